"""A rank's converted weights as memory-mapped bytes by tensor name, from any number of shards."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from orchestrator.base.errors import SourceMissingError
from orchestrator.checkpoints.safetensors import read_header
from orchestrator.checkpoints.trtllm import rank_files
from orchestrator.planning.steps import Task
from orchestrator.stores.source import LocalFolder
from orchestrator.work.context import Context

_ADVICE = "Make the checkpoint again with `orchestrator convert`: every rank that is compiled must be in it, whole."


@dataclass(frozen=True, slots=True)
class Weight:
    """Bytes of one tensor in the page cache, kept alive by `data`."""

    dtype: str
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]
    mapping: mmap.mmap | None = None
    """Mapped file that holds `data`; None: memory of this process."""
    offset: int = 0
    """First byte in `mapping`."""

    def release(self) -> None:
        """Take the tensor's pages out of this process's memory. They are read again when they are touched."""
        begin = -(-self.offset // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (self.offset + self.data.size) // mmap.PAGESIZE * mmap.PAGESIZE
        if self.mapping is not None and end > begin:
            self.mapping.madvise(mmap.MADV_DONTNEED, begin, end - begin)


def map_shards(paths: Iterable[Path]) -> dict[str, Weight]:
    """Map every tensor of the given safetensors files, by name. Raises SourceCorruptError."""
    weights: dict[str, Weight] = {}
    for path in paths:
        entries, _ = read_header(path)
        with path.open("rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        mapped = np.frombuffer(mapping, np.uint8)
        for entry in entries:
            data = mapped[entry.offset : entry.offset + entry.num_bytes]
            weights[entry.name] = Weight(entry.dtype, entry.shape, data, mapping, entry.offset)
    return weights


def release(weights: Mapping[str, Weight]) -> None:
    """Take the pages of all tensors out of this process's memory."""
    for weight in weights.values():
        weight.release()


def rank_shards(task: Task, context: Context, rank: int) -> list[Path]:
    """Return the files of `rank` among the outputs of the task's needs."""
    outputs = [output for need in task.step.needs for output in task.inputs[need].outputs]
    mine = [output for output in outputs if output.name == f"rank{rank}.safetensors" or output.name.startswith(f"rank{rank}-")]
    return [context.fetch(output) for output in mine]


def require(weights: Mapping[str, Weight], names: Iterable[str]) -> None:
    """Check that `weights` has every name. Raises SourceMissingError when the checkpoint lacks a tensor of the network."""
    missing = [name for name in names if name not in weights]
    if missing:
        raise SourceMissingError(f"the rank's checkpoint lacks {', '.join(missing[:3])} ({len(missing)} in all)", _ADVICE)


def map_checkpoint_rank(folder: Path, rank: int) -> dict[str, Weight]:
    """Map a rank of a TensorRT-LLM checkpoint folder. Raises SourceMissingError, SourceCorruptError."""
    place = LocalFolder(folder)
    return map_shards(folder / name for name in rank_files(place, set(place.top_names()), rank))
