"""Compiles one rank. With backend `tensorrt` it holds a GPU of the target type; with `tensorrt_rtx` it needs none."""

from __future__ import annotations

from actors.step_actor import StepActor
from orchestrator.planning.steps import Kind


class EngineActor(StepActor):
    """Runs orchestrator.work.build.step, and orchestrator.work.convert.step for the next stage between the engines of two."""

    kinds = (Kind.BUILD,)
    also = (Kind.CONVERT,)
