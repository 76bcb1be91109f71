"""Experts that a source stores as two tensors of a layer, seen as a tensor for each linear of an expert.

                      as is                                  transposed
    gate_up_proj      [experts, 2 x intermediate, hidden]    [experts, hidden, 2 x intermediate], gate before up
    down_proj         [experts, hidden, intermediate]        [experts, intermediate, hidden]

Qwen3-VL's files on the hub are transposed, those that transformers 5 writes are not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from orchestrator.base.dtypes import num_bytes
from orchestrator.base.errors import QuantizationError, SourceCorruptError
from orchestrator.checkpoints.assembly import assembled
from orchestrator.model.checkpoint import Assembly, Piece, TensorInfo

_FUSED, _DOWN = ".experts.gate_up_proj", ".experts.down_proj"


def single_experts(tensors: Mapping[str, TensorInfo], hidden_size: int) -> dict[str, TensorInfo]:
    """Return the tensors with those of all experts of a layer replaced by gate_proj, up_proj and down_proj of each expert.

    Raises SourceCorruptError for shapes that are no experts of this hidden size, QuantizationError for quantized ones.
    """
    found: dict[str, TensorInfo] = {}
    for name, tensor in tensors.items():
        prefix = name.removesuffix(_FUSED)
        down = tensors.get(prefix + _DOWN)
        if name.endswith(_FUSED) and down is not None:
            found |= {each.name: each for each in _of_layer(prefix, tensor, down, hidden_size)}
        elif not (name.endswith(_DOWN) and name.removesuffix(_DOWN) + _FUSED in tensors):
            found[name] = tensor
    return found


def _of_layer(prefix: str, fused: TensorInfo, down: TensorInfo, hidden: int) -> Iterator[TensorInfo]:
    """Yield the tensors of the experts of a layer."""
    for tensor in (fused, down):
        if tensor.encoding is not None:
            raise QuantizationError(
                f"{tensor.name} holds the quantized weights of all experts of a layer, which are not read",
                "Use the checkpoint that is not quantized.",
            )
    count, inter = fused.shape[0], max(fused.num_elements // max(2 * fused.shape[0] * hidden, 1), 1)
    transposed = (fused.shape, down.shape) == ((count, hidden, 2 * inter), (count, inter, hidden))
    if not transposed and (fused.shape, down.shape) != ((count, 2 * inter, hidden), (count, hidden, inter)):
        raise SourceCorruptError(
            f"{fused.name} is {list(fused.shape)} and {down.name} is {list(down.shape)}, "
            f"which are no experts of hidden size {hidden}",
            "Use the complete checkpoint of the model's publisher.",
        )
    for expert in range(count):
        linears = f"{prefix}.experts.{expert}"
        for row, linear in ((0, "gate_proj"), (inter, "up_proj")):
            yield _linear(f"{linears}.{linear}.weight", fused, expert, (row, row + inter), hidden, transposed)
        yield _linear(f"{linears}.down_proj.weight", down, expert, (0, hidden), inter, transposed)


def _linear(name: str, tensor: TensorInfo, expert: int, rows: tuple[int, int], columns: int, transposed: bool) -> TensorInfo:
    """Return rows [begin, end) of an expert's [out, in] in a tensor of all experts."""
    size = tensor.num_bytes // tensor.shape[0]
    offset, out = tensor.offset + expert * size, tensor.num_elements // (tensor.shape[0] * columns)
    if transposed:
        part = None if rows == (0, out) else rows
        return assembled(name, tensor.dtype, Assembly((Piece(tensor.file, offset, (columns, out)),), transposed=True, part=part))
    begin, end = (offset + num_bytes(tensor.dtype, row * columns) for row in rows)
    return TensorInfo(name, tensor.dtype, (rows[1] - rows[0], columns), tensor.file, begin, end - begin)
