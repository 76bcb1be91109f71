"""The work of each kind of step: plain functions task -> facts, run by any cluster in any process.

`run` is the whole life of an attempt: open the store, do the work, commit the outcome.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import importlib
import platform
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from orchestrator.base.errors import DamagedOutputError
from orchestrator.events import StepProgressed
from orchestrator.planning.facts import Facts
from orchestrator.planning.steps import Kind, Outcome, Task
from orchestrator.scheduling import commits
from orchestrator.scheduling.checking import InputChecks
from orchestrator.stores import open_store
from orchestrator.stores.store import Store
from orchestrator.work.context import Context, Unit
from orchestrator.work.logs import StepLog
from orchestrator.work.nvtx import Ranges, find_marker
from orchestrator.work.process import is_full, scratch_root
from orchestrator.work.scratch import remove_dead, scratch_folder
from orchestrator.work.usage import Sampler

FUNCTIONS: dict[Kind, str] = {
    Kind.MINIATURE: "orchestrator.work.miniature:miniature",
    Kind.REFERENCE: "orchestrator.work.reference.step:reference",
    Kind.CALIBRATE: "orchestrator.work.calibrate.step:calibrate",
    Kind.CONVERT: "orchestrator.work.convert.step:convert",
    Kind.BUILD: "orchestrator.work.build.step:build",
    Kind.VERIFY: "orchestrator.work.verify.step:verify",
    Kind.EXPORT: "orchestrator.work.export.step:export",
}
"""Function of each kind. Imported when a step of the kind runs, because the imports are heavy."""

LOG = "log.txt"
"""Name of the step's whole log, with TensorRT's messages, beside its outputs."""
_REPORT_SECONDS = 0.2
_LOG_TAIL_LINES = 40


def run(task: Task, emit: Callable[[StepProgressed], None], node: str = "") -> Outcome:
    """Do the step and commit its outcome, or return the outcome that is already committed.

    Raises the step's error; then nothing is committed.
    """
    store = open_store(task.store, task.store_options)
    digest = task.step.digest
    known = commits.lookup(store, digest)
    if known is not None:
        return known
    root = scratch_root(task.scratch)
    remove_dead(root)
    checks = InputChecks(root, task.build_id)
    with scratch_folder(root, task.build_id) as scratch, contextlib.closing(checks):
        return _attempt(task, emit, node or platform.node(), store, scratch, checks)


def _attempt(
    task: Task, emit: Callable[[StepProgressed], None], node: str, store: Store, scratch: Path, checks: InputChecks
) -> Outcome:
    digest = task.step.digest
    module, _, name = FUNCTIONS[task.step.kind].partition(":")
    function = getattr(importlib.import_module(module), name)
    log, ranges = StepLog(task, node), Ranges(task.step.name, find_marker())
    lines = log.lines
    context = Context(
        store=store,
        prefix=commits.attempt_prefix(digest, task.build_id + uuid.uuid4().hex[:12]),
        scratch=scratch,
        report=_throttled(digest, emit, ranges),
        log=log.write,
        makers={output.key: need for need, outcome in task.inputs.items() for output in outcome.outputs},
        checks=checks,
    )
    started_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    began = time.monotonic()
    sampler = Sampler()
    try:
        with log, ranges, sampler:
            facts = _checked(function, task, context)
    except BaseException as error:
        # Libraries report a full disk each in its own way (torch.save: "unexpected pos").
        full = isinstance(error, Exception) and is_full(scratch)
        told = OSError(errno.ENOSPC, f"no room in the scratch folder of {node} ({error})", str(scratch)) if full else error
        _attach_log(told, lines)
        if full:
            raise told from error
        raise
    if lines:
        store.put(context.prefix + LOG, "\n".join(lines).encode())
    outcome = Outcome(
        digest=digest,
        name=task.step.name,
        kind=task.step.kind,
        outputs=tuple(sorted(context.outputs, key=lambda output: output.name)),
        consumed=tuple(sorted(context.consumed, key=lambda item: (item.step, item.name))),
        facts=facts,
        node=node,
        started_at=started_at,
        seconds=round(time.monotonic() - began, 3),
        tools=context.tools,
        usage=sampler.usage(),
        log=context.prefix + LOG if lines else "",
        log_tail="\n".join(lines[-_LOG_TAIL_LINES:]),
    )
    commits.check_same_again(store, outcome)
    committed = commits.commit(store, outcome)
    for action in context.after_commit:
        action()
    return committed


def _checked(function: Callable[[Task, Context], Facts], task: Task, context: Context) -> Facts:
    """Run the step and return its facts. Raises DamagedOutputError when an input was damaged, even if the step failed otherwise."""
    try:
        facts = function(task, context)
    except DamagedOutputError:
        raise
    except Exception as error:
        try:
            context.checks.settle()
        except DamagedOutputError as damage:
            raise damage from error
        raise
    context.checks.settle()
    if context.checks.hashed_bytes:
        hashed, waited = context.checks.hashed_bytes, context.checks.waited_seconds
        context.log(f"inputs: {hashed:,} bytes hashed beside the step, waited {waited:.2f} s for it")
    return facts


def log_of(error: BaseException) -> str:
    """Return the end of the step's log at the time it raised `error`."""
    return str(getattr(error, "_step_log", ""))


def _attach_log(error: BaseException, lines: list[str]) -> None:
    error._step_log = "\n".join(lines[-_LOG_TAIL_LINES:])  # type: ignore[attr-defined]


def _throttled(digest: str, emit: Callable[[StepProgressed], None], ranges: Ranges) -> Callable[[str, int, int, Unit], None]:
    """Return a progress reporter that emits a few events per second at most, and always the last of a phase."""
    last = 0.0

    def report(phase: str, done: int, total: int, unit: Unit) -> None:
        nonlocal last
        ranges.phase(phase)
        now = time.monotonic()
        if now - last >= _REPORT_SECONDS or done >= total:
            last = now
            emit(StepProgressed(digest=digest, phase=phase, done=done, total=total, unit=unit))

    return report
