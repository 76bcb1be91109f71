"""Last checks before a release is published: the compiled networks are the executed ones, and the miniature was proven."""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.base.errors import VerificationError
from orchestrator.planning.facts import BuildFacts, MiniatureFacts, VerifyFacts
from orchestrator.planning.options import BuildOptions, VerifyOptions
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
    """Compare the network that each engine was compiled from with the one executed for its rank.

    Does nothing for a plan without verification. Raises VerificationError that names the ranks.
    """
    executed: dict[int, str | None] = {}
    for step in plan.of_kind(Kind.VERIFY):
        stage = VerifyOptions.model_validate(step.options).network.stage
        recorded = outcomes[step.digest].facts_as(VerifyFacts).networks or (None,) * stage.tp
        executed |= {stage.rank(tp_rank): digest for tp_rank, digest in enumerate(recorded)}
    if not executed:
        return
    compiled = {
        BuildOptions.model_validate(step.options).rank: outcomes[step.digest].facts_as(BuildFacts).network
        for step in plan.of_kind(Kind.BUILD)
    }
    differing = [rank for rank, digest in sorted(compiled.items()) if digest is None or digest != executed.get(rank)]
    if differing:
        ranks = ", ".join(map(str, differing))
        raise VerificationError(
            f"the engines of ranks {ranks} were compiled from other networks than were verified",
            "Delete the outcomes of these build and verify steps in the store, and build again.",
        )
