"""Releases whose engines tests/support/fake_tensorrt.py executes, from real conversions, and all their ranks as threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest

from orchestrator import engines, work
from orchestrator.planning import preparation
from orchestrator.planning.steps import Kind, Outcome, Task
from orchestrator.releases.placing import place
from orchestrator.releases.publish import publish
from orchestrator.releases.pulling import pull
from orchestrator.runners.tensorrt import EngineRunner, KnownIds, Libraries
from orchestrator.runners.tensorrt.communicators import groups_of
from orchestrator.scheduling import commits
from orchestrator.spec.build import BuildSpec
from orchestrator.spec.decoding import decode
from orchestrator.stores import open_store
from tests.support import fake_nccl
from tests.support.artifact import write_artifact
from tests.support.fake_nccl import FakeDevice
from tests.support.fake_tensorrt import FakeTensorRT
from tests.support.releases import MINIATURE

Result = TypeVar("Result")
MAX_BATCH, MAX_INPUT, SLOTS = 3, 8, 48


def release_of(source: Path, folder: Path, tp: int, pp: int, **sections: Any) -> Path:
    """Convert, "compile", verify and publish a model in float32; returns the folder that it is pulled to."""
    plain: dict[str, Any] = {
        "source": {"path": str(source)}, "dtype": "float32", "topology": {"tp": tp, "pp": pp},
        "engine": {"max_batch_size": MAX_BATCH, "max_input_len": MAX_INPUT, "max_seq_len": SLOTS, "max_logits_per_sequence": 2},
        "verification": {"max_tokens": 12, "decode_steps": 3}, "release": {"name": "tiny", "version": "1"}, **sections,
    }  # fmt: skip
    if "quantization" in sections:
        loose = {"max_relative_error": None, "max_mean_kl": 1.0, "min_top1_agreement": 0.5}
        plain["verification"] = {**plain["verification"], "tolerance": loose}
        plain["quantization"] = {"scales": str(write_artifact(source, folder / "scales")), **sections["quantization"]}
    plan = preparation.plan(decode(BuildSpec, plain, "test"))
    store = open_store((folder / "store").as_uri())
    outcomes: dict[str, Outcome] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(engines.BACKENDS, "tensorrt_rtx", "tests.support.fake_tensorrt")
        for step in plan.steps:
            inputs = {need: outcomes[need] for need in step.needs}
            if step.kind is Kind.MINIATURE:
                proven = Outcome(digest=step.digest, name=step.name, kind=step.kind, outputs=(), facts={"miniature": MINIATURE})
                outcomes[step.digest] = commits.commit(store, proven)
            else:
                outcomes[step.digest] = work.run(Task(step=step, inputs=inputs, attempt=1, store=store.url), lambda event: None)
    publish(store, plan, outcomes, place(store, plan, outcomes))
    pulled = folder / "pulled"
    pull(f"{store.url}/releases/tiny/1", pulled, check=False)
    return pulled


Change = Callable[[int, Libraries], Libraries]


def run_ranks(
    folder: Path, tp: int, pp: int, job: Callable[[EngineRunner], Result], change: Change = lambda rank, libraries: libraries
) -> list[Result]:
    """Run `job` on every rank, each a thread with its own GPU; returns the results by rank. The first error is raised."""
    ids = KnownIds({group.name: bytes(fake_nccl.get_unique_id()) for group in groups_of(tp, pp)})

    def run(rank: int) -> Result:
        device = FakeDevice()
        libraries = change(rank, Libraries(FakeTensorRT(device), fake_nccl, device))
        with EngineRunner(folder, rank, libraries, ids) as runner:
            return job(runner)

    with ThreadPoolExecutor(tp * pp) as pool:
        return [task.result() for task in [pool.submit(run, rank) for rank in range(tp * pp)]]
