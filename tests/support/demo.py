"""The life of a release in one store, by the command line: built, killed, resumed, pulled, verified, tagged, damaged, collected.

Each step asserts what it shows and returns a line about it. The store may be any; the server and its credentials stand in the
environment, and nowhere that a build writes to: the last step searches everything.
"""

from __future__ import annotations

import datetime
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from orchestrator.base.errors import DigestError, ReleaseExistsError, SignatureError
from orchestrator.planning.steps import Kind
from orchestrator.releases.manifest import MANIFEST
from orchestrator.stores import open_store
from orchestrator.stores.store import Store

_UPLOAD_BYTES = 20 * 2**20
_WAIT_SECONDS = 60
_WRITE_AND_WAIT = """
import sys
from orchestrator.stores import open_store
with open_store(sys.argv[1]).writer(sys.argv[2], int(sys.argv[3]) + 1) as writer:
    writer.write(bytes(int(sys.argv[3])))
    print("written", flush=True)
    sys.stdin.read()
"""


@dataclass(frozen=True)
class Done:
    """A command that ended."""

    code: int
    said: str
    """On stdout."""
    noise: str = ""
    """On stderr."""


Run = Callable[[list[str]], Done]


def run_process(words: list[str]) -> Done:
    """`orchestrator WORDS` as a process."""
    done = subprocess.run([sys.executable, "-m", "orchestrator.cli", *words], capture_output=True, text=True)
    return Done(done.returncode, done.stdout, done.stderr)


def run_here(words: list[str]) -> Done:
    """The same in this process, whose imports are paid for."""
    from typer.testing import CliRunner

    from orchestrator.cli.commands import app

    result = CliRunner().invoke(app, words)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Done(result.exit_code, result.stdout, result.stderr)


@dataclass
class Demo:
    """One walk. `spec` is a build spec as it stands in a file; it must have two engines at least."""

    folder: Path
    """For files of this machine: spec, keys, what is pulled."""
    store: str
    """URL."""
    spec: dict[str, Any]
    cluster: dict[str, Any] = field(default_factory=dict)
    """A cluster file without its store."""
    run: Run = run_process
    secrets: tuple[str, ...] = ()
    """Must not be found in anything that was written, said or stored."""
    logs: Callable[[], Iterator[Path]] = lambda: iter(())
    """Further files to search for secrets: a cluster's logs."""
    said: list[Done] = field(default_factory=list)
    finished: set[str] = field(default_factory=set)
    """Steps whose end the killed build has told."""

    def walk(self) -> Iterator[tuple[str, float, str]]:
        """What was done, its seconds, what it showed. Raises AssertionError."""
        self._prepare()
        for step in (
            self.build_that_is_killed, self.build_that_resumes, self.build_again, self.build_of_another_version,
            self.build_of_something_else_under_this_version, self.verify, self.releases, self.tag, self.pull_of_a_rank,
            self.pull_of_everything, self.writer_that_is_killed, self.collect, self.build_after_collecting,
            self.flipped_byte_of_an_engine, self.flipped_byte_of_a_signature, self.flipped_byte_of_the_manifest, self.no_secret,
        ):  # fmt: skip
            began = time.monotonic()
            result = step()
            yield step.__name__.replace("_", " "), time.monotonic() - began, result

    def _prepare(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "cluster.yaml").write_text(yaml.safe_dump({**self.cluster, "store": self.store}))
        self._write_spec("1")
        for words in (
            ["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", "key.pem"],
            ["ec", "-in", "key.pem", "-pubout", "-out", "pub.pem"],
        ):
            subprocess.run(["openssl", *words], cwd=self.folder, check=True, capture_output=True)

    def _write_spec(self, version: str, **engine: Any) -> None:
        name = self.spec["release"]["name"]
        plain = {
            **self.spec,
            "engine": {**self.spec["engine"], **engine},
            "release": {"name": name, "version": version},
        }
        (self.folder / "spec.yaml").write_text(yaml.safe_dump(plain))

    @property
    def _url(self) -> str:
        return f"{self.store}/releases/{self.spec['release']['name']}/1"

    @property
    def _key(self) -> list[str]:
        return ["--public-key", str(self.folder / "pub.pem")]

    @property
    def _build_words(self) -> list[str]:
        files = [str(self.folder / name) for name in ("spec.yaml", "cluster.yaml", "key.pem")]
        return ["build", files[0], "--cluster", files[1], "--sign-key", files[2], "--json"]

    def _run(self, *words: str, code: int = 0) -> str:
        done = self.run([*words])
        self.said.append(done)
        assert done.code == code, f"{' '.join(words)} ended with {done.code}, not {code}: {done.said[-2000:]} {done.noise[-2000:]}"
        return done.said

    def _build(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._run(*self._build_words).splitlines()]

    def _opened(self) -> Store:
        return open_store(self.store)

    def build_that_is_killed(self) -> str:
        """SIGKILL to the driver as soon as the first engine is there."""
        command = [sys.executable, "-m", "orchestrator.cli", *self._build_words]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
            assert driver.stdout is not None
            for line in driver.stdout:
                event = json.loads(line)
                if event["event"] == "succeeded":
                    self.finished.add(event["outcome"]["name"])
                    if event["outcome"]["kind"] == Kind.BUILD:
                        os.kill(driver.pid, signal.SIGKILL)
                        break
        assert driver.returncode == -signal.SIGKILL
        store = self._opened()
        assert not [info for info in store.list("releases/") if info.key.endswith(MANIFEST)]
        assert list(store.list("live/"))
        return f"SIGKILL after {', '.join(sorted(self.finished))}"

    def build_that_resumes(self) -> str:
        events = self._build()
        plan = next(event for event in events if event["event"] == "plan")
        second = {event["outcome"]["name"] for event in events if event["event"] == "succeeded"}
        assert not self.finished & (second | set(plan["pending"]))
        assert second
        assert events[-1]["event"] == "published"
        return f"the other {events[-1]['steps_run']} of {plan['steps']} steps ran; published"

    def build_again(self) -> str:
        last = self._build()[-1]
        assert (last["event"], last["steps_run"]) == ("published", 0)
        return "0 steps ran"

    def build_of_another_version(self) -> str:
        self._write_spec("2")
        last = self._build()[-1]
        self._write_spec("1")
        assert (last["event"], last["steps_run"]) == ("published", 0)
        assert last["manifest"].endswith("/2/manifest.json")
        return "0 steps ran; published from what was there"

    def build_of_something_else_under_this_version(self) -> str:
        self._write_spec("1", max_batch_size=1)
        self._run(*self._build_words, code=ReleaseExistsError.exit_code)
        self._write_spec("1")
        return f"refused, exit code {ReleaseExistsError.exit_code}"

    def verify(self) -> str:
        found = json.loads(self._run("verify", self._url, *self._key, "--json"))
        assert found["signature"].startswith("signed by the key")
        return f"{found['files']} files, {found['bytes']:,} bytes, signature right"

    def releases(self) -> str:
        found = json.loads(self._run("releases", self.store, "--json"))["releases"]
        assert [(item["release"].rpartition("/")[2], item["signed"], item["problem"]) for item in found] == [
            ("1", True, ""), ("2", True, ""),
        ]  # fmt: skip
        assert json.loads(self._run("releases", self.store, "--select", "tp=77", "--json"))["releases"] == []
        return f"{len(found)}, signed"

    def tag(self) -> str:
        for version in ("2", "1"):
            self._run("tag", f"{self._url[:-1]}{version}", "demo/prod", "--sign-key", str(self.folder / "key.pem"))
        shown = " ".join(self._run("inspect", f"{self.store}/tags/demo/prod").split())
        assert f"{self.spec['release']['name']} 1" in shown
        return "demo/prod moved from version 2 to 1"

    def pull_of_a_rank(self) -> str:
        target = self.folder / "rank1"
        words = ["pull", f"{self.store}/tags/demo/prod", "--rank", "1", "--no-check", "--output", str(target), *self._key]
        self._run(*words)
        engines = [path.name for path in target.rglob("*.engine")]
        assert engines == ["rank1.engine"]
        return f"by the tag: {', '.join(engines)} and what all ranks share"

    def pull_of_everything(self) -> str:
        """With `model_signing`'s own program as the judge; a second pull fetches nothing."""
        target = self.folder / "whole"
        words = ["pull", self._url, "--node", "0", "--gpus-per-node", "64", "--no-check", "--output", str(target), *self._key]
        self._run(*words)
        before = {path: path.stat().st_mtime_ns for path in target.rglob("*") if path.suffix == ".engine"}
        self._run(*words)
        assert len(before) >= 2
        assert {path: path.stat().st_mtime_ns for path in before} == before
        program = Path(sys.executable).with_name("model_signing")
        key, signature = str(self.folder / "pub.pem"), str(target / "model.sig")
        stock = [str(program), "verify", "key", "--public_key", key, "--signature", signature, str(target)]
        judged = subprocess.run(stock, capture_output=True, text=True)
        assert judged.returncode == 0, judged.stdout + judged.stderr
        return f"{len(before)} engines; model_signing verify: {(judged.stdout + judged.stderr).strip().splitlines()[-1]}"

    def writer_that_is_killed(self) -> str:
        """What a node leaves that loses power in the middle of an upload."""
        key = f"steps/{'ab' * 32}/attempt/rank0.engine"
        command = [sys.executable, "-c", _WRITE_AND_WAIT, self.store, key, str(_UPLOAD_BYTES)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"written\n"
            end = time.monotonic() + _WAIT_SECONDS
            while not (begun := list(self._opened().list_uploads("steps/"))) and time.monotonic() < end:
                time.sleep(0.05)  # obstore begins the upload on a thread of its own
            process.kill()
        assert begun
        return f"{len(begun)} unfinished upload left"

    def collect(self) -> str:
        """Without the grace period, since nothing runs: a dry run, the deletion, and a look at what is left."""
        store = self._opened()
        store.put(f"steps/{'cd' * 32}/attempt/out", b"of a dead worker")
        words = ["collect", self.store, "--grace-days", "0", "--json"]
        told = json.loads(self._run(*words))
        assert told["uploads"]
        assert any(key.startswith("live/") for key in told["due"])
        assert any(key.startswith(f"steps/{'cd' * 32}") for key in told["due"])
        deleted = json.loads(self._run(*words, "--delete"))
        assert deleted["due"].keys() == told["due"].keys()
        left = json.loads(self._run(*words))
        assert (left["due"], left["waiting"], left["uploads"]) == ({}, {}, [])
        assert [*store.list_uploads(""), *store.list("live/")] == []
        self._run("verify", self._url, *self._key)
        return f"{len(told['due'])} objects and {len(told['uploads'])} uploads deleted; nothing left; the release verifies"

    def build_after_collecting(self) -> str:
        self._write_spec("3")
        last = self._build()[-1]
        self._write_spec("1")
        assert last["steps_run"] == 0
        return "0 steps ran: the cache of a release stays"

    def _flipped(self, key: str, place: int, code: int) -> str:
        store = self._opened()
        good = store.get(key)
        bad = bytearray(good)
        bad[place % len(bad)] ^= 1
        store.put(key, bytes(bad))
        self._run("verify", self._url, *self._key, code=code)
        target = str(self.folder / f"damaged-{datetime.datetime.now().timestamp()}")
        self._run("pull", self._url, "--no-check", "--output", target, *self._key, code=code)
        assert not list(Path(target).rglob("rank0.engine"))
        store.put(key, good)
        return f"verify and pull end with {code}"

    def flipped_byte_of_an_engine(self) -> str:
        folder = self._url.removeprefix(self.store).lstrip("/")
        (key,) = (info.key for info in self._opened().list(f"{folder}/") if info.key.endswith("/rank0.engine"))
        return self._flipped(key, 12345, DigestError.exit_code)

    def flipped_byte_of_a_signature(self) -> str:
        folder = self._url.removeprefix(self.store).lstrip("/")
        (key,) = (info.key for info in self._opened().list(f"{folder}/signatures/"))
        return self._flipped(key, 400, SignatureError.exit_code)

    def flipped_byte_of_the_manifest(self) -> str:
        folder = self._url.removeprefix(self.store).lstrip("/")
        return self._flipped(f"{folder}/{MANIFEST}", 700, DigestError.exit_code)

    def no_secret(self) -> str:
        """Nothing that was stored, written or said holds a credential or the private key."""
        store = self._opened()
        private = "".join((self.folder / "key.pem").read_text().splitlines()[1:-1])
        places: dict[str, bytes] = {info.key: store.get(info.key) for info in store.list("")}
        files = [path for path in self.folder.rglob("*") if path.is_file() and path.name != "key.pem"]
        places |= {str(path): path.read_bytes() for path in [*files, *self.logs()]}
        places |= {f"output {number}": (done.said + done.noise).encode() for number, done in enumerate(self.said)}
        secrets = [secret.encode() for secret in (*self.secrets, private, private[:64])]
        assert [name for name, data in places.items() for secret in secrets if secret in data] == []
        return f"{len(places)} objects, files and outputs searched"
