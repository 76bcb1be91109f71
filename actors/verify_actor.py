"""Executes all ranks of a pipeline stage in lockstep, the source model that they are compared with, or its miniature."""

from __future__ import annotations

from actors.step_actor import StepActor
from orchestrator.planning.steps import Kind


class VerifyActor(StepActor):
    """Runs orchestrator.work.verify.step, orchestrator.work.reference.step and orchestrator.work.miniature."""

    kinds = (Kind.VERIFY, Kind.REFERENCE, Kind.MINIATURE)
