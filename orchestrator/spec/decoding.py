"""From plain data (YAML, JSON, the command line) to frozen values, with errors that name every wrong field and its line."""

from __future__ import annotations

import difflib
import functools
import typing
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, ValidationInfo, field_validator

from orchestrator.base.errors import SpecError, abbreviated

if TYPE_CHECKING:
    from orchestrator.spec.yaml_text import Mark, Path

_SHOWN_MISTAKES = 12


class Frozen(BaseModel):
    """A decoded value: immutable, and strict about its keys and about what is a number."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_written_as_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic takes true for 1 and '2' for 2: whoever wrote on, 1:30 or 0o2 meant neither."""
        if info.field_name in _number_fields(cls):
            _refuse_words(value)
        return value


@functools.cache
def _number_fields(model: type[BaseModel]) -> frozenset[str]:
    """Fields that hold numbers and nothing else, or lists of them."""
    kinds = {name: set(_leaves(Annotated[info.annotation, *info.metadata, None])) for name, info in model.model_fields.items()}
    return frozenset(name for name, found in kinds.items() if found & {int, float} and not found & {bool, str})


def _leaves(kind: Any) -> Iterator[type]:
    """The scalar types in a type; a number with a decoder of its own counts as text too."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is Annotated:
        yield from _leaves(arguments[0])
        if any(isinstance(item, BeforeValidator) for item in arguments[1:]):
            yield str
    elif typing.get_origin(kind) is Literal:
        yield from map(type, arguments)
    elif typing.get_origin(kind) is dict:
        yield from _leaves(arguments[1])
    elif arguments:
        for argument in arguments:
            yield from _leaves(argument)
    elif isinstance(kind, type):
        yield kind


def _refuse_words(value: Any) -> None:
    if isinstance(value, bool):
        raise ValueError(f"expected a number, not {str(value).lower()}")
    if isinstance(value, str):
        raise ValueError(f"expected a number, not the text {abbreviated(value, 40)!r}")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
        _refuse_words(item)


T = TypeVar("T", bound=Frozen)


def decode(model: type[T], data: Any, origin: str, marks: Mapping[Path, Mark] | None = None) -> T:
    """Decode plain data into `model`; `marks` say where in `origin` values stand.

    Raises SpecError that names every wrong path, to a dozen.
    """
    if not isinstance(data, dict):
        got = "nothing" if data is None else f"a {type(data).__name__}"
        raise SpecError(f"{origin}: expected a mapping of fields, got {got}")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        entries = error.errors(include_url=False)
        lines = [_line(model, entry, marks or {}) for entry in entries[:_SHOWN_MISTAKES]]
        if len(entries) > _SHOWN_MISTAKES:
            lines.append(f"and {len(entries) - _SHOWN_MISTAKES:,} more mistakes")
        raise SpecError(f"{origin}: " + "; ".join(lines)) from None


def decode_yaml(model: type[T], text: bytes | str, origin: str) -> T:
    """Decode a YAML text into `model`. Raises SpecError that names every wrong path and its line."""
    from orchestrator.spec.yaml_text import parse_yaml

    document = parse_yaml(text.encode(errors="surrogatepass") if isinstance(text, str) else text, origin)
    return decode(model, document.data, origin, document.marks)


def _line(model: type[BaseModel], entry: Mapping[str, Any], marks: Mapping[Path, Mark]) -> str:
    loc, kind = entry["loc"], entry["type"]
    path = ".".join(abbreviated(str(part), 60) for part in loc) or "(top)"
    mark = _mark(loc, marks)
    where = f" (line {mark.line})" if mark is not None else ""
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(str(loc[-1])[:100], _field_names(model, loc[:-1]), n=1)
        return f"unknown key {path}{where}" + (f" (did you mean {near[0]}?)" if near else "")
    if kind == "missing":
        return f"missing key {path}{where}"
    given = entry["input"]
    if kind == "string_type" and isinstance(given, (int, float)) and mark is not None and mark.text is not None:
        written = abbreviated(mark.text, 40)
        return f'{path}{where}: {written} is a {_kind_name(given)}, text was expected: put it in quotes: "{written}"'
    if kind in ("model_type", "dict_type", "model_attributes_type"):
        fields = ", ".join(_field_names(model, loc)[:3])
        expected = f"a mapping with fields such as {fields}" if fields else "a mapping"
        return f"{path}{where}: expected {expected}, not {abbreviated(repr(given), 60)}"
    shown = f", not {abbreviated(repr(given), 60)}" if kind in ("literal_error", "string_pattern_mismatch") else ""
    return f"{path}{where}: {abbreviated(entry['msg'].removeprefix('Value error, '), 300)}{shown}"


def _kind_name(value: object) -> str:
    return "boolean" if isinstance(value, bool) else "number"


def _mark(loc: Path, marks: Mapping[Path, Mark]) -> Mark | None:
    """Mark of the value, or of the nearest mapping that it would stand in."""
    return next((marks[loc[:end]] for end in range(len(loc), -1, -1) if loc[:end] in marks), None)


def _field_names(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Field names of the model found by walking `loc` from `model`; empty when the walk leaves models."""
    current: Any = model
    for part in loc:
        info = current.model_fields.get(str(part)) if isinstance(current, type) and issubclass(current, BaseModel) else None
        annotation = info.annotation if info else None
        members = [annotation, *getattr(annotation, "__args__", ())]
        current = next((item for item in members if isinstance(item, type) and issubclass(item, BaseModel)), None)
        if current is None:
            return []
    return list(current.model_fields)
