"""Layer-wise calibration that survives its worker: Model Optimizer's checkpoints, kept in the store under the step's digest.

Model Optimizer writes a folder per finished layer and then, by rename, its manifest.json. Before the next layer runs,
everything new is copied, the manifest last, so the copy is always one that it can resume from, on any node.
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
"""What a layer hands to the next: as large as all hidden states, and of use for the last finished layer only."""
_NUM_TOKENS = "num_tokens.json"
"""Ours: how many tokens each expert saw so far."""
_BLOCK_BYTES = 16 * 2**20


class LayerwiseFolder:
    """The checkpoint folder of a step, in scratch, and its copy under `resume/<digest>/`."""

    def __init__(self, context: Context, digest: str, part: PartModel) -> None:
        """Fetches what an earlier attempt left; every layer of `part` will keep what is new when it is about to run."""
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
        """Of all places that a calibration passes through, the first after a layer was finished."""
        manifest = self.path / _MANIFEST
        if manifest.is_file() and _version(manifest) != self._committed:
            self.save()

    def save(self) -> None:
        """Copy what is new or changed, the manifest last; then drop what only earlier layers needed."""
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
        """The copy, if it is one to resume from; an attempt that still runs elsewhere may be changing it."""
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
            self._context.log("calibrate: another attempt is still running, this one starts over")
            return
        self._committed = _version(self.path / _MANIFEST)
        self._part.add_token_counts(json.loads((self.path / _NUM_TOKENS).read_text()))
        self._context.log(f"calibrate: an earlier attempt finished {finished} layers, resumes behind them")

    def _get(self, name: str) -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for block in self._context.store.blocks(self._prefix + name):
                file.write(block)
        self._kept[name] = _version(path)

    def _finished_layers(self, objects: set[str]) -> int:
        """How many layers the copy holds; 0 when it is none to resume from."""
        if _MANIFEST not in objects or _NUM_TOKENS not in objects:
            return 0
        last = int(json.loads(self._context.store.get(self._prefix + _MANIFEST))["last_completed_layer"])
        return last + 1 if f"layer_{last:04d}/{_NEXT_INPUTS}" in objects else 0

    def _remove(self) -> None:
        """The manifest first: half a copy must not look like a whole one."""
        store = self._context.store
        keys = [info.key for info in store.list(self._prefix)]
        for key in sorted(keys, key=lambda key: not key.endswith(_MANIFEST)):
            store.delete(key)


def _version(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns
