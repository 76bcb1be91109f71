"""Child processes that end with their parent."""

from __future__ import annotations

import ctypes
import signal

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


def die_with_parent() -> None:
    """For Popen's preexec_fn: ask Linux to end the child when the thread that started it dies, even by SIGKILL.

    The child stays in its parent's process group: Ray cleans that group up, a session of its own would survive.
    """
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
