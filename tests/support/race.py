"""Two processes that build and publish under the same name and version at once, round after round, in one store.

The parent holds both where each has found the version free and copied its objects, then lets them commit. As a program
(`python -m tests.support.race JSON`) this module is one of the two.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.base.errors import OrchestratorError, ReleaseExistsError

ENGINE = {"max_batch_size": 2, "max_input_len": 16, "max_seq_len": 64}


@dataclass(frozen=True)
class Racers:
    """What both build. They differ in an engine option, or in nothing."""

    source: Path
    store: str
    """URL."""
    sign_key: Path
    is_same: bool
    rebuilds: bool
    """Whether engines are built anew in each round, or only in the first."""


def race(racers: Racers, rounds: int) -> Iterator[tuple[int, int]]:
    """The exit codes of both, of each round. Raises AssertionError when there is not exactly one manifest of theirs."""
    plain = {"source": str(racers.source), "store": racers.store, "key": str(racers.sign_key), "rounds": rounds}
    with contextlib.ExitStack() as stack:
        both = []
        for number in range(2):
            words = {**plain, "batch": 2 if racers.is_same else 2 + number, "rebuilds": racers.rebuilds}
            command = [sys.executable, "-m", "tests.support.race", json.dumps(words)]
            both.append(stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)))
        try:
            for _ in range(rounds):
                for place in ("ready", "copied"):
                    said = [_hear(process) for process in both]
                    assert [line["at"] for line in said] == [place] * 2, said
                    for process in both:
                        print("go", file=process.stdin, flush=True)
                first, second = (_hear(process) for process in both)
                _check(first, second, racers.is_same)
                yield first["code"], second["code"]
        finally:
            for process in both:
                process.kill()


def _hear(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    said: dict[str, Any] = json.loads(process.stdout.readline() or '{"at": "dead"}')
    return said


def _check(first: dict[str, Any], second: dict[str, Any], is_same: bool) -> None:
    codes = sorted([first["code"], second["code"]])
    if is_same:
        assert codes == [0, 0], (first, second)
        assert first["sha256"] == second["sha256"]
    else:
        assert codes == [0, ReleaseExistsError.exit_code], (first, second)


def check_store(store: str, public_key: Path, rounds: int) -> str:
    """After the races: every release verifies, what is committed is whole, and collecting finds losers' objects only."""
    from orchestrator.planning.steps import Outcome
    from orchestrator.releases import collect, list_releases, verify
    from orchestrator.scheduling import commits
    from orchestrator.stores import open_store

    opened = open_store(store)
    listed = list_releases(store)
    assert [item.problem for item in listed] == [""] * rounds
    for item in listed:
        verify(f"{store}/{item.folder}", public_key)
    outcomes = [Outcome.model_validate_json(opened.get(info.key)) for info in opened.list(commits.OUTCOMES)]
    digests = {outcome.digest for outcome in outcomes}
    assert commits.committed(opened, digests).keys() == digests
    assert [*opened.list(commits.LIVE), *opened.list_uploads("")] == []
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)
    removed = collect(store, datetime.timedelta(0), delete=True, now=later)
    for item in listed:
        verify(f"{store}/{item.folder}", public_key)
    return f"{rounds} releases verify, {len(digests)} committed steps are whole, {len(removed.due)} objects of losers collected"


def _main() -> None:
    from orchestrator import building
    from orchestrator.base.digest import digest_bytes
    from orchestrator.releases import publish
    from orchestrator.spec.build import BuildSpec
    from orchestrator.spec.cluster import ClusterSpec
    from orchestrator.spec.decoding import decode
    from tests.support.here import HereCluster

    plain = json.loads(sys.argv[1])
    stdout, sys.stdout = sys.stdout, sys.stderr  # libraries talk

    def say(at: str, **facts: Any) -> None:
        print(json.dumps({"at": at, **facts}), file=stdout, flush=True)

    describe = publish.describe

    def wait_then_describe(*arguments: Any) -> Any:
        say("copied")
        sys.stdin.readline()
        return describe(*arguments)

    publish.describe = wait_then_describe
    for number in range(plain["rounds"]):
        engine = {**ENGINE, "max_batch_size": plain["batch"]}
        if plain["rebuilds"]:
            engine |= {"max_input_len": ENGINE["max_input_len"] + number}
        spec = decode(
            BuildSpec,
            {
                "source": {"path": plain["source"]}, "engine": engine, "verification": {"enabled": False},
                "release": {"name": "tiny", "version": str(number)},
            },
            "race",
        )  # fmt: skip
        say("ready")
        sys.stdin.readline()
        try:
            place = ClusterSpec(store=plain["store"])
            done = building.build(spec, place, open_cluster=lambda _: HereCluster(), sign_key=Path(plain["key"]))
            say("end", code=0, sha256=digest_bytes(done.manifest.to_json()))
        except OrchestratorError as error:
            say("end", code=error.exit_code, message=error.message)


if __name__ == "__main__":
    _main()
