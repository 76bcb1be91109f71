"""Calibrations of a plan: for each method, a chain of steps through the model's layers, independent of the ranks.

The calibration `max` collects amax, which several formats need. Its options do not name the formats, so builds of different
algorithms share the step.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from orchestrator.model.checkpoint import CheckpointIndex, SourceFile
from orchestrator.model.config import ModelConfig
from orchestrator.model.quantization import CalibrationMethod, LinearFormat, ModelQuantization, linear_of
from orchestrator.model.quantized_targets import module_of
from orchestrator.model.targets import Target
from orchestrator.model.weight_map import WeightMap
from orchestrator.planning.options import CalibrateOptions
from orchestrator.quantizers.calibration_data import CalibrationData

MAX = CalibrationMethod(method="max")
_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Quantization:
    """The spec's quantization, resolved for a model."""

    model: ModelQuantization
    methods: Mapping[str, CalibrationMethod]
    """Calibrated algorithm -> method."""
    data: CalibrationData
    dataset: str = ""
    """Path of a local file with texts. No part of the build's identity."""
    device: str = "auto"
    """Device of the calibration. No part of the build's identity."""
    layerwise: bool = False
    num_stages: int | None = None
    """Number of parts that are calibrated one after the other; None: the pipeline stages."""
    scales: str | None = None
    """Folder of the user's calibration artifact; None: calibrate. No part of the build's identity."""
    scales_sha256: str | None = None

    def methods_used(self) -> tuple[CalibrationMethod, ...]:
        """Return the distinct methods, `max` first, because quantities of other methods take precedence."""
        if self.scales is not None:
            return ()
        used = {self.methods[fmt.algorithm] for fmt in self.model.formats() if fmt.algorithm in self.methods}
        if self.model.kv_cache and not used:
            used = {MAX}
        return tuple(sorted(used, key=lambda method: (method != MAX, method.model_dump_json())))


def calibrations(
    quantization: Quantization,
    index: CheckpointIndex,
    extra_files: tuple[SourceFile, ...],
    config: ModelConfig,
    weights: WeightMap,
    parts: Iterable[range],
) -> Iterator[list[CalibrateOptions]]:
    """Yield the options of the steps of each method. Each step but the first reads the output of the step before."""
    linears = [target for group in weights.groups for target in group.targets if linear_of(target.name)]
    modules = tuple(dict.fromkeys(module_of(read) for target in linears for read in target.reads))
    targets = [target for target in linears if target.quantized is not None]
    ranges = list(parts)
    for method in quantization.methods_used():
        chosen = [] if method == MAX else [target for target in targets if _method(quantization, target) == method]
        formats = {module: fmt for target in chosen for module, fmt in _modules(target)}
        shared = [tuple(dict.fromkeys(module for module, _ in _modules(target))) for target in chosen]
        yield [
            CalibrateOptions(
                format=index.format,
                files=index.files + extra_files,
                num_weight_files=len(index.files),
                config=config,
                first_layer=part.start,
                num_layers=len(part),
                modules=tuple(module for module in modules if layer_of(module) in part),
                method=method,
                formats={module: fmt for module, fmt in formats.items() if layer_of(module) in part},
                resmooth=tuple(group for group in shared if len(group) > 1 and layer_of(group[0]) in part),
                data=quantization.data,
                layerwise=quantization.layerwise,
            )
            for part in ranges
        ]


def _method(quantization: Quantization, target: Target) -> CalibrationMethod | None:
    assert target.quantized is not None
    return quantization.methods.get(target.quantized.format.algorithm)


def _modules(target: Target) -> Iterator[tuple[str, LinearFormat]]:
    assert target.quantized is not None
    return ((module, target.quantized.format) for module in target.quantized.modules)


def layer_of(module: str) -> int:
    """Return the layer of a source module: 3 for model.layers.3.mlp.up_proj."""
    found = _LAYER.search(module)
    assert found is not None, module
    return int(found.group(1))


def in_layers(tensor: str, layers: range) -> bool:
    """Whether a source tensor belongs to one of `layers`."""
    found = _LAYER.search(tensor)
    return found is not None and int(found.group(1)) in layers
