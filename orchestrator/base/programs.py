"""Where other programs are: beside this Python first, as pip installs them there, whether its environment is activated or not."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path


def find_program(name: str) -> str | None:
    """The path of a program beside this Python, or on the PATH; None when it is nowhere."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)
