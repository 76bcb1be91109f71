"""Where a step computes: as asked, and refused where that cannot be."""

from __future__ import annotations

import onnxruntime
import pytest
import torch

from orchestrator.base.errors import ToolError
from orchestrator.planning.steps import Task
from orchestrator.work.device import device_of, verification_device
from tests.support.plans import task


def task_on(device: str) -> Task:
    made = task("verify/stage0")
    return made.model_copy(update={"step": made.step.model_copy(update={"locations": {"device": device}})})


@pytest.mark.parametrize(
    ("asked", "seen", "device"),
    [("auto", True, "cuda"), ("auto", False, "cpu"), ("cpu", True, "cpu"), ("cuda", True, "cuda")],
)
def test_device_of_a_step_is_the_one_asked_for_or_what_there_is(
    monkeypatch: pytest.MonkeyPatch, asked: str, seen: bool, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen)
    assert device_of(task_on(asked), "verification.device") == device


def test_device_cuda_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ToolError, match=r"verification\.device is cuda, but torch sees no GPU here"):
        device_of(task_on("cuda"), "verification.device")


def test_verification_device_needs_an_onnx_runtime_with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert verification_device(task_on("auto")) == "cpu"
    with pytest.raises(ToolError, match="this ONNX Runtime has no CUDA"):
        verification_device(task_on("cuda"))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    assert verification_device(task_on("auto")) == "cuda"
