"""A bounded run of the fuzzer of manifests, and cases that once ended in a traceback, a hang or a file outside."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from orchestrator.base.errors import MachineError, SpecError
from tests.fuzz import manifests
from tests.fuzz.harness import open_fuzzer, remove, run_case, run_line
from tests.fuzz.manifests import COMMANDS, SPECIALS, TEXTS, Manifests


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Manifests]:
    made = open_fuzzer("manifests")
    assert isinstance(made, Manifests)
    made.prepare(tmp_path_factory.mktemp("base"))
    return made


@seed(1)
@settings(max_examples=25, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(number=st.integers(0, 10**9))
def test_readers_of_any_manifest_end_with_success_or_an_error_of_ours(fuzzer: Manifests, number: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        for ended in run_case(fuzzer, "manifests", 0, number, Path(scratch) / "case"):
            assert not ended.problem, f"{ended.problem}\npython -m tests.fuzz manifests --case {number}\n{ended.stderr.decode()}"


def test_readers_of_an_unchanged_manifest_all_succeed(fuzzer: Manifests, tmp_path: Path) -> None:
    for words in COMMANDS:
        remove(tmp_path / "case")
        (tmp_path / "case").mkdir()
        fuzzer.write(tmp_path / "case", None)
        ended = run_line(words, tmp_path / "case")
        no_gpu = words[:1] == ("pull",) and "--no-check" not in words
        expected = SpecError.exit_code if "triton" in words else MachineError.exit_code if no_gpu else 0  # not built for Triton
        assert ended.code == expected, (words, ended.stderr)


@pytest.mark.parametrize("number", range(len(SPECIALS) + len(TEXTS)))
def test_readers_of_each_kind_of_hostile_manifest_end_with_success_or_an_error_of_ours(
    fuzzer: Manifests, tmp_path: Path, number: int
) -> None:
    (tmp_path / "case").mkdir()
    rng = random.Random(number)
    fuzzer.write(tmp_path / "case", fuzzer.special(rng, number))
    for words in (rng.choice([words for words in COMMANDS if words[0] == name]) for name in ("pull", "releases")):
        assert run_line(words, tmp_path / "case").problem == ""


def test_replay_of_a_case_writes_the_same_manifest_in_another_store(tmp_path: Path) -> None:
    found = []
    for name in ("one", "two"):
        fuzzer = Manifests()
        (tmp_path / name).mkdir()
        fuzzer.prepare(tmp_path / name)
        (tmp_path / f"{name}-case").mkdir()
        fuzzer.make(random.Random(3), tmp_path / f"{name}-case")
        found.append((tmp_path / f"{name}-case" / manifests.FOLDER / "manifest.json").read_bytes())
    assert found[0] == found[1]
