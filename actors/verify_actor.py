"""Executes all ranks of a pipeline stage in lockstep, the source model that they are compared with, or its miniature."""

from __future__ import annotations

from actors.step_actor import StepActor
from orchestrator.core.step import Kind


class VerifyActor(StepActor):
    """Runs orchestrator.work.verify, orchestrator.work.reference and orchestrator.work.miniature."""

    kinds = (Kind.VERIFY, Kind.REFERENCE, Kind.MINIATURE)
