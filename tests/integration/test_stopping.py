"""A build on a Ray of this machine that is stopped while Ray starts, and while a step runs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.support.signals import hear_interrupts


def names_below(process: int) -> list[str]:
    """Command lines of what a process has started."""
    found = []
    for child in psutil.Process(process).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            found.append(" ".join(child.cmdline()))
    return found


MOMENTS: dict[str, Callable[[int, Path], bool]] = {
    "ray-starts": lambda process, scratch: any("gcs_server" in name for name in names_below(process)),
    "step-runs": lambda process, scratch: any(scratch.glob("trt-orchestrator-*")),
}


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("moment", MOMENTS)
def test_build_on_ray_that_is_stopped_ends_with_the_signals_code_and_leaves_nothing(
    moment: str, number: int, code: int, tiny_llama: Path, tmp_path: Path
) -> None:
    scratch = tmp_path / "scratch"
    spec = {"source": {"path": str(tiny_llama)}, "verification": {"enabled": False}, "release": {"name": "tiny", "version": "1"}}
    (tmp_path / "spec.yaml").write_text(json.dumps({**spec, "engine": {"max_input_len": 16, "max_seq_len": 64}}))
    place = {"kind": "ray", "store": (tmp_path / "store").as_uri(), "scratch": str(scratch)}
    (tmp_path / "cluster.yaml").write_text(json.dumps(place))
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestrator.cli", "build", "spec.yaml", "--cluster", "cluster.yaml"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        preexec_fn=hear_interrupts,
    )  # fmt: skip
    while not MOMENTS[moment](process.pid, scratch):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    below = psutil.Process(process.pid).children(recursive=True)
    began = time.monotonic()
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    said, _ = process.communicate(timeout=30)
    seconds = time.monotonic() - began
    assert (process.returncode, "error: stopped" in said) == (code, True), said
    assert seconds < 5
    assert list(scratch.glob("*")) == []
    assert list((tmp_path / "store").rglob(".tmp-*")) == []
    while any(child.is_running() for child in below):
        assert time.monotonic() - began < 30, below
        time.sleep(0.05)
