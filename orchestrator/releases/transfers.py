"""Those who hear how a transfer comes on: bytes as they are verified, and files as they end."""

from __future__ import annotations

from typing import Protocol

from orchestrator.releases.manifest import FileRecord


class Listener(Protocol):
    """Hears of a pull or a verification; called from several threads."""

    def on_begin(self, num_files: int, num_bytes: int) -> None:
        """How much there is, once, before anything else."""
        ...

    def on_bytes(self, num_bytes: int) -> None:
        """More bytes are done."""
        ...

    def on_file(self, file: FileRecord) -> None:
        """A file is done."""
        ...


class Silent:
    """Hears, and says nothing."""

    def on_begin(self, num_files: int, num_bytes: int) -> None:
        pass

    def on_bytes(self, num_bytes: int) -> None:
        pass

    def on_file(self, file: FileRecord) -> None:
        pass
