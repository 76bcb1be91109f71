"""YAML as people write it into specs, cluster files and rates files: read strictly, with the line of every value.

Plain words mean what they mean in YAML 1.2: `true` and `false` are the only booleans, numbers are decimal or hexadecimal, and all
else (on, no, 1:30, 010, 0o17, 1_000, 2024-01-01) is text, which a field for a number refuses. Keys are text and stand once in
a mapping. Tags, several documents and anchors that contain themselves are refused; depth, size and what aliases stand for are
bounded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from orchestrator.base.errors import SpecError, abbreviated, is_text

MAX_BYTES = 256 * 1024
MAX_DEPTH = 32
MAX_VALUES = 50_000
"""Most scalars, lists and mappings in a document, those that aliases repeat included."""
_MAX_DIGITS = 40
_STRING_TAG = "tag:yaml.org,2002:str"
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_SPECIAL = {"": None, "~": None, "null": None, "Null": None, "NULL": None, "true": True, "True": True, "TRUE": True,
            "false": False, "False": False, "FALSE": False}  # fmt: skip
_TABS = "Indent with spaces: YAML forbids tabs there."
_SYNTAX = "Correct the line; text with : # [ { & * ! | > ' \" % @ ` at its start, or ': ' in it, stands in quotes."

_BREAKS = "\x85\u2028\u2029"

Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Mark:
    """Where a value stands, and how it was written."""

    line: int
    """From 1."""
    text: str | None = None
    """Text of a plain scalar."""


@dataclass(frozen=True)
class Document:
    """The values of a YAML text, and where each stands."""

    data: Any
    marks: Mapping[Path, Mark] = field(default_factory=dict)


def parse_yaml(data: bytes, origin: str) -> Document:
    """Read the one document of a YAML text. Raises SpecError with line and column; `origin` is what the text is called."""
    text = _decoded(data, origin)
    reader = _Reader(origin)
    try:
        return reader.read(yaml.parse(text, Loader=yaml.SafeLoader))
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        where = f"line {before.count(chr(10)) + 1}, column {len(before) - before.rfind(chr(10))}"
        code = f"U+{ord(error.character):04X}" if isinstance(error.character, str) else f"U+{error.character:04X}"
        raise SpecError(f"{origin} is not YAML: {where}: the character {code} is not allowed", "Remove it.") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = abbreviated(str(error.problem or error.context), 200)
        raise SpecError(f"{origin} is not YAML: {where}{problem}", _TABS if r"'\t'" in problem else _SYNTAX) from None
    except yaml.YAMLError as error:
        raise SpecError(f"{origin} is not YAML: {abbreviated(str(error), 200)}", _SYNTAX) from None


def _decoded(data: bytes, origin: str) -> str:
    if len(data) > MAX_BYTES:
        raise SpecError(f"{origin} has more than {MAX_BYTES:,} bytes: this is no file of this kind", "Check the path.")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise SpecError(f"{origin} is UTF-16, not UTF-8", "Save it as UTF-8.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SpecError(f"{origin} is not UTF-8: line {line}: byte 0x{data[error.start]:02x}", "Save it as UTF-8.") from None


class _Reader:
    """Makes values of parser events, which PyYAML's stubs describe too little of; one per text."""

    def __init__(self, origin: str) -> None:
        self._origin = origin
        self._marks: dict[Path, Mark] = {}
        self._anchors: dict[str, tuple[Any, int]] = {}
        self._open: set[str] = set()
        self._count = 0

    def read(self, events: Iterator[Any]) -> Document:
        data, documents = None, 0
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise self._error(event, "a second document begins here, one was expected", "Remove the line ---.")
            elif isinstance(event, yaml.NodeEvent):
                data = self._value(event, events, ())
        return Document(data, self._marks)

    def _error(self, event: Any, what: str, advice: str = "") -> SpecError:
        mark = event.start_mark
        return SpecError(f"{self._origin}: line {mark.line + 1}, column {mark.column + 1}: {what}", advice)

    def _value(self, event: Any, events: Iterator[Any], path: Path) -> Any:
        self._marks[path] = Mark(event.start_mark.line + 1, _plain_text(event))
        if len(path) > MAX_DEPTH:
            raise self._error(event, f"values in one another more than {MAX_DEPTH} deep")
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event)
        self._add(event, 1)
        if event.tag not in (None, "!", _STRING_TAG):
            raise self._error(
                event, f"tags such as {abbreviated(event.tag, 40)} are not read here", "Write the value without a tag."
            )
        before, anchor = self._count, event.anchor
        if anchor is not None:
            self._open.add(anchor)
        value = self._made(event, events, path)
        if anchor is not None:
            self._open.discard(anchor)
            self._anchors[anchor] = value, self._count - before + 1
        return value

    def _made(self, event: Any, events: Iterator[Any], path: Path) -> Any:
        if isinstance(event, yaml.SequenceStartEvent):
            found: list[Any] = []
            while not isinstance(item := next(events), yaml.SequenceEndEvent):
                found.append(self._value(item, events, (*path, len(found))))
            return found
        if isinstance(event, yaml.MappingStartEvent):
            return self._mapping(events, path)
        return self._scalar(event)

    def _mapping(self, events: Iterator[Any], path: Path) -> dict[str, Any]:
        found: dict[str, Any] = {}
        lines: dict[str, int] = {}
        while not isinstance(item := next(events), yaml.MappingEndEvent):
            key = self._key(item)
            if key in found:
                name = abbreviated(".".join(map(str, (*path, key))), 100)
                raise self._error(
                    item, f"{name} stands here again, first in line {lines[key]}", "Remove one, or write both parts under one key."
                )
            lines[key] = item.start_mark.line + 1
            found[key] = self._value(next(events), events, (*path, key))
        return found

    def _key(self, event: Any) -> str:
        if isinstance(event, yaml.ScalarEvent):
            key = self._scalar(event)
            if isinstance(key, str):
                return key
            raise self._error(event, f"the key {abbreviated(event.value, 40)} is not text", "Put it in quotes.")
        raise self._error(event, "a key that is a list, a mapping or an alias", "Keys are words.")

    def _scalar(self, event: Any) -> Any:
        text: str = event.value
        if not is_text(text):
            raise self._error(event, "half of a character (U+D800 to U+DFFF)", "Remove the escape.")
        if not event.implicit[0] or event.tag == _STRING_TAG:  # in quotes, a block, or !!str
            return text
        if text in _SPECIAL:
            return _SPECIAL[text]
        digits = sum(character.isdigit() for character in text)
        if _INTEGER.fullmatch(text) or _FLOAT.fullmatch(text):
            if digits > _MAX_DIGITS:
                raise self._error(event, f"a number of {digits:,} digits", "Put it in quotes if it is text.")
            return int(text, 0) if _INTEGER.fullmatch(text) else float(text)
        return text

    def _alias(self, event: Any) -> Any:
        name = abbreviated(event.anchor, 40)
        if event.anchor in self._open:
            raise self._error(event, f"*{name} stands within &{name}, which contains it")
        if event.anchor not in self._anchors:
            raise self._error(
                event, f"*{name} names no anchor before it", f"Put text that begins with * in quotes, or write &{name} first."
            )
        value, size = self._anchors[event.anchor]
        self._add(event, size)
        return value

    def _add(self, event: Any, count: int) -> None:
        self._count += count
        if self._count > MAX_VALUES:
            raise self._error(event, f"more than {MAX_VALUES:,} values, those that aliases repeat included", "Use fewer aliases.")


def _plain_text(event: Any) -> str | None:
    is_plain = isinstance(event, yaml.ScalarEvent) and event.implicit[0]
    return str(event.value) if is_plain else None


class _Dumper(yaml.SafeDumper):
    """Quotes text that would be read as something else: 1e5, which is text for PyYAML, and rare line breaks."""


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    is_other = _INTEGER.fullmatch(text) or _FLOAT.fullmatch(text) or any(mark in text for mark in _BREAKS)
    return dumper.represent_scalar(_STRING_TAG, text, style='"' if is_other else None)


_Dumper.add_representer(str, _represent_text)


def dump_yaml(value: Any) -> str:
    """Plain data as text that `parse_yaml` reads as the same."""
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True))
