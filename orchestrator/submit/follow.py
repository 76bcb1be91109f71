"""Follow a build to its end, on any cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from orchestrator.events import Errored, Event, Published
from orchestrator.submit.protocol import Followed, Notice


def follow(
    followed: Followed, show: Callable[[Event | Notice | str], None], lines: Iterable[str] | None = None
) -> Published | None:
    """Show a build to its end and return its outcome; None after Ctrl-C, which leaves it running. Raises the build's own error.

    The final event is returned or raised, not shown. With `lines`, these are shown in place of the events.
    """
    try:
        for item in lines or followed.events():
            if not isinstance(item, (Published, Errored)):  # the final event of an attempt need not be the build's
                show(item)
    except KeyboardInterrupt:
        return None
    return followed.result()
