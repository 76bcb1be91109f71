"""The stored tensors of one quantized weight, with checks of their dtypes and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

from orchestrator.base.dtypes import MODEL_DTYPE_NAMES
from orchestrator.base.errors import SourceCorruptError
from orchestrator.checkpoints.quantized.recipes import Recipe
from orchestrator.model.checkpoint import Stored, TensorInfo

COMPLETE = "Download the checkpoint again; if it is complete, its quantization is one that is not read."
FLOATS = (*MODEL_DTYPE_NAMES, "F64")


def stored_part(tensor: TensorInfo) -> Stored:
    """Return where a tensor of a file lies."""
    return Stored(tensor.dtype, tensor.shape, tensor.file, tensor.offset)


class StoredWeight:
    """The stored tensors of one weight, and checks of them."""

    def __init__(self, name: str, module: str, parts: Mapping[str, TensorInfo], recipe: Recipe, url: str) -> None:
        self.name, self.module, self.parts, self.recipe, self.url = name, module, parts, recipe, url
        self.codes = parts["codes"]

    def fail(self, reason: str) -> NoReturn:
        """Raise SourceCorruptError for this weight."""
        shown = f"{self.codes.dtype} {list(self.codes.shape)}"
        raise SourceCorruptError(f"{self.url}: {self.name} is {shown}, quantized as {self.recipe.method}, but {reason}", COMPLETE)

    def is_of(self, *dtypes: str) -> None:
        if self.codes.dtype not in dtypes:
            self.fail(f"weights of this quantization are {' or '.join(dtypes)}")

    def matrix(self) -> tuple[int, int]:
        """Return the shape of two-dimensional codes."""
        if len(self.codes.shape) != 2 or not all(self.codes.shape):
            self.fail("only matrices are read")
        return self.codes.shape[0], self.codes.shape[1]

    def part(self, role: str, *shapes: tuple[int, ...], dtypes: tuple[str, ...] = FLOATS) -> Stored:
        """Return a stored tensor that has one of the shapes and dtypes."""
        found = self.parts.get(role)
        if found is None:
            self.fail(f"its {role} is missing")
        if found.dtype not in dtypes:
            self.fail(f"{found.name} is {found.dtype}, expected is {' or '.join(dtypes)}")
        if shapes and found.shape not in shapes:
            self.fail(f"{found.name} is {list(found.shape)}, expected is {' or '.join(str(list(shape)) for shape in shapes)}")
        return stored_part(found)

    def blocks(self, size: tuple[int, int], block: tuple[int, int], dtypes: tuple[str, ...] = FLOATS) -> Stored:
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
