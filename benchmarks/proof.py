"""A large build on this machine: seconds and peak memory of every step, each in its own process, beside the reserved memory.

    python -m benchmarks.proof [--width 8b|405b] [--layers 4] [--tp 2] [--pp 2] [--engines] [--folder DIR]

The model is a seeded Llama of the width of the 8B (hidden 4096, MLP 14336, 32 heads) or of the 405B (hidden 16384, MLP 53248, 128
heads), both with a vocabulary of 128256, and `--layers` layers; the embedding is split over the ranks. Without --engines it is
converted and verified, as `orchestrator convert --verify` does; with it, engines are built and the release is published too.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from orchestrator import building
from orchestrator.checkpoints.safetensors import encode_header
from orchestrator.planning import preparation
from orchestrator.planning.facts import VerifyFacts
from orchestrator.planning.steps import Kind, Outcome
from orchestrator.scheduling import commits
from orchestrator.spec.build import BuildSpec
from orchestrator.spec.cluster import ClusterSpec
from orchestrator.spec.decoding import decode
from orchestrator.stores import open_store
from tests.support.peaks import run_apart

_BLOCK = 1 << 24


@dataclass(frozen=True)
class Width:
    """Sizes of a Llama."""

    hidden: int
    mlp: int
    heads: int
    kv_heads: int = 8
    vocabulary: int = 128256


WIDTHS = {"8b": Width(4096, 14336, 32), "405b": Width(16384, 53248, 128)}


def main() -> None:
    """Write the model, run every step, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", choices=WIDTHS, default="8b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--pp", type=int, default=2)
    parser.add_argument("--engines", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path(".cache/proof"))
    arguments = parser.parse_args()
    folder = arguments.folder / f"{arguments.width}-layers{arguments.layers}"
    if not (folder / "source/config.json").is_file():
        write_source(folder / "source", WIDTHS[arguments.width], arguments.layers)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    spec = spec_of(folder / "source", arguments.tp, arguments.pp)
    run(spec, (folder / "store").resolve().as_uri(), (*Kind,) if arguments.engines else tuple(set(Kind) - {Kind.BUILD}))
    if arguments.engines:
        began = time.monotonic()
        built = building.build(spec, ClusterSpec(store=(folder / "store").resolve().as_uri()))
        print(f"published in {time.monotonic() - began:.0f} s: {built.address}")


def spec_of(source: Path, tp: int, pp: int) -> BuildSpec:
    """The build of the seeded model."""
    plain = {
        "source": {"path": str(source.resolve())}, "topology": {"tp": tp, "pp": pp}, "release": {"name": "proof", "version": "1"},
        "conversion": {"use_parallel_embedding": True}, "engine": {"max_batch_size": 2, "max_input_len": 16, "max_seq_len": 64},
    }  # fmt: skip
    return decode(BuildSpec, plain, "benchmark")


def run(spec: BuildSpec, store: str, kinds: Sequence[Kind]) -> None:
    """Run the steps that are not committed, one after the other, and print what each took."""
    plan = preparation.plan(spec)
    outcomes: dict[str, Outcome] = commits.committed(open_store(store), (step.digest for step in plan.steps))
    table = Table("step", "seconds", "peak", "reserved", "relative error", box=None)
    total = 0.0
    for step in plan.steps:
        if step.kind not in kinds or step.digest in outcomes:
            continue
        measured = run_apart(step, outcomes, store)
        outcome = outcomes[step.digest] = measured.outcome
        found = outcome.facts.verification if isinstance(outcome.facts, VerifyFacts) else None
        error = "" if found is None else f"{found.max_relative_error:.1e} on {found.num_positions} positions"
        sizes = (f"{size / 1e9:.2f} GB" for size in (measured.peak_bytes, step.resources.memory_bytes))
        table.add_row(step.name, f"{outcome.seconds:.0f}", *sizes, error)
        total += outcome.seconds
        print(f"{step.name}: {outcome.seconds:.0f} s, {measured.peak_bytes / 1e9:.2f} GB", flush=True)
    Console(width=120).print(table)
    print(f"{total:.0f} s of steps, one after the other")


def write_source(folder: Path, width: Width, layers: int) -> None:
    """A Hugging Face folder of seeded bfloat16 weights, written block by block."""
    folder.mkdir(parents=True, exist_ok=True)
    hidden, mlp, kv = width.hidden, width.mlp, width.kv_heads * width.hidden // width.heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (width.vocabulary, hidden), "model.norm.weight": (hidden,)}
    shapes["lm_head.weight"] = (width.vocabulary, hidden)
    linears = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (mlp, hidden), "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in linears.items()}
    # One block of random numbers, shifted from tensor to tensor: drawing ten billion would take longer than the build.
    generator = np.random.default_rng(1)
    random = (generator.standard_normal(2 * _BLOCK, np.float32) * np.float32(0.02)).view(np.uint32) >> 16
    block = random.astype(np.uint16)
    ones = np.full(hidden, 0x3F80, np.uint16)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(encode_header(((name, "BF16", shape) for name, shape in shapes.items()), {"format": "pt"}))
        for shape in shapes.values():
            for begin in range(0, math.prod(shape), _BLOCK):
                count = min(_BLOCK, math.prod(shape) - begin)
                shift = int(generator.integers(0, _BLOCK))
                file.write((ones if len(shape) == 1 else block[shift : shift + count]).tobytes())
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": mlp,
        "num_hidden_layers": layers, "num_attention_heads": width.heads, "num_key_value_heads": width.kv_heads,
        "vocab_size": width.vocabulary, "max_position_embeddings": 8192, "rope_theta": 500000.0, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1))


if __name__ == "__main__":
    main()
