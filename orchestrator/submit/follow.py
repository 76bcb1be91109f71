"""The loop that follows a build to its end, whatever runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from orchestrator.events.builds import BuildEvent, Errored, Published
from orchestrator.submit.protocol import Followed, Notice


def follow(
    followed: Followed, show: Callable[[BuildEvent | Notice | str], None], lines: Iterable[str] | None = None
) -> Published | None:
    """Show a build to its end; returns its outcome, None after Ctrl-C: then it runs on. Raises the build's own error.

    Its last word is not shown but returned or raised. With `lines`, these are shown in place of its events.
    """
    try:
        for item in lines or followed.events():
            if not isinstance(item, (Published, Errored)):  # that of an attempt need not be the build's
                show(item)
    except KeyboardInterrupt:
        return None
    return followed.result()
