"""Resolution of the spec's quantization for a plan: formats, methods, digests of data and of given scales."""

from __future__ import annotations

import fnmatch
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.base.digest import digest_file
from orchestrator.base.errors import QuantizationError, SourceMissingError, SpecError, TopologyError
from orchestrator.model.checkpoint import CheckpointIndex
from orchestrator.model.config import ModelConfig
from orchestrator.model.config_trtllm import from_trtllm
from orchestrator.model.quantization import MIXED_PRECISION, LinearFormat, ModelQuantization, global_name, linear_of
from orchestrator.model.quantized_targets import module_of
from orchestrator.model.stored_targets import stored_format
from orchestrator.model.targets import Target
from orchestrator.model.topology import Topology
from orchestrator.model.weight_map import WeightMap
from orchestrator.planning.calibration import MAX, Quantization, layer_of
from orchestrator.quantizers.calibration_data import CalibrationData
from orchestrator.quantizers.resolve import calibration_method, from_checkpoint, model_quantization, quantizer_named
from orchestrator.spec.build import DATA_SUFFIXES, CalibrationSpec, QuantizationSpec

SCALES = "scales.safetensors"


def resolve(spec: QuantizationSpec, num_layers: int) -> Quantization:
    """Resolve the quantization of a model. Raises QuantizationError, SourceMissingError for missing data, TopologyError."""
    model = model_quantization(spec, num_layers)
    algorithms = {fmt.algorithm for fmt in model.formats()}
    calibrated = {name for name in algorithms if quantizer_named(name).calibration is not None}
    methods = {name: calibration_method(spec, name) for name in calibrated}
    calibration = spec.calibration
    if calibration.num_stages is not None and calibration.num_stages > num_layers:
        raise TopologyError(
            f"quantization.calibration.num_stages is {calibration.num_stages}, but the model has {num_layers} layers"
        )
    needed = bool(methods or spec.kv_cache)
    data, dataset = resolve_data(calibration) if needed and spec.scales is None else (_no_data(calibration), "")
    return Quantization(
        model=model,
        methods=methods if methods else ({"kv_cache": MAX} if spec.kv_cache else {}),
        data=data,
        dataset=dataset,
        device=calibration.device,
        layerwise=calibration.layerwise,
        num_stages=calibration.num_stages,
        scales=spec.scales if needed else None,
        scales_sha256=_scales_sha256(Path(spec.scales)) if spec.scales is not None and needed else None,
    )


def resolve_stored(spec: QuantizationSpec, index: CheckpointIndex, dense: WeightMap, num_layers: int) -> Quantization:
    """Resolve `algorithm: source`: every linear keeps the source's format if engines have it, else the model's dtype.

    `dense`: the map of the unquantized weights. Raises QuantizationError for a source without such a linear.
    """
    targets = [target for group in dense.groups for target in group.targets]
    found = (_stored_layer(target, index, spec.exclude or ()) for target in targets if linear_of(target.name))
    layers: dict[str, LinearFormat | None] = dict(found)
    kept = {fmt for fmt in layers.values() if fmt is not None}
    if not kept:
        raise QuantizationError(
            "quantization.algorithm is source, but no linear can keep the source's format: it has "
            f"{index.algorithm or 'no quantized weights'}",
            "Leave quantization out: weights are dequantized. Kept are FP8 per tensor and per row, MXFP8, NVFP4, MXFP4 (as NVFP4), "
            "and INT4 in groups without zero points.",
        )
    if len(kept) == 1 and None not in layers.values():
        (fmt,) = kept
        model = ModelQuantization(algorithm=fmt.algorithm, linear=fmt, kv_cache=spec.kv_cache, as_stored=True)
    else:
        model = ModelQuantization(algorithm=MIXED_PRECISION, layers=layers, kv_cache=spec.kv_cache, as_stored=True)
    if spec.kv_cache is None:
        return Quantization(model=model, methods={}, data=_no_data(spec.calibration))
    return replace(resolve(spec.model_copy(update={"algorithm": None}), num_layers), model=model)


def _stored_layer(target: Target, index: CheckpointIndex, exclude: tuple[str, ...]) -> tuple[str, LinearFormat | None]:
    """Return a linear's name, with its number in the whole model, and the format that it keeps."""
    linear = target.name.removesuffix(".weight")
    name = global_name(linear, int(linear.split(".")[2]), layer_of(module_of(target.reads[0])))
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude):
        return name, None
    return name, stored_format(target, index.activation_limit)


def read_checkpoint(folder: Path) -> tuple[ModelConfig, Topology, ModelQuantization | None]:
    """Return model, topology and formats (None: not quantized) of a TensorRT-LLM checkpoint folder.

    Raises SpecError when it is not such a folder, QuantizationError.
    """
    mixture = folder / "quant_cfg.json"
    try:
        plain: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
        quant_cfg = json.loads(mixture.read_bytes()) if mixture.is_file() else None
        return *from_trtllm(plain), from_checkpoint(plain.get("quantization") or {}, quant_cfg)
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise SpecError(f"{folder} is not a TensorRT-LLM checkpoint: {error}", "Make one with `orchestrator convert`.") from None


def _no_data(spec: CalibrationSpec) -> CalibrationData:
    return CalibrationData(
        dataset="", digest=None, num_samples=spec.num_samples, max_length=spec.max_length,
        batch_size=spec.batch_size, seed=spec.seed,
    )  # fmt: skip


def resolve_data(spec: CalibrationSpec) -> tuple[CalibrationData, str]:
    """Return the identity of the data, and the path of a local file or "". Raises SourceMissingError, QuantizationError."""
    from orchestrator.quantizers.calibration_data import DEFAULT, check_data, default_digest

    path = Path(spec.dataset)
    is_file = path.suffix in DATA_SUFFIXES
    if is_file and not path.is_file():
        raise SourceMissingError(f"there is no calibration file {path}", f"Files end in {', '.join(DATA_SUFFIXES)}.")
    if is_file:
        check_data(path)
        return _no_data(spec).model_copy(update={"dataset": path.name, "digest": digest_file(path)}), str(path.resolve())
    digest = default_digest() if spec.dataset == DEFAULT else None
    return _no_data(spec).model_copy(update={"dataset": spec.dataset, "digest": digest}), ""


def _scales_sha256(folder: Path) -> str:
    path = folder / SCALES
    if not path.is_file():
        raise QuantizationError(f"{folder} holds no calibration artifact", "Make one with `orchestrator quantize --output`.")
    return digest_file(path)
