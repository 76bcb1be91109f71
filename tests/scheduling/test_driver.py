from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from orchestrator.base.errors import DtypeError, StepFailedError
from orchestrator.clusters.simulated import SimulatedCluster
from orchestrator.events import Event, StepEvent, StepRetried
from orchestrator.planning.plan import Plan
from orchestrator.planning.steps import Failure, FailureKind, Outcome, Task
from orchestrator.scheduling.driver import Result, drive
from orchestrator.spec.cluster import ClusterSpec, PoolSpec, RetrySpec
from tests.support.plans import LOST, WRONG, fake_plan, named, outcome_of

SPEC = ClusterSpec(
    store="memory://none",
    scratch="/scratch",
    pools={"default": PoolSpec(cpus=2)},
    retries=RetrySpec(max_attempts=3, backoff_seconds=4.0, max_backoff_seconds=6.0),
)
Failures = Mapping[tuple[str, int], Failure]


@dataclass
class Recorder:
    """A listener that remembers."""

    events: list[StepEvent] = field(default_factory=list)
    retries: list[tuple[str, int, float]] = field(default_factory=list)

    def __call__(self, event: Event) -> None:
        if isinstance(event, StepRetried):
            self.retries.append((event.step, event.attempt, event.delay_seconds))
        else:
            assert isinstance(event, StepEvent), "the driver announces neither plans nor nodes nor ends"
            self.events.append(event)


@dataclass
class Run:
    result: Result
    history: list[tuple[float, float, str]]
    recorder: Recorder
    started: list[Task]

    def names(self, digests: object, plan: Plan) -> set[str]:
        assert isinstance(digests, frozenset | set | Mapping)
        return {plan.step(digest).name for digest in digests}


class Spy(SimulatedCluster):
    """Remembers the tasks that it was given."""

    def __init__(self, spec: ClusterSpec, failures: Failures) -> None:
        super().__init__(spec, failures)
        self.tasks: list[Task] = []

    def start(self, task: Task) -> None:
        self.tasks.append(task)
        super().start(task)


def run(
    plan: Plan, failures: Failures | None = None, committed: Mapping[str, Outcome] | None = None, spec: ClusterSpec = SPEC
) -> Run:
    cluster, recorder = Spy(spec, failures or {}), Recorder()
    result = drive(plan, committed or {}, cluster, spec, recorder)
    history = [(span.start, span.end, span.name) for span in cluster.spans]
    return Run(result, history, recorder, cluster.tasks)


CHAIN = fake_plan({"a": [], "b": ["a"], "c": ["b"]}, {"a": 10.0, "b": 5.0, "c": 1.0})


def test_drive_steps_run_in_order_and_everything_is_committed() -> None:
    done = run(CHAIN)
    assert done.history == [(0.0, 10.0, "a"), (10.0, 15.0, "b"), (15.0, 16.0, "c")]
    assert done.names(done.result.ran, CHAIN) == done.names(done.result.outcomes, CHAIN) == {"a", "b", "c"}
    assert done.result.failures == {}
    done.result.raise_failures(CHAIN)


def test_drive_no_barrier_a_step_starts_when_its_own_needs_are_there() -> None:
    plan = fake_plan({"slow": [], "quick": [], "after": ["quick"]}, {"slow": 50.0, "quick": 1.0, "after": 2.0})
    assert run(plan).history == [(0.0, 1.0, "quick"), (1.0, 3.0, "after"), (0.0, 50.0, "slow")]


def test_drive_tasks_carry_what_their_needs_produced() -> None:
    done = run(CHAIN)
    first, second, _ = done.started
    assert first.inputs == {}
    assert second.inputs == {named(CHAIN, "a").digest: done.result.outcomes[named(CHAIN, "a").digest]}
    assert {(task.store, task.scratch, task.attempt) for task in done.started} == {("memory://none", "/scratch", 1)}


def test_drive_committed_steps_do_not_run_again() -> None:
    committed = {step.digest: outcome_of(step) for step in CHAIN.steps[:2]}
    done = run(CHAIN, committed=committed)
    assert [name for _, _, name in done.history] == ["c"]
    assert done.names(done.result.ran, CHAIN) == {"c"}
    assert done.names(done.result.outcomes, CHAIN) == {"a", "b", "c"}


def test_drive_everything_committed_starts_nothing() -> None:
    done = run(CHAIN, committed={step.digest: outcome_of(step) for step in CHAIN.steps})
    assert done.started == []
    assert done.result.ran == frozenset()


def test_drive_lost_machine_is_tried_again_after_the_backoff() -> None:
    done = run(CHAIN, {("b", 1): LOST, ("b", 2): LOST})
    assert done.history == [(0.0, 10.0, "a"), (10.0, 15.0, "b"), (19.0, 24.0, "b"), (30.0, 35.0, "b"), (35.0, 36.0, "c")]
    assert done.recorder.retries == [("b", 2, 4.0), ("b", 3, 6.0)]
    assert [task.attempt for task in done.started if task.step.name == "b"] == [1, 2, 3]
    assert done.result.failures == {}
    assert done.names(done.result.ran, CHAIN) == {"a", "b", "c"}


def test_drive_other_steps_run_during_a_backoff() -> None:
    plan = fake_plan({"flaky": [], "x": [], "y": ["x"]}, {"flaky": 1.0, "x": 2.0, "y": 1.0})
    done = run(plan, {("flaky", 1): LOST})
    assert done.history == [(0.0, 1.0, "flaky"), (0.0, 2.0, "x"), (2.0, 3.0, "y"), (5.0, 6.0, "flaky")]


def test_drive_machine_that_is_lost_every_time_is_given_up() -> None:
    done = run(CHAIN, {("a", attempt): LOST for attempt in (1, 2, 3)})
    assert [task.attempt for task in done.started] == [1, 2, 3]
    with pytest.raises(StepFailedError, match=r"a: node lost \(attempt 3 of 3\)") as caught:
        done.result.raise_failures(CHAIN)
    assert caught.value.exit_code == 23


WIDE = fake_plan({"bad": [], "running": [], "waiting": ["running"]}, {"bad": 1.0, "running": 9.0, "waiting": 1.0})


def test_drive_own_error_stops_new_starts_and_running_steps_finish() -> None:
    done = run(WIDE, {("bad", 1): WRONG})
    assert done.history == [(0.0, 1.0, "bad"), (0.0, 9.0, "running")]
    assert done.names(done.result.outcomes, WIDE) == done.names(done.result.ran, WIDE) == {"running"}
    assert done.names(done.result.failures, WIDE) == {"bad"}
    assert done.recorder.retries == []


def test_drive_own_error_is_raised_as_itself_with_its_step() -> None:
    with pytest.raises(DtypeError, match=r"^bad: weights are wrong") as caught:
        run(WIDE, {("bad", 1): WRONG}).result.raise_failures(WIDE)
    assert caught.value.advice == "mend them"
    assert caught.value.exit_code == 28


def test_drive_several_errors_the_first_is_raised_and_names_the_others() -> None:
    done = run(WIDE, {("bad", 1): WRONG, ("running", 1): LOST})
    assert done.names(done.result.failures, WIDE) == {"bad", "running"}
    with pytest.raises(DtypeError, match=r"bad: weights are wrong \(also failed: running\)"):
        done.result.raise_failures(WIDE)


def test_drive_waiting_retry_does_not_start_after_another_failure() -> None:
    plan = fake_plan({"flaky": [], "bad": []}, {"flaky": 1.0, "bad": 2.0})
    done = run(plan, {("flaky", 1): LOST, ("bad", 1): WRONG})
    assert done.history == [(0.0, 1.0, "flaky"), (0.0, 2.0, "bad")]


def test_drive_listener_hears_every_event_in_order() -> None:
    done = run(CHAIN, {("b", 1): LOST})
    heard = [(event.step, event.event) for event in done.recorder.events]
    assert {(event.step, event.node, event.attempt) for event in done.recorder.events} == {
        (name, "default/0", attempt) for name, attempt in (("a", 1), ("b", 1), ("b", 2), ("c", 1))
    }
    pairs = [("a", "succeeded"), ("b", "failed"), ("b", "succeeded"), ("c", "succeeded")]
    assert heard == [item for name, end in pairs for item in ((name, "started"), (name, end))]


def test_drive_tasks_that_wait_for_memory_all_run() -> None:
    plan = fake_plan({str(number): [] for number in range(6)}, memory_bytes=6 * 10**9)
    spec = SPEC.model_copy(update={"pools": {"default": PoolSpec(cpus=4, memory=13 * 10**9)}})
    done = run(plan, spec=spec)
    assert sorted(done.history) == [(float(number // 2), number // 2 + 1.0, str(number)) for number in range(6)]


def test_drive_cancelled_step_is_not_tried_again() -> None:
    done = run(CHAIN, {("a", 1): Failure(kind=FailureKind.CANCELLED, message="stopped")})
    assert len(done.started) == 1
    assert done.names(done.result.failures, CHAIN) == {"a"}


def test_drive_outcome_committed_by_a_lost_worker_is_found_before_the_retry() -> None:
    lost = named(CHAIN, "b")
    cluster, recorder = Spy(SPEC, {("b", 1): LOST}), Recorder()
    asked: list[str] = []

    def lookup(digest: str) -> Outcome | None:
        asked.append(digest)
        return outcome_of(lost)

    result = drive(CHAIN, {}, cluster, SPEC, recorder, lookup)
    assert asked == [lost.digest]
    assert [(task.step.name, task.attempt) for task in cluster.tasks] == [("a", 1), ("b", 1), ("c", 1)]
    assert set(result.outcomes) == {step.digest for step in CHAIN.steps}
    assert [failure.message for failure in result.lost[lost.digest]] == ["node lost"]
