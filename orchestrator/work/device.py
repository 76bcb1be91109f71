"""Device of a step's arithmetic: the CPU, or a GPU that the process sees."""

from __future__ import annotations

from orchestrator.base.errors import ToolError
from orchestrator.planning.steps import Task


def device_of(task: Task, setting: str) -> str:
    """Return cpu or cuda. `setting` names the field of the spec. Raises ToolError when a GPU is set and torch sees none."""
    asked = task.step.locations.get("device", "auto")
    if asked == "cpu":
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if asked == "cuda":
        raise ToolError(f"{setting} is cuda, but torch sees no GPU here", f"Set {setting}: auto.")
    return "cpu"


def verification_device(task: Task) -> str:
    """Return cpu or cuda for ONNX Runtime. Raises ToolError when a GPU is set and ONNX Runtime was built without CUDA."""
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        return device_of(task, "verification.device")
    if task.step.locations.get("device") == "cuda":
        raise ToolError(
            "verification.device is cuda, but this ONNX Runtime has no CUDA", "Install onnxruntime-gpu in place of onnxruntime."
        )
    return "cpu"
