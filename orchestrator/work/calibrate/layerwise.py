"""Layer-wise calibration that survives its worker: Model Optimizer's checkpoints, copied to the store under the step's digest.

Model Optimizer writes a folder per finished layer and then, by rename, its manifest.json. Before the next layer runs, all new
files are copied, the manifest last. So an attempt on any node can always resume from the copy.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from orchestrator.stores.store import ObjectChangedError, ObjectMissingError
from orchestrator.work.calibrate.part_model import PartModel
from orchestrator.work.context import Context

_MANIFEST = "manifest.json"
_NEXT_INPUTS = "next_inputs.pt"
"""Input of the next layer: as large as all hidden states, and needed for the last finished layer only."""
_NUM_TOKENS = "num_tokens.json"
"""Our own file: tokens that each expert has seen so far."""
_BLOCK_BYTES = 16 * 2**20


class LayerwiseFolder:
    """Checkpoint folder of a step, in scratch, and its copy under `resume/<digest>/`."""

    def __init__(self, context: Context, digest: str, part: PartModel) -> None:
        """Fetch an earlier attempt's copy, and save new files before each layer of `part` runs."""
        self._context, self._part = context, part
        self._prefix = f"resume/{digest}/"
        self.path = context.scratch / "layerwise"
        self._kept: dict[str, tuple[int, int]] = {}
        self._committed: tuple[int, int] | None = None
        self.path.mkdir()
        self._fetch()
        for layer in part.model.model.layers:
            layer.register_forward_pre_hook(self._before_layer)
        context.after_commit.append(self._remove)

    def _before_layer(self, _layer: Any, _args: Any) -> None:
        """Save after a finished layer; no earlier hook sees its files."""
        manifest = self.path / _MANIFEST
        if manifest.is_file() and _version(manifest) != self._committed:
            self.save()

    def save(self) -> None:
        """Copy new and changed files, the manifest last; then drop what only earlier layers needed."""
        (self.path / _NUM_TOKENS).write_text(json.dumps(self._part.token_counts()))
        files = [path for path in self.path.rglob("*") if path.is_file() and path.suffix != ".tmp"]
        for path in sorted(files, key=lambda path: path.name == _MANIFEST):
            name = path.relative_to(self.path).as_posix()
            if self._kept.get(name) != _version(path):
                self._put(path, name)
                self._kept[name] = _version(path)
        for path in sorted(self.path.glob(f"layer_*/{_NEXT_INPUTS}"))[:-1]:
            self._context.store.delete(self._prefix + path.relative_to(self.path).as_posix())
            path.unlink()
        self._committed = _version(self.path / _MANIFEST)

    def _put(self, path: Path, name: str) -> None:
        with path.open("rb") as file, self._context.store.writer(self._prefix + name, path.stat().st_size) as writer:
            while block := file.read(_BLOCK_BYTES):
                writer.write(block)

    def _fetch(self) -> None:
        """Fetch the copy if an attempt can resume from it. Another attempt, still running elsewhere, may be changing it."""
        store = self._context.store
        objects = {info.key.removeprefix(self._prefix) for info in store.list(self._prefix)}
        finished = self._finished_layers(objects)
        if not finished:
            return
        try:
            for name in objects:
                self._get(name)
        except (ObjectMissingError, ObjectChangedError):
            shutil.rmtree(self.path)
            self.path.mkdir()
            self._kept.clear()
            self._context.log("calibrate: another attempt is still running: start over")
            return
        self._committed = _version(self.path / _MANIFEST)
        self._part.add_token_counts(json.loads((self.path / _NUM_TOKENS).read_text()))
        self._context.log(f"calibrate: an earlier attempt finished {finished} layers: resume after them")

    def _get(self, name: str) -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for block in self._context.store.blocks(self._prefix + name):
                file.write(block)
        self._kept[name] = _version(path)

    def _finished_layers(self, objects: set[str]) -> int:
        """Return the number of layers in the copy; 0 when no attempt can resume from it."""
        if _MANIFEST not in objects or _NUM_TOKENS not in objects:
            return 0
        last = int(json.loads(self._context.store.get(self._prefix + _MANIFEST))["last_completed_layer"])
        return last + 1 if f"layer_{last:04d}/{_NEXT_INPUTS}" in objects else 0

    def _remove(self) -> None:
        """Remove the copy, the manifest first: half a copy must not look like a whole one."""
        store = self._context.store
        keys = [info.key for info in store.list(self._prefix)]
        for key in sorted(keys, key=lambda key: not key.endswith(_MANIFEST)):
            store.delete(key)


def _version(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns
