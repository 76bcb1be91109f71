"""Reader of KerasHub presets: config.json of a backbone, and model.weights.h5 or its shards under model.weights.json.

Presents Hugging Face's tensors: kernels, which Keras stores as [in, out], are read transposed. KerasHub's rotary embedding pairs
the halves of a head as transformers does. Source: keras_hub/src/utils/transformers/convert_*.py and the backbones' get_config.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.base.errors import SourceCorruptError, SourceMissingError, abbreviated
from orchestrator.checkpoints.assembly import read_assembled_rows
from orchestrator.checkpoints.hdf5 import read_datasets
from orchestrator.checkpoints.huggingface import check_file_names, read_json
from orchestrator.checkpoints.keras_backbones import Backbone, backbone_of
from orchestrator.checkpoints.kernels import check_heads, kernel
from orchestrator.checkpoints.safetensors import HeaderEntry
from orchestrator.model.checkpoint import CheckpointIndex, TensorInfo
from orchestrator.stores.source import SourceFolder

CONFIG, METADATA, SINGLE, INDEX = "config.json", "metadata.json", "model.weights.h5", "model.weights.json"
_SHARD = r"[^/\\]+\.weights\.h5"
_VOCABULARY = "assets/tokenizer/vocabulary.json"
PUBLISHED = {"assets/tokenizer/vocabulary.spm": "tokenizer.model"}
"""File of the tokenizer -> Hugging Face's name.

Keras' config.json and tokenizer.json would be taken for Hugging Face's. So would merges.txt, whose first line is a merge: readers
of Hugging Face's skip that line.
"""

_NO_TOKENIZER = (
    "the preset's tokenizer (vocabulary.json, merges.txt) is not one of Hugging Face's, and is not published: without "
    "source.tokenizer the release reads token ids only"
)

read_rows = read_assembled_rows


def matches(names: list[str]) -> bool:
    """Whether config.json stands beside model.weights.h5 or the index of its shards, without safetensors, which are preferred."""
    safetensors = any(name.endswith(".safetensors") and "/" not in name for name in names)
    return CONFIG in names and not safetensors and (SINGLE in names or INDEX in names)


def read_index(folder: SourceFolder) -> CheckpointIndex:
    """Read the configs and the tables of the HDF5 files in `folder`. No object of Keras is made.

    Raises SourceMissingError, SourceCorruptError, LfsPointerError, ArchitectureError, QuantizationError, DtypeError; ToolError
    without h5py.
    """
    where = f"{folder.url}/{CONFIG}"
    backbone, fields = _backbone(read_json(folder, CONFIG), where)
    config, warnings = backbone.hugging_face_config(fields, where)
    names, listed = _file_names(folder)
    tensors: dict[str, TensorInfo] = {}
    elements = 0
    for number, name in enumerate(names):
        entries, labels = read_datasets(folder, name)
        for entry in entries:
            _check_listed(f"{folder.url}/{INDEX}", listed, entry.name, name)
            made = _tensor(backbone, config, entry, number, labels, f"{folder.url}/{name}")
            if made.name in tensors:
                raise SourceCorruptError(f"{folder.url}: {entry.name} is in both {names[tensors[made.name].file]} and {name}")
            tensors[made.name] = made
            elements += made.num_elements
    said = fields.get("tie_word_embeddings", backbone.tied)
    config["tie_word_embeddings"] = tied = _is_tied(said, tensors, where)
    if not _check_count(folder, elements) and tied and said is None:
        warnings = (*warnings, f"no head is stored: without parameter_count in {METADATA} it is not known whether it is missing")
    if _VOCABULARY in folder.names():
        warnings = (*warnings, _NO_TOKENIZER)
    return CheckpointIndex("keras", tuple(folder.source_file(name) for name in names), tensors, config, warnings)


def _backbone(plain: Mapping[str, Any], where: str) -> tuple[Backbone, dict[str, Any]]:
    """Return the backbone's table and its fields. Raises ArchitectureError, SourceCorruptError."""
    name, config = plain.get("class_name"), plain.get("config")
    if not isinstance(name, str) or not isinstance(config, dict):
        raise SourceCorruptError(f"{where} is not the config of a Keras model: it lacks class_name or config")
    return backbone_of(name, config, where), config


def _file_names(folder: SourceFolder) -> tuple[list[str], dict[str, set[str]]]:
    """Return the files of weights, and of shards the files that should hold each group. Raises SourceMissingError."""
    present = folder.names()
    if SINGLE in present:
        return [SINGLE], {}
    if INDEX not in present:
        raise SourceMissingError(f"{folder.url} has neither {SINGLE} nor {INDEX}", "A preset of KerasHub holds one of them.")
    plain = read_json(folder, INDEX).get("weight_map")
    if not isinstance(plain, dict) or not plain:
        raise SourceCorruptError(f"{folder.url}/{INDEX} has no weight_map")
    lists = {path.strip("/"): value if isinstance(value, list) else [value] for path, value in plain.items()}
    check_file_names([name for value in lists.values() for name in value], _SHARD, f"{folder.url}/{INDEX}")
    listed = {path: set(value) for path, value in lists.items()}
    names = sorted(set().union(*listed.values()))
    for name in names:
        if name not in present:
            raise SourceMissingError(f"{folder.url}/{INDEX} names the shard {abbreviated(name, 100)}, which is missing")
    return names, listed


def _check_listed(index: str, listed: Mapping[str, set[str]], path: str, name: str) -> None:
    group = path.rpartition("/")[0]
    if listed and name not in listed.get(group, ()):
        raise SourceCorruptError(f"{index} does not list {abbreviated(path, 100)} in {name}, which holds it")


def _tensor(
    backbone: Backbone, config: Mapping[str, Any], entry: HeaderEntry, file: int, labels: Mapping[str, str], where: str
) -> TensorInfo:
    """Return a dataset as Hugging Face's tensor. One without a rule keeps its name: the weight map refuses it."""
    rule = backbone.rule(entry.name)
    if rule is None:
        return TensorInfo(entry.name, entry.dtype, entry.shape, file, entry.offset, entry.num_bytes)
    container = "/".join(entry.name.split("/")[:2])
    label = labels.get(f"{container}/vars")
    if rule.layer is not None and label not in (None, f"{backbone.layer_label}_{rule.layer}"):
        raise SourceCorruptError(f"{where}: {container} is labelled {abbreviated(str(label), 60)}, not as layer {rule.layer}")
    check_heads(rule.name, rule.kind, entry.shape, config, f"{where}: {entry.name}")
    return kernel(rule.name, rule.kind, entry.dtype, entry.shape, file, entry.offset, f"{where}: {entry.name}")


def _check_count(folder: SourceFolder, elements: int) -> bool:
    """Compare the number of parameters with metadata.json's; returns whether it has one. Raises SourceCorruptError."""
    count = read_json(folder, METADATA).get("parameter_count") if METADATA in folder.names() else None
    if count is not None and count != elements:
        raise SourceCorruptError(
            f"{folder.url} holds {elements:,} parameters, {METADATA} says {abbreviated(str(count), 30)}",
            "A variable is missing, or the files are of different models: download the preset again.",
        )
    return count is not None


def _is_tied(said: bool | None, tensors: Mapping[str, TensorInfo], where: str) -> bool:
    """Whether the head is the embedding: the weights show it. `said`: what the config or the family says; None: nothing."""
    tied = "lm_head.weight" not in tensors
    if said is not None and bool(said) is not tied:
        holds = "no head of its own" if tied else "a head of its own"
        raise SourceCorruptError(f"{where} means tie_word_embeddings {said}, the weights hold {holds}")
    return tied
