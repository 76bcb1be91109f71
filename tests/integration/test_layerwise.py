"""Calibration of one decoder layer after the other: the same scales, and an attempt that is killed is gone on with."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from orchestrator import work
from orchestrator.base.errors import StoreError
from orchestrator.planning import preparation
from orchestrator.planning.plan import Plan
from orchestrator.planning.steps import Kind, Outcome, Task
from orchestrator.scheduling import commits
from orchestrator.spec.build import BuildSpec
from orchestrator.spec.decoding import decode
from orchestrator.stores import open_store
from orchestrator.stores.file import FileStore
from orchestrator.stores.store import Block, ObjectMissingError
from orchestrator.work.calibrate.layerwise import LayerwiseFolder
from orchestrator.work.calibrate.part_model import PartModel
from orchestrator.work.context import Context
from tests.support.families import write_tiny
from tests.support.here import run_here, scales_of

NUM_LAYERS, NUM_BATCHES = 4, 2
KILLED = """
import os, signal, sys
from orchestrator import work
from orchestrator.planning.steps import Task
from orchestrator.work.calibrate.part_model import PartModel
task, last = Task.model_validate_json(open(sys.argv[1]).read()), int(sys.argv[2])
original, num_calls = PartModel.run, 0
def run(*args):
    global num_calls
    num_calls += 1
    if num_calls > last:
        os.kill(os.getpid(), signal.SIGKILL)
    original(*args)
PartModel.run = run
work.run(task, lambda progress: None)
"""
"""Calibrates until the given number of forward calls, then is killed."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layerwise") / "mixtral"
    return write_tiny("mixtral", folder, num_hidden_layers=NUM_LAYERS, num_local_experts=8, intermediate_size=64)


def plan_of(source: Path, algorithm: str, *, layerwise: bool, num_stages: int = 1) -> Plan:
    quantization = {
        "algorithm": algorithm,
        "calibration": {"num_samples": 2, "max_length": 4, "batch_size": 1, "layerwise": layerwise, "num_stages": num_stages},
    }
    if algorithm.endswith("AWQ"):
        quantization["group_size"] = 32
    plain = {
        "source": {"path": str(source)}, "quantization": quantization, "engine": {"max_input_len": 16, "max_seq_len": 32},
        "release": {"name": "tiny", "version": "1"},
    }  # fmt: skip
    return preparation.plan(decode(BuildSpec, plain, "spec"))


def calibrated(plan: Plan, store: Path) -> tuple[dict[str, torch.Tensor], list[Outcome]]:
    outcomes = list(run_here(plan, store, [Kind.CALIBRATE]).values())
    return {name: value for outcome in outcomes for name, value in scales_of(outcome, store).items()}, outcomes


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert not [name for name in found if not torch.equal(found[name], expected[name])]


@pytest.mark.parametrize("algorithm", ["FP8", "W4A8_AWQ"])
def test_layerwise_calibration_of_two_parts_gives_the_scales_of_the_usual_one(algorithm: str, source: Path, tmp_path: Path) -> None:
    expected, _ = calibrated(plan_of(source, algorithm, layerwise=False), tmp_path)
    found, outcomes = calibrated(plan_of(source, algorithm, layerwise=True, num_stages=2), tmp_path)
    assert len(outcomes) == 2
    assert_same(found, expected)


def killed(task: Task, num_calls: int, folder: Path, _monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "task.json").write_text(task.model_dump_json())
    ended = subprocess.run([sys.executable, "-c", KILLED, folder / "task.json", str(num_calls)], check=False, cwd=Path.cwd())
    assert ended.returncode == -signal.SIGKILL


def failed(task: Task, num_calls: int, _folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in this process, which is faster."""
    counted(monkeypatch, num_calls)
    with pytest.raises(StoreError, match="gone"):
        work.run(task, lambda progress: None)
    monkeypatch.undo()


def counted(monkeypatch: pytest.MonkeyPatch, limit: int | None = None) -> list[int]:
    """Grows by one with every forward call; the one after `limit` fails."""
    calls: list[int] = []
    original = PartModel.run

    def run(*args: Any) -> None:
        calls.append(1)
        if limit is not None and len(calls) > limit:
            raise StoreError("gone")
        original(*args)

    monkeypatch.setattr(PartModel, "run", run)
    return calls


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts in tensors of all experts, each token's input weighed before."""
    folder = tmp_path_factory.mktemp("layerwise") / "llama4"
    return write_tiny("llama4", folder, num_hidden_layers=NUM_LAYERS, interleave_moe_layer_step=1)


@pytest.mark.parametrize(
    ("algorithm", "interrupted", "model"), [("W4A8_AWQ", killed, "source"), ("FP8", failed, "fused")], ids=["killed", "failed"]
)
def test_layerwise_calibration_that_is_interrupted_resumes_at_the_layer_reached(
    algorithm: str,
    interrupted: Callable[..., None],
    model: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source: Path = request.getfixturevalue(model)
    expected, (usual,) = calibrated(plan_of(source, algorithm, layerwise=False), tmp_path)
    (step,) = plan_of(source, algorithm, layerwise=True).of_kind(Kind.CALIBRATE)
    store = open_store(tmp_path.as_uri())
    task = Task(step=step, inputs={}, attempt=1, store=store.url, scratch=str(tmp_path))
    # A pass to the first layer, one more per finished layer, and one batch for the layer that it does not finish.
    finished = 2
    interrupted(task, NUM_BATCHES * (1 + finished) + 1, tmp_path, monkeypatch)
    assert commits.lookup(store, step.digest) is None
    kept = {info.key for info in store.list(f"resume/{step.digest}/")}
    assert sum(key.endswith("next_inputs.pt") for key in kept) == 1

    calls = counted(monkeypatch)
    outcome = work.run(task.model_copy(update={"attempt": 2}), lambda progress: None)
    assert len(calls) == NUM_BATCHES * (NUM_LAYERS - 1 - finished)
    assert f"an earlier attempt finished {finished} layers" in store.get(outcome.log).decode()
    assert_same(scales_of(outcome, tmp_path), expected)
    assert outcome.facts.unseen == usual.facts.unseen
    assert outcome.facts.unseen[0].startswith("model.layers.0.")
    assert list(store.list(f"resume/{step.digest}/")) == []


class StoreOfARunningAttempt(FileStore):
    """One file is deleted between the listing and the reading."""

    def blocks(self, key: str) -> Iterator[Block]:
        if key.endswith("next_inputs.pt"):
            raise ObjectMissingError(key)
        return super().blocks(key)


@pytest.mark.parametrize(
    ("kind", "files", "resumes"),
    [
        (FileStore, ["manifest.json", "num_tokens.json", "layer_0003/weights.pt", "layer_0003/next_inputs.pt"], True),
        (FileStore, ["manifest.json", "num_tokens.json", "layer_0003/weights.pt", "layer_0002/next_inputs.pt"], False),
        (FileStore, ["num_tokens.json", "layer_0003/weights.pt", "layer_0003/next_inputs.pt"], False),
        (StoreOfARunningAttempt, ["manifest.json", "num_tokens.json", "layer_0003/next_inputs.pt"], False),
    ],
)
def test_layerwise_folder_is_fetched_only_when_it_can_be_resumed_from(
    kind: type[FileStore], files: list[str], resumes: bool, tmp_path: Path
) -> None:
    store = kind(tmp_path.as_uri())
    for name in files:
        store.put(f"resume/d1/{name}", b'{"last_completed_layer": 3}' if name == "manifest.json" else b"{}")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    lines: list[str] = []
    context = Context(store, "steps/d1/a/", scratch, lambda *_: None, lines.append)
    part = PartModel(SimpleNamespace(model=SimpleNamespace(layers=[])), {}, {})
    folder = LayerwiseFolder(context, "d1", part).path
    fetched = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert fetched == (sorted(files) if resumes else [])
    assert any("finished 4 layers" in line for line in lines) == resumes
