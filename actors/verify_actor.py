"""Actor that executes all ranks of a pipeline stage in lockstep, the reference model, or the miniature."""

from __future__ import annotations

from actors.step_actor import StepActor
from orchestrator.planning.steps import Kind


class VerifyActor(StepActor):
    """Runs orchestrator.work.verify.step, orchestrator.work.reference.step and orchestrator.work.miniature."""

    kinds = (Kind.VERIFY, Kind.REFERENCE, Kind.MINIATURE)
