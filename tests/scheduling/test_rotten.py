"""Bytes that rot in a store: found when a step reads them or a release is made of them, and made again, on every store.

Engines here are the bytes of their rank's shards, so that a wrong byte shows; everything else is the real code.
"""

from __future__ import annotations

import datetime
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from orchestrator import building, stages, work
from orchestrator.base.digest import digest_bytes
from orchestrator.base.errors import DamagedOutputError, DigestError, SourceCorruptError
from orchestrator.events import encode_line
from orchestrator.planning import preparation
from orchestrator.planning.options import BuildOptions
from orchestrator.planning.steps import Kind, Outcome, Output, Task
from orchestrator.releases import collect, verify
from orchestrator.releases.placing import place
from orchestrator.scheduling import commits
from orchestrator.scheduling.schedule import MAX_REPEATS
from orchestrator.spec.build import BuildSpec
from orchestrator.spec.cluster import ClusterSpec, StoreOptions
from orchestrator.stores import open_store
from orchestrator.stores.store import Store
from orchestrator.work.context import Context
from orchestrator.work.shards import rank_shards
from tests.support.here import HereCluster
from tests.support.releases import engine_facts, release_spec, tiny_reference, tiny_source
from tests.support.s3_server import S3Server


def build_of_bytes(task: Task, context: Context) -> dict[str, Any]:
    options = BuildOptions.model_validate(task.step.options)
    data = b"".join(path.read_bytes() for path in rank_shards(task, context, options.rank)) + str(options.engine).encode()
    with context.output(f"rank{options.rank}.engine", chunked=True) as writer:
        writer.write(data)
    return engine_facts(task.step)


def reference_of_bytes(task: Task, context: Context) -> dict[str, Any]:
    with context.output("reference.safetensors") as writer:
        writer.write(tiny_reference())
    return {}


def verify_of_bytes(task: Task, context: Context) -> dict[str, Any]:
    for need in task.step.needs:
        for output in task.inputs[need].outputs:
            context.fetch(output).read_bytes()
    with context.output("hidden_states.safetensors") as writer:
        writer.write(b"states")
    return engine_facts(task.step)


class Watched(HereCluster):
    """Remembers what ran; `before` may change the store before a step begins."""

    def __init__(self, ran: list[str], before: Callable[[Task], None]) -> None:
        super().__init__()
        self._ran, self._before = ran, before

    def start(self, task: Task) -> None:
        self._before(task)
        self._ran.append(task.step.name)
        super().start(task)


@dataclass
class Bench:
    """Builds of a tiny source at tp=2 in one store."""

    store: Store
    source: Path
    options: StoreOptions = field(default_factory=StoreOptions)
    ran: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    """Lines of events."""
    before: Callable[[Task], None] = lambda task: None

    def spec(self, version: str, **sections: Any) -> BuildSpec:
        return release_spec(self.source, topology={"tp": 2}, release={"name": "tiny", "version": version}, **sections)

    def build(self, version: str, **sections: Any) -> building.Build:
        self.ran.clear()
        self.said.clear()
        place = ClusterSpec(store=self.store.url, store_options=self.options)
        return building.build(
            self.spec(version, **sections),
            place,
            open_cluster=lambda place: Watched(self.ran, lambda task: self.before(task)),
            listener=lambda event: self.said.append(encode_line(event)),
        )

    def outcome(self, version: str, kind: Kind, number: int = 0, **sections: Any) -> Outcome:
        step = list(preparation.plan(self.spec(version, **sections)).of_kind(kind))[number]
        found = commits.lookup(self.store, step.digest)
        assert found is not None
        return found

    def rot(self, output: Output) -> None:
        """Flip a bit of an object, as a disk does: the size stays. Links of the file rot with it."""
        data = bytearray(self.store.get(output.key))
        data[-9] ^= 4
        path = self.store.local_path(output.key)
        if path is not None:
            with path.open("r+b") as file:
                file.write(data)
        else:
            self.store.put(output.key, bytes(data))

    def engines(self, done: building.Build) -> list[bytes]:
        prefix = f"releases/tiny/{done.manifest.version}/"
        return [self.store.get(prefix + rank.files[0].key) for rank in done.manifest.ranks]


SMALLER = {"engine": {"max_batch_size": 1, "max_input_len": 16, "max_seq_len": 64}}


@pytest.fixture(autouse=True)
def _steps_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, name in ((Kind.BUILD, "build"), (Kind.REFERENCE, "reference"), (Kind.VERIFY, "verify")):
        monkeypatch.setitem(work.FUNCTIONS, kind, f"{__name__}:{name}_of_bytes")


@pytest.fixture
def file_bench(tmp_path: Path) -> Bench:
    return Bench(open_store((tmp_path / "store").as_uri()), tiny_source(tmp_path / "source"))


@pytest.fixture(params=["file", "fsspec", "obstore", "s3fs"])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    source = tiny_source(tmp_path / "source")
    if request.param == "file":
        yield Bench(open_store((tmp_path / "store").as_uri()), source)
    elif request.param == "fsspec":
        yield Bench(open_store(f"memory://rotten-{uuid.uuid4().hex}"), source)
    else:
        server: S3Server = request.getfixturevalue("s3_environment")
        options = StoreOptions(transfer=request.param)
        yield Bench(open_store(f"s3://{server.bucket}/rotten-{uuid.uuid4().hex}", options), source, options)


def test_build_rotten_shard_is_converted_again_and_the_engine_is_made_of_right_bytes(bench: Bench) -> None:
    right = bench.engines(bench.build("1"))
    shard = bench.outcome("1", Kind.CONVERT).output("rank1.safetensors")
    bench.rot(shard)
    done = bench.build("2", **SMALLER)
    assert sorted(set(bench.ran)) == ["build/rank0", "build/rank1", "convert/stage0/group0"]
    assert any('"event": "failed"' in line and "is not what was written" in line for line in bench.said)
    assert any('"event": "retry"' in line and "convert/stage0/group0" in line for line in bench.said)
    expected = bench.engines(bench.build("3", **SMALLER))
    assert bench.engines(done) == expected
    for ours, first in zip(expected, right, strict=True):
        assert ours.partition(b"max_batch_size")[0] == first.partition(b"max_batch_size")[0]
    aside = commits.Aside.model_validate_json(bench.store.get(commits.aside_key(shard.key.split("/")[1], damaged=True)))
    assert aside.outcome.output("rank1.safetensors") == shard
    assert "rank1.safetensors" in aside.reason
    assert done.result is not None
    assert "convert/stage0/group0" in {done.plan.step(digest).name for digest in done.result.lost}


def test_build_rotten_engine_of_a_committed_step_is_not_published_but_built_again(bench: Bench) -> None:
    first = bench.build("1")
    engine = bench.outcome("1", Kind.BUILD, 1)
    bench.rot(engine.outputs[0])
    done = bench.build("2")
    assert bench.ran == ["build/rank1"]
    assert any('"event": "failed"' in line and "is not what was written" in line and "build/rank1" in line for line in bench.said)
    assert bench.engines(done)[1] != bench.store.get(engine.outputs[0].key)
    assert [digest_bytes(data) for data in bench.engines(done)] == [rank.files[0].sha256 for rank in first.manifest.ranks]
    verify(done.address, options=bench.options)


def test_build_output_that_is_gone_while_a_step_waits_for_it_is_made_again(bench: Bench) -> None:
    def lose(task: Task) -> None:
        if task.step.kind is Kind.BUILD and task.attempt == 1:
            (made,) = task.inputs.values()
            bench.store.delete(made.output("rank0.safetensors").key)

    bench.before = lose
    done = bench.build("1")
    assert bench.ran.count("convert/stage0/group0") == 2
    verify(done.address, options=bench.options)


VERIFIED = {"verification": {"max_tokens": 12}}


@pytest.mark.parametrize("kind", [Kind.REFERENCE, Kind.CONVERT])
def test_build_verification_checks_what_it_reads(file_bench: Bench, kind: Kind) -> None:
    plan = preparation.plan(file_bench.spec("1", **VERIFIED))

    def rot(task: Task) -> None:
        if task.step.kind is Kind.VERIFY and task.attempt == 1:
            made = next(outcome for outcome in task.inputs.values() if outcome.kind is kind)
            file_bench.rot(made.outputs[0])

    file_bench.before = rot
    done = file_bench.build("1", **VERIFIED)
    (maker,) = plan.of_kind(kind)
    assert file_bench.ran.count(maker.name) == 2
    assert file_bench.ran.count("verify/stage0") == 2
    assert done.manifest.build_key == plan.build_key


def test_build_store_that_rots_every_time_ends_with_a_clear_error(file_bench: Bench) -> None:
    def rot(task: Task) -> None:
        if task.step.name == "build/rank0":
            (made,) = task.inputs.values()
            file_bench.rot(made.output("rank0.safetensors"))

    file_bench.before = rot
    with pytest.raises(DamagedOutputError, match="ran again 2 times, and each time it was wrong again") as caught:
        file_bench.build("1")
    assert "mend it, or use another store" in caught.value.advice
    assert file_bench.ran.count("convert/stage0/group0") == 1 + MAX_REPEATS
    step = next(preparation.plan(file_bench.spec("1")).of_kind(Kind.CONVERT))
    assert commits.lookup(file_bench.store, step.digest) is None


def test_build_rotten_source_under_a_rotten_shard_is_refused_and_not_published(file_bench: Bench) -> None:
    file_bench.build("1")
    file_bench.rot(file_bench.outcome("1", Kind.CONVERT).outputs[0])
    weights = file_bench.source / "model.safetensors"
    before = weights.stat()
    data = bytearray(weights.read_bytes())
    data[-9] ^= 4
    weights.write_bytes(data)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    for version in ("2", "3"):  # not only in the build that has found it
        with pytest.raises(SourceCorruptError, match="wrote another rank"):
            file_bench.build(version, **SMALLER)
    assert not [info.key for info in file_bench.store.list("releases/tiny/2/")]


def test_build_outcome_made_from_other_bytes_than_its_need_holds_is_made_again(file_bench: Bench) -> None:
    """A cached engine and verification of a conversion that was done again, and came out otherwise."""
    file_bench.build("1", **VERIFIED)
    converted = file_bench.outcome("1", Kind.CONVERT, **VERIFIED)
    file_bench.rot(converted.output("rank0.safetensors"))
    changed = converted.output("rank0.safetensors")
    data = file_bench.store.get(changed.key)
    outputs = tuple(
        output.model_copy(update={"sha256": digest_bytes(data)}) if output == changed else output for output in converted.outputs
    )
    other = converted.model_copy(update={"outputs": outputs})
    file_bench.store.put(commits.outcome_key(other.digest), other.model_dump_json().encode())
    done = file_bench.build("2", **VERIFIED)
    assert sorted(file_bench.ran) == ["build/rank0", "verify/stage0"]
    assert "build/rank0 was made from another rank0.safetensors" in file_bench.said[0]
    assert file_bench.engines(done)[0].startswith(data)


def test_publish_engine_of_other_bytes_than_were_verified_is_refused(file_bench: Bench) -> None:
    """The last look, at whatever came of the steps; the conversion's own outcome is gone."""
    done = file_bench.build("1", **VERIFIED)
    assert done.result is not None
    plan, outcomes = done.plan, dict(done.result.outcomes)
    place(file_bench.store, plan, outcomes)
    (convert,) = plan.of_kind(Kind.CONVERT)
    built = list(plan.of_kind(Kind.BUILD))[1].digest
    consumed = tuple(item.model_copy(update={"sha256": "0" * 64}) for item in outcomes[built].consumed)
    outcomes[built] = outcomes[built].model_copy(update={"consumed": consumed})
    with pytest.raises(DigestError, match=r"build/rank1 was made from another rank1\.safetensors than convert"):
        place(file_bench.store, plan, outcomes)
    del outcomes[convert.digest]
    with pytest.raises(DigestError, match=r"made from different bytes of rank1\.safetensors of convert"):
        place(file_bench.store, plan, outcomes)
    outcomes[built] = outcomes[built].model_copy(update={"consumed": ()})
    with pytest.raises(DigestError, match="build/rank1 does not record which bytes of convert"):
        place(file_bench.store, plan, outcomes)


def test_convert_rotten_shard_of_a_killed_run_is_converted_again(
    file_bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = file_bench.spec("1", conversion={"max_shard_bytes": 3000})
    output = tmp_path / "checkpoint"
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", _killed)
        with pytest.raises(KeyboardInterrupt):
            stages.convert(spec, output)
    whole = stages.convert(spec, tmp_path / "whole")
    staged = sorted((output / ".staging").rglob("rank0-*.safetensors"))
    assert staged
    data = bytearray(staged[0].read_bytes())
    data[-9] ^= 4
    staged[0].write_bytes(data)
    stages.convert(spec, output)
    for path in sorted((tmp_path / "whole").glob("*.safetensors")):
        assert (output / path.name).read_bytes() == path.read_bytes(), path.name
    assert whole.plan.topology.tp == 2


_replace = Path.replace


def _killed(self: Path, target: Path) -> Path:
    if Path(target).name.startswith("rank"):
        raise KeyboardInterrupt
    return _replace(self, target)


def test_collect_removes_what_was_set_aside_after_the_grace_period(file_bench: Bench) -> None:
    file_bench.build("1")
    file_bench.rot(file_bench.outcome("1", Kind.CONVERT).outputs[0])
    file_bench.build("2", **SMALLER)
    aside = {info.key for info in file_bench.store.list(commits.ASIDE)}
    assert len(aside) == 1
    now = datetime.datetime.now(datetime.UTC)
    collect(file_bench.store.url, delete=True, now=now)
    found = collect(file_bench.store.url, delete=True, now=now + datetime.timedelta(days=8))
    assert aside < set(found.due)
    assert list(file_bench.store.list(commits.ASIDE)) == []
