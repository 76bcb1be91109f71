"""Compiles one rank. With backend `tensorrt` it holds a GPU of the target type; with `tensorrt_rtx` it needs none."""

from __future__ import annotations

from actors.step_actor import StepActor
from orchestrator.core.step import Kind


class EngineActor(StepActor):
    """Runs orchestrator.work.build, and orchestrator.work.convert for the next stage between the engines of two."""

    kinds = (Kind.BUILD,)
    also = (Kind.CONVERT,)
