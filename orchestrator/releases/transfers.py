"""Listeners to the progress of a transfer: verified bytes and finished files."""

from __future__ import annotations

from typing import Protocol

from orchestrator.releases.manifest import FileRecord


class Listener(Protocol):
    """Listener to a pull or a verification; called from several threads."""

    def on_begin(self, num_files: int, num_bytes: int) -> None:
        """Note the total size, once, before anything else."""
        ...

    def on_bytes(self, num_bytes: int) -> None:
        """Note that more bytes are done."""
        ...

    def on_file(self, file: FileRecord) -> None:
        """Note that a file is done."""
        ...

    def on_note(self, text: str) -> None:
        """Note what the layout of a pull cannot do."""
        ...


class Silent:
    """A listener that ignores everything."""

    def on_begin(self, num_files: int, num_bytes: int) -> None:
        pass

    def on_bytes(self, num_bytes: int) -> None:
        pass

    def on_file(self, file: FileRecord) -> None:
        pass

    def on_note(self, text: str) -> None:
        pass
