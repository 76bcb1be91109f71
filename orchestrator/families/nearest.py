"""The families nearest to a model that none knows, by the names of its tensors and the keys of its config.json."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from orchestrator.base.errors import ArchitectureError, some_of
from orchestrator.families import FAMILIES
from orchestrator.families.wrappers import WRAPPERS
from orchestrator.model.config_keys import unknown_keys
from orchestrator.model.rules import Family

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True, slots=True)
class Nearness:
    """How near a family is to a model."""

    family: str
    read: int
    """Kinds of tensors (names without numbers) of the model that the family's rules read."""
    kinds: int
    """Kinds of tensors of the model; 0: they are not known."""
    unread: tuple[str, ...]
    """Kinds that no rule reads."""
    missing: tuple[str, ...]
    """Kinds that the family always reads, and that the model lacks."""
    unknown_keys: tuple[str, ...]
    """Keys of config.json that the family does not know."""

    def line(self) -> str:
        """Return the facts as a sentence without its subject."""
        parts = [f"reads {self.read} of {self.kinds} kinds of tensors"] if self.kinds else []
        parts += [f"lacks a rule for {some_of(self.unread)}"] if self.unread else []
        parts += [f"needs {some_of(self.missing)}, which is not there"] if self.missing else []
        parts += (
            [f"does not know the keys {some_of(self.unknown_keys)}"] if self.unknown_keys else ["knows all keys of config.json"]
        )
        return "; ".join(parts)


def nearest(architecture: str, config: Mapping[str, Any], names: Iterable[str] = ()) -> list[Nearness]:
    """Return all families, the nearest first: by the differences in kinds of tensors and in keys, then the architecture's name."""
    kinds = {kind_of(name) for name in names}

    def distance(found: Nearness) -> tuple[int, float]:
        names = FAMILIES[found.family].architectures
        likeness = max(SequenceMatcher(None, architecture.lower(), name.lower()).ratio() for name in names)
        return len(found.unread) + len(found.missing) + len(found.unknown_keys), -likeness

    return sorted((_nearness(family, config, kinds) for family in FAMILIES.values()), key=distance)


def kind_of(name: str) -> str:
    """Return a tensor's name with * for the numbers of layers and experts."""
    return _NUMBER.sub("*", name)


def _nearness(family: Family, config: Mapping[str, Any], kinds: set[str]) -> Nearness:
    readable, always = set[str](), set[str]()
    for rule in family.rules:
        sources = {part.source.format(layer="*", expert="*") for part in rule.parts}
        readable |= sources
        always |= set() if rule.when else sources
    passed_over = {kind for kind in kinds if any(kind_of(entry.pattern) == kind for entry in family.ignored)}
    return Nearness(
        family=family.name,
        read=len(kinds & readable),
        kinds=len(kinds),
        unread=tuple(sorted(kinds - readable - passed_over)),
        missing=tuple(sorted(always - kinds)) if kinds else (),
        unknown_keys=tuple(unknown_keys(config, family.config)),
    )


def unsupported(architecture: str, found: Nearness) -> ArchitectureError:
    """Return the error of an architecture that no family has: what is supported, by kind, and which family is nearest (`found`)."""
    return ArchitectureError(
        f"unsupported architecture {architecture!r}. Nearest is {found.family}, which {found.line()}. {supported()}",
        f"`orchestrator family check SOURCE --family {found.family}` says what differs; docs/add-a-family.md shows how to add a "
        "family; `orchestrator family list` prints all architectures.",
    )


def supported() -> str:
    """Return a sentence that lists the families by kind."""
    kinds: dict[str, list[str]] = {"dense": [], "mixtures of experts": [], "latent attention": []}
    for family in FAMILIES.values():
        kind = "latent attention" if family.config.latent else "mixtures of experts" if family.config.experts else "dense"
        kinds[kind].append(family.name)
    listed = "; ".join(f"{kind}: {', '.join(sorted(names))}" for kind, names in kinds.items())
    return f"Supported: {listed}; and the language models of {len(WRAPPERS)} larger models (vision, speech)."
