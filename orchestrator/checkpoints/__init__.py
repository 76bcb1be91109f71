"""Readers of source formats: headers first, bytes on demand."""

from __future__ import annotations

from pathlib import Path

from orchestrator.core.checkpoint import CheckpointIndex, SourceFile


def read_source(path: str) -> tuple[CheckpointIndex, tuple[SourceFile, ...]]:
    """The index of the checkpoint at `path`, and its tokenizer and config files. Raises as the format's reader does."""
    from orchestrator.checkpoints import huggingface

    folder = Path(path)
    return huggingface.read_index(folder), huggingface.companions(folder)
