"""Actor that converts one layer group of the source for all tensor-parallel ranks of a stage. CPU only."""

from __future__ import annotations

from actors.step_actor import StepActor
from orchestrator.planning.steps import Kind


class ConvertActor(StepActor):
    """Runs orchestrator.work.convert.step."""

    kinds = (Kind.CONVERT,)
