"""NVTX ranges around a step and its phases, for Nsight Systems. No ranges without nvtx or a torch with CUDA."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any, Protocol, Self


class Marker(Protocol):
    """NVTX process ranges, which may begin and end on different threads."""

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
    """Return the nvtx package, or torch's NVTX if torch is already loaded and has a GPU; None without either."""
    try:
        import nvtx
    except ImportError:
        torch = sys.modules.get("torch")
        return _Torch(torch.cuda.nvtx) if torch is not None and torch.cuda.is_available() else None
    marker: Marker = nvtx
    return marker


class Ranges:
    """One range for the block and, within it, one per phase. A phase ends where the next begins."""

    def __init__(self, name: str, marker: Marker | None) -> None:
        self._name = name
        self._marker = marker
        self._phase = ""
        self._open: list[Any] = []

    def phase(self, name: str) -> None:
        """Begin the phase's range."""
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
