"""The calibration artifact as convert tasks read it: float32 quantities by source module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from orchestrator.base.digest import digest_file
from orchestrator.base.errors import DigestError, QuantizationError
from orchestrator.model.quantization import WeightFormat
from orchestrator.model.targets import ArtifactScale
from orchestrator.planning.options import ConvertOptions
from orchestrator.planning.steps import Kind, Task
from orchestrator.work.context import Context

SCALES = "scales.safetensors"
"""Output of calibrate steps, with tensors {module}.{quantity}; see `work/calibrate/step.py`."""
Floats = npt.NDArray[np.float32]


class Scales:
    """Quantities of one or more calibrations. Later calibrations take precedence."""

    def __init__(self, values: Mapping[str, Floats]) -> None:
        self._values = values

    @staticmethod
    def read(paths: Iterable[Path]) -> Scales:
        from safetensors.numpy import load_file

        values: dict[str, Floats] = {}
        for path in paths:
            values.update(load_file(path))
        return Scales(values)

    def vector(self, module: str, quantity: str) -> Floats:
        """Return a quantity of a module. Raises QuantizationError when the artifact lacks it."""
        name = f"{module}.{quantity}"
        if name not in self._values:
            raise QuantizationError(
                f"the calibration artifact has no {name}", "It belongs to another model or algorithm: calibrate again."
            )
        return self._values[name]

    def largest(self, modules: Iterable[str], quantities: Iterable[str]) -> float:
        """Return the largest of some scalar quantities over some modules."""
        wanted = list(quantities)
        return max(float(self.vector(module, quantity)) for module in modules for quantity in wanted)

    def artifact_scale(self, scale: ArtifactScale, rank: int) -> Floats:
        """Return the scale in a rank's file: amax / divisor for each entry, or the rank's part of a pre_quant_scale."""
        entries = scale.entries[rank]
        if scale.quantities == ("pre_quant_scale",):
            vector = self.vector(entries[0][0], "pre_quant_scale")
            return vector[scale.spans[rank].begin : scale.spans[rank].end] if scale.spans else vector
        amax = np.array([self.largest(modules, scale.quantities) for modules in entries], np.float32)
        # Like Model Optimizer's export: an amax of zero gives a scale of one.
        divisor = np.float32(scale.divisor)
        amax[amax == 0] = divisor
        return (amax / divisor).astype(np.float32)


def scales_for(task: Task, options: ConvertOptions, context: Context) -> Scales:
    """Read the artifacts of the task's calibrate steps, or the user's own. Raises DigestError, QuantizationError."""
    if options.scales_sha256 is not None:
        path = Path(task.step.locations["scales"]) / SCALES
        if digest_file(path) != options.scales_sha256:
            raise DigestError(f"{path} was changed during the build", "Run the build again.")
        return Scales.read([path])
    outcomes = [task.inputs[need] for need in task.step.needs]
    return Scales.read(context.fetch(outcome.output(SCALES)) for outcome in outcomes if outcome.kind is Kind.CALIBRATE)


def has_tensor_scale(fmt: WeightFormat) -> bool:
    """Whether the format has a scale per tensor, derived from the calibrated weight_amax."""
    return fmt in (WeightFormat.FP8_TENSOR, WeightFormat.NVFP4, WeightFormat.INT4_BLOCK_FP8)
