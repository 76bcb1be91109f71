"""The model families, one table per file, and the table of all families.

A family's table turns its tensors into rank tensors. To add a family, write `families/<name>.py` with a `Family` value and list
it here; the family suite of the tests picks it up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.base.errors import ArchitectureError
from orchestrator.families.afmoe import AFMOE
from orchestrator.families.apertus import APERTUS
from orchestrator.families.arcee import ARCEE
from orchestrator.families.cohere import COHERE, COHERE2, COHERE2_MOE
from orchestrator.families.cwm import CWM
from orchestrator.families.deepseek import DEEPSEEK_V3
from orchestrator.families.dots import DOTS1, SOLAR_OPEN
from orchestrator.families.ernie import ERNIE, ERNIE_MOE
from orchestrator.families.exaone import EXAONE4, EXAONE_MOE
from orchestrator.families.flex_olmo import FLEX_OLMO
from orchestrator.families.gemma import GEMMA, GEMMA2, GEMMA3, VAULTGEMMA
from orchestrator.families.gemma4 import GEMMA4
from orchestrator.families.glm import GLM4_MOE, GLM4_MOE_LITE
from orchestrator.families.glm_dense import GLM, GLM4
from orchestrator.families.gpt_oss import GPT_OSS
from orchestrator.families.granite import GRANITE, GRANITE_MOE, GRANITE_MOE_SHARED
from orchestrator.families.helium import HELIUM
from orchestrator.families.hunyuan import HUNYUAN_DENSE, HUNYUAN_MOE, HY3
from orchestrator.families.llama import LLAMA
from orchestrator.families.llama4 import LLAMA4
from orchestrator.families.minimax import MINIMAX_M2
from orchestrator.families.mistral import MINISTRAL3, MISTRAL
from orchestrator.families.mistral4 import MISTRAL4
from orchestrator.families.mixtral import MIXTRAL
from orchestrator.families.nemotron import JAIS2, NEMOTRON
from orchestrator.families.olmo import OLMO2
from orchestrator.families.olmo3 import OLMO3
from orchestrator.families.olmoe import OLMOE
from orchestrator.families.phi import PHI3
from orchestrator.families.phimoe import PHIMOE
from orchestrator.families.qwen import QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE
from orchestrator.families.seed import SEED_OSS
from orchestrator.families.smollm import SMOLLM3
from orchestrator.families.starcoder import STARCODER2
from orchestrator.families.youtu import YOUTU
from orchestrator.model.rules import Family

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        LLAMA,
        MISTRAL,
        MINISTRAL3,
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
        GLM4_MOE,
        MINIMAX_M2,
        DEEPSEEK_V3,
        GLM4_MOE_LITE,
        GPT_OSS,
        MISTRAL4,
        ERNIE,
        ERNIE_MOE,
        DOTS1,
        SOLAR_OPEN,
        OLMOE,
        SEED_OSS,
        SMOLLM3,
        ARCEE,
        APERTUS,
        GLM,
        GLM4,
        OLMO3,
        EXAONE4,
        HELIUM,
        CWM,
        YOUTU,
        STARCODER2,
        NEMOTRON,
        JAIS2,
        COHERE,
        COHERE2,
        FLEX_OLMO,
        LLAMA4,
        EXAONE_MOE,
        HY3,
        HUNYUAN_DENSE,
        HUNYUAN_MOE,
        GRANITE_MOE,
        GRANITE_MOE_SHARED,
        GEMMA4,
        VAULTGEMMA,
        AFMOE,
        COHERE2_MOE,
        PHIMOE,
    )
}


def family_for(architecture: str) -> Family:
    """Return the family of a Hugging Face architecture. Raises ArchitectureError."""
    family = find(architecture)
    if family is None:
        raise ArchitectureError(
            f"unsupported architecture {architecture!r}", "`orchestrator family list` prints what is supported."
        )
    return family


def find(architecture: str) -> Family | None:
    """Return the family of a Hugging Face architecture; None: there is none."""
    return next((family for family in FAMILIES.values() if architecture in family.architectures), None)


def family_named(name: str) -> Family:
    """Return the family of this name. Raises ArchitectureError, which lists the known names."""
    if name not in FAMILIES:
        raise ArchitectureError(f"no family is named {name!r}", f"Families: {', '.join(sorted(FAMILIES))}, or auto.")
    return FAMILIES[name]


def check_kind(config: Mapping[str, Any], family: Family, where: str) -> None:
    """Check that config.json belongs to the family that the spec names. Raises ArchitectureError."""
    kind = config.get("model_type")
    own = next((other.name for other in FAMILIES.values() if kind in other.config.model_types), family.name)
    if own != family.name:
        raise ArchitectureError(
            f"source.family is {family.name}, but model_type in config.json of {where} is {kind!r}: transformers loads a {own}",
            f"Set source.family to {own} or auto.",
        )
