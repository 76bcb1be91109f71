"""Versions of Ray as they stand in rayVersion."""

from __future__ import annotations

import re


def below(version: object, least: str) -> bool:
    """Whether a version is older than `least`, absent or not a version."""
    found = _numbers(version)
    return found is None or found < (_numbers(least) or ())


def _numbers(version: object) -> tuple[int, ...] | None:
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", str(version))
    return tuple(int(part or 0) for part in match.groups()) if match else None
