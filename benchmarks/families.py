"""Every family at every topology of the table, on tiny seeded models: worst relative error of float32 logits against transformers.

    python -m benchmarks.families [--engines] [--only WORD] [--experts FORM] [--device cuda] [--folder DIR] [--record]

`--experts` takes mixtures only, with this form of experts. `--engines` also builds a TensorRT engine of every rank at tp=2, pp=2.
The reference of a family serves all its topologies, and the shards of tp=2, pp=2 its engines; steps of an earlier run in
`--folder` are taken from there. `--record` puts the results, and the formats in which the family can be quantized by a plan, into
docs/models.json. The last line counts what was compared and built, and the steps that ran.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.recording import record
from orchestrator import work
from orchestrator.base.errors import OrchestratorError
from orchestrator.model.topology import problems
from orchestrator.planning import preparation
from orchestrator.planning.plan import Plan
from orchestrator.planning.steps import Kind, Outcome, Task
from orchestrator.quantizers import QUANTIZERS
from orchestrator.scheduling import commits
from orchestrator.spec.build import BuildSpec
from orchestrator.spec.decoding import decode
from orchestrator.stores import open_store
from tests.support.families import TINY, write_tiny

TOPOLOGIES: dict[str, dict[str, int]] = {
    "1x1": {}, "tp2": {"tp": 2}, "pp2 uneven": {"pp": 2}, "tp2 pp2": {"tp": 2, "pp": 2}, "tp4 kv x2": {"tp": 4},
    "tp2 ep2": {"tp": 2, "moe_ep": 2}, "tp4 ep2": {"tp": 4, "moe_ep": 2},
    "tp4 ep4": {"tp": 4, "moe_ep": 4},
}  # fmt: skip
WIDE = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}
WIDE_IF_GIVEN = {
    "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "q_lora_rank": 64, "kv_lora_rank": 64,
    "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32, "shared_intermediate_size": 64, "global_head_dim": 64,
}  # fmt: skip
ENGINES_AT = "tp2 pp2"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", action="store_true")
    parser.add_argument("--only", default="", help="Families whose name holds this word.")
    parser.add_argument("--experts", choices=["dense", "gathered"], default="auto", help="Form of the experts of mixtures.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="Of the reference and of the ranks.")
    parser.add_argument("--folder", type=Path, default=Path(".cache/families"))
    parser.add_argument("--record", action="store_true", help="Write the results to docs/models.json.")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    began, counts = time.monotonic(), Counter[str]()
    table = Table("family", *TOPOLOGIES, *(["engines"] if arguments.engines else []), box=None)
    for family in (name for name in TINY if arguments.only in name):
        source = arguments.folder / family
        if not (source / "config.json").is_file():
            write_tiny(family, source)
        store = arguments.folder / f"store-{arguments.device}"
        if arguments.experts != "auto" and plan(source, {}).inputs.config.moe is None:
            continue
        cells = [cell(source, topology, store, arguments.device, arguments.experts, counts) for topology in TOPOLOGIES.values()]
        if arguments.engines:
            cells.append(f"{num_engines(source, store, arguments.experts, counts)} built")
        counts["families"] += 1
        table.add_row(family, *cells)
        if arguments.record:
            errors = dict(zip(TOPOLOGIES, cells, strict=False))
            engines = {"engines": cells[-1]} if arguments.engines else {}
            record(family, errors=errors, formats=planned_formats(family, arguments.folder), **engines)
    Console(width=140).print(table)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"{counts['families']} families, {counts['cells']} topologies compared, {counts['engines']} engines built; "
        f"{counts['run']} steps run, {counts['kept']} taken from the folder; "
        f"{time.monotonic() - began:.0f} s, {peak / 1e9:.1f} GB at the peak"
    )


def plan(source: Path, topology: dict[str, int], device: str = "cpu", experts: str = "auto") -> Plan:
    """The plan of a tiny model."""
    plain = {
        "source": {"path": str(source.resolve())}, "topology": topology, "release": {"name": "none", "version": "0"},
        "engine": {"max_batch_size": 2, "max_input_len": 16, "max_seq_len": 64, "experts": experts},
        "verification": {"max_tokens": 12, "decode_steps": 3, "device": device},
    }  # fmt: skip
    return preparation.plan(decode(BuildSpec, plain, "benchmark"))


def planned_formats(family: str, folder: Path) -> list[str]:
    """The algorithms and KV caches in which a plan of a model can be quantized, whose sizes are multiples of every block."""
    source, found = folder / f"wide-{family}", []
    if not (source / "config.json").is_file():
        fields = TINY[family].fields
        sizes = {**WIDE, **{key: value for key, value in WIDE_IF_GIVEN.items() if key in fields}}
        if fields.get("head_dim") == fields.get("qk_nope_head_dim", 0) + fields.get("qk_rope_head_dim", 0):
            sizes["head_dim"] = sizes["qk_nope_head_dim"] + sizes["qk_rope_head_dim"]
        write_tiny(family, source, **sizes)
    asked = [{"algorithm": name} for name in QUANTIZERS] + [{"kv_cache": name} for name in ("FP8", "INT8")]
    for quantization in asked:
        group = {"group_size": 32} if quantization.get("algorithm") in ("W4A16", "W4A16_AWQ", "W4A8_AWQ") else {}
        plain = {
            "source": {"path": str(source.resolve())}, "release": {"name": "none", "version": "0"},
            "quantization": {**quantization, **group}, "engine": {"max_seq_len": 64},
        }  # fmt: skip
        try:
            preparation.plan(decode(BuildSpec, plain, "benchmark"))
        except OrchestratorError:
            continue
        found.append(quantization.get("algorithm") or f"cache {quantization['kv_cache']}")
    return found


def run(made: Plan, store: Path, kinds: tuple[Kind, ...], counts: Counter[str]) -> dict[str, Outcome]:
    """Outcome by step name; committed steps are not repeated."""
    address = store.resolve().as_uri()
    digests = [step.digest for step in made.steps if step.kind in kinds]
    found: dict[str, Outcome] = commits.committed(open_store(address), digests)
    counts["kept"] += len(found)
    for step in made.steps:
        if step.digest in digests and step.digest not in found:
            counts["run"] += 1
            task = Task(step=step, inputs={need: found[need] for need in step.needs}, attempt=1, store=address)
            found[step.digest] = work.run(task, lambda event: None)
    return {outcome.name: outcome for outcome in found.values()}


def cell(source: Path, topology: dict[str, int], store: Path, device: str, experts: str, counts: Counter[str]) -> str:
    """The worst relative error, or '-' where the topology is illegal for the model."""
    if topology.get("moe_ep"):
        wanted = decode(
            BuildSpec, {"source": {"path": "."}, "topology": topology, "release": {"name": "n", "version": "0"}}, "benchmark"
        )
        if problems(wanted.topology.topology(), plan(source, {}).inputs.config.limits()):
            return "-"
    made = plan(source, topology, device, experts)
    outcomes = run(made, store, (Kind.REFERENCE, Kind.CONVERT, Kind.VERIFY), counts)
    counts["cells"] += 1
    last = [step.name for step in made.of_kind(Kind.VERIFY)][-1]
    return f"{outcomes[last].facts.verification.max_relative_error:.1e}"


def num_engines(source: Path, store: Path, experts: str, counts: Counter[str]) -> int:
    """Build every rank at one topology."""
    outcomes = run(plan(source, TOPOLOGIES[ENGINES_AT], experts=experts), store, (Kind.CONVERT, Kind.BUILD), counts)
    built = sum(outcome.kind is Kind.BUILD for outcome in outcomes.values())
    counts["engines"] += built
    return built


if __name__ == "__main__":
    main()
