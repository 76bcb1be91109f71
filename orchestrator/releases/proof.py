"""Last checks before a release is published: the compiled networks are the executed ones, and the miniature was proven."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from orchestrator.base.errors import VerificationError
from orchestrator.model.stage import StageOptions
from orchestrator.planning.facts import BuildFacts, ExportFacts, MiniatureFacts, VerifyFacts
from orchestrator.planning.options import BuildOptions, ExportOptions, VerifyOptions
from orchestrator.planning.plan import Plan
from orchestrator.planning.steps import Kind, Outcome


def check_miniature(plan: Plan, outcomes: Mapping[str, Outcome]) -> None:
    """Check that the build's miniature has an outcome. Raises VerificationError."""
    for step in plan.of_kind(Kind.MINIATURE):
        if step.digest in outcomes and isinstance(outcomes[step.digest].facts, MiniatureFacts):
            return
    raise VerificationError(
        "config.json is not proven to mean here what it means in transformers: the build's miniature has no outcome",
        "Delete its outcome in the store, if there is one, and build again.",
    )


def check_networks(plan: Plan, outcomes: Mapping[str, Outcome]) -> None:
    """Compare the networks of the engines with those that were executed, and with those of the portable graphs.

    Raises VerificationError that names the ranks.
    """
    compiled: dict[int, str | None] = {
        BuildOptions.model_validate(step.options).rank: outcomes[step.digest].facts_as(BuildFacts).network
        for step in plan.of_kind(Kind.BUILD)
    }
    executed: dict[int, str] = {}
    exported: dict[int, str] = {}
    for step in plan.steps:
        if step.kind is Kind.VERIFY:
            stage = VerifyOptions.model_validate(step.options).network.stage
            executed |= _by_rank(stage, outcomes[step.digest].facts_as(VerifyFacts).networks)
        elif step.kind is Kind.EXPORT:
            stage = ExportOptions.model_validate(step.options).network.stage
            exported |= _by_rank(stage, outcomes[step.digest].facts_as(ExportFacts).networks)
    has_kind = {step.kind for step in plan.steps}
    for kind, found, what in ((Kind.VERIFY, executed, "were verified"), (Kind.EXPORT, exported, "the portable graphs hold")):
        differing = [rank for rank, digest in sorted(compiled.items()) if digest is None or digest != found.get(rank)]
        if kind in has_kind and differing:
            ranks = ", ".join(map(str, differing))
            raise VerificationError(
                f"the engines of ranks {ranks} were compiled from other networks than {what}",
                f"Delete the outcomes of these build and {kind.value} steps in the store, and build again.",
            )


def _by_rank(stage: StageOptions, networks: Sequence[str]) -> dict[int, str]:
    return {stage.rank(tp_rank): digest for tp_rank, digest in enumerate(networks)}
