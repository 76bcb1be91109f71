"""Whether every command ends when it is asked to: Ctrl-C and SIGTERM at random moments, how long it takes and what is left.

    python -m benchmarks.stopping [--moments 20] [--seed 1] [--only build/ray]

Each command runs once to its end, to know how long it takes. Then it is started anew as often as there are moments, with an empty
store or output, and stopped; the clock starts when it handles the signals, since until then Python itself starts. Ctrl-C goes to
the whole process group, as a terminal sends it. What must not be left: processes, unfinished files, a config.json that is not
whole; and, after one more run to the end in the same scratch folder, anything in scratch. Ends with 1 if a rule is broken.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator.base.errors import CancelledError, TerminatedError
from tests.support.signals import hear_interrupts

SECONDS = 5.0
"""By then a command has ended."""
_GIVEN_UP_SECONDS = 20.0
_DYING_SECONDS = 3.0
"""How long after the command its processes may take to be gone: Ray's and MPI's notice by themselves."""
_ENDING_SECONDS = 0.5
_MARK = "STOPPING_BENCHMARK"
_CODES = {signal.SIGINT: CancelledError.exit_code, signal.SIGTERM: TerminatedError.exit_code}
_OPTIONS = ["--max-batch-size", "2", "--max-input-len", "16", "--max-seq-len", "64"]
_OPEN = ("*.part", ".tmp-*")
"""Names of files that are being written."""


@dataclass(frozen=True)
class Bed:
    """Folders of one run of this program."""

    root: Path

    @property
    def scratch(self) -> Path:
        return self.root / "scratch"

    @property
    def output(self) -> Path:
        """Folder that the command writes: its store, or its output."""
        return self.root / "output"

    def command(self, case: str) -> list[str]:
        """The words of a command at a place, e.g. build/ray."""
        name, place = case.split("/")
        cluster, out = ["--cluster", str(self.root / f"{place}.yaml")], str(self.output)
        return {
            "build": ["build", str(self.root / "plain.yaml"), *cluster],
            "quantize": ["quantize", str(self.root / "quantized.yaml"), *cluster, "--output", str(self.output / "artifact")],
            "convert": ["convert", "--source", str(self.root / "model"), "--output", str(self.output / "checkpoint")],
            "build-engine": ["build-engine", "--checkpoint", str(self.root / "checkpoint"), *_OPTIONS, "--output", out],
        }[name]  # fmt: skip


CASES = ("build/local", "build/ray", "quantize/local", "quantize/ray", "convert/local", "build-engine/local")


def make_bed(root: Path) -> Bed:
    """A tiny model, its checkpoint, specs and cluster files."""
    from orchestrator.compat.models import LLaMAForCausalLM
    from tests.support.tiny import write_tiny_llama

    bed = Bed(root)
    source = write_tiny_llama(root / "model")
    LLaMAForCausalLM.from_hugging_face(source).save_checkpoint(root / "checkpoint")
    spec = {
        "source": {"path": str(source)}, "engine": {"max_batch_size": 2, "max_input_len": 16, "max_seq_len": 64},
        "verification": {"max_tokens": 12, "decode_steps": 3}, "release": {"name": "tiny", "version": "1"},
    }  # fmt: skip
    (root / "plain.yaml").write_text(json.dumps(spec))
    quantization = {"algorithm": "FP8", "calibration": {"num_samples": 8, "max_length": 16}}
    (root / "quantized.yaml").write_text(json.dumps({**spec, "quantization": quantization}))
    bed.scratch.mkdir()
    for kind in ("local", "ray"):
        place = {"kind": kind, "store": (bed.output / "store").as_uri(), "scratch": str(bed.scratch)}
        (root / f"{kind}.yaml").write_text(json.dumps(place))
    return bed


@dataclass(frozen=True)
class Row:
    """One stop."""

    case: str
    signal: signal.Signals
    moment: float
    seconds: float
    code: int
    left: tuple[str, ...]

    @property
    def is_early_end(self) -> bool:
        """The command was faster than its moment, or had nothing left but Python's own end."""
        return self.code == 0 and self.seconds < _ENDING_SECONDS

    @property
    def problems(self) -> list[str]:
        """Faults of the stop; empty: none."""
        if self.is_early_end:
            return list(self.left)
        found = list(self.left)
        if self.seconds > SECONDS:
            found.append("too slow")
        if self.code != _CODES[self.signal]:
            found.append(f"exit code {self.code}")
        return found

    def line(self) -> str:
        ended = "ended before" if self.is_early_end else f"{self.seconds:5.2f} s  {self.code:>4}"
        wrong = ", ".join(self.problems)
        return f"{self.case:<20} {self.signal.name:<8} {self.moment:6.2f} s  {ended:<14}  {wrong or 'nothing left'}"


def start(bed: Bed, case: str, mark: str) -> subprocess.Popen[bytes]:
    """Start the command in a session of its own, and wait until it handles signals."""
    environment = {**os.environ, _MARK: mark, "TMPDIR": str(bed.scratch), "RAY_TMPDIR": tempfile.gettempdir()}
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestrator.cli", *bed.command(case)],
        env=environment, stdout=(bed.root / "said").open("ab"), stderr=subprocess.STDOUT, start_new_session=True,
        preexec_fn=hear_interrupts,
    )  # fmt: skip
    while process.poll() is None and not _handles(process.pid, signal.SIGTERM):
        time.sleep(0.001)
    return process


def _handles(process: int, number: int) -> bool:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    caught = next((int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:")), 0)
    return bool(caught >> (number - 1) & 1)


def run_whole(bed: Bed, case: str) -> float:
    """Run the command to its end; seconds. Raises RuntimeError when it fails."""
    process = start(bed, case, uuid.uuid4().hex)
    began = time.monotonic()
    if process.wait() != 0:
        raise RuntimeError(f"{case} failed: " + (bed.root / "said").read_text()[-2000:])
    return time.monotonic() - began


def stop(bed: Bed, case: str, number: signal.Signals, moment: float) -> Row:
    """Run the command until `moment`, and stop it."""
    clear(bed)
    mark = uuid.uuid4().hex
    process = start(bed, case, mark)
    try:
        process.wait(moment)
    except subprocess.TimeoutExpired:
        began = time.monotonic()
        if number is signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        try:
            process.wait(_GIVEN_UP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        seconds = time.monotonic() - began
    else:
        seconds = 0.0
    return Row(case, number, moment, seconds, process.returncode, tuple(left(bed, mark)))


def left(bed: Bed, mark: str) -> Iterator[str]:
    """Leftovers of a stopped command, its scratch excepted."""
    end = time.monotonic() + _DYING_SECONDS
    while (living := marked(mark)) and time.monotonic() < end:
        time.sleep(0.1)
    yield from (f"process {name}" for name in living)
    for pattern in _OPEN:
        yield from (f"unfinished {path.relative_to(bed.output)}" for path in bed.output.rglob(pattern))
    for path in bed.output.rglob("config.json"):
        try:
            json.loads(path.read_bytes())
        except ValueError:
            yield f"half of {path.relative_to(bed.output)}"


def marked(mark: str) -> list[str]:
    """Names of living processes that belong to a command."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and f"{_MARK}={mark}".encode() in (folder / "environ").read_bytes():
                found.append(f"{folder.name} {(folder / 'comm').read_text().strip()}")
        except OSError:
            continue
    return found


def clear(bed: Bed) -> None:
    """An empty output."""
    shutil.rmtree(bed.output, ignore_errors=True)
    bed.output.mkdir()


def run_case(bed: Bed, case: str, num_moments: int, generator: random.Random) -> list[str]:
    """Stop a command at its moments under both signals; returns what is wrong."""
    whole = math.inf
    for _ in range(2):  # the first one also fills the page cache
        clear(bed)
        whole = min(whole, run_whole(bed, case))
    print(f"{case}: {whole:.1f} s to its end", flush=True)
    usual = set(bed.scratch.iterdir())  # some library keeps a file of its own there, stopped or not
    problems, slowest, count = [], 0.0, 0
    while count < 2 * num_moments:
        number = list(_CODES)[count % 2]
        row = stop(bed, case, number, generator.uniform(0.0, whole))
        print(row.line(), flush=True)
        problems += [f"{row.case} {row.signal.name} at {row.moment:.2f} s: {problem}" for problem in row.problems]
        slowest = max(slowest, row.seconds)
        if row.is_early_end:  # another moment instead of this one, which never came
            whole = row.moment
        else:
            count += 1
    at_once = sorted(path.name for path in set(bed.scratch.iterdir()) - usual)
    run_whole(bed, case)  # the next build, on what the last stop left
    after = sorted(path.name for path in set(bed.scratch.iterdir()) - usual)
    problems += [f"{case}: {name} is in scratch after the next build" for name in after]
    print(
        f"{case}: slowest end {slowest:.2f} s; in scratch after {2 * num_moments} stops: {len(at_once)}, "
        f"after the next build: {len(after)}", flush=True,
    )  # fmt: skip
    return problems


def main() -> None:
    """Run all cases, or one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=20, help="per command, place and signal")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=CASES)
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}, {arguments.moments} moments", flush=True)
    problems: list[str] = []
    with tempfile.TemporaryDirectory(prefix="stopping-") as folder:
        bed = make_bed(Path(folder))
        for case in [arguments.only] if arguments.only else CASES:
            problems += run_case(bed, case, arguments.moments, random.Random(f"{arguments.seed} {case}"))
    print("\n".join(["broken rules:", *problems]) if problems else "every rule holds")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
