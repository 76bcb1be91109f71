"""Tensors of a quantized source: which stored tensors make up a weight, checked by dtype and shape.

The stored tensors decide what is quantized; the source's own description must agree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from orchestrator.base.dtypes import num_bytes
from orchestrator.base.errors import SourceCorruptError
from orchestrator.checkpoints.quantized.formats import FORMATS
from orchestrator.checkpoints.quantized.recipes import Recipe
from orchestrator.checkpoints.quantized.stored_weight import COMPLETE, FLOATS, StoredWeight, stored_part
from orchestrator.model.checkpoint import TensorInfo

_NO_CODES = ("I64", "BOOL")
"""Dtypes of buffers, such as position_ids, that are no quantized weights."""
_ACTIVATIONS = "calibrated scale of activations, which are not quantized here"
_CACHE = "calibrated scale of the KV cache, which is not quantized here"

_SUFFIXES: dict[str, dict[str, str]] = {
    "fp8": {
        ".weight": "codes", ".weight_scale_inv": "scale", ".weight_scale": "scale", ".input_scale": "input_scale",
        ".activation_scale": "input_scale",
    },
    "fbgemm_fp8": {".weight": "codes", ".weight_scale": "scale", ".input_scale_ub": "bound"},
    "mxfp4": {"_blocks": "codes", "_scales": "scale"},
    "awq": {".qweight": "codes", ".scales": "scale", ".qzeros": "zero"},
    "gptq": {".qweight": "codes", ".scales": "scale", ".qzeros": "zero", ".g_idx": "groups"},
    "compressed-tensors": {
        ".weight": "codes", ".weight_packed": "codes", ".weight_scale": "scale", ".weight_zero_point": "zero",
        ".weight_global_scale": "second", ".weight_shape": "shape", ".weight_g_idx": "groups", ".input_scale": "input_scale",
        ".input_global_scale": "input_scale", ".input_zero_point": "bound",
    },
    "modelopt": {
        ".weight": "codes", ".weight_scale": "scale", ".weight_scale_2": "second", ".pre_quant_scale": "columns",
        ".input_scale": "input_scale",
    },
}  # fmt: skip
"""quant_method -> ends of tensor names -> role within a weight."""
_EVERYWHERE = {".k_scale": _CACHE, ".v_scale": _CACHE, ".q_scale": _CACHE, ".output_scale": _ACTIVATIONS}
_UNREAD = {
    "input_scale": _ACTIVATIONS,
    "bound": _ACTIVATIONS,
    "shape": "shape of a packed weight, which follows from its scales",
}
"""Role -> reason why it is not read."""


@dataclass(slots=True)
class Weights:
    """Tensors of a source with its quantized weights joined."""

    tensors: dict[str, TensorInfo]
    left_out: dict[str, str]
    """Stored tensor -> reason why it is not read."""


def encoded(tensors: Mapping[str, TensorInfo], recipe: Recipe, url: str, dtype: str) -> Weights:
    """Join codes and scales to weights of `dtype` (safetensors' name), named as in the unquantized model.

    Raises SourceCorruptError for a scale that is missing, of another shape than the weight needs, or of no weight.
    """
    suffixes = sorted(_SUFFIXES[recipe.method].items(), key=lambda item: -len(item[0]))
    places = {name: _split(name, suffixes) for name in tensors}
    modules: dict[str, dict[str, TensorInfo]] = {}
    for name, (module, role) in places.items():
        parts = modules.setdefault(module, {})
        if role in parts:
            raise SourceCorruptError(f"{url}: {name} and {parts[role].name} are both the {role} of {module}", COMPLETE)
        parts[role] = tensors[name]
    weights = Weights({}, {})
    for name, (module, role) in places.items():
        parts = modules[module]
        if role == "codes":
            _add(weights, StoredWeight(name, module, parts, recipe, url), dtype)
        elif role in (_CACHE, _ACTIVATIONS):
            weights.left_out[name] = role
        elif role in _UNREAD:
            weights.left_out[name] = _UNREAD[role]
        elif "codes" not in parts or parts["codes"].dtype in FLOATS:
            raise SourceCorruptError(f"{url}: {name} belongs to no quantized weight: {module} has none", COMPLETE)
        elif role == "groups" and not recipe.activation_order:
            weights.left_out[name] = "groups are consecutive (desc_act is off)"
    return weights


def _split(name: str, suffixes: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """Return a stored tensor's module and role. One that ends as no part of a weight is codes, of a module of its own name."""
    for end, role in suffixes:
        if name.endswith(end):
            return name.removesuffix(end), role
    for end, reason in _EVERYWHERE.items():
        if name.endswith(end):
            return name, reason
    return name, "codes"


def _add(weights: Weights, builder: StoredWeight, dtype: str) -> None:
    """Add a plain tensor, or the weight whose codes it holds."""
    name, module, parts, method = builder.name, builder.module, builder.parts, builder.recipe.method
    if builder.codes.dtype in FLOATS or (module == name and builder.codes.dtype in _NO_CODES):
        logical, tensor = name, builder.codes
    else:
        if module == name or "scale" not in parts:
            builder.fail("it has no scale")
        if builder.recipe.ignores(module):
            builder.fail("quantization_config lists it among the modules that are not quantized")
        shape, encoding = FORMATS[method](builder)
        if "input_scale" in parts:
            encoding = replace(encoding, input_scale=stored_part(parts["input_scale"]))
        logical, codes = module if method == "mxfp4" else f"{module}.weight", encoding.codes
        size = num_bytes(dtype, math.prod(shape))
        tensor = TensorInfo(logical, dtype, shape, codes.file, codes.offset, size, None, encoding)
    if logical in weights.tensors:
        builder.fail(f"there is another {logical} too")
    weights.tensors[logical] = tensor
