"""Steps of a plan run one after the other in this process: heavy imports are paid for once."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file

from orchestrator import work
from orchestrator.events import StepEvent
from orchestrator.planning import preparation
from orchestrator.planning.plan import Plan
from orchestrator.planning.steps import Kind, Outcome, Task
from orchestrator.scheduling import commits
from orchestrator.spec.build import BuildSpec
from orchestrator.stores import open_store
from orchestrator.work.streaming import stream


def run_here(plan: Plan, folder: Path, kinds: Iterable[Kind]) -> dict[str, Outcome]:
    """Run the steps of `kinds`, with `folder` as the store; outcomes by the step's name."""
    wanted, store = set(kinds), open_store(folder.resolve().as_uri())
    outcomes: dict[str, Outcome] = {}
    for step in plan.steps:
        if step.kind in wanted:
            inputs = {need: outcomes[need] for need in step.needs if need in outcomes}
            task = Task(step=step, inputs=inputs, attempt=1, store=store.url)
            outcomes[step.digest] = commits.lookup(store, step.digest) or work.run(task, lambda progress: None)
    return {outcome.name: outcome for outcome in outcomes.values()}


def scales_of(outcome: Outcome, store: Path) -> dict[str, torch.Tensor]:
    """The artifact of a calibrate step."""
    path = open_store(store.resolve().as_uri()).local_path(outcome.output("scales.safetensors").key)
    assert path is not None
    return load_file(path)


def convert_here(spec: BuildSpec, store: Path, output: Path) -> Path:
    """The rank files of `spec` in the folder `output`."""
    output.mkdir()
    found = open_store(store.resolve().as_uri())
    for outcome in run_here(preparation.plan(spec), store, (Kind.CALIBRATE, Kind.CONVERT)).values():
        if outcome.kind is Kind.CONVERT:
            for written in outcome.outputs:
                path = found.local_path(written.key)
                assert path is not None
                shutil.copyfile(path, output / written.name)
    return output


class HereCluster:
    """The Cluster protocol in this process: a step runs when it is started."""

    def __init__(self) -> None:
        self._events: list[StepEvent] = []

    def start(self, task: Task) -> None:
        self._events.extend(stream(task, "here"))

    def events(self, timeout_seconds: float | None) -> list[StepEvent]:
        found, self._events = self._events, []
        return found

    def now(self) -> float:
        return 0.0

    def close(self) -> None:
        self._events.clear()
