"""Calibrate a stage: only rank 0 of it ever calls a quantizer; its product is a small file of scales."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from orchestrator.core.errors import QuantizationError
from orchestrator.core.options import CalibrateOptions
from orchestrator.core.step import Task
from orchestrator.quantizers import QUANTIZERS, Quantizer
from orchestrator.work.context import Context

OUTPUT = "scales.safetensors"


def calibrate(task: Task, context: Context) -> dict[str, Any]:
    """Write the scales of the stage. Raises QuantizationError for an algorithm that the table does not name."""
    options = CalibrateOptions.model_validate(task.step.options)
    name = options.quantization.algorithm
    if name not in QUANTIZERS:
        raise QuantizationError(f"this worker has no quantizer called {name!r}")
    quantizer: Quantizer = importlib.import_module(QUANTIZERS[name]).QUANTIZER
    path = context.scratch / OUTPUT
    quantizer.calibrate(options, Path(task.step.places["source"]), path)
    data = path.read_bytes()
    with context.output(OUTPUT, len(data)) as writer:
        writer.write(data)
    return {"algorithm": name}
