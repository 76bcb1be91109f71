"""Formats of quantized weights by the method that wrote them: stored tensors in, shape and encoding out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from orchestrator.checkpoints.quantized.stored_weight import FLOATS, StoredWeight, stored_part
from orchestrator.model.checkpoint import Encoding, Packing, Stored

E8M0 = ("U8", "F8_E8M0")


def _fp8(weight: StoredWeight) -> tuple[tuple[int, ...], Encoding]:
    weight.is_of("F8_E4M3")
    size, block = weight.matrix(), weight.recipe.args.block
    if block is not None:
        scale = weight.blocks(size, block, (*FLOATS, "F8_E8M0"))
    else:
        scale, block = weight.by_shape(size)
    return size, Encoding(Packing.BYTES, "E4M3", stored_part(weight.codes), scale, block)


def _fbgemm(weight: StoredWeight) -> tuple[tuple[int, ...], Encoding]:
    weight.is_of("F8_E4M3")
    out, inner = weight.matrix()
    scale = weight.part("scale", (out, 1), (out,))
    return (out, inner), Encoding(Packing.BYTES, "E4M3", stored_part(weight.codes), scale, (1, inner))


def _mxfp4(weight: StoredWeight) -> tuple[tuple[int, ...], Encoding]:
    """Return experts as transformers has them, [experts, in, out]; stored are blocks [experts, out, in / 32, 16]."""
    weight.is_of("U8")
    shape = weight.codes.shape
    if len(shape) != 4 or shape[3] != 16 or not all(shape):
        weight.fail("blocks of experts are [experts, out, in / 32, 16]")
    experts, out, blocks, _ = shape
    scale = weight.part("scale", (experts, out, blocks), dtypes=E8M0)
    encoding = Encoding(Packing.EXPERTS, "E2M1", stored_part(weight.codes), scale, (1, 32))
    return (experts, blocks * 32, out), encoding


def _awq(weight: StoredWeight) -> tuple[tuple[int, ...], Encoding]:
    weight.is_of("I32")
    inner, words = weight.matrix()
    out, size = words * 8, weight.group(inner)
    scale = weight.part("scale", (inner // size, out))
    zero = weight.part("zero", (inner // size, words), dtypes=("I32",))
    return (out, inner), Encoding(Packing.ROW_WORDS, "U4", stored_part(weight.codes), scale, (1, size), zero)


def _gptq(weight: StoredWeight) -> tuple[tuple[int, ...], Encoding]:
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
    codes = stored_part(weight.codes)
    return (out, inner), Encoding(Packing.COLUMN_WORDS, number, codes, scale, (1, size), zero, offset, groups=groups)


def _compressed(weight: StoredWeight) -> tuple[tuple[int, ...], Encoding]:
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
    codes = stored_part(weight.codes)
    if args.bits == 4:
        return (out, inner), Encoding(Packing.NIBBLES, "U4", codes, scale, block, zero, offset=8)
    return (out, inner), Encoding(Packing.BYTES, "U8", codes, scale, block, zero, offset=128)


def _compressed_bytes(weight: StoredWeight, block: tuple[int, int] | None) -> tuple[tuple[int, ...], Encoding]:
    """Return an INT8 weight that is stored as it is."""
    size = weight.matrix()
    if block is not None:
        scale = weight.blocks(size, block)
    else:
        scale, block = weight.by_shape(size)
    zero = weight.part("zero", weight.parts["scale"].shape, dtypes=("I8",)) if "zero" in weight.parts else None
    return size, Encoding(Packing.BYTES, "S8", stored_part(weight.codes), scale, block, zero)


def _compressed_float(weight: StoredWeight, bits: int, block: tuple[int, int] | None) -> tuple[tuple[int, ...], Encoding]:
    size = weight.matrix()
    if bits == 4:
        return _fp4(weight, (size[0], size[1] * 2), divides=True)
    weight.is_of("F8_E4M3")
    if weight.parts["scale"].dtype in E8M0:
        return size, _mxfp8(weight, size)
    if block is not None:
        scale = weight.blocks(size, block)
    else:
        scale, block = weight.by_shape(size)
    return size, Encoding(Packing.BYTES, "E4M3", stored_part(weight.codes), scale, block)


def _fp4(weight: StoredWeight, size: tuple[int, int], *, divides: bool) -> tuple[tuple[int, ...], Encoding]:
    """Return an NVFP4 weight, whose scales are E4M3 per 16 with one more per tensor, or an MXFP4 weight."""
    weight.is_of("U8")
    codes = stored_part(weight.codes)
    if weight.parts["scale"].dtype in E8M0:
        scale = weight.blocks(size, (1, 32), E8M0)
        return size, Encoding(Packing.NIBBLES, "E2M1", codes, scale, (1, 32))
    scale = weight.blocks(size, (1, 16), ("F8_E4M3",))
    second = weight.part("second", (), (1,), dtypes=("F32",))
    encoding = Encoding(
        Packing.NIBBLES, "E2M1", codes, scale, (1, 16), second=second, divides=divides, columns=_columns(weight, size)
    )
    return size, encoding


def _mxfp8(weight: StoredWeight, size: tuple[int, int]) -> Encoding:
    return Encoding(Packing.BYTES, "E4M3", stored_part(weight.codes), weight.blocks(size, (1, 32), E8M0), (1, 32))


def _columns(weight: StoredWeight, size: tuple[int, int]) -> Stored | None:
    """Return the factors of the input features that Model Optimizer left beside the weight."""
    return weight.part("columns", (size[1],)) if "columns" in weight.parts else None


def _modelopt(weight: StoredWeight) -> tuple[tuple[int, ...], Encoding]:
    size, scale = weight.matrix(), weight.parts["scale"]
    codes = stored_part(weight.codes)
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
        case _ if scale.dtype in E8M0:
            _check_algorithm(weight, "MXFP8")
            return size, _mxfp8(weight, size)
        case _:
            weight.is_of("F8_E4M3")
            _check_algorithm(weight, "FP8")
            if len(scale.shape) == 4:
                return size, Encoding(Packing.BYTES, "E4M3", codes, weight.blocks(size, (128, 128)), (128, 128))
            grid, block_of = weight.by_shape(size)
            return size, Encoding(Packing.BYTES, "E4M3", codes, grid, block_of, columns=_columns(weight, size))


def _check_algorithm(weight: StoredWeight, name: str) -> None:
    """Check that the source says that it has weights of an algorithm whose name contains `name`."""
    if not any(name in algorithm for algorithm in weight.recipe.algorithms):
        weight.fail(f"its description says {', '.join(sorted(weight.recipe.algorithms))}")


FORMATS: dict[str, Callable[[StoredWeight], Any]] = {
    "fp8": _fp8,
    "fbgemm_fp8": _fbgemm,
    "mxfp4": _mxfp4,
    "awq": _awq,
    "gptq": _gptq,
    "compressed-tensors": _compressed,
    "modelopt": _modelopt,
}
"""quant_method -> function of the stored tensors of a weight."""
