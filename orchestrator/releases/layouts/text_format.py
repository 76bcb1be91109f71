"""Protobuf's text format, written without protobuf: a pull needs the base install only."""

from __future__ import annotations

from collections.abc import Sequence

Field = tuple[str, "str | Sequence[Field]"]
"""Name and value: the text of a scalar, or the fields of a message."""


def text_of(fields: Sequence[Field], comment: str) -> bytes:
    """Return the file of a message, below a comment of one line."""
    return "\n".join([f"# {comment}", *_lines(fields, "")]).encode() + b"\n"


def _lines(fields: Sequence[Field], indent: str) -> list[str]:
    found = []
    for name, value in fields:
        if isinstance(value, str):
            found.append(f"{indent}{name}: {value}")
        else:
            found += [f"{indent}{name} {{", *_lines(value, indent + "  "), f"{indent}}}"]
    return found


def quoted(text: str) -> str:
    """Quote a string; no character of a manifest's name can end it."""
    escaped = (character if character.isprintable() and character not in '"\\' else _octal(character) for character in text)
    return f'"{"".join(escaped)}"'


def _octal(character: str) -> str:
    return "".join(f"\\{byte:03o}" for byte in character.encode())
