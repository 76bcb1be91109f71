"""The kinds of step."""

from __future__ import annotations

from enum import StrEnum


class Kind(StrEnum):
    """Kind of a step. `work` has one function per kind."""

    MINIATURE = "miniature"
    REFERENCE = "reference"
    CALIBRATE = "calibrate"
    CONVERT = "convert"
    BUILD = "build"
    VERIFY = "verify"
    EXPORT = "export"
