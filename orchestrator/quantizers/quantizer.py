"""What a member of QUANTIZERS is."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.core.quantization import CalibrationMethod, LinearFormat
from orchestrator.core.spec import ToleranceSpec


@dataclass(frozen=True, slots=True)
class Quantizer:
    """An algorithm, fully specified."""

    linear: LinearFormat
    calibration: CalibrationMethod | None
    """None: data-free."""
    tolerance: ToleranceSpec
    """Of verification against the unquantized model: about twice what a 135M-parameter model shows, which is far more
    sensitive than larger ones."""
    exclude: tuple[str, ...] = ()
    """Linears that keep the model's precision by default."""
