"""The quantizers: one algorithm per file, and the table of them. There is none yet: builds keep the source's precision."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from orchestrator.core.options import CalibrateOptions


class Quantizer(Protocol):
    """What a member of QUANTIZERS offers: calibration on rank 0 of a stage."""

    def calibrate(self, options: CalibrateOptions, source: Path, output: Path) -> None:
        """Write the stage's scales to `output`, a safetensors file."""
        ...


QUANTIZERS: dict[str, str] = {}
"""TensorRT-LLM's name of the algorithm -> module with a `QUANTIZER`."""
