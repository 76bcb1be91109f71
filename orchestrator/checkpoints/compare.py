"""Comparison of two checkpoints of any source format, tensor by tensor.

Both are read in blocks through the readers of their formats, which present tensors under Hugging Face names. Memory is a few
blocks of at least one row. Tensors are equal if their bytes are: equal NaN patterns are, 0 and -0 are not. Only a tensor that
differs is read a second time, to measure the difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.base.dtypes import ARRAY_NAMES, numpy_dtype
from orchestrator.checkpoints import read_source
from orchestrator.checkpoints.reading import RowReader
from orchestrator.model.checkpoint import CheckpointIndex, TensorInfo
from orchestrator.stores import open_source
from orchestrator.stores.source import planned_ranges

BLOCK_BYTES = 4 * 2**20

Bytes = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Difference:
    """A tensor that differs between the two checkpoints."""

    name: str
    dtypes: tuple[str, str]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    num_different: int | None = None
    """Number of elements that differ (of bytes for packed dtypes); None: the shapes differ, and nothing was read."""
    max_absolute: float | None = None
    """Largest |a - b|, infinite where only one is NaN; None: the numbers cannot be compared."""
    max_relative: float | None = None
    """max_absolute / largest finite |a| of the tensor."""

    @property
    def is_only_dtype(self) -> bool:
        """Whether all numbers are equal and only the dtype differs, e.g. for a router or norm kept in float32."""
        return self.dtypes[0] != self.dtypes[1] and self.num_different == 0 and self.max_absolute == 0

    def within(self, tolerance: float | None) -> bool:
        """Whether max_relative is at most `tolerance`, whatever the dtypes. False without a tolerance."""
        return tolerance is not None and self.max_relative is not None and self.max_relative <= tolerance


@dataclass(frozen=True)
class Comparison:
    """Result of `compare`."""

    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    differences: tuple[Difference, ...]
    num_identical: int
    """Number of tensors with equal dtype, shape and bytes."""
    num_bytes: int
    """Size of A's tensors that were read."""
    tolerance: float | None = None

    @property
    def beyond(self) -> tuple[Difference, ...]:
        """Differences beyond the tolerance, without those of the dtype alone."""
        return tuple(item for item in self.differences if not item.is_only_dtype and not item.within(self.tolerance))

    @property
    def same(self) -> bool:
        return not (self.only_a or self.only_b or self.beyond)

    def to_plain(self) -> dict[str, Any]:
        """Return the comparison for JSON, with infinite differences as the text 'inf'."""
        plain = asdict(self)
        for item, made in zip(plain["differences"], self.differences, strict=True):
            item["within_tolerance"] = made.within(self.tolerance)
            item["is_only_dtype"] = made.is_only_dtype
            for name in ("max_absolute", "max_relative"):
                if item[name] is not None and math.isinf(item[name]):
                    item[name] = "inf"
        return {"same": self.same, **plain}

    def lines(self) -> Iterator[str]:
        """Yield the comparison as text for people. The last line is the summary."""
        yield from (f"only in A: {name}" for name in self.only_a)
        yield from (f"only in B: {name}" for name in self.only_b)
        yield from (_line(item) for item in self.differences)
        widened = sum(item.is_only_dtype for item in self.differences)
        close = len(self.differences) - len(self.beyond) - widened
        alike = "same within the tolerance" if close else "same numbers" if widened else "identical"
        verdict = alike if self.same else "different"
        within = f", {widened} of the same numbers in another dtype" if widened else ""
        within += f", {close} within the tolerance of {self.tolerance:g}" if self.tolerance is not None else ""
        yield (
            f"{verdict}: {self.num_identical} tensors bit-identical{within}, {len(self.beyond)} different, "
            f"{len(self.only_a)} only in A, {len(self.only_b)} only in B; {self.num_bytes:,} bytes compared"
        )


class _Side:
    """One of the two checkpoints, open, with a read buffer."""

    def __init__(self, index: CheckpointIndex, read: Callable[[TensorInfo, int, int, memoryview], None]) -> None:
        self.index, self._read = index, read
        self._buffer = np.empty(BLOCK_BYTES, np.uint8)

    def rows(self, name: str, begin: int, end: int) -> Bytes:
        """Read rows [begin, end) of a tensor as bytes. The array is valid until the next call."""
        tensor = self.index.tensors[name]
        size = tensor.num_bytes // _num_rows(tensor) * (end - begin)
        if size > self._buffer.size:
            self._buffer = np.empty(size, np.uint8)
        block = self._buffer[:size]
        self._read(tensor, begin, end, block.data)
        return block


def compare(a: str, b: str, tolerance: float | None = None) -> Comparison:
    """Compare the checkpoints at two paths or URLs. Raises as the readers of their formats do."""
    index_a, index_b = read_source(a)[0], read_source(b)[0]
    common = [name for name in index_a.tensors if name in index_b.tensors]
    common.sort(key=lambda name: (index_a.tensors[name].file, index_a.tensors[name].offset))  # read A from front to back
    readable = [name for name in common if index_a.tensors[name].shape == index_b.tensors[name].shape]
    found = [_unread(name, index_a, index_b) for name in common if index_a.tensors[name].shape != index_b.tensors[name].shape]
    with ExitStack() as stack:
        sides = [_open(stack, *side, readable) for side in ((a, index_a), (b, index_b))]
        for name in readable:
            difference = _compare_tensor(name, *sides)
            if difference is not None:
                found.append(difference)
    return Comparison(
        only_a=tuple(sorted(index_a.tensors.keys() - index_b.tensors.keys())),
        only_b=tuple(sorted(index_b.tensors.keys() - index_a.tensors.keys())),
        differences=tuple(sorted(found, key=lambda item: item.name)),
        num_identical=len(common) - len(found),
        num_bytes=sum(index_a.tensors[name].num_bytes for name in readable),
        tolerance=tolerance,
    )


def _open(stack: ExitStack, path: str, index: CheckpointIndex, names: list[str]) -> _Side:
    planned = planned_ranges(index.tensors[name] for name in names)
    source = stack.enter_context(open_source(path).open(index.files, planned))
    return _Side(index, RowReader(index.format, source, (index.tensors[name] for name in names)).read)


def _unread(name: str, a: CheckpointIndex, b: CheckpointIndex) -> Difference:
    one, two = a.tensors[name], b.tensors[name]
    return Difference(name, (one.dtype, two.dtype), (one.shape, two.shape))


def _compare_tensor(name: str, a: _Side, b: _Side) -> Difference | None:
    """Compare a tensor of equal shapes. None: dtype and bytes are equal."""
    one, two = a.index.tensors[name], b.index.tensors[name]
    if one.dtype == two.dtype and all(np.array_equal(left, right) for left, right in _blocks(name, a, b)):
        return None
    found = Difference(name, (one.dtype, two.dtype), (one.shape, two.shape))
    if not ARRAY_NAMES.keys() >= {one.dtype, two.dtype}:  # packed: several elements per byte
        if one.num_bytes != two.num_bytes:
            return found
        return replace(found, num_different=sum(int(np.count_nonzero(left != right)) for left, right in _blocks(name, a, b)))
    kinds = numpy_dtype(one.dtype), numpy_dtype(two.dtype)
    return _measure(found, ((left.view(kinds[0]), right.view(kinds[1])) for left, right in _blocks(name, a, b)))


def _blocks(name: str, a: _Side, b: _Side) -> Iterator[tuple[Bytes, Bytes]]:
    """Yield the rows of both sides in blocks, from first to last. Each pair is valid until the next."""
    one, two = a.index.tensors[name], b.index.tensors[name]
    rows = _num_rows(one)
    step = max(1, BLOCK_BYTES * rows // max(one.num_bytes, two.num_bytes, 1))
    for begin in range(0, rows, step) if one.num_elements else ():
        end = min(begin + step, rows)
        yield a.rows(name, begin, end), b.rows(name, begin, end)


def _measure(found: Difference, blocks: Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any]]]) -> Difference:
    """Fill in the figures of `found` from the numbers of both sides."""
    count, absolute, largest = 0, 0.0, 0.0
    for left, right in blocks:
        a, b = left.astype(np.float64), right.astype(np.float64)
        if left.dtype == right.dtype:
            bits = np.dtype(f"u{left.dtype.itemsize}")
            unequal = left.view(bits) != right.view(bits)
        else:
            unequal = (a != b) & ~(np.isnan(a) & np.isnan(b))
        count += int(np.count_nonzero(unequal))
        absolute = max(absolute, _largest_distance(a[unequal], b[unequal]))
        largest = max(largest, float(np.max(np.abs(a), where=np.isfinite(a), initial=0.0)))
    relative = absolute / largest if largest else math.inf if absolute else 0.0
    return replace(found, num_different=count, max_absolute=absolute, max_relative=relative)


def _largest_distance(a: Numbers, b: Numbers) -> float:
    """Return the largest |a - b|: 0 between two NaNs or equal infinities, infinite between NaN or infinity and other numbers."""
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        distance = np.where(same, 0.0, np.abs(a - b))
    return float(np.max(np.where(np.isnan(distance), math.inf, distance), initial=0.0))


def _num_rows(tensor: TensorInfo) -> int:
    return tensor.shape[0] if tensor.shape else 1


def _line(item: Difference) -> str:
    dtypes = item.dtypes[0] if item.dtypes[0] == item.dtypes[1] else f"{item.dtypes[0]} in A, {item.dtypes[1]} in B"
    if item.shapes[0] != item.shapes[1]:
        return f"{item.name}: shape {list(item.shapes[0])} in A, {list(item.shapes[1])} in B, {dtypes}"
    count = "" if item.num_different is None else f", {item.num_different:,} of {math.prod(item.shapes[0]):,} elements differ"
    numbers = (
        f", max absolute {item.max_absolute:.3g}, max relative {item.max_relative:.3g}" if item.max_absolute is not None else ""
    )
    return f"{item.name}: {dtypes}{count}{numbers}"
