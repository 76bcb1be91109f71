"""Lookup of other programs: first beside this Python, where pip installs them even if its environment is not activated."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path


def find_program(name: str) -> str | None:
    """Return the path of a program beside this Python, or on the PATH. None: not found."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)
