"""Reader of Orbax checkpoints: the parameters of MaxText and of Gemma in Flax, in OCDBT or in folders of zarr arrays.

The checkpoint records no config: config.json of the same model, in Hugging Face's format, stands in the folder that is given, and
the tokenizer too. The checkpoint is that folder or one below it (items/, default/, 0/items/).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

from orchestrator.base.errors import SourceCorruptError, SourceMissingError, SpecError, abbreviated
from orchestrator.checkpoints.assembly import read_assembled_rows
from orchestrator.checkpoints.huggingface import read_config
from orchestrator.checkpoints.kernels import check_heads, kernel, with_rows
from orchestrator.checkpoints.ocdbt import MANIFEST, Value, read_keys
from orchestrator.checkpoints.orbax_parts import Part, Tree
from orchestrator.checkpoints.orbax_trees import tree_of
from orchestrator.checkpoints.zarr import METADATA, read_array
from orchestrator.model.checkpoint import Assembly, CheckpointIndex, ChunkedArray, Piece, SourceFile, TensorInfo
from orchestrator.stores.source import ByteSource, SourceFolder

_UNFINISHED = ".orbax-checkpoint-tmp"
_STATE = "it is no parameter of the model, but of its training"


def matches(names: list[str]) -> bool:
    """Whether there is a manifest of OCDBT, or the metadata of Orbax, and no weights of Hugging Face's."""
    others = any(name.endswith((".safetensors", ".bin")) and "/" not in name for name in names)
    return not others and any(name.rpartition("/")[2] in (MANIFEST, "_METADATA") for name in names)


def read_index(folder: SourceFolder) -> CheckpointIndex:
    """Read config.json, the keys of the checkpoint and the metadata of its arrays.

    Raises SourceMissingError, SourceCorruptError, SpecError, ArchitectureError, DtypeError, QuantizationError; ToolError without
    TensorStore.
    """
    from orchestrator.base.extras import require

    require("orbax")
    names = folder.names()
    root = _root(folder, names)
    config = _config(folder, names)
    arrays = _arrays(folder, root, names)
    tree = tree_of(config, arrays.keys(), folder.url)
    files: dict[str, SourceFile] = {}
    tensors: dict[str, TensorInfo] = {}
    left_out: dict[str, str] = {}
    for name, values in sorted(arrays.items()):
        path = tree.parameter(name)
        if path is None:
            left_out[name] = _STATE
            continue
        array = _read(folder, name, values, files)
        for part in tree.parts(path, array.shape):
            made = _tensor(part, array, tree, f"{folder.url}: {name}")
            if made.name in tensors:
                raise SourceCorruptError(f"{folder.url}: two arrays hold {made.name}")
            tensors[made.name] = made
    return CheckpointIndex("orbax", tuple(files.values()), tensors, config, tree.warnings, left_out)


def read_rows(source: ByteSource, tensor: TensorInfo, begin: int, end: int, out: memoryview) -> None:
    """Fill `out` with rows [begin, end): `Format.read_rows`. Each call decompresses the array; `RowReader` does it once."""
    if tensor.array is None:
        read_assembled_rows(source, tensor, begin, end, out)
    elif begin < end:
        from orchestrator.checkpoints.staging import Staging  # numpy

        Staging(source).read(tensor, begin, end, out)


def _root(folder: SourceFolder, names: list[str]) -> str:
    """Return the subfolder ("" or "name/") of the checkpoint. Raises SourceMissingError, SpecError when there are several."""
    marked = {name.rpartition("/")[0] for name in names if name.rpartition("/")[2] in (MANIFEST, "_METADATA")}
    roots = sorted(
        place for place in marked if not any(place.startswith(f"{other}/" if other else "") for other in marked - {place})
    )
    if not roots:
        raise SourceMissingError(f"{folder.url} holds no checkpoint of Orbax: neither {MANIFEST} nor _METADATA")
    if len(roots) > 1:
        shown = ", ".join(abbreviated(place, 60) for place in roots[:5])
        raise SpecError(f"{folder.url} holds {len(roots)} checkpoints: {shown}", "Give the folder of one step.")
    if _UNFINISHED in f"{folder.url}/{roots[0]}":
        raise SourceMissingError(f"{folder.url}/{roots[0]} is a checkpoint that was not finished", "Give one that was.")
    return f"{roots[0]}/" if roots[0] else ""


def _config(folder: SourceFolder, names: list[str]) -> dict[str, object]:
    if "config.json" not in names:
        raise SourceMissingError(
            f"{folder.url} has no config.json: a checkpoint of Orbax does not record the model's config",
            "Put the config.json of the same model, as on the Hugging Face hub, beside the checkpoint, and its tokenizer.json.",
        )
    return read_config(folder)


@dataclass(frozen=True)
class _Keys:
    """Keys of an array."""

    metadata: bytes
    values: Mapping[str, Value]


def _arrays(folder: SourceFolder, root: str, names: list[str]) -> dict[str, _Keys]:
    """Return the arrays of the checkpoint by name."""
    if root + MANIFEST in names:
        keys = read_keys(folder, root)
    else:
        inner = [name for name in names if name.startswith(root) and "/" in name[len(root) :]]
        sizes = {name: folder.source_file(name).num_bytes for name in inner}
        keys = {name[len(root) :]: Value(name, 0, sizes[name]) for name in inner}
    grouped: dict[str, dict[str, Value]] = defaultdict(dict)
    for mark in METADATA:
        for key in keys:
            if key.endswith(f"/{mark}"):
                grouped[key.removesuffix(f"/{mark}")][mark] = keys[key]
    for key, value in keys.items():
        array = next((key[:at] for at in _slashes(key) if key[:at] in grouped), None)
        if array is not None:
            grouped[array][key[len(array) + 1 :]] = value
    found = {}
    for name, values in grouped.items():
        mark = next(mark for mark in METADATA if mark in values)
        found[name] = _Keys(_bytes(folder, values[mark], 0, None), values)
    if not found:
        raise SourceMissingError(f"{folder.url}/{root} holds no array", "Give the folder of a checkpoint's parameters.")
    return found


def _slashes(key: str) -> list[int]:
    return [at for at, letter in enumerate(key) if letter == "/"]


def _bytes(folder: SourceFolder, value: Value, begin: int, end: int | None) -> bytes:
    """Return bytes [begin, end) of a value."""
    if value.key:
        return value.data[begin:end]
    return folder.read(value.file, value.offset + begin, value.offset + (value.num_bytes if end is None else end))


def _read(folder: SourceFolder, name: str, keys: _Keys, files: dict[str, SourceFile]) -> ChunkedArray:
    """Return an array; `files` gets the files that hold its chunks."""
    for key, value in keys.values.items():
        if key not in METADATA:
            if value.file not in files:
                files[value.file] = folder.source_file(value.file)
            if value.offset + value.num_bytes > files[value.file].num_bytes:
                raise SourceCorruptError(
                    f"{folder.url}/{value.file} is truncated: {name}/{key} ends at byte {value.offset + value.num_bytes}",
                    "Copy the checkpoint again.",
                )
    numbers = {file: number for number, file in enumerate(files)}
    return read_array(
        f"{folder.url}: {name}", keys.metadata, keys.values, numbers, lambda value, begin, end: _bytes(folder, value, begin, end)
    )


def _tensor(part: Part, array: ChunkedArray, tree: Tree, where: str) -> TensorInfo:
    """Return a part of an array as Hugging Face's tensor. Raises SourceCorruptError."""
    array = replace(array, fixed=part.fixed)
    check_heads(part.name, part.kind, array.part_shape, tree.sizes, where)
    made = kernel(part.name, part.kind, array.dtype, array.part_shape, 0, 0, where)
    made = with_rows(made, tree.most_rows(part.name))
    if part.paired_rows or (part.factor, part.divisor, part.add) != (1.0, 1.0, 0.0):
        assembly = made.assembly or Assembly((Piece(0, 0, array.part_shape),))
        assembly = replace(assembly, paired_rows=part.paired_rows, factor=part.factor, divisor=part.divisor, add=part.add)
        made = replace(made, assembly=assembly)
        if (part.factor, part.divisor, part.add) != (1.0, 1.0, 0.0):
            made = replace(made, dtype="F32", num_bytes=4 * made.num_elements)
    return replace(made, file=array.chunks[0][0], array=array)
