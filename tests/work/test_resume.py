"""Killed references and verifications go on behind the layers that they finished."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator import work
from orchestrator.base.errors import DamagedOutputError
from orchestrator.planning import preparation
from orchestrator.planning.steps import Kind, Outcome, Step, Task
from orchestrator.stores import open_store
from orchestrator.stores.store import Store
from orchestrator.work import resume
from orchestrator.work.resume import LayerStates
from tests.support.synthetic import build_spec, model_config, random_arrays, write_source

LAYERS = 4


class Killed(BaseException):
    """SIGKILL as an attempt feels it: nothing after it runs."""


class FakeContext:
    def __init__(self, store: Store) -> None:
        self.store = store
        self.after_commit: list[Callable[[], None]] = []
        self.checks = self
        self.damage: DamagedOutputError | None = None

    def settle(self) -> None:
        if self.damage is not None:
            raise self.damage


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store((tmp_path / "states").as_uri())


def state(layer: int) -> dict[str, Any]:
    return {"a": np.full((2, 3), layer, np.float32)}


def states(store: Store, clock: FakeClock, **options: Any) -> LayerStates:
    return LayerStates(FakeContext(store), "digest", clock=clock, **options)  # type: ignore[arg-type]


def test_saved_layers_are_those_before_the_last_write(store: Store) -> None:
    clock = FakeClock()
    first = states(store, clock)
    for layer in range(7):
        clock.now += 4.0  # a block after every third layer
        first.keep(layer, lambda layer=layer: state(layer))  # type: ignore[misc]
    found = states(store, clock).saved()
    assert list(found) == list(range(6))
    assert all(np.array_equal(found[layer]["a"], state(layer)["a"]) for layer in found)


def test_saved_of_a_damaged_block_stops_before_it(store: Store) -> None:
    clock = FakeClock()
    first = states(store, clock)
    for layer in range(4):
        clock.now += 20.0
        first.keep(layer, lambda layer=layer: state(layer))  # type: ignore[misc]
    (key,) = (info.key for info in store.list("resume/digest/") if info.key.startswith("resume/digest/2-"))
    data = bytearray(store.get(key))
    data[-1] ^= 1
    store.put(key, bytes(data))
    assert list(states(store, clock).saved()) == [0, 1]


def test_saved_of_the_last_layer_only_removes_earlier_blocks(store: Store) -> None:
    clock = FakeClock()
    first = states(store, clock, only_last=True)
    for layer in range(3):
        clock.now += 20.0
        first.keep(layer, lambda layer=layer: state(layer))  # type: ignore[misc]
    assert len(list(store.list("resume/"))) == 1
    assert list(states(store, clock, only_last=True).saved()) == [2]


def test_keep_of_a_state_made_from_damaged_bytes_writes_nothing(store: Store) -> None:
    clock, context = FakeClock(), FakeContext(store)
    made = LayerStates(context, "digest", clock=clock)  # type: ignore[arg-type]
    clock.now, context.damage = 20.0, DamagedOutputError("a shard is damaged", key="steps/x")
    with pytest.raises(DamagedOutputError):
        made.keep(0, lambda: state(0))
    assert list(store.list("")) == []


def test_keep_of_the_last_layer_only_copies_no_state_before_it_is_due(store: Store) -> None:
    clock = FakeClock()
    copied: list[int] = []

    def copy(layer: int) -> dict[str, Any]:
        copied.append(layer)
        return state(layer)

    made = states(store, clock, only_last=True)
    for layer in range(4):
        clock.now += 6.0
        made.keep(layer, lambda layer=layer: copy(layer))  # type: ignore[misc]
    assert copied == [1, 3]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(resume, "SECONDS", 0.0)
    config = model_config(num_hidden_layers=LAYERS)
    small = {name: np.multiply(array, 0.2).astype(array.dtype) for name, array in random_arrays(config).items()}
    source = write_source(tmp_path / "model", config, small)
    return Bench(source, tmp_path / "store", monkeypatch)


class Bench:
    """Runs steps of a plan of one stage on two ranks, in this process."""

    def __init__(self, source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plan = preparation.plan(build_spec(source, topology={"tp": 2}, dtype="float16"))
        self.folder, self.monkeypatch = folder, monkeypatch
        self.outcomes: dict[str, Outcome] = {}
        self.layers: list[int] = []
        """Layers that were computed."""

    def step(self, kind: Kind) -> Step:
        return next(self.plan.of_kind(kind))

    def run(self, kind: Kind) -> Outcome:
        step = self.step(kind)
        inputs = {need: self.outcomes[need] for need in step.needs}
        outcome = work.run(Task(step=step, inputs=inputs, attempt=1, store=self.folder.as_uri()), lambda event: None)
        self.outcomes[step.digest] = outcome
        return outcome

    def kill_after(self, layer: int, kind: Kind) -> None:
        """Run a step, and end it once it has kept the state of `layer`."""
        keep = LayerStates.keep

        def kept(self: LayerStates, number: int, arrays: Any) -> None:
            keep(self, number, arrays)
            if number == layer:
                raise Killed

        with self.monkeypatch.context() as patched:
            patched.setattr(LayerStates, "keep", kept)
            with pytest.raises(Killed):
                self.run(kind)

    def count_layers(self) -> None:
        """Note every layer whose computation ends from now on."""
        keep, seen = LayerStates.keep, self.layers

        def noted(self: LayerStates, number: int, arrays: Any) -> None:
            seen.append(number)
            keep(self, number, arrays)

        self.monkeypatch.setattr(LayerStates, "keep", noted)

    def outputs(self, outcome: Outcome) -> dict[str, str]:
        return {output.name: output.sha256 for output in outcome.outputs}

    def left(self) -> list[str]:
        return [info.key for info in open_store(self.folder.as_uri()).list("resume/")]


def test_reference_that_was_killed_resumes_behind_its_layers_and_equals_one_that_was_not(bench: Bench, tmp_path: Path) -> None:
    undisturbed = Bench(tmp_path / "model", tmp_path / "other", bench.monkeypatch).run(Kind.REFERENCE)
    bench.kill_after(1, Kind.REFERENCE)
    bench.count_layers()
    resumed = bench.run(Kind.REFERENCE)
    assert bench.layers == [2, 3]
    assert bench.outputs(resumed) == bench.outputs(undisturbed)
    assert "finished 2 of 4 layers" in resumed.log_tail
    assert bench.left() == []


def test_reference_that_was_killed_after_its_last_layer_computes_none_again(bench: Bench) -> None:
    bench.kill_after(LAYERS - 1, Kind.REFERENCE)
    bench.count_layers()
    bench.run(Kind.REFERENCE)
    assert bench.layers == []


@pytest.mark.parametrize("layer", [0, 2, LAYERS - 1])
def test_verification_that_was_killed_resumes_behind_its_layer_and_finds_the_same(bench: Bench, tmp_path: Path, layer: int) -> None:
    undisturbed = Bench(tmp_path / "model", tmp_path / "other", bench.monkeypatch)
    for each in (undisturbed, bench):
        for kind in (Kind.REFERENCE, Kind.CONVERT):
            each.run(kind)
    expected = undisturbed.run(Kind.VERIFY).facts
    bench.kill_after(layer, Kind.VERIFY)
    bench.count_layers()
    resumed = bench.run(Kind.VERIFY)
    assert bench.layers == list(range(layer + 1, LAYERS))
    assert resumed.facts == expected
    assert bench.left() == []
