"""Model Optimizer 0.47: the only file that writes its configuration and reads its quantizers.

Calibration returns the artifact, float32 tensors by source module:

    {linear}.input_amax, .weight_amax                  []    raw, per linear; weight_amax for per-tensor scales only
    {linear}.smooth                                    [in]  vector by which the weight was multiplied
    {linear}.own_pre_quant_scale, .pre_quant_scale     [in]  before and after linears with one input agreed on a vector
    {attention}.k_amax, .v_amax                        []
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.base.errors import QuantizationError
from orchestrator.model.quantization import (
    MXFP8_BLOCK,
    NVFP4_BLOCK,
    ActivationFormat,
    CalibrationMethod,
    LinearFormat,
    WeightFormat,
)

Floats = npt.NDArray[np.float32]
_FP8 = (4, 3)
_WATCHING = "orchestrator_watching"
"""Name of a quantizer backend that collects an amax and never rounds."""
_KV_CACHE = {"quantizer_name": "*[kv]_bmm_quantizer", "cfg": {"num_bits": _FP8, "axis": None, "backend": _WATCHING}}
"""Quantizers of keys and values. An amax does not depend on the format; every modelopt attention accepts FP8. They never round,
because rounding would change the inputs of AWQ's later passes, and so its choices."""


def calibrate(
    model: Any,
    forward: Callable[[Any], None],
    linears: Mapping[str, str],
    method: CalibrationMethod,
    formats: Mapping[str, LinearFormat],
    resmooth: Sequence[Sequence[str]],
    layerwise: Path | None = None,
) -> dict[str, Floats]:
    """Calibrate `model` in place and return the artifact.

    `linears`: module path in the model -> source module. `formats` and `resmooth` are keyed by source module; `max` needs neither.
    `layerwise`: calibrate one decoder layer at a time, store each in this folder, and skip layers that it holds already.
    Raises QuantizationError when a linear is missing.
    """
    import modelopt.torch.quantization as mtq

    paths = {source: path for path, source in linears.items()}
    wanted = linears.values() if method.method == "max" else formats
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for source in wanted:
        entries.extend(_entries(paths[source], formats.get(source)))
    entries.append(_KV_CACHE)
    config = {"quant_cfg": entries, "algorithm": _algorithm(method, layerwise)}
    with _watching(), _recorded_smoothing(model, layerwise / "smoothing" if layerwise else None) as smooth:
        mtq.quantize(model, config, forward)
    return _artifact(model, linears, smooth, [[paths[source] for source in group] for group in resmooth])


def _algorithm(method: CalibrationMethod, layerwise: Path | None) -> dict[str, Any]:
    options = method.model_dump(exclude_none=True)
    if layerwise is None:
        return options
    # `max` does not change weights, so the folder holds only amax values.
    kept = {"checkpoint_dir": str(layerwise), "calib_mutates_weights": method.method != "max"}
    return {**options, "layerwise": {"enable": True, **kept}}


def _entries(path: str, fmt: LinearFormat | None) -> list[dict[str, Any]]:
    """Return the quantizers of one linear. `fmt` None: quantizers that collect both amax values."""
    weight = _weight(fmt) if fmt else {"num_bits": _FP8, "axis": None}
    found: list[dict[str, Any]] = [{"quantizer_name": f"{path}.weight_quantizer", "cfg": weight}]
    activation = _activation(fmt.activation) if fmt else {"num_bits": _FP8, "axis": None}
    if activation is not None:
        found.append({"quantizer_name": f"{path}.input_quantizer", "cfg": activation})
    return found


def _activation(fmt: ActivationFormat) -> dict[str, Any] | None:
    match fmt:
        case ActivationFormat.NONE:
            return None
        case ActivationFormat.INT8_TENSOR:
            return {"num_bits": 8, "axis": None}
        case ActivationFormat.FP8_TENSOR:
            return {"num_bits": _FP8, "axis": None}
        case ActivationFormat.FP8_TOKEN:
            return {"num_bits": _FP8, "type": "dynamic", "block_sizes": {-1: None}}
        case ActivationFormat.NVFP4:
            return {"num_bits": (2, 1), "block_sizes": {-1: NVFP4_BLOCK, "type": "dynamic", "scale_bits": _FP8}}
        case ActivationFormat.MXFP8:
            return {"num_bits": _FP8, "block_sizes": {-1: MXFP8_BLOCK, "type": "dynamic", "scale_bits": (8, 0)}}


def search_config(fmt: LinearFormat) -> dict[str, Any]:
    """Return a candidate of modelopt's search: the quantizers of any linear, and their calibration algorithm."""
    entries = _entries("*", fmt)
    named = [{**entry, "quantizer_name": entry["quantizer_name"].replace("*.", "*")} for entry in entries]
    algorithm: Any = "awq_lite" if fmt.pre_quant_scale and fmt.block_size else "smoothquant" if fmt.pre_quant_scale else "max"
    return {"quant_cfg": [{"quantizer_name": "*", "enable": False}, *named], "algorithm": algorithm}


def _weight(fmt: LinearFormat) -> Any:
    int4 = {"num_bits": 4, "block_sizes": {-1: fmt.block_size, "type": "static"}}
    match fmt.weight:
        case WeightFormat.INT8_CHANNEL:
            return {"num_bits": 8, "axis": 0}
        case WeightFormat.INT4_BLOCK:
            return int4
        case WeightFormat.INT4_BLOCK_FP8:
            return [int4, {"num_bits": _FP8, "axis": None}]
        case WeightFormat.FP8_TENSOR:
            return {"num_bits": _FP8, "axis": None}
        case WeightFormat.FP8_CHANNEL:
            return {"num_bits": _FP8, "axis": 0}
        case WeightFormat.NVFP4:
            return {"num_bits": (2, 1), "block_sizes": {-1: NVFP4_BLOCK, "type": "dynamic", "scale_bits": _FP8}}
        case WeightFormat.MXFP8:
            return {"num_bits": _FP8, "block_sizes": {-1: MXFP8_BLOCK, "type": "dynamic", "scale_bits": (8, 0)}}


@contextmanager
def _watching() -> Iterator[None]:
    from modelopt.torch.quantization.nn.modules import tensor_quantizer

    tensor_quantizer.register_quant_backend(_WATCHING, lambda inputs, quantizer: inputs)
    try:
        yield
    finally:
        tensor_quantizer.unregister_quant_backend(_WATCHING)


@contextmanager
def _recorded_smoothing(model: Any, folder: Path | None) -> Iterator[dict[str, Floats]]:
    """Record the float32 vector by which modelopt multiplies each weight, by the linear's path, in memory and in `folder`.

    Smoothing other copies of the weight to the same bits needs the exact vector, but modelopt's quantizers keep only the inverse,
    rounded to the weight's dtype. Vectors that `folder` already holds belong to layers that are not calibrated again.
    """
    from modelopt.torch.quantization import model_calib

    original = model_calib._apply_weight_pre_quant_scale
    paths = {id(module): path for path, module in model.named_modules()}
    recorded: dict[str, Floats] = {}
    if folder is not None:
        folder.mkdir(exist_ok=True)
        recorded |= {file.stem: np.load(file) for file in folder.glob("*.npy")}

    def record(linear: Any, pre_quant_scale: Any) -> None:
        path = paths[id(linear)]
        recorded[path] = _vector(pre_quant_scale)
        if folder is not None:
            np.save(folder / f"{path}.npy", recorded[path])
        original(linear, pre_quant_scale)

    model_calib._apply_weight_pre_quant_scale = record
    try:
        yield recorded
    finally:
        model_calib._apply_weight_pre_quant_scale = original


def _artifact(
    model: Any, linears: Mapping[str, str], smooth: Mapping[str, Floats], groups: Sequence[Sequence[str]]
) -> dict[str, Floats]:
    modules = dict(model.named_modules())
    found: dict[str, Floats] = {}
    own = {path: _vector(modules[path].input_quantizer.pre_quant_scale) for path in linears if _is_smoothed(modules[path])}
    for group in groups:
        _agree([modules[path] for path in group])
    for path, source in linears.items():
        module = modules[path]
        found |= _amax(f"{source}.input_amax", module.input_quantizer)
        weight = module.weight_quantizer
        found |= _amax(f"{source}.weight_amax", weight[-1] if hasattr(weight, "__len__") else weight)
        if path in own:
            vector = own[path]
            found[f"{source}.smooth"] = _smoothing(path, smooth, vector)
            found[f"{source}.own_pre_quant_scale"] = vector
            found[f"{source}.pre_quant_scale"] = _vector(module.input_quantizer.pre_quant_scale)
    for path, module in modules.items():
        if hasattr(module, "k_bmm_quantizer"):
            found |= _amax(f"{path}.k_amax", module.k_bmm_quantizer) | _amax(f"{path}.v_amax", module.v_bmm_quantizer)
    return found


def _smoothing(path: str, recorded: Mapping[str, Floats], pre_quant_scale: Floats) -> Floats:
    """Return the recorded vector, or ones for a linear that AWQ did not smooth. Raises QuantizationError if recording failed."""
    if path in recorded:
        return recorded[path]
    if np.any(pre_quant_scale != 1):
        raise QuantizationError(
            f"Model Optimizer smoothed {path} unnoticed", "Use the version of nvidia-modelopt in constraints.txt."
        )
    return np.ones_like(pre_quant_scale)


def _is_smoothed(module: Any) -> bool:
    return getattr(module.input_quantizer, "_pre_quant_scale", None) is not None


def _agree(modules: list[Any]) -> None:
    """Give linears with the same input one pre_quant_scale, and smooth their weights again."""
    from modelopt.torch.export.quant_utils import preprocess_linear_fusion

    preprocess_linear_fusion(modules, resmooth_only=True)


def _amax(name: str, quantizer: Any) -> dict[str, Floats]:
    """Return the quantizer's scalar amax under `name`; empty: it has none."""
    amax = getattr(quantizer, "amax", None)
    if amax is None or amax.numel() != 1:
        return {}
    return {name: amax.detach().float().reshape(()).cpu().numpy().copy()}


def _vector(values: Any) -> Floats:
    copied: Floats = values.detach().float().reshape(-1).cpu().numpy().copy()
    return copied
