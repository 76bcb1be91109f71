"""NVTX ranges around a step and its phases, for Nsight Systems; nothing where neither nvtx nor a torch with CUDA is there."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any, Protocol, Self


class Marker(Protocol):
    """Ranges of the whole process: they may begin and end on different threads."""

    def start_range(self, message: str) -> Any: ...

    def end_range(self, range_id: Any) -> None: ...


class _Torch:
    def __init__(self, nvtx: Any) -> None:
        self._nvtx = nvtx

    def start_range(self, message: str) -> Any:
        return self._nvtx.range_start(message)

    def end_range(self, range_id: Any) -> None:
        self._nvtx.range_end(range_id)


def find_marker() -> Marker | None:
    """The nvtx package, or torch's where torch is loaded already and has a GPU."""
    try:
        import nvtx
    except ImportError:
        torch = sys.modules.get("torch")
        return _Torch(torch.cuda.nvtx) if torch is not None and torch.cuda.is_available() else None
    marker: Marker = nvtx
    return marker


class Ranges:
    """One for the block, and within it one for each phase: a phase ends where the next one begins."""

    def __init__(self, name: str, marker: Marker | None) -> None:
        self._name = name
        self._marker = marker
        self._phase = ""
        self._open: list[Any] = []

    def phase(self, name: str) -> None:
        """The step is in this phase now."""
        if self._marker is None or name == self._phase:
            return
        if len(self._open) > 1:
            self._marker.end_range(self._open.pop())
        self._phase = name
        self._open.append(self._marker.start_range(name))

    def __enter__(self) -> Self:
        if self._marker is not None:
            self._open.append(self._marker.start_range(self._name))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        while self._marker is not None and self._open:
            self._marker.end_range(self._open.pop())
