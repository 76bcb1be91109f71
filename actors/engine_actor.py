"""Actor that compiles one rank. Backend `tensorrt` holds a GPU of the target type; `tensorrt_rtx` needs none."""

from __future__ import annotations

from actors.step_actor import StepActor
from orchestrator.planning.steps import Kind


class EngineActor(StepActor):
    """Runs orchestrator.work.build.step, and between the engines of two stages orchestrator.work.convert.step for the next."""

    kinds = (Kind.BUILD,)
    also = (Kind.CONVERT,)
