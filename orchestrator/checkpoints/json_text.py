"""JSON files of a source, parsed strictly: no conflicting duplicate names, one error class."""

from __future__ import annotations

import json
from typing import Any

from orchestrator.base.errors import SourceCorruptError, abbreviated, is_text

_ADVICE = "Download the file again."


def json_value(data: bytes, where: str) -> Any:
    """Parse the JSON text of the file `where`. Raises SourceCorruptError.

    Refuses an object with two values of one name, because readers differ in which value they take. Accepts NaN and Infinity,
    which Python's json module writes.
    """
    try:
        value = json.loads(data, object_pairs_hook=_object)
        if b"\\ud" in data.lower() and not is_text(json.dumps(value, ensure_ascii=False)):
            raise ValueError("it holds half of a character (U+D800 to U+DFFF)")
        return value
    except (ValueError, RecursionError) as error:  # not UTF-8, thousands of digits, thousands of brackets
        raise SourceCorruptError(f"{where} is not JSON: {abbreviated(str(error), 200)}", _ADVICE) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: dict[str, Any] = {}
        for name, value in pairs:
            if name in seen and seen[name] != value:
                raise ValueError(f"an object has two values of {abbreviated(name, 60)!r}")
            seen[name] = value
    return found
