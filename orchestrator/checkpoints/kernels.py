"""Kernels of JAX and Keras as Hugging Face's weights: [in, out] read transposed, axes of heads flattened."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from enum import Enum
from typing import Any

from orchestrator.base.dtypes import num_bytes
from orchestrator.base.errors import SourceCorruptError
from orchestrator.checkpoints.assembly import assembled
from orchestrator.model.checkpoint import Assembly, Piece, TensorInfo


class Kind(Enum):
    """How a tensor of Hugging Face's is stored."""

    COPY = 1
    """The same."""
    FLAT = 2
    """[heads, size]: a bias."""
    OUT_OF_FIRST = 3
    """[in, ...]: a kernel whose other axes are the output."""
    INTO_LAST = 4
    """[..., out]: a kernel whose other axes are the input."""
    HEADS = 5
    """[heads, in, size]: a kernel per head."""

    @property
    def least_axes(self) -> int:
        """Number of axes that what is stored has at least."""
        return {Kind.COPY: 0, Kind.FLAT: 1, Kind.HEADS: 3}.get(self, 2)


def kernel(name: str, kind: Kind, dtype: str, shape: tuple[int, ...], file: int, offset: int, where: str) -> TensorInfo:
    """Return the tensor `name` that is stored with `shape` at `offset`. Raises SourceCorruptError when it has too few axes."""
    if len(shape) < kind.least_axes:
        raise SourceCorruptError(f"{where} has shape {list(shape)}, {kind.least_axes} axes were expected")
    size = num_bytes(dtype, math.prod(shape))
    match kind:
        case Kind.COPY:
            return TensorInfo(name, dtype, shape, file, offset, size)
        case Kind.FLAT:
            return TensorInfo(name, dtype, (math.prod(shape),), file, offset, size)
        case Kind.HEADS:
            step = size // max(shape[0], 1)
            pieces = tuple(Piece(file, offset + head * step, shape[1:]) for head in range(shape[0]))
        case Kind.OUT_OF_FIRST:
            pieces = (Piece(file, offset, (shape[0], math.prod(shape[1:]))),)
        case Kind.INTO_LAST:
            pieces = (Piece(file, offset, (math.prod(shape[:-1]), shape[-1])),)
    return assembled(name, dtype, Assembly(pieces, transposed=True))


def check_heads(name: str, kind: Kind, shape: tuple[int, ...], config: Mapping[str, Any], where: str) -> None:
    """Compare the heads of an attention kernel with a config of Hugging Face's. Raises SourceCorruptError.

    A weight of other heads can have the same rows and columns.
    """
    found = re.search(r"self_attn\.([qkvo])_proj\.weight$", name)
    if found is None or len(shape) != 3:
        return
    stored = {Kind.HEADS: (shape[0], shape[2]), Kind.OUT_OF_FIRST: shape[1:], Kind.INTO_LAST: shape[:2]}.get(kind)
    heads = config["num_attention_heads"]
    count = heads if found[1] in "qo" else config.get("num_key_value_heads") or heads
    expected = (count, config.get("head_dim") or config["hidden_size"] // heads)
    if stored is not None and stored != expected:
        raise SourceCorruptError(
            f"{where} has {stored[0]} heads of {stored[1]}, the config says {expected[0]} of {expected[1]}",
            "The config and the weights belong to different models.",
        )


def with_rows(tensor: TensorInfo, rows: int) -> TensorInfo:
    """Return the first `rows` rows of a tensor, without the padding of a vocabulary; the tensor itself if it has no more."""
    if not tensor.shape or tensor.shape[0] <= rows:
        return tensor
    shape = (rows, *tensor.shape[1:])
    return replace(tensor, shape=shape, num_bytes=num_bytes(tensor.dtype, math.prod(shape)))
