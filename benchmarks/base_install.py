"""Cost and use of `pip install trt-orchestrator` alone: megabytes, seconds, and the commands that run there.

    python -m benchmarks.base_install

Builds a small release of a tiny model here, installs the package without extras into an environment of its own, and runs there
what a laptop and a serving node need. Then come commands whose extra is missing: each must name it and change nothing. Ends with
1 when a command does not end as it must, or when the environment takes 200 MB or more.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator.base.errors import ToolError, UnreachableError

ROOT = Path(__file__).resolve().parents[1]
GOAL_BYTES = 200_000_000
NOWHERE = "http://127.0.0.1:1"
_NOT_INSTALLED = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "tests", "benchmarks", "shared")


@dataclass(frozen=True)
class Case:
    """A command and how it must end."""

    words: tuple[str, ...]
    extra: str = ""
    """The extra that it must name; empty: it runs."""
    unreachable: bool = False
    """It must come as far as the cluster, of which there is none here."""

    @property
    def exit_code(self) -> int:
        return ToolError.exit_code if self.extra else UnreachableError.exit_code if self.unreachable else 0


def served(folder: Path, release: str) -> Iterator[Case]:
    """Commands of a laptop and of a serving node; `folder` holds model/ and spec.yaml."""
    spec, store = str(folder / "spec.yaml"), release.partition("/releases/")[0]
    yield Case(("--version",))
    yield Case(("plan", spec))
    yield Case(("plan", spec, "--simulate"))
    yield Case(("inspect", str(folder / "model")))
    yield Case(("inspect", release))
    yield Case(("pull", release, "--rank", "0", "--no-check", "--output", str(folder / "engines")))
    yield Case(("verify", release))
    yield Case(("tag", release, "prod"))
    yield Case(("releases", store))
    yield Case(("collect", store))
    yield Case(("schema", "manifest"))
    yield Case(("submit", "--help"))
    yield Case(("submit", spec, "--cluster", str(folder / "ray.yaml"), "--address", NOWHERE), unreachable=True)
    yield Case(("list", "--address", NOWHERE), unreachable=True)
    yield Case(("k8s", "overlays"))
    yield Case(("k8s", "render", str(folder / "remote.yaml"), "--overlay", "cpu-aot", "--store", "s3://bucket/builds"))
    yield Case(("k8s", "validate", str(ROOT / "deploy/kuberay/overlays/h100")))


def refused(folder: Path, release: str) -> Iterator[Case]:
    """Commands that need more than the base install; none may write anything to `folder`."""
    spec, new = str(folder / "spec.yaml"), str(folder / "new")
    yield Case(("build", spec, "--store", new), "build")
    yield Case(("convert", "--source", str(folder / "model"), "--output", new), "build")
    yield Case(("build-engine", "--checkpoint", str(folder / "model"), "--output", new), "build")
    yield Case(("quantize", spec, "--store", new, "--sweep", "FP8"), "build")
    yield Case(("quantize", spec, "--auto", "7", "--output", new), "build")
    yield Case(("checkpoint", "compare", str(folder / "model"), str(folder / "model")), "build")
    yield Case(("build", spec, "--cluster", str(folder / "ray.yaml")), "build,ray")
    yield Case(("build", spec, "--cluster", str(folder / "mpi.yaml")), "build,mpi")
    yield Case(("k8s", "list"), "kubernetes")
    yield Case(("tag", release, "signed", "--sign-key", str(folder / "spec.yaml")), "signing")


def write_files(folder: Path, model: Path) -> None:
    """Specs and cluster files of the commands; JSON is YAML."""
    spec = {
        "source": {"path": str(model)},
        "engine": {"max_batch_size": 2, "max_input_len": 16, "max_seq_len": 64},
        "verification": {"max_tokens": 12, "decode_steps": 3},
        "release": {"name": "tiny", "version": "1"},
    }
    (folder / "spec.yaml").write_text(json.dumps(spec))
    (folder / "remote.yaml").write_text(json.dumps({**spec, "source": {"path": "s3://bucket/model"}}))
    for kind in ("ray", "mpi"):
        (folder / f"{kind}.yaml").write_text(json.dumps({"kind": kind, "store": (folder / "new").as_uri()}))


def problem(case: Case, exit_code: int, output: str) -> str:
    """Return the problem with the end of a command; empty: none."""
    if exit_code != case.exit_code:
        return f"exit code {exit_code}, expected {case.exit_code}"
    named = not case.extra or f"pip install 'trt-orchestrator[{case.extra}]'" in output
    return "" if named else f"does not name the extra {case.extra}"


def main() -> None:
    """Install, run, print."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        release = _build_release(folder)
        num_bytes, seconds = _install(folder)
        wrong = [said for case in [*served(folder, release), *refused(folder, release)] if (said := _run(folder, case))]
        if (folder / "new").exists():
            wrong.append("a command without its extra has written something")
    size = f"{num_bytes / 1e6:.0f} MB with the environment's own pip"
    print(f"base install: {size}, {seconds:.0f} s; goal: under {GOAL_BYTES / 1e6:.0f} MB")
    if num_bytes >= GOAL_BYTES:
        wrong.append("too large")
    print("; ".join(wrong) or "every command ended as it must")
    sys.exit(bool(wrong))


def _build_release(folder: Path) -> str:
    """Build and publish one real engine of a tiny model; returns the release's URL."""
    from orchestrator import ClusterSpec, build, load_spec
    from tests.support.tiny import write_tiny_llama

    write_files(folder, write_tiny_llama(folder / "model"))
    return build(load_spec(folder / "spec.yaml"), ClusterSpec(store=(folder / "store").as_uri())).address


def _install(folder: Path) -> tuple[int, float]:
    """Bytes of the environment, and seconds that pip took."""
    source = shutil.copytree(ROOT, folder / "source", ignore=_NOT_INSTALLED, symlinks=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder / "env")], check=True)
    pip = [str(folder / "env/bin/pip"), "--disable-pip-version-check", "-q", "install"]
    began = time.perf_counter()
    subprocess.run([*pip, "-c", str(ROOT / "constraints.txt"), str(source)], check=True, stderr=subprocess.DEVNULL)
    seconds = time.perf_counter() - began
    files = (path for path in (folder / "env").rglob("*") if path.is_file() and not path.is_symlink())
    return sum(path.stat().st_size for path in files), seconds


def _run(folder: Path, case: Case) -> str:
    """Run a command outside of the repository, print how it ended; returns what is wrong with that."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    began = time.perf_counter()
    done = subprocess.run(
        [str(folder / "env/bin/orchestrator"), *case.words], capture_output=True, text=True, check=False, cwd="/", env=environment
    )
    found = problem(case, done.returncode, done.stdout + done.stderr)
    shown = " ".join(word.replace(f"{folder}/", "").replace(f"{ROOT}/", "").removeprefix("file://") for word in case.words)
    ended = f"names the extra {case.extra}" if case.extra and not found else f"exit code {done.returncode}"
    print(f"{time.perf_counter() - began:5.1f} s  {ended:<28}  orchestrator {shown}{': ' + found if found else ''}", flush=True)
    return f"{shown}: {found}" if found else ""


if __name__ == "__main__":
    main()
