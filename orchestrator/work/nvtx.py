"""NVTX ranges around a step and its phases, for Nsight Systems. No ranges without nvtx or a torch with CUDA."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Self

Marker = tuple[Callable[[str], Any], Callable[[Any], object]]
"""Begins a process range, and ends it, perhaps on another thread."""
NO_MARKER: Marker = (lambda message: None, lambda range_id: None)


def find_marker() -> Marker:
    """Return the nvtx package's, or torch's if torch is already loaded and has a GPU; without either NO_MARKER."""
    try:
        import nvtx
    except ImportError:
        torch = sys.modules.get("torch")
        if torch is None or not torch.cuda.is_available():
            return NO_MARKER
        return torch.cuda.nvtx.range_start, torch.cuda.nvtx.range_end
    return nvtx.start_range, nvtx.end_range


class Ranges:
    """One range for the block and, within it, one per phase. A phase ends where the next begins."""

    def __init__(self, name: str, marker: Marker) -> None:
        self._name, self._phase = name, ""
        self._begin, self._end = marker
        self._open: list[Any] = []

    def phase(self, name: str) -> None:
        """Begin the phase's range."""
        if name == self._phase:
            return
        if len(self._open) > 1:
            self._end(self._open.pop())
        self._phase = name
        self._open.append(self._begin(name))

    def __enter__(self) -> Self:
        self._open.append(self._begin(self._name))
        return self

    def __exit__(self, *raised: object) -> None:
        while self._open:
            self._end(self._open.pop())
