"""Tensors of a quantized source: which stored tensors make up a weight, checked by dtype and shape.

The stored tensors decide what is quantized; the source's own description must agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn

from orchestrator.base.dtypes import MODEL_DTYPE_NAMES, num_bytes
from orchestrator.base.errors import SourceCorruptError
from orchestrator.checkpoints.quantized.recipes import Recipe
from orchestrator.model.checkpoint import Encoding, Packing, Stored, TensorInfo

_COMPLETE = "Download the checkpoint again; if it is complete, its quantization is one that is not read."
_FLOATS = (*MODEL_DTYPE_NAMES, "F64")
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
            raise SourceCorruptError(f"{url}: {name} and {parts[role].name} are both the {role} of {module}", _COMPLETE)
        parts[role] = tensors[name]
    weights = Weights({}, {})
    for name, (module, role) in places.items():
        parts = modules[module]
        if role == "codes":
            _add(weights, _Builder(name, module, parts, recipe, url), dtype)
        elif role in (_CACHE, _ACTIVATIONS):
            weights.left_out[name] = role
        elif role in _UNREAD:
            weights.left_out[name] = _UNREAD[role]
        elif "codes" not in parts or parts["codes"].dtype in _FLOATS:
            raise SourceCorruptError(f"{url}: {name} belongs to no quantized weight: {module} has none", _COMPLETE)
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


def _add(weights: Weights, builder: _Builder, dtype: str) -> None:
    """Add a plain tensor, or the weight whose codes it holds."""
    name, module, parts, method = builder.name, builder.module, builder.parts, builder.recipe.method
    if builder.codes.dtype in _FLOATS or (module == name and builder.codes.dtype in _NO_CODES):
        logical, tensor = name, builder.codes
    else:
        if module == name or "scale" not in parts:
            builder.fail("it has no scale")
        if builder.recipe.ignores(module):
            builder.fail("quantization_config lists it among the modules that are not quantized")
        shape, encoding = _BUILDERS[method](builder)
        if "input_scale" in parts:
            encoding = replace(encoding, input_scale=_stored(parts["input_scale"]))
        logical, codes = module if method == "mxfp4" else f"{module}.weight", encoding.codes
        size = num_bytes(dtype, math.prod(shape))
        tensor = TensorInfo(logical, dtype, shape, codes.file, codes.offset, size, None, encoding)
    if logical in weights.tensors:
        builder.fail(f"there is another {logical} too")
    weights.tensors[logical] = tensor


def _stored(tensor: TensorInfo) -> Stored:
    return Stored(tensor.dtype, tensor.shape, tensor.file, tensor.offset)


class _Builder:
    """The stored tensors of one weight, and checks of them."""

    def __init__(self, name: str, module: str, parts: Mapping[str, TensorInfo], recipe: Recipe, url: str) -> None:
        self.name, self.module, self.parts, self.recipe, self.url = name, module, parts, recipe, url
        self.codes = parts["codes"]

    def fail(self, reason: str) -> NoReturn:
        """Raise SourceCorruptError for this weight."""
        shown = f"{self.codes.dtype} {list(self.codes.shape)}"
        raise SourceCorruptError(f"{self.url}: {self.name} is {shown}, quantized as {self.recipe.method}, but {reason}", _COMPLETE)

    def is_of(self, *dtypes: str) -> None:
        if self.codes.dtype not in dtypes:
            self.fail(f"weights of this quantization are {' or '.join(dtypes)}")

    def matrix(self) -> tuple[int, int]:
        """Return the shape of two-dimensional codes."""
        if len(self.codes.shape) != 2 or not all(self.codes.shape):
            self.fail("only matrices are read")
        return self.codes.shape[0], self.codes.shape[1]

    def part(self, role: str, *shapes: tuple[int, ...], dtypes: tuple[str, ...] = _FLOATS) -> Stored:
        """Return a stored tensor that has one of the shapes and dtypes."""
        found = self.parts.get(role)
        if found is None:
            self.fail(f"its {role} is missing")
        if found.dtype not in dtypes:
            self.fail(f"{found.name} is {found.dtype}, expected is {' or '.join(dtypes)}")
        if shapes and found.shape not in shapes:
            self.fail(f"{found.name} is {list(found.shape)}, expected is {' or '.join(str(list(shape)) for shape in shapes)}")
        return _stored(found)

    def blocks(self, size: tuple[int, int], block: tuple[int, int], dtypes: tuple[str, ...] = _FLOATS) -> Stored:
        """Return the scales of a matrix of `size`, one per block; the last blocks may be smaller."""
        grid = -(-size[0] // block[0]), -(-size[1] // block[1])
        return self.part("scale", grid, (grid[0], 1, grid[1], 1), dtypes=dtypes)

    def by_shape(self, size: tuple[int, int]) -> tuple[Stored, tuple[int, int]]:
        """Return scales per tensor or per row, and their block."""
        out, inner = size
        found = self.part("scale", (), (1,), (1, 1), (out,), (out, 1))
        return found, (1, inner) if found.shape and found.shape[0] == out else (out, inner)

    def group(self, inner: int) -> int:
        """Return the input features per scale. They must divide the row."""
        size = self.recipe.args_of(self.module).group_size
        if size is None:
            shape = self.parts["scale"].shape
            size = inner // shape[-1] if shape and shape[-1] and inner % shape[-1] == 0 else 0
        size = inner if size == -1 else size
        if size <= 0 or inner % size:
            self.fail(f"{inner} input features are not whole groups of {size}")
        return size


_E8M0 = ("U8", "F8_E8M0")


def _fp8(weight: _Builder) -> tuple[tuple[int, ...], Encoding]:
    weight.is_of("F8_E4M3")
    size, block = weight.matrix(), weight.recipe.args.block
    if block is not None:
        scale = weight.blocks(size, block, (*_FLOATS, "F8_E8M0"))
    else:
        scale, block = weight.by_shape(size)
    return size, Encoding(Packing.BYTES, "E4M3", _stored(weight.codes), scale, block)


def _fbgemm(weight: _Builder) -> tuple[tuple[int, ...], Encoding]:
    weight.is_of("F8_E4M3")
    out, inner = weight.matrix()
    scale = weight.part("scale", (out, 1), (out,))
    return (out, inner), Encoding(Packing.BYTES, "E4M3", _stored(weight.codes), scale, (1, inner))


def _mxfp4(weight: _Builder) -> tuple[tuple[int, ...], Encoding]:
    """Return experts as transformers has them, [experts, in, out]; stored are blocks [experts, out, in / 32, 16]."""
    weight.is_of("U8")
    shape = weight.codes.shape
    if len(shape) != 4 or shape[3] != 16 or not all(shape):
        weight.fail("blocks of experts are [experts, out, in / 32, 16]")
    experts, out, blocks, _ = shape
    scale = weight.part("scale", (experts, out, blocks), dtypes=_E8M0)
    encoding = Encoding(Packing.EXPERTS, "E2M1", _stored(weight.codes), scale, (1, 32))
    return (experts, blocks * 32, out), encoding


def _awq(weight: _Builder) -> tuple[tuple[int, ...], Encoding]:
    weight.is_of("I32")
    inner, words = weight.matrix()
    out, size = words * 8, weight.group(inner)
    scale = weight.part("scale", (inner // size, out))
    zero = weight.part("zero", (inner // size, words), dtypes=("I32",))
    return (out, inner), Encoding(Packing.ROW_WORDS, "U4", _stored(weight.codes), scale, (1, size), zero)


def _gptq(weight: _Builder) -> tuple[tuple[int, ...], Encoding]:
    weight.is_of("I32")
    words, out = weight.matrix()
    bits = weight.recipe.args.bits
    inner = words * 32 // bits
    size = weight.group(inner)
    scale = weight.part("scale", (inner // size, out))
    zero = weight.part("zero", (inner // size, out * bits // 32), dtypes=("I32",))
    groups = weight.part("groups", (inner,), dtypes=("I32",)) if weight.recipe.activation_order else None
    number: Literal["U8", "U4"] = "U8" if bits == 8 else "U4"
    offset = weight.recipe.zero_offset
    codes = _stored(weight.codes)
    return (out, inner), Encoding(Packing.COLUMN_WORDS, number, codes, scale, (1, size), zero, offset, groups=groups)


def _compressed(weight: _Builder) -> tuple[tuple[int, ...], Encoding]:
    args = weight.recipe.args_of(weight.module)
    if args.is_float:
        return _compressed_float(weight, args.bits, args.block)
    out, width = weight.matrix()
    if weight.codes.dtype == "I8":
        return _compressed_bytes(weight, args.block)
    weight.is_of("I32")
    scale_shape = weight.parts["scale"].shape
    columns = width * 32 // args.bits
    grouped = args.group_size not in (None, -1)
    inner = scale_shape[-1] * int(args.group_size or 0) if grouped and scale_shape else columns
    if not 0 <= columns - inner < 32 // args.bits:
        weight.fail(f"its scales {list(scale_shape)} are of {inner} input features, its codes of {columns}")
    size = weight.group(inner) if grouped else inner
    if grouped or args.group_size == -1:
        scale, block = weight.part("scale", (out, inner // size)), (1, size)
    else:
        scale, block = weight.part("scale", (), (1,)), (out, inner)
    zero = None
    if not args.symmetric:
        zero = weight.part("zero", (-(-out * args.bits // 32), inner // size), dtypes=("I32",))
    packing, number = (Packing.NIBBLES, "U4") if args.bits == 4 else (Packing.BYTES, "U8")
    offset = 1 << (args.bits - 1)
    return (out, inner), Encoding(packing, number, _stored(weight.codes), scale, block, zero, offset)  # type: ignore[arg-type]


def _compressed_bytes(weight: _Builder, block: tuple[int, int] | None) -> tuple[tuple[int, ...], Encoding]:
    """Return an INT8 weight that is stored as it is."""
    size = weight.matrix()
    if block is not None:
        scale = weight.blocks(size, block)
    else:
        scale, block = weight.by_shape(size)
    zero = weight.part("zero", weight.parts["scale"].shape, dtypes=("I8",)) if "zero" in weight.parts else None
    return size, Encoding(Packing.BYTES, "S8", _stored(weight.codes), scale, block, zero)


def _compressed_float(weight: _Builder, bits: int, block: tuple[int, int] | None) -> tuple[tuple[int, ...], Encoding]:
    size = weight.matrix()
    if bits == 4:
        return _fp4(weight, (size[0], size[1] * 2), divides=True)
    weight.is_of("F8_E4M3")
    if weight.parts["scale"].dtype in _E8M0:
        return size, _mxfp8(weight, size)
    if block is not None:
        scale = weight.blocks(size, block)
    else:
        scale, block = weight.by_shape(size)
    return size, Encoding(Packing.BYTES, "E4M3", _stored(weight.codes), scale, block)


def _fp4(weight: _Builder, size: tuple[int, int], *, divides: bool) -> tuple[tuple[int, ...], Encoding]:
    """Return an NVFP4 weight, whose scales are E4M3 per 16 with one more per tensor, or an MXFP4 weight."""
    weight.is_of("U8")
    codes = _stored(weight.codes)
    if weight.parts["scale"].dtype in _E8M0:
        scale = weight.blocks(size, (1, 32), _E8M0)
        return size, Encoding(Packing.NIBBLES, "E2M1", codes, scale, (1, 32))
    scale = weight.blocks(size, (1, 16), ("F8_E4M3",))
    second = weight.part("second", (), (1,), dtypes=("F32",))
    encoding = Encoding(
        Packing.NIBBLES, "E2M1", codes, scale, (1, 16), second=second, divides=divides, columns=_columns(weight, size)
    )
    return size, encoding


def _mxfp8(weight: _Builder, size: tuple[int, int]) -> Encoding:
    return Encoding(Packing.BYTES, "E4M3", _stored(weight.codes), weight.blocks(size, (1, 32), _E8M0), (1, 32))


def _columns(weight: _Builder, size: tuple[int, int]) -> Stored | None:
    """Return the factors of the input features that Model Optimizer left beside the weight."""
    return weight.part("columns", (size[1],)) if "columns" in weight.parts else None


def _modelopt(weight: _Builder) -> tuple[tuple[int, ...], Encoding]:
    size, scale = weight.matrix(), weight.parts["scale"]
    kind = (weight.codes.dtype, scale.dtype in _E8M0, len(scale.shape))
    codes = _stored(weight.codes)
    match weight.codes.dtype:
        case "U8" if scale.dtype == "F8_E4M3":
            _check_algorithm(weight, "NVFP4")
            return _fp4(weight, (size[0], size[1] * 2), divides=False)
        case "U8":
            _check_algorithm(weight, "W4A16_AWQ")
            whole = size[0] * 2, size[1]
            block = weight.group(whole[1])
            grid = weight.part("scale", (whole[0], whole[1] // block))
            return whole, Encoding(Packing.ROW_PAIRS, "S4", codes, grid, (1, block), columns=_columns(weight, whole))
        case "I8":
            _check_algorithm(weight, "W8A")
            grid = weight.part("scale", (size[0],), (size[0], 1))
            return size, Encoding(Packing.BYTES, "S8", codes, grid, (1, size[1]), columns=_columns(weight, size))
        case _ if kind[1]:
            _check_algorithm(weight, "MXFP8")
            return size, _mxfp8(weight, size)
        case _:
            weight.is_of("F8_E4M3")
            _check_algorithm(weight, "FP8")
            if len(scale.shape) == 4:
                return size, Encoding(Packing.BYTES, "E4M3", codes, weight.blocks(size, (128, 128)), (128, 128))
            grid, block_of = weight.by_shape(size)
            return size, Encoding(Packing.BYTES, "E4M3", codes, grid, block_of, columns=_columns(weight, size))


def _check_algorithm(weight: _Builder, name: str) -> None:
    """Check that the source says that it has weights of an algorithm whose name contains `name`."""
    if not any(name in algorithm for algorithm in weight.recipe.algorithms):
        weight.fail(f"its description says {', '.join(sorted(weight.recipe.algorithms))}")


_BUILDERS: dict[str, Callable[[_Builder], Any]] = {
    "fp8": _fp8,
    "fbgemm_fp8": _fbgemm,
    "mxfp4": _mxfp4,
    "awq": _awq,
    "gptq": _gptq,
    "compressed-tensors": _compressed,
    "modelopt": _modelopt,
}
