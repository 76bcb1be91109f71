from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.events import StepFailed, StepProgressed, StepStarted, StepSucceeded
from orchestrator.planning.plan import Plan
from orchestrator.planning.steps import Consumed, Failure, FailureKind, Kind, Outcome, Output, Step
from orchestrator.scheduling.schedule import MAX_REPEATS, Schedule, Start
from orchestrator.spec.cluster import RetrySpec
from tests.support.plans import LOST, WRONG, fake_plan, named, outcome_of

RETRIES = RetrySpec(max_attempts=3, backoff_seconds=2.0, max_backoff_seconds=3.0)
DIAMOND = fake_plan({"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c"]}, {"b": 1.0, "c": 5.0})


def schedule_of(plan: Plan, committed: Mapping[str, Outcome] | None = None) -> Schedule:
    return Schedule(plan, committed or {}, RETRIES)


def names(commands: list[Start]) -> list[str]:
    return [command.step.name for command in commands]


def succeeded(step: Step) -> StepSucceeded:
    return StepSucceeded(digest=step.digest, outcome=outcome_of(step))


def failed(step: Step, failure: Failure) -> StepFailed:
    return StepFailed(digest=step.digest, failure=failure)


def test_start_only_steps_without_needs_begin() -> None:
    schedule = schedule_of(DIAMOND)
    assert names(schedule.start()) == ["a"]
    assert not schedule.done


def test_handle_step_starts_as_soon_as_its_own_needs_are_there() -> None:
    schedule = schedule_of(DIAMOND)
    schedule.start()
    assert names(schedule.handle(succeeded(named(DIAMOND, "a")))) == ["b", "c"]
    assert schedule.handle(succeeded(named(DIAMOND, "b"))) == []
    assert names(schedule.handle(succeeded(named(DIAMOND, "c")))) == ["d"]
    assert not schedule.done
    assert schedule.handle(succeeded(named(DIAMOND, "d"))) == []
    assert schedule.done
    assert set(schedule.outcomes) == {step.digest for step in DIAMOND.steps}


def test_start_steps_go_in_the_order_of_the_plan() -> None:
    plan = fake_plan({"late": [], "x": [], "chain": [], "behind": ["chain"]}, {"late": 2.0, "x": 2.0, "chain": 1.0, "behind": 9.0})
    assert names(schedule_of(plan).start()) == ["late", "x", "chain"]


def test_start_everything_committed_is_done_at_once() -> None:
    committed = {step.digest: outcome_of(step) for step in DIAMOND.steps}
    schedule = schedule_of(DIAMOND, committed)
    assert schedule.start() == []
    assert schedule.done


def test_start_committed_step_hides_what_only_it_needs() -> None:
    plan = fake_plan({"shared": [], "only": [], "done": ["shared", "only"], "open": ["shared"]})
    done = named(plan, "done")
    schedule = schedule_of(plan, {done.digest: outcome_of(done)})
    assert names(schedule.start()) == ["shared"]
    assert names(schedule.handle(succeeded(named(plan, "shared")))) == ["open"]
    schedule.handle(succeeded(named(plan, "open")))
    assert schedule.done
    assert named(plan, "only").digest not in schedule.outcomes


def test_handle_lost_machine_retries_after_doubling_delays_then_gives_up() -> None:
    plan = fake_plan({"a": []})
    step = named(plan, "a")
    schedule = schedule_of(plan)
    schedule.start()
    assert schedule.handle(failed(step, LOST)) == [Start(step, 2, 2.0)]
    assert schedule.num_running == 1
    assert schedule.handle(failed(step, LOST)) == [Start(step, 3, 3.0)]
    assert len(schedule.lost[step.digest]) == 2
    assert schedule.handle(failed(step, LOST)) == []
    assert schedule.done
    assert schedule.failures[step.digest].message == "node lost (attempt 3 of 3)"
    assert schedule.failures[step.digest].kind is FailureKind.INFRASTRUCTURE


def test_handle_own_error_stops_new_starts_and_waits_for_what_runs() -> None:
    plan = fake_plan({"bad": [], "good": [], "after": ["good"]})
    schedule = schedule_of(plan)
    schedule.start()
    assert schedule.handle(failed(named(plan, "bad"), WRONG)) == []
    assert not schedule.done
    assert schedule.handle(succeeded(named(plan, "good"))) == []
    assert schedule.done
    assert named(plan, "good").digest in schedule.outcomes
    assert schedule.failures == {named(plan, "bad").digest: WRONG.model_copy(update={"attempt": 1})}


def test_handle_own_error_of_the_miniature_ends_the_build_at_once() -> None:
    plan = fake_plan({"miniature": [], "long": [], "other": []})
    first = plan.steps[0].model_copy(update={"kind": Kind.MINIATURE})
    plan = replace(plan, steps=(first, *plan.steps[1:]))
    schedule = schedule_of(plan)
    assert names(schedule.start()) == ["miniature", "long", "other"]
    assert schedule.handle(failed(named(plan, "other"), LOST)) == [Start(named(plan, "other"), 2, 2.0)]
    assert schedule.handle(failed(first, WRONG)) == []
    assert schedule.done
    assert next(iter(schedule.failures)) == first.digest
    assert schedule.handle(succeeded(named(plan, "long"))) == []


def test_handle_lost_machine_after_another_failure_is_not_retried() -> None:
    plan = fake_plan({"bad": [], "lost": []})
    schedule = schedule_of(plan)
    schedule.start()
    schedule.handle(failed(named(plan, "bad"), WRONG))
    assert schedule.handle(failed(named(plan, "lost"), LOST)) == []
    assert schedule.done
    assert schedule.failures[named(plan, "lost").digest] == LOST.model_copy(update={"attempt": 1})


def test_handle_late_events_change_nothing() -> None:
    plan = fake_plan({"a": [], "b": ["a"]})
    a, b = named(plan, "a"), named(plan, "b")
    schedule = schedule_of(plan)
    schedule.start()
    for event in (succeeded(b), failed(b, WRONG), failed(b, LOST)):  # not started yet
        assert schedule.handle(event) == []
    schedule.handle(succeeded(a))
    first = schedule.outcomes[a.digest]
    other = StepSucceeded(digest=a.digest, outcome=outcome_of(a).model_copy(update={"node": "late"}))
    for late in (other, failed(a, WRONG), failed(a, LOST)):
        assert schedule.handle(late) == []
    assert schedule.outcomes[a.digest] is first
    assert schedule.failures == {}
    assert schedule.num_running == 1


def test_handle_start_and_progress_ask_for_nothing() -> None:
    plan = fake_plan({"a": [], "b": ["a"]})
    digest = named(plan, "a").digest
    schedule = schedule_of(plan)
    schedule.start()
    assert schedule.handle(StepStarted(digest=digest, node="n", attempt=1)) == []
    assert schedule.handle(StepProgressed(digest=digest, phase="convert", done=1, total=2, unit="bytes")) == []
    assert schedule.num_running == 1


@dataclass
class Trace:
    """One random run: what was started, in order, what runs, and what waits for its delay."""

    started: list[tuple[str, int]] = field(default_factory=list)
    open: dict[str, int] = field(default_factory=dict)
    delayed: dict[str, Start] = field(default_factory=dict)


@st.composite
def graphs(draw: st.DrawFn) -> Plan:
    count = draw(st.integers(1, 8))
    needs = {
        str(number): [str(need) for need in draw(st.sets(st.integers(0, number - 1), max_size=3))] if number else []
        for number in range(count)
    }
    return fake_plan(needs, {name: draw(st.sampled_from([0.5, 1.0, 7.0])) for name in needs})


def _run(
    plan: Plan, committed: Mapping[str, Outcome], failures: Mapping[str, list[Failure]], order: Random
) -> tuple[Schedule, Trace]:
    """End delays and answer starts with their scripted failure or success, in random order, until nothing is left."""
    schedule, trace = schedule_of(plan, committed), Trace()
    _take(schedule.start(), schedule, trace)
    while trace.open or trace.delayed:
        digest = order.choice(sorted([*trace.open, *trace.delayed]))
        if digest in trace.delayed:
            _begin(trace.delayed.pop(digest), schedule, trace)
            continue
        attempt, step = trace.open.pop(digest), plan.step(digest)
        script = failures.get(step.name, [])
        event = failed(step, script[attempt - 1]) if attempt <= len(script) else succeeded(step)
        _take(schedule.handle(event), schedule, trace)
    return schedule, trace


def _take(commands: list[Start], schedule: Schedule, trace: Trace) -> None:
    for command in commands:
        assert command.step.digest not in {*trace.open, *trace.delayed}
        if command.delay_seconds:
            trace.delayed[command.step.digest] = command
        else:
            _begin(command, schedule, trace)
    waiting = 0 if schedule.failures else len(trace.delayed)
    assert schedule.num_running == len(trace.open) + waiting


def _begin(command: Start, schedule: Schedule, trace: Trace) -> None:
    wanted = schedule.begin(command)
    assert wanted == (not schedule.failures)
    if wanted:
        assert all(need in schedule.outcomes for need in command.step.needs)
        trace.started.append((command.step.name, command.attempt))
        trace.open[command.step.digest] = command.attempt


names_of = st.integers(0, 7).map(str)


@settings(max_examples=150)
@given(
    plan=graphs(),
    done=st.sets(names_of),
    failures=st.dictionaries(names_of, st.lists(st.sampled_from([LOST, LOST, WRONG]), max_size=4), max_size=3),
    order=st.randoms(use_true_random=False),
)
def test_schedule_random_plans_and_failures_keep_the_rules(
    plan: Plan, done: set[str], failures: dict[str, list[Failure]], order: Random
) -> None:
    committed = {step.digest: outcome_of(step) for step in plan.steps if step.name in done}
    schedule, trace = _run(plan, committed, failures, order)
    pending = {step.name for step in plan.pending(committed)}
    assert schedule.done
    assert len(set(trace.started)) == len(trace.started)
    assert {name for name, _ in trace.started} <= pending
    assert all(attempt <= RETRIES.max_attempts for _, attempt in trace.started)
    doomed = {name for name, script in failures.items() if WRONG in script[:3] or script[:3] == [LOST] * 3}
    if not doomed & pending:
        assert schedule.failures == {}
        assert {name for name, _ in trace.started} == pending
    assert {plan.step(digest).name for digest in schedule.failures} <= doomed | set(failures)
    assert bool(schedule.failures) == bool(doomed & {name for name, _ in trace.started})


def test_begin_retry_that_waits_when_another_step_fails_for_good_is_unwanted() -> None:
    plan = fake_plan({"flaky": [], "bad": []})
    schedule = Schedule(plan, {}, RETRIES)
    for command in schedule.start():
        assert schedule.begin(command)
    (retry,) = schedule.handle(failed(named(plan, "flaky"), LOST))
    assert schedule.handle(failed(named(plan, "bad"), WRONG)) == []
    assert not schedule.begin(retry)
    assert schedule.done
    assert {plan.step(digest).name for digest in schedule.failures} == {"flaky", "bad"}


@pytest.mark.parametrize("policy", [RetrySpec(max_attempts=1), RetrySpec(max_attempts=4, backoff_seconds=0)])
def test_handle_retry_policy_is_the_clusters(policy: RetrySpec) -> None:
    plan = fake_plan({"a": []})
    schedule = Schedule(plan, {}, policy)
    attempts = len(schedule.start())
    while not schedule.done:
        attempts += len(schedule.handle(failed(named(plan, "a"), LOST)))
    assert attempts == policy.max_attempts


def test_handle_handed_over_step_does_not_use_up_its_attempts() -> None:
    plan = fake_plan({"a": []})
    step, moved = named(plan, "a"), Failure(kind=FailureKind.HANDED_OVER, message="node is taken back")
    schedule = schedule_of(plan)
    schedule.start()
    assert schedule.handle(failed(step, moved)) == [Start(step, 2, 0.0)]
    assert schedule.handle(failed(step, moved)) == [Start(step, 3, 0.0)]
    assert schedule.handle(failed(step, LOST)) == [Start(step, 4, 2.0)]
    assert schedule.handle(failed(step, LOST)) == [Start(step, 5, 3.0)]
    assert schedule.handle(failed(step, LOST)) == []
    assert schedule.failures[step.digest].message == "node lost (attempt 3 of 3)"
    handed, lost = FailureKind.HANDED_OVER, FailureKind.INFRASTRUCTURE
    assert [(each.kind, each.attempt) for each in schedule.lost[step.digest]] == [(handed, 1), (handed, 2), (lost, 3), (lost, 4)]


def _written(step: Step, attempt: str) -> Outcome:
    output = Output(name="out", key=f"steps/{step.digest}/{attempt}/out", num_bytes=1, sha256="ab" * 32)
    return outcome_of(step).model_copy(update={"outputs": (output,), "node": attempt})


def _made_from(step: Step, need: Step, sha256: str = "ab" * 32) -> StepSucceeded:
    outcome = outcome_of(step).model_copy(update={"consumed": (Consumed(step=need.digest, name="out", sha256=sha256),)})
    return StepSucceeded(digest=step.digest, outcome=outcome)


def _damaged(outcome: Outcome) -> Failure:
    return Failure(kind=FailureKind.APPLICATION, message="it is not what was written", damaged=outcome.outputs[0].key)


PAIR = fake_plan({"maker": [], "x": ["maker"], "y": ["maker"]})
MAKER, X, Y = (named(PAIR, name) for name in ("maker", "x", "y"))


def test_handle_damaged_input_its_maker_runs_again_and_then_whoever_read_it() -> None:
    first, second = _written(MAKER, "one"), _written(MAKER, "two")
    schedule = schedule_of(PAIR, {MAKER.digest: first})
    assert names(schedule.start()) == ["x", "y"]
    assert schedule.handle(failed(X, _damaged(first))) == [Start(MAKER, 2)]
    (taken,) = schedule.taken_back()
    assert (taken.outcome, taken.damaged, schedule.taken_back()) == (first, True, [])
    assert schedule.handle(failed(Y, _damaged(first))) == []  # the same damage, found later
    assert schedule.taken_back() == []
    commands = schedule.handle(StepSucceeded(digest=MAKER.digest, outcome=second))
    assert commands == [Start(X, 2), Start(Y, 2)]
    for step in (X, Y):
        schedule.handle(_made_from(step, MAKER))
    assert schedule.done
    assert schedule.failures == {}
    assert [len(schedule.lost[step.digest]) for step in (MAKER, X, Y)] == [1, 1, 1]


def test_handle_input_that_is_damaged_each_time_is_given_up() -> None:
    schedule = schedule_of(PAIR, {})
    schedule.start()
    for attempt in range(MAX_REPEATS + 1):
        outcome = _written(MAKER, str(attempt))
        schedule.handle(StepSucceeded(digest=MAKER.digest, outcome=outcome))
        schedule.handle(failed(X, _damaged(outcome)))
        if attempt == 0:
            schedule.handle(failed(Y, _damaged(outcome)))
    schedule.handle(failed(Y, WRONG))
    assert schedule.done
    assert next(iter(schedule.failures)) == MAKER.digest
    assert "each time it was wrong again" in schedule.failures[MAKER.digest].message


def test_handle_outcome_made_from_other_bytes_than_there_are_now_runs_again() -> None:
    """It ended before its maker had to run again, and that came out otherwise."""
    first = _written(MAKER, "one")
    schedule = schedule_of(PAIR, {MAKER.digest: first})
    schedule.start()
    schedule.handle(_made_from(X, MAKER))
    schedule.handle(failed(Y, _damaged(first)))
    schedule.taken_back()
    (output,) = _written(MAKER, "two").outputs
    other = first.model_copy(update={"outputs": (output.model_copy(update={"sha256": "cd" * 32}),)})
    assert schedule.handle(StepSucceeded(digest=MAKER.digest, outcome=other)) == [Start(X, 2), Start(Y, 2)]
    (taken,) = schedule.taken_back()
    assert (taken.outcome.name, taken.damaged) == ("x", False)
    for step in (X, Y):
        schedule.handle(_made_from(step, MAKER, "cd" * 32))
    assert schedule.done
    assert schedule.failures == {}
