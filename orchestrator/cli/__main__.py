"""The program: `orchestrator`, or `python -m orchestrator.cli`."""

from __future__ import annotations

import sys
from collections.abc import Callable

from orchestrator.base.errors import interruption
from orchestrator.cli.stopping import install


def main() -> None:
    """Run the command of sys.argv."""
    run(load)


def load() -> Callable[[], object]:
    """Import all commands."""
    from orchestrator.cli.commands import app

    return app


def run(load: Callable[[], Callable[[], object]]) -> None:
    """Load and run a program, which Ctrl-C and SIGTERM stop from here on."""
    stopping = install()
    try:
        load()()
    except BaseException as error:
        if not stopping.number:
            raise
        stop = interruption(stopping.number)
        if not isinstance(error, SystemExit) or error.code != stop.exit_code:  # an exit outside of a command: nothing was shown yet
            print(f"error: {stop.message}", file=sys.stderr)
        stopping.leave()


if __name__ == "__main__":
    main()
