"""A step as a stream of events, which any cluster passes on to the driver."""

from __future__ import annotations

import datetime
import queue
import threading
import traceback
from collections.abc import Iterator

from orchestrator.events import StepEvent, StepFailed, StepStarted, StepSucceeded
from orchestrator.planning.steps import Task
from orchestrator.work import log_of, run
from orchestrator.work.failures import failure_of
from orchestrator.work.profiling import stream_profiled


def stream(task: Task, node: str) -> Iterator[StepEvent]:
    """Run the task in a new thread; yields its start, its progress, and exactly one final event."""
    if task.profile is not None:
        yield from stream_profiled(task, node)
        return
    events: queue.SimpleQueue[StepEvent] = queue.SimpleQueue()

    def work() -> None:
        try:
            outcome = run(task, events.put, node)
        except BaseException as error:  # even SystemExit of a library must reach the driver as an event
            text = "".join(traceback.format_exception(error))
            events.put(StepFailed(digest=task.step.digest, failure=failure_of(error, node, log_of(error), text)))
        else:
            events.put(StepSucceeded(digest=task.step.digest, outcome=outcome))

    at = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    yield StepStarted(digest=task.step.digest, node=node, attempt=task.attempt, at=at)
    thread = threading.Thread(target=work, name=task.step.name, daemon=True)
    thread.start()
    while True:
        event = events.get()
        yield event
        if isinstance(event, (StepSucceeded, StepFailed)):
            thread.join()
            return
