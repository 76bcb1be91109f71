"""JSON that a source holds: no name twice, every mistake one error."""

from __future__ import annotations

import json
from typing import Any

from orchestrator.base.errors import SourceCorruptError, abbreviated, is_text

_ADVICE = "Download the file again: whoever wrote it wrote JSON."


def json_value(data: bytes, where: str) -> Any:
    """The value of a JSON text, `where` being its file. Raises SourceCorruptError.

    A name that stands twice in an object with two values is refused: readers differ in which one they take. NaN and Infinity are
    read, as Python's own writer writes them.
    """
    try:
        value = json.loads(data, object_pairs_hook=_object)
        if b"\\ud" in data.lower() and not is_text(json.dumps(value, ensure_ascii=False)):
            raise ValueError("it holds half of a character (U+D800 to U+DFFF)")
        return value
    except (ValueError, RecursionError) as error:  # no UTF-8, thousands of digits, thousands of brackets
        raise SourceCorruptError(f"{where} is not JSON: {abbreviated(str(error), 200)}", _ADVICE) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: dict[str, Any] = {}
        for name, value in pairs:
            if name in seen and seen[name] != value:
                raise ValueError(f"{abbreviated(name, 60)!r} stands twice in an object, with two values")
            seen[name] = value
    return found
