"""Actor that calibrates one pipeline stage, as the stage's rank 0."""

from __future__ import annotations

from actors.step_actor import StepActor
from orchestrator.planning.steps import Kind


class QuantizeActor(StepActor):
    """Runs orchestrator.work.calibrate.step."""

    kinds = (Kind.CALIBRATE,)
