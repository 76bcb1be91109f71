"""Commands that tests and benchmarks stop."""

from __future__ import annotations

import signal


def hear_interrupts() -> None:
    """For Popen's preexec_fn: let Ctrl-C through, as a terminal does. Shells ignore it for what they start in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
