"""A build on a bed of Ray nodes: `orchestrator build --json` runs in one of them, its events are read while they come."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from orchestrator.scheduling.commits import OUTCOMES, outcome_key
from orchestrator.spec.cluster import StoreOptions
from orchestrator.stores import open_store
from tests.support.ray_nodes import RayNodes

Line = dict[str, Any]
_POLL_SECONDS = 0.02


class BedBuild:
    """One release, built by as many drivers as it takes. `read_at` in a line: when, seconds since 1970."""

    def __init__(
        self,
        bed: RayNodes,
        source: Path,
        version: str,
        store: str | None = None,
        pools: Any = None,
        options: StoreOptions | None = None,
        **sections: Any,
    ) -> None:
        """`options`: of the store. `sections`: of the spec, instead of those of a tiny build."""
        self.bed = bed
        self.options = options
        self.folder = bed.folder / "builds" / version
        self.folder.mkdir(parents=True)
        self.version = version
        self.store = store or bed.store_url
        spec = {
            "source": {"path": str(source)},
            "topology": {"tp": 2, "pp": 2},
            "conversion": {"max_shard_bytes": "60KB"},
            "engine": {"max_batch_size": 2, "max_input_len": 16, "max_seq_len": 32},
            "verification": {"max_tokens": 8, "decode_steps": 2},
            "release": {"name": "tiny", "version": version},
            **sections,
        }
        cluster = {
            "kind": "ray", "store": self.store, "scratch": str(bed.scratch),
            "retries": {"max_attempts": 8, "backoff_seconds": 0.5, "max_backoff_seconds": 4},
            "schedule_timeout_seconds": 90, "probe_timeout_seconds": 60,
        }  # fmt: skip
        if options is not None:
            cluster["store_options"] = options.model_dump(mode="json", exclude_unset=True)
        if pools is not None:
            cluster["pools"] = pools
        (self.folder / "spec.yaml").write_text(yaml.safe_dump(spec))
        (self.folder / "cluster.yaml").write_text(yaml.safe_dump(cluster, sort_keys=False))
        self.lines: list[Line] = []
        """Of all drivers so far."""
        self.process: subprocess.Popen[Any] | None = None
        self._output = self.folder / "events.jsonl"
        self._output.touch()
        self._read_bytes = 0

    def start(self, node: int) -> None:
        """Start a driver in a node."""
        spec, cluster = str(self.folder / "spec.yaml"), str(self.folder / "cluster.yaml")
        words = [sys.executable, "-m", "orchestrator.cli", "build", spec, "--cluster", cluster, "--json"]
        with self._output.open("ab") as out, (self.folder / "driver.log").open("ab") as err:
            self.process = self.bed.popen(node, *words, stdout=out, stderr=err)

    def kill(self) -> None:
        """SIGKILL to the driver."""
        assert self.process is not None
        self.bed.kill_process(self.process)

    @property
    def alive(self) -> bool:
        """Whether the driver is."""
        assert self.process is not None
        return self.process.poll() is None

    def read(self) -> list[Line]:
        """Lines that came since the last call."""
        with self._output.open("rb") as output:
            output.seek(self._read_bytes)
            data = output.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._read_bytes += len(whole)
        new = [{"read_at": time.time(), **json.loads(line)} for line in whole.splitlines() if line.startswith(b"{")]
        self.lines.extend(new)
        return new

    def until(self, condition: Callable[[Line], bool], seconds: float = 120.0) -> Line | None:
        """The first line from now on that meets the condition; None when the driver ended before."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            ended = not self.alive
            for line in self.read():
                if condition(line):
                    return line
            if ended:
                return None
            time.sleep(_POLL_SECONDS)
        raise AssertionError(f"waited {seconds:.0f} s; {self.explain()}")

    def wait(self, seconds: float = 240.0) -> int:
        """Exit code of the driver, when it has ended."""
        self.until(lambda line: False, seconds)
        assert self.process is not None
        return int(self.process.wait())

    def of(self, event: str, **fields: Any) -> list[Line]:
        return [
            line for line in self.lines if line["event"] == event and all(line.get(key) == value for key, value in fields.items())
        ]

    def running(self) -> dict[str, Line]:
        """Starts of the steps that run, as far as has been read, by name of the step."""
        found: dict[str, Line] = {}
        for line in self.lines:
            if line["event"] == "started":
                found[line["step"]] = line
            elif line["event"] in ("succeeded", "failed"):
                found.pop(line["step"], None)
        return found

    def nodes_of(self, kind: str) -> set[str]:
        """Names of the nodes where steps of a kind ran to their end."""
        outcomes = [line["outcome"] for line in self.of("succeeded")]
        return {outcome["node"].partition("/")[0] for outcome in outcomes if outcome["kind"] == kind}

    def explain(self) -> str:
        """For a failed assertion."""
        log = (self.folder / "driver.log").read_text(errors="replace")[-1500:]
        shown = [{key: str(value)[:160] for key, value in line.items() if key != "outcome"} for line in self.lines[-8:]]
        return f"last lines {shown}; driver.log {log}"


def is_start_of(kind: str) -> Callable[[Line], bool]:
    """Whether a line says that a step of a kind began."""
    return lambda line: line["event"] == "started" and str(line.get("step", "")).startswith(kind)


def started_again(build: BedBuild) -> list[str]:
    """Steps that began (on their node's clock, which is ours) after their outcome had been committed."""
    found = []
    for line in build.of("started"):
        began = datetime.datetime.fromisoformat(line["at"]).timestamp()
        if began > committed_at(build, line["digest"]):
            found.append(line["step"])
    return found


def committed_at(build: BedBuild, digest: str) -> float:
    """When the outcome of a step was committed, seconds since 1970; infinite when it was not. S3 knows the second only: its end."""
    key = outcome_key(digest)
    if build.store.startswith("file://"):
        commit = Path(build.store.removeprefix("file://")) / key
        return commit.stat().st_mtime if commit.exists() else float("inf")
    import s3fs

    assert build.options is not None
    found = s3fs.S3FileSystem(endpoint_url=build.options.endpoint_url, use_listings_cache=False)
    try:
        return float(found.info(f"{build.store.removeprefix('s3://')}/{key}")["LastModified"].timestamp()) + 1.0
    except FileNotFoundError:
        return float("inf")


def checkpoint(build: BedBuild) -> dict[str, str]:
    """sha256 of every file of the converted checkpoint, by step and name: the same weights give the same."""
    store = open_store(build.store, build.options)
    outcomes = [json.loads(store.get(found.key)) for found in store.list(OUTCOMES)]
    return {
        f"{outcome['name']}/{output['name']}": output["sha256"]
        for outcome in outcomes
        if outcome["kind"] == "convert"
        for output in outcome["outputs"]
    }


def published(build: BedBuild) -> str:
    """What is wrong with the release; empty: it is there, its ranks were executed, and every byte is what the manifest says."""
    from orchestrator.base.errors import OrchestratorError
    from orchestrator.releases import verify

    url = f"{build.store}/releases/tiny/{build.version}"
    try:
        verified = verify(url, options=build.options)
    except OrchestratorError as error:
        return f"{type(error).__name__}: {error.message}"
    return "" if verified.release.manifest.verification is not None else "not verified"
