"""Weights that a decode step of a mixture reads on a rank, in either form of the experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.engines.experts import computed_experts, expert_choice
from orchestrator.model.stage import ExpertForm, StageOptions
from orchestrator.model.weight_map import LayerGroup
from orchestrator.spec.build import BuildConfig


@dataclass(frozen=True, slots=True)
class DecodeReads:
    """Weights that one decode step of one sequence reads on a rank of a stage, in bytes."""

    form: ExpertForm
    """Form of the experts that the stage's engines have."""
    reason: str
    dense: int
    """With all experts."""
    gathered: int
    """With the experts that a token chooses; at most, where choices of other ranks' experts repeat one."""


def decode_reads(stage: StageOptions, groups: Sequence[LayerGroup], engine: BuildConfig) -> DecodeReads:
    """Return the reads of a stage with experts. `groups`: of the stage. Raises ValueError for a model without experts."""
    targets = [target for group in groups for target in group.targets if target.name != "transformer.vocab_embedding.weight"]
    mixtures = {_mixture(target.name) for target in targets if len(target.shape) == 3 and ".mlp.fc." in target.name}
    experts = [target for target in targets if _mixture(target.name) in mixtures and _is_of_experts(target.name)]
    total, of_experts = (sum(target.num_bytes for target in some) for some in (targets, experts))
    assert stage.config.moe is not None
    local = stage.config.moe.num_experts // stage.moe_ep
    choice = expert_choice(stage, engine)
    return DecodeReads(choice.form, choice.reason, total, total - of_experts + of_experts * computed_experts(stage, 1) // local)


def _mixture(name: str) -> str:
    return name.partition(".mlp.")[0]


def _is_of_experts(name: str) -> bool:
    return ".mlp.fc." in name or ".mlp.proj." in name
