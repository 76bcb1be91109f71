"""Readers of source formats: headers first, rows on demand. The table of formats and their interface.

To add a format, write `checkpoints/<name>.py` with the functions of `Format` and list it here.
"""

from __future__ import annotations

import fnmatch
import importlib
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from orchestrator.base.errors import LfsPointerError, SourceMissingError, SpecError
from orchestrator.model.checkpoint import CheckpointIndex, SourceFile, TensorInfo
from orchestrator.stores import open_source
from orchestrator.stores.source import LFS_MAGIC, ByteSource, SourceFolder

FORMATS: dict[str, str] = {
    "bin": "orchestrator.checkpoints.bin",
    "meta": "orchestrator.checkpoints.meta",
    "megatron": "orchestrator.checkpoints.megatron",
    "trtllm": "orchestrator.checkpoints.trtllm",
    "keras": "orchestrator.checkpoints.keras",
    "orbax": "orchestrator.checkpoints.orbax",
    "huggingface": "orchestrator.checkpoints.huggingface",
}
"""Name -> module, in the order in which `auto` tries them. huggingface is last: it reports what is missing beside a config.json."""


class Format(Protocol):
    """Interface of a module of FORMATS."""

    def matches(self, names: list[str]) -> bool:
        """Whether a folder with these files is of this format."""
        ...

    def read_index(self, folder: SourceFolder) -> CheckpointIndex:
        """Return every tensor under its Hugging Face name, from headers only. Raises the Source... errors."""
        ...

    def read_rows(self, source: ByteSource, tensor: TensorInfo, begin: int, end: int, out: memoryview) -> None:
        """Fill `out` with rows [begin, end) of the tensor's first axis, in the tensor's dtype and C order."""
        ...


COMPANIONS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja", "chat_template.json",
    "params.json",
)  # fmt: skip
"""Files beside the weights that serving the model needs, of formats that do not name their own in PUBLISHED."""
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin", "*.pth", "*.gguf", "*.h5", "flax_model*.msgpack")


def format_named(name: str) -> Format:
    """Return the module of a format. Raises SpecError for an unknown name."""
    if name not in FORMATS:
        raise SpecError(f"no source format is called {name!r}", f"Formats: auto, {', '.join(FORMATS)}.")
    module: Format = importlib.import_module(FORMATS[name])
    return module


def read_source(path: str, source_format: str = "auto") -> tuple[CheckpointIndex, tuple[SourceFile, ...]]:
    """Return the index of the checkpoint at `path`, and its tokenizer and config files.

    Raises SpecError for an unknown format, SourceMissingError when `auto` finds none, and what the format's reader raises.
    """
    refuse_archive(path)
    folder = open_source(path)
    names = folder.names()
    if source_format == "auto":
        source_format = next((name for name in FORMATS if format_named(name).matches(names)), "")
        if not source_format:
            raise _unknown(path, names)
    index = format_named(source_format).read_index(folder)
    _check_indexes(folder, names)
    warnings = (*index.warnings, *passed_over(index, names))
    return replace(index, warnings=warnings), companions(folder, names, source_format)


def refuse_archive(path: str) -> None:
    """Refuse an archive of NeMo 1. Raises SourceMissingError."""
    if path.endswith(".nemo") and Path(path).is_file():  # folders of NeMo 2 may be called so
        raise SourceMissingError(
            f"{path} is an archive of NeMo 1, which is not read",
            "Convert it to Hugging Face's format with NeMo 1 (scripts/checkpoint_converters), or import it with NeMo 2.",
        )


_FOREIGN = {
    "adapter_config.json": (
        "is an adapter (LoRA), not a model",
        "Merge it into its base model first (peft: merge_and_unload, then save_pretrained), and build from that folder.",
    ),
    "model_index.json": ("is a diffusers pipeline", "Decoder-only language models are built here: give the folder of one."),
    "modules.json": ("is a sentence-transformers model", "Decoder-only language models are built here: give the folder of one."),
}
"""Files that mark folders of other kinds -> kind of folder, advice."""


def _unknown(path: str, names: list[str]) -> SourceMissingError:
    """Return the error of a folder that is of no known format."""
    for name, (what, advice) in _FOREIGN.items():
        if name in names:
            return SourceMissingError(f"{path} {what}: it holds {name} and no weights of a model", advice)
    if any(name.endswith(".gguf") for name in names):
        return SourceMissingError(
            f"{path} is a GGUF model, whose weights were rounded when it was made",
            "Build from the Hugging Face checkpoint that it was made from.",
        )
    held = f"it holds {', '.join(sorted(names)[:5])}" if names else "it holds no file"
    return SourceMissingError(f"{path} holds no checkpoint of a known format: {held}", f"Formats: {', '.join(FORMATS)}.")


def _check_indexes(folder: SourceFolder, names: list[str]) -> None:
    """Check that every index of weights, read or not, is JSON. Raises SourceCorruptError, LfsPointerError."""
    from orchestrator.checkpoints.huggingface import read_json

    for name in names:
        if name.endswith(".index.json") and "/" not in name:
            read_json(folder, name)


def passed_over(index: CheckpointIndex, names: list[str]) -> tuple[str, ...]:
    """Return a warning if the folder holds weights that the index does not read: a second set, or another model's."""
    read = {file.name for file in index.files}
    others = [name for name in names if name not in read and not name.startswith(".") and _is_weights(name)]
    if not others:
        return ()
    return (
        f"the source holds weights that are not read: {_as_sets(others)}. The build reads {_as_sets(sorted(read))} "
        f"(source.format {index.format})",
    )


def _is_weights(name: str) -> bool:
    base = name.rpartition("/")[2]
    return any(fnmatch.fnmatchcase(base, pattern) for pattern in _WEIGHTS)


def _as_sets(names: list[str]) -> str:
    """Join names that differ only in numbers: model-*-of-*.safetensors (4 files)."""
    sets: dict[str, list[str]] = {}
    for name in names:
        sets.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    shown = [members[0] if len(members) == 1 else f"{pattern} ({len(members)} files)" for pattern, members in sets.items()]
    return ", ".join(shown)


_TOKENIZER = tuple(name for name in COMPANIONS if name not in ("config.json", "params.json"))


def tokenizer_files(path: str) -> tuple[SourceFile, ...]:
    """Return the files of the tokenizer in the folder `path`, under Hugging Face's names, and generation_config.json.

    Raises SourceMissingError if there is no tokenizer, and as `companions` does.
    """
    folder = open_source(path)
    names = [name for name in folder.names() if name in _TOKENIZER]
    if not any(name.startswith(("tokenizer.", "vocab.")) for name in names):
        raise SourceMissingError(
            f"{path} holds no tokenizer: no tokenizer.json, tokenizer.model or vocab.json",
            "Set source.tokenizer to a folder in which a tokenizer was saved with save_pretrained, or leave it out.",
        )
    return companions(folder, names)


def published_names(source_format: str) -> Mapping[str, str]:
    """Return the tokenizer and config files of a format -> names under which they are published with a release.

    A format whose files have other names than Hugging Face's, or another meaning, gives them in PUBLISHED.
    """
    found: Mapping[str, str] = getattr(format_named(source_format), "PUBLISHED", {name: name for name in COMPANIONS})
    return found


def companions(folder: SourceFolder, names: list[str], source_format: str = "huggingface") -> tuple[SourceFile, ...]:
    """Return the tokenizer and config files among `names`, with the digests of their content as identity.

    Raises LfsPointerError, SourceLinkError; SourceCorruptError for a .json file without a JSON object.
    """
    from orchestrator.base.digest import digest_bytes
    from orchestrator.checkpoints.huggingface import parse_json
    from orchestrator.stores.confined import read_companion

    contents = {name: read_companion(folder, name) for name in published_names(source_format) if name in names}
    for name, data in contents.items():
        if data.startswith(LFS_MAGIC):
            raise LfsPointerError(f"{folder.url}/{name} is a Git-LFS pointer, not a tokenizer or config")
        if name.endswith(".json"):
            parse_json(data, f"{folder.url}/{name}")
    return tuple(SourceFile(name, len(data), "sha256:" + digest_bytes(data)) for name, data in contents.items())
