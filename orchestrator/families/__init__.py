"""The model families: one table per file, and the table of tables.

A family says how its tensors become rank tensors. To add one, write `families/<name>.py` with one `Family` value and name
it here; the family suite of the tests picks it up.
"""

from __future__ import annotations

from orchestrator.core.errors import ArchitectureError
from orchestrator.core.rules import Family
from orchestrator.families.llama import LLAMA

FAMILIES: dict[str, Family] = {family.name: family for family in (LLAMA,)}


def family_for(architecture: str) -> Family:
    """The family of a Hugging Face architecture. Raises ArchitectureError naming those that there are."""
    for family in FAMILIES.values():
        if architecture in family.architectures:
            return family
    known = ", ".join(sorted(name for family in FAMILIES.values() for name in family.architectures))
    raise ArchitectureError(f"unsupported architecture {architecture!r}", f"Supported: {known}. Adding one is a file in families/.")


def family_named(name: str) -> Family:
    """A family by its own name. Raises ArchitectureError."""
    if name not in FAMILIES:
        raise ArchitectureError(f"no family is named {name!r}", f"Families: {', '.join(sorted(FAMILIES))}, or auto.")
    return FAMILIES[name]
