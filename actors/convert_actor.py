"""Cuts one layer group of the source for all tensor-parallel ranks of a stage. CPU only."""

from __future__ import annotations

from actors.step_actor import StepActor
from orchestrator.core.step import Kind


class ConvertActor(StepActor):
    """Runs orchestrator.work.convert."""

    kinds = (Kind.CONVERT,)
