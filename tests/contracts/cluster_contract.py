"""What every place that runs steps must do.

A subclass gives three fixtures: `cluster`, open and with nothing to do, closed by the fixture afterwards; `two_cores`, the same
on one node with two cores for steps; and `tasks`, which those clusters can run.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from orchestrator.events import StepEvent, StepFailed, StepStarted, StepSucceeded
from orchestrator.planning.steps import FailureKind, Resources, Task
from orchestrator.scheduling.cluster import Cluster

PATIENCE_SECONDS = 120.0
"""Real seconds after which a cluster that reports nothing has failed the test."""


@dataclass(frozen=True)
class ContractTasks:
    """Steps with different digests that need nothing."""

    succeeding: tuple[Task, ...]
    """At least three."""
    failing: Task
    """Ends with an error of the step's own in every attempt."""


def collect(cluster: Cluster, tasks: Iterable[Task]) -> list[StepEvent]:
    """Every event until each of `tasks` has ended."""
    waiting = {task.step.digest for task in tasks}
    events: list[StepEvent] = []
    deadline = time.monotonic() + PATIENCE_SECONDS
    while waiting:
        assert time.monotonic() < deadline, f"no final event of {waiting}"
        found = cluster.events(1.0)
        waiting -= {event.digest for event in found if isinstance(event, StepSucceeded | StepFailed)}
        events.extend(found)
    return events


def alone(task: Task, order: int) -> Task:
    """It needs two cores, and has this place in the plan."""
    step = task.step.model_copy(update={"resources": Resources(cpus=2)})
    return task.model_copy(update={"step": step, "order": order})


def by_step(events: Iterable[StepEvent]) -> dict[str, list[StepEvent]]:
    found: dict[str, list[StepEvent]] = defaultdict(list)
    for event in events:
        found[event.digest].append(event)
    return dict(found)


class ClusterContract:
    """Run by every member of clusters/ and by the Ray cluster."""

    def test_start_every_task_starts_once_and_ends_once(self, cluster: Cluster, tasks: ContractTasks) -> None:
        started = [*tasks.succeeding, tasks.failing]
        for task in started:
            cluster.start(task)
        found = by_step([*collect(cluster, started), *cluster.events(0.1)])
        assert set(found) == {task.step.digest for task in started}
        for events in found.values():
            kinds = [event.event for event in events]
            assert kinds[0] == "started"
            assert kinds[-1] in {"succeeded", "failed"}
            assert set(kinds[1:-1]) <= {"progress"}

    def test_start_finished_task_reports_its_outcome(self, cluster: Cluster, tasks: ContractTasks) -> None:
        task = tasks.succeeding[0]
        cluster.start(task)
        final = collect(cluster, [task])[-1]
        assert isinstance(final, StepSucceeded)
        outcome = final.outcome
        assert (outcome.digest, outcome.name, outcome.kind) == (task.step.digest, task.step.name, task.step.kind)
        assert outcome.node

    def test_start_failing_task_is_reported_and_others_go_on(self, cluster: Cluster, tasks: ContractTasks) -> None:
        started = [tasks.failing, *tasks.succeeding]
        for task in started:
            cluster.start(task)
        final = {digest: events[-1] for digest, events in by_step(collect(cluster, started)).items()}
        failed = final.pop(tasks.failing.step.digest)
        assert isinstance(failed, StepFailed)
        assert failed.failure.kind is FailureKind.APPLICATION
        assert failed.failure.message
        assert all(isinstance(event, StepSucceeded) for event in final.values())

    def test_start_another_attempt_of_a_failed_step_ends_on_its_own(self, cluster: Cluster, tasks: ContractTasks) -> None:
        for attempt in (1, 2):
            task = tasks.failing.model_copy(update={"attempt": attempt})
            cluster.start(task)
            events = collect(cluster, [task])
            assert [event.event for event in events if event.event != "progress"] == ["started", "failed"]
            assert isinstance(events[0], StepStarted)
            assert events[0].attempt == attempt
            assert events[0].node

    def test_events_room_of_an_ended_step_goes_to_what_it_made_ready_before_what_waited(
        self, two_cores: Cluster, tasks: ContractTasks
    ) -> None:
        first, waiting, ready = (alone(task, order) for task, order in zip(tasks.succeeding, (0, 9, 1), strict=False))
        two_cores.start(first)
        two_cores.start(waiting)
        collect(two_cores, [first])
        two_cores.start(ready)
        events = collect(two_cores, [waiting, ready])
        started = [event.digest for event in events if isinstance(event, StepStarted)]
        assert started == [ready.step.digest, waiting.step.digest]

    def test_events_nothing_to_report_returns_in_time(self, cluster: Cluster, tasks: ContractTasks) -> None:
        before = time.monotonic()
        assert cluster.events(0.0) == []
        assert cluster.events(0.2) == []
        assert time.monotonic() - before < PATIENCE_SECONDS / 10

    def test_events_without_a_limit_waits_for_something(self, cluster: Cluster, tasks: ContractTasks) -> None:
        cluster.start(tasks.succeeding[0])
        assert cluster.events(None)

    def test_now_never_goes_back(self, cluster: Cluster, tasks: ContractTasks) -> None:
        times = [cluster.now()]
        cluster.start(tasks.succeeding[0])
        times.append(cluster.now())
        collect(cluster, [tasks.succeeding[0]])
        times.append(cluster.now())
        cluster.events(0.1)
        times.append(cluster.now())
        assert times == sorted(times)
        assert times[-1] - times[-2] >= 0.09

    def test_close_again_and_with_running_tasks_is_no_error(self, cluster: Cluster, tasks: ContractTasks) -> None:
        for task in tasks.succeeding:
            cluster.start(task)
        cluster.close()
        cluster.close()

    def test_close_running_tasks_end_without_success(self, cluster: Cluster, tasks: ContractTasks) -> None:
        for task in tasks.succeeding:
            cluster.start(task)
        cluster.close()
        assert [event for event in cluster.events(0.2) if isinstance(event, StepSucceeded)] == []
