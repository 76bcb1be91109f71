"""Types of values in specs that pydantic has not."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from orchestrator.base.errors import abbreviated

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(value: Any) -> Any:
    """'5GB' or '16 GiB' to a number of bytes; numbers pass through. Raises ValueError."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([KMGT]?i?B?)\s*", value, re.IGNORECASE)
    unit = match.group(2).upper() if match else "?"
    unit = unit + "B" if unit in {"K", "M", "G", "T"} else "" if unit == "B" else unit
    if match is None or unit not in _UNITS:
        raise ValueError(f"{abbreviated(value, 40)!r} is not a size such as 5GB or 16GiB")
    return int(Decimal(match.group(1)) * _UNITS[unit])


NumBytes = Annotated[int, BeforeValidator(parse_bytes), Field(ge=0, lt=2**63)]
