"""A rule: a check of one kind of subject that yields problems, with the same advice each time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from orchestrator.submit.kubernetes.manifests import Subject

S = TypeVar("S", bound=Subject)
Found = Iterator[tuple[str, str]]
"""Pairs of a path within the subject, "" for itself, and the problem there."""


TYPES = "Compare with `kubectl explain`: text in place of a mapping or list, or a number in quotes."


@dataclass(frozen=True)
class Problem:
    """A rule that a manifest breaks."""

    rule: str
    """Id of the rule."""
    where: str
    """Object and path, e.g. `RayJob/build: spec.suspend`."""
    message: str
    advice: str

    def __str__(self) -> str:
        return f"{self.rule} {self.where}: {self.message}"


@dataclass(frozen=True)
class Rule(Generic[S]):
    """See the table in orchestrator.submit.kubernetes.rules."""

    id: str
    title: str
    """Condition that must hold."""
    subject: type[S]
    check: Callable[[S], Found]
    advice: str

    def problems(self, subject: Subject) -> Iterator[Problem]:
        """Return the problems of a subject; empty for a subject of another kind."""
        if not isinstance(subject, self.subject):
            return
        try:
            for path, message in self.check(subject):
                yield Problem(self.id, subject.where(path), message, self.advice)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            # Rules read fields as in the schema; the API server checks their types.
            yield Problem(self.id, subject.where(), f"a field is of another type than Kubernetes has there ({error})", TYPES)


def rule(id: str, subject: type[S], advice: str) -> Callable[[Callable[[S], Found]], Rule[S]]:  # noqa: A002
    """Decorate a check as a Rule, with the check's docstring as its title."""

    def make(check: Callable[[S], Found]) -> Rule[S]:
        return Rule(id, (check.__doc__ or "").strip(), subject, check, advice)

    return make


AnyRule = Rule[Any]
