"""Save states at the ends of layers to the store, so that the next attempt of a killed step resumes after them.

    resume/<digest of the step>/<first layer>-<last layer>-<sha256>.safetensors

A block is whole or missing, and valid only if it has the digest in its name. All attempts of a step compute the same states, so
blocks of two attempts may coexist. They are removed when the step is committed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.base.digest import digest_bytes
from orchestrator.base.errors import StoreError
from orchestrator.work.context import Context

SECONDS = 10.0
"""Time between two blocks: a shorter one slows a fast step, a longer one repeats more of a slow step."""
_SUFFIX = ".safetensors"
Arrays = Mapping[str, npt.NDArray[Any]]


class LayerStates:
    """Saved arrays of one step, by layer."""

    def __init__(
        self, context: Context, digest: str, *, only_last: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`only_last`: the last layer is enough to resume, so earlier blocks are removed."""
        self._context, self._only_last, self._clock = context, only_last, clock
        self._prefix = f"resume/{digest}/"
        self._pending: dict[int, Arrays] = {}
        self._written_at = clock()
        context.after_commit.append(self._remove)

    def saved(self) -> dict[int, dict[str, npt.NDArray[Any]]]:
        """Return the arrays of an earlier attempt's finished layers: 0 to n without a gap, or the last with `only_last`."""
        found: dict[int, dict[str, npt.NDArray[Any]]] = {}
        for info in list(self._context.store.list(self._prefix)):
            try:
                found |= self._read(info.key)
            except (StoreError, ValueError):  # removed by another attempt, or damaged: its layers are computed again
                continue
        if self._only_last:
            return {max(found): found[max(found)]} if found else {}
        whole = 0
        while whole in found:
            whole += 1
        return {layer: found[layer] for layer in range(whole)}

    def keep(self, layer: int, arrays: Callable[[], Arrays]) -> None:
        """Take the state at the end of a layer; it is written when the time since the last block is over.

        With `only_last`, `arrays` is called for a layer that is written only. Raises DamagedOutputError when an input is damaged.
        """
        is_due = self._clock() - self._written_at >= SECONDS
        if is_due or not self._only_last:
            self._pending[layer] = arrays()
        if is_due:
            self._write()

    def _read(self, key: str) -> dict[int, dict[str, npt.NDArray[Any]]]:
        from safetensors.numpy import load

        data = self._context.store.get(key)
        if digest_bytes(data) != key.removesuffix(_SUFFIX).rpartition("-")[2]:
            raise ValueError(f"{key} is damaged")
        layers: dict[int, dict[str, npt.NDArray[Any]]] = {}
        for name, array in load(data).items():
            number, _, rest = name.partition(".")
            layers.setdefault(int(number), {})[rest] = array
        return layers

    def _write(self) -> None:
        from safetensors.numpy import save

        self._context.checks.settle()  # a state made from damaged bytes would outlive their repair
        arrays = ((f"{layer}.{name}", array) for layer, named in self._pending.items() for name, array in named.items())
        data = save({name: np.ascontiguousarray(array) for name, array in arrays})
        before = [info.key for info in self._context.store.list(self._prefix)] if self._only_last else []
        key = f"{self._prefix}{min(self._pending)}-{max(self._pending)}-{digest_bytes(data)}{_SUFFIX}"
        self._context.store.put(key, data)
        for old in before:
            if old != key:
                self._context.store.delete(old)
        self._pending.clear()
        self._written_at = self._clock()

    def _remove(self) -> None:
        for info in list(self._context.store.list(self._prefix)):
            self._context.store.delete(info.key)
