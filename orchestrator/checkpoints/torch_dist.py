"""Reader of PyTorch's distributed checkpoints (`torch.distributed.checkpoint`): what `.metadata` says, without running it.

Such a folder holds `.metadata`, a pickle that lists every tensor's chunks, and `__RANK_N.distcp` files, in which each chunk is an
archive of torch.save at an offset (torch/distributed/checkpoint/metadata.py and filesystem.py). Megatron-Core's format `torch_dist`
is this one. A pickle is a program, so the reader accepts only the names of which such a description consists, and none of them is
looked up: a value of our own stands for each.
"""

from __future__ import annotations

import collections
import io
import math
import pickle  # only through _Unpickler, which resolves no name
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.base.errors import LfsPointerError, OrchestratorError, SourceCorruptError, UnsafePickleError, abbreviated
from orchestrator.stores.source import LFS_MAGIC, SourceFolder

METADATA = ".metadata"
_FILE = re.compile(r"[^/\\]+\.distcp")
_MAX_AXES = 8
_DAMAGED = "Copy the checkpoint again, or save it again."


@dataclass(frozen=True, slots=True)
class Chunk:
    """A block of a tensor, as an archive of torch.save in a file."""

    offsets: tuple[int, ...]
    """First index on each axis of the tensor."""
    sizes: tuple[int, ...]
    file: str
    """Name beside `.metadata`."""
    offset: int
    """First byte of the archive in the file."""
    num_bytes: int
    """Size of the archive."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of the checkpoint. Its chunks tile it: none is missing, none overlap."""

    name: str
    dtype: str
    """torch's name."""
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


def read_metadata(folder: SourceFolder, name: str) -> dict[str, StoredTensor]:
    """Read the file `name` (`.metadata`, within a subfolder too) and return its tensors. Pickled objects are left out.

    Raises SourceMissingError, LfsPointerError, SourceCorruptError; UnsafePickleError for a pickle that names anything else.
    """
    path, data = f"{folder.url}/{name}", folder.read(name)
    if data.startswith(LFS_MAGIC):
        raise LfsPointerError(f"{path} is a Git-LFS pointer")
    try:
        plain = _Unpickler(data, path).load()
        metadata = _fields(plain, "Metadata")
        places = _places(metadata["storage_data"])
        tensors = [
            _tensor(key, _fields(value, "TensorStorageMetadata"), places)
            for key, value in metadata["state_dict_metadata"].items()
            if not isinstance(value, _Record) or value.name != "BytesStorageMetadata"
        ]
    except OrchestratorError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise SourceCorruptError(f"{path} is damaged: {abbreviated(str(error), 200)}", _DAMAGED) from None
    return {tensor.name: tensor for tensor in tensors}


class _Record:
    """Stand-in for an object of torch: its class, arguments and state. A pickle can set nothing else."""

    __slots__ = ("arguments", "state")
    name = ""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _record(name: str) -> type[_Record]:
    return type(name, (_Record,), {"__slots__": (), "name": name})


class _Size:
    """Stand-in for torch.Size."""

    __slots__ = ()

    def __call__(self, sizes: Any = ()) -> tuple[int, ...]:
        return _counts(sizes)


_METADATA = ("torch.distributed.checkpoint.metadata", "torch.distributed._shard.sharded_tensor.metadata")
_NAMES: dict[tuple[str, str], type[_Record]] = {
    (module, name): _record(name)
    for modules, names in (
        (_METADATA, ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
                     "MEM_FORMAT_ENCODING", "_MEM_FORMAT_ENCODING", "MetadataIndex", "StorageMeta")),
        (("torch.distributed.checkpoint.filesystem",), ("_StorageInfo", "_StoragePrefix")),
        (("torch.distributed.checkpoint.planner",), ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
        (("megatron.core.dist_checkpointing.strategies.torch",), ("MCoreMetadata", "MCoreSavePlan")),
        (("torch.serialization",), ("_get_layout",)),
        (("pathlib", "pathlib._local"), ("PosixPath", "PurePosixPath", "Path")),
    )
    for module in modules
    for name in names
}  # fmt: skip
"""Names that a description may hold -> stand-in. The plans of writing beside it are read over."""
_DTYPE = re.compile(r"(float|bfloat|complex|int|uint|qint|quint|bits|bool|half|double|long)[0-9a-z_]*")


class _Unpickler(pickle.Unpickler):
    """Unpickler that accepts the names of a description, and refuses all others before they are looked up."""

    def __init__(self, data: bytes, path: str) -> None:
        super().__init__(io.BytesIO(data))
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _NAMES:
            return _NAMES[module, name]
        if (module, name) == ("torch", "Size"):
            return _Size()
        if module == "torch" and _DTYPE.fullmatch(name):
            return name
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        raise UnsafePickleError(
            f"{self._path} asks for {abbreviated(f'{module}.{name}', 200)}, which no description of tensors needs",
            "Save the checkpoint again with its trainer, in a sandbox if you do not trust its author.",
        )


def _fields(value: Any, name: str) -> Mapping[str, Any]:
    """Return the state of a stand-in for the class `name`. Raises ValueError."""
    if not isinstance(value, _Record) or value.name not in (name, f"MCore{name}") or not isinstance(value.state, dict):
        raise ValueError(f"a {name} was expected")
    return value.state


def _counts(values: Any) -> tuple[int, ...]:
    found = tuple(values)
    if len(found) > _MAX_AXES or not all(type(number) is int and 0 <= number < 2**63 for number in found):
        raise ValueError("impossible sizes")
    return found


def _places(storage_data: Any) -> dict[str, dict[tuple[int, ...], Mapping[str, Any]]]:
    """Return tensor -> first indices of a chunk -> place. Raises ValueError."""
    found: dict[str, dict[tuple[int, ...], Mapping[str, Any]]] = {}
    for index, info in storage_data.items():
        key = _fields(index, "MetadataIndex")
        chunks = found.setdefault(key["fqn"], {})
        offsets = tuple(key.get("offset") or ())
        if offsets in chunks:
            raise ValueError(f"a chunk of {abbreviated(str(key['fqn']), 100)} is listed twice")
        chunks[offsets] = _fields(info, "_StorageInfo")
    return found


def _tensor(
    name: Any, fields: Mapping[str, Any], places: Mapping[str, Mapping[tuple[int, ...], Mapping[str, Any]]]
) -> StoredTensor:
    """Return a tensor with the places of its chunks. Raises ValueError."""
    if not isinstance(name, str):
        raise ValueError("the name of a tensor is not a text")
    shape = _counts(fields["size"])
    dtype: Any = fields["properties"].state[0]
    if not isinstance(dtype, str):
        raise ValueError(f"{name} has no dtype")
    own = places.get(name, {})
    chunks = [_chunk(name, _fields(chunk, "ChunkStorageMetadata"), shape, own) for chunk in fields["chunks"]]
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(shape) or len({chunk.offsets for chunk in chunks}) < len(
        chunks
    ):
        raise ValueError(f"the chunks of {abbreviated(name, 100)} do not make up its shape {list(shape)}")
    return StoredTensor(name, dtype, shape, tuple(chunks))


def _chunk(
    name: str, fields: Mapping[str, Any], shape: tuple[int, ...], places: Mapping[tuple[int, ...], Mapping[str, Any]]
) -> Chunk:
    offsets, sizes = _counts(fields["offsets"]), _counts(fields["sizes"])
    if not len(offsets) == len(sizes) == len(shape) or any(
        first + size > whole for first, size, whole in zip(offsets, sizes, shape, strict=True)
    ):
        raise ValueError(f"a chunk of {abbreviated(name, 100)} lies outside of it")
    place = places.get(offsets) or ({} if any(offsets) else places.get((), {}))
    if not place:
        raise ValueError(f"the chunk {list(offsets)} of {abbreviated(name, 100)} has no place in a file")
    file, (offset, size) = place["relative_path"], _counts((place["offset"], place["length"]))
    if not isinstance(file, str) or not _FILE.fullmatch(file):
        raise ValueError(f"{abbreviated(repr(file), 100)} is not a .distcp file of this folder")
    if place.get("transform_descriptors"):
        raise ValueError(f"{abbreviated(name, 100)} was written through transforms (compression), which are not read")
    return Chunk(offsets, sizes, file, offset, size)
