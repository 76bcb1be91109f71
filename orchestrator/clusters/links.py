"""Transfers over shared links: max-min fair, on a simulated clock.

A transfer crosses several links (the store, a node's network, its disk). Between events each transfer has a constant rate: no link
exceeds its limit, and no transfer could be faster without slowing one that is no faster. With one common link this is processor
sharing. Rates change only when a transfer begins or ends, so the time of the next end is known exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_SAME_TIME = 1e-12
"""Transfers that would end within this fraction of a step of the clock end together."""


@dataclass
class _Transfer:
    path: tuple[str, ...]
    """Links of the path that have a limit."""
    every: tuple[str, ...]
    num_bytes: int
    left: float
    rate: float = math.inf

    @property
    def seconds(self) -> float:
        return self.left / self.rate


class Links:
    """Links by name. `limits` are in bytes per second; None or a missing name: no limit."""

    def __init__(self, limits: Mapping[str, float | None]) -> None:
        self._limits = {name: float(limit) for name, limit in limits.items() if limit is not None}
        self._transfers: dict[str, _Transfer] = {}
        self.carried: dict[str, int] = {}
        """Bytes of ended transfers, by link."""

    def begin(self, name: str, path: Sequence[str], num_bytes: int) -> None:
        """Begin a transfer over all links of `path`."""
        self._transfers[name] = _Transfer(tuple(link for link in path if link in self._limits), tuple(path), num_bytes, num_bytes)
        self._share()

    def next_end(self) -> float:
        """Return the seconds until the next transfer ends; infinite without transfers."""
        return min((transfer.seconds for transfer in self._transfers.values()), default=math.inf)

    def advance(self, seconds: float) -> list[str]:
        """Advance the clock, at most to the next end; returns the ended transfers, in order of their begin."""
        ended = [name for name, transfer in self._transfers.items() if transfer.seconds <= seconds * (1 + _SAME_TIME)]
        for name, transfer in self._transfers.items():
            if name not in ended:
                transfer.left -= transfer.rate * seconds
        for name in ended:
            transfer = self._transfers.pop(name)
            for link in transfer.every:
                self.carried[link] = self.carried.get(link, 0) + transfer.num_bytes
        if ended:
            self._share()
        return ended

    def rates(self) -> dict[str, float]:
        """Return the bytes per second of every transfer."""
        return {name: transfer.rate for name, transfer in self._transfers.items()}

    def _share(self) -> None:
        """Raise the rates on all links evenly. When a link is full, the rates of its transfers are final."""
        room = dict(self._limits)
        waiting = [transfer for transfer in self._transfers.values() if transfer.path]
        while waiting:
            crossing: dict[str, int] = {}
            for transfer in waiting:
                for link in transfer.path:
                    crossing[link] = crossing.get(link, 0) + 1
            tightest = min(crossing, key=lambda link: room[link] / crossing[link])
            rate = room[tightest] / crossing[tightest]
            for transfer in waiting:
                if tightest in transfer.path:
                    transfer.rate = rate
                    for link in transfer.path:
                        room[link] = max(room[link] - rate, 0.0)
            waiting = [transfer for transfer in waiting if tightest not in transfer.path]
