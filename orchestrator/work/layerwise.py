"""Layer-wise calibration that survives its worker: Model Optimizer's checkpoints, kept in the store under the step's digest.

Model Optimizer writes a folder per finished layer and then, by rename, its manifest.json. Between two layers it asks for the
next pass: that is when everything new is copied, the manifest last, so the copy is always one that it can resume from.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.work.context import Context

_MANIFEST = "manifest.json"
_BLOCK_BYTES = 16 * 2**20


class LayerwiseFolder:
    """The checkpoint folder of a step, in scratch, and its copy."""

    def __init__(self, context: Context, digest: str) -> None:
        self._context = context
        self._prefix = f"resume/{digest}/"
        self._folder = context.scratch / "layerwise"
        self._copied: dict[str, tuple[int, int]] = {}
        self._folder.mkdir()
        self._restore()

    def options(self) -> dict[str, Any]:
        """Of modelopt's LayerwiseConfig."""
        return {"enable": True, "checkpoint_dir": str(self._folder), "save_every": 1}

    def synced(self, forward: Callable[[Any], None]) -> Callable[[Any], None]:
        """`forward`, with everything that earlier layers left copied first."""

        def run(model: Any) -> None:
            self.save()
            forward(model)

        return run

    def save(self) -> None:
        """Copy what is new or changed; the manifest last."""
        files = [path for path in self._folder.rglob("*") if path.is_file() and path.suffix != ".tmp"]
        for path in sorted(files, key=lambda path: path.name == _MANIFEST):
            stat, name = path.stat(), path.relative_to(self._folder).as_posix()
            version = (stat.st_size, stat.st_mtime_ns)
            if self._copied.get(name) != version:
                self._put(path, name)
                self._copied[name] = version

    def _put(self, path: Path, name: str) -> None:
        with path.open("rb") as file, self._context.store.writer(self._prefix + name, path.stat().st_size) as writer:
            while block := file.read(_BLOCK_BYTES):
                writer.write(block)

    def _restore(self) -> None:
        store = self._context.store
        keys = [info.key for info in store.list(self._prefix)]
        for key in keys:
            name = key.removeprefix(self._prefix)
            path = self._folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(store.get(key))
            stat = path.stat()
            self._copied[name] = (stat.st_size, stat.st_mtime_ns)
        if keys:
            self._context.log(f"calibrate: resumes from {len(keys)} files of an earlier attempt")
