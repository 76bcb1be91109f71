"""Plans of very large models from headers alone: seconds and memory of a fresh process.

A 405B-shaped Llama at tp=8, pp=16, and a mixture of 61 layers x 256 experts at tp=32, pp=4, moe_ep=32.

    python -m benchmarks.plan_scale [--folder DIR] [--rounds N] [--profile]

The checkpoints' files hold headers and holes: hundreds of gigabytes by size, megabytes by what they take.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.sources import write_llama, write_moe_headers

Section = dict[str, Any] | None
"""`quantization` of the spec; None: not quantized."""
_CHILD = """
import json, resource, sys, time
began = time.monotonic()
from orchestrator.planning import preparation
from orchestrator.report import experts_lines
from orchestrator.spec.build import BuildSpec
from orchestrator.spec.decoding import decode
imported = time.monotonic()
if sys.argv[2]:
    import cProfile
    profile = cProfile.Profile()
    profile.enable()
made = preparation.plan(decode(BuildSpec, json.loads(sys.argv[1]), "benchmark"))
ended = time.monotonic()
if sys.argv[2]:
    import pstats
    profile.disable()
    pstats.Stats(profile, stream=sys.stderr).sort_stats("cumulative").print_stats(45)
print(json.dumps({
    "import_seconds": imported - began, "plan_seconds": ended - imported, "steps": len(made.steps),
    "source_bytes": made.inputs.index.num_bytes, "tensors": len(made.inputs.index.tensors),
    "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "build_key": made.build_key,
    "experts": experts_lines(made),
    "memory_bytes": {step.kind.value: max(s.resources.memory_bytes for s in made.of_kind(step.kind)) for step in made.steps},
}))
"""


def main() -> None:
    """Write the headers, plan in processes of their own, print the median round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".cache/bench"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="print where the time goes, to stderr")
    arguments = parser.parse_args()
    llama = arguments.folder / "llama-405b-headers"
    write_llama(llama, num_files=191, hidden=16384, inter=53248, heads=128, kv_heads=8, layers=126, vocab=128256, sparse=True)
    report(llama, {"tp": 8, "pp": 16}, arguments.rounds, arguments.profile)
    moe = arguments.folder / "moe-256-headers"
    write_moe_headers(moe, num_files=163, layers=61, num_experts=256)
    report(moe, {"tp": 32, "pp": 4, "moe_ep": 32}, arguments.rounds, arguments.profile)


def report(source: Path, topology: dict[str, int], num_rounds: int, profile: bool, quantization: Section = None) -> None:
    """Plan in processes of their own and print the median round."""
    rounds = sorted(
        (plan(source, topology, profile, quantization) for _ in range(num_rounds)), key=lambda found: float(found["plan_seconds"])
    )
    found = rounds[len(rounds) // 2]
    assert len({item["build_key"] for item in rounds}) == 1, "the plan is not the same each time"
    name = quantization["algorithm"] if quantization else "not quantized"
    size = f"{found['source_bytes'] / 1e9:.0f} GB in {found['tensors']} tensors"
    print(f"{source.name}: {size}, {topology}, {name}: {found['steps']} steps")
    print(f"seconds of the plan               {found['plan_seconds']:8.2f}      (goal 5; imports {found['import_seconds']:.2f})")
    print(f"peak memory of the process        {found['peak_bytes'] / 1e6:8.0f} MB   (goal 500 or less)")
    memory = ", ".join(f"{kind} {size / 1e9:.1f}" for kind, size in found["memory_bytes"].items())
    print(f"memory of the largest steps, GB   {memory}   (goals: reference and verify 24, others 48)")
    for line in found["experts"]:
        print(line)


def plan(source: Path, topology: dict[str, int], profile: bool, quantization: Section = None) -> dict[str, Any]:
    """One round: what the process measured of itself."""
    spec = {
        "source": {"path": str(source.resolve())}, "topology": topology,
        "engine": {"max_seq_len": 8192}, "release": {"name": "bench", "version": "1"},
        **({"quantization": quantization} if quantization else {}),
    }  # fmt: skip
    words = [sys.executable, "-c", _CHILD, json.dumps(spec), "profile" if profile else ""]
    found: dict[str, Any] = json.loads(subprocess.run(words, stdout=subprocess.PIPE, check=True).stdout)
    return found


if __name__ == "__main__":
    main()
