"""When a request to a store is made again, and after how long. Knows no protocol: clients tell the kinds of failure apart."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


class TransientError(Exception):
    """The same request may succeed a moment later, or may have succeeded already: its answer was lost."""


class RefusedCredentialsError(Exception):
    """The server does not take these credentials (any more): new ones may do."""


@dataclass(frozen=True, slots=True)
class Backoff:
    """How often a request is made, and the waits between: doubling, each drawn from its upper half."""

    max_attempts: int = 10
    first_seconds: float = 0.5
    max_seconds: float = 30.0
    sleep: Callable[[float], None] = time.sleep
    draw: Callable[[], float] = random.random
    """A number of [0, 1)."""

    def delays(self) -> Iterator[float]:
        """Seconds before the second, third, ... attempt."""
        for number in range(self.max_attempts - 1):
            yield min(self.first_seconds * 2**number, self.max_seconds) * (1 + self.draw()) / 2

    def run(self, attempt: Callable[[], T], renew: Callable[[], None]) -> T:
        """Call `attempt` until it returns; `renew` is called once, when credentials are refused.

        Raises the last TransientError, a second RefusedCredentialsError, and at once whatever else `attempt` raises.
        """
        renewed = False
        delays = self.delays()
        while True:
            try:
                return attempt()
            except RefusedCredentialsError:
                if renewed:
                    raise
                renewed = True
                renew()
            except TransientError:
                delay = next(delays, None)
                if delay is None:
                    raise
                self.sleep(delay)
