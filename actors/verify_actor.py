"""Executes all ranks of a pipeline stage in lockstep, or the source model that they are compared with."""

from __future__ import annotations

from actors.step_actor import StepActor
from orchestrator.core.step import Kind


class VerifyActor(StepActor):
    """Runs orchestrator.work.verify and orchestrator.work.reference."""

    kinds = (Kind.VERIFY, Kind.REFERENCE)
