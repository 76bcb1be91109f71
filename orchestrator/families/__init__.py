"""The model families: one table per file, and the table of tables.

A family says how its tensors become rank tensors. To add one, write `families/<name>.py` with one `Family` value and name
it here; the family suite of the tests picks it up.
"""

from __future__ import annotations

from orchestrator.core.errors import ArchitectureError
from orchestrator.core.rules import Family
from orchestrator.families.gemma import GEMMA, GEMMA2, GEMMA3
from orchestrator.families.granite import GRANITE
from orchestrator.families.llama import LLAMA
from orchestrator.families.mistral import MISTRAL
from orchestrator.families.mixtral import MIXTRAL
from orchestrator.families.olmo import OLMO2
from orchestrator.families.phi import PHI3
from orchestrator.families.qwen import QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        LLAMA,
        MISTRAL,
        QWEN2,
        QWEN3,
        GEMMA,
        GEMMA2,
        GEMMA3,
        PHI3,
        GRANITE,
        OLMO2,
        MIXTRAL,
        QWEN2_MOE,
        QWEN3_MOE,
    )
}


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
