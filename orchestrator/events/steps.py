"""What a cluster reports while steps run. Events survive JSON: a worker writes them, the driver reads them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from orchestrator.planning.steps import Failure, Outcome


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    digest: str
    """Of the step."""


class StepStarted(_Event):
    """An attempt began on a node."""

    type: Literal["started"] = "started"
    node: str
    attempt: int
    at: str = ""
    """When, on the node's clock: ISO 8601, UTC."""


class StepProgress(_Event):
    """How far a phase of a step is."""

    type: Literal["progress"] = "progress"
    phase: str
    """E.g. convert, parse, tactics."""
    done: int
    total: int
    unit: Literal["bytes", "steps"]


class StepSucceeded(_Event):
    """Final: the outcome is committed."""

    type: Literal["succeeded"] = "succeeded"
    outcome: Outcome


class StepFailed(_Event):
    """Final: this attempt came to nothing."""

    type: Literal["failed"] = "failed"
    failure: Failure


Event = Annotated[StepStarted | StepProgress | StepSucceeded | StepFailed, Field(discriminator="type")]
EVENT: TypeAdapter[StepStarted | StepProgress | StepSucceeded | StepFailed] = TypeAdapter(Event)
"""Decodes an event from JSON."""
AnyEvent = StepStarted | StepProgress | StepSucceeded | StepFailed
