"""The source's tokenizer and config files as a local folder, for libraries that read folders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from orchestrator.base.digest import digest_bytes
from orchestrator.base.errors import SourceCorruptError
from orchestrator.checkpoints import published_names
from orchestrator.model.checkpoint import SourceFile
from orchestrator.stores import open_source
from orchestrator.work.context import Context


def companion_folder(locations: Mapping[str, str], files: Iterable[SourceFile], context: Context, source_format: str) -> Path:
    """Copy `files` of the step's tokenizer, else its source, to scratch under the names that a release gives them.

    Returns the folder. Raises SourceMissingError, or SourceCorruptError for a changed file.
    """
    folder = context.scratch / "tokenizer"
    folder.mkdir()
    elsewhere = locations.get("tokenizer")
    origin = open_source(elsewhere or locations["source"])
    names = published_names("huggingface" if elsewhere else source_format)
    for file in files:
        data = origin.read(file.name)
        if file.identity != "sha256:" + digest_bytes(data):
            raise SourceCorruptError(f"{file.name} of the source was changed during the build", "Run the build again.")
        (folder / names[file.name]).write_bytes(data)
    return folder
