"""Peak memory of every step of a build's proof, each in a process of its own, beside what the plan reserves for it.

    python -m benchmarks.proof [--layers 4] [--tp 2] [--pp 2] [--folder DIR]

The model is a seeded Llama of the 8B's width (hidden 4096, MLP 14336, 32 heads, vocabulary 128256) with `--layers` layers: the
peaks must not grow with them. No engine is built.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from orchestrator import work
from orchestrator.checkpoints.safetensors import encode_header
from orchestrator.planning import preparation
from orchestrator.planning.plan import Plan
from orchestrator.planning.steps import Kind, Outcome, Task
from orchestrator.spec.build import BuildSpec
from orchestrator.spec.decoding import decode

HIDDEN, MLP, HEADS, KV_HEADS, VOCABULARY = 4096, 14336, 32, 8, 128256
KINDS = (Kind.REFERENCE, Kind.CONVERT, Kind.VERIFY)
_BLOCK = 1 << 24


def main() -> None:
    """Print the table, or run one step of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--pp", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path(".cache/proof"))
    parser.add_argument("--step", help="run this step alone and print its numbers as JSON")
    arguments = parser.parse_args()
    folder = arguments.folder / f"layers{arguments.layers}"
    if not (folder / "source/config.json").is_file():
        write_source(folder / "source", arguments.layers)
    made = plan(folder / "source", arguments.tp, arguments.pp)
    if arguments.step:
        print(json.dumps(run(made, folder, arguments.step)))
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    table = Table("step", "seconds", "peak", "reserved", "relative error", box=None)
    for step in made.steps:
        if step.kind in KINDS:
            words = ["--layers", str(arguments.layers), "--tp", str(arguments.tp), "--pp", str(arguments.pp)]
            command = [sys.executable, "-m", "benchmarks.proof", *words, "--folder", str(arguments.folder), "--step", step.name]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            error = "" if found["error"] is None else f"{found['error']:.1e}"
            reserved = f"{step.resources.memory_bytes / 1e9:.2f} GB"
            table.add_row(step.name, f"{found['seconds']:.0f}", f"{found['peak_bytes'] / 1e9:.2f} GB", reserved, error)
    Console(width=120).print(table)


def plan(source: Path, tp: int, pp: int) -> Plan:
    """The build of the seeded model."""
    plain = {
        "source": {"path": str(source.resolve())}, "topology": {"tp": tp, "pp": pp}, "release": {"name": "proof", "version": "1"},
        "engine": {"max_batch_size": 2, "max_input_len": 16, "max_seq_len": 64},
    }  # fmt: skip
    return preparation.plan(decode(BuildSpec, plain, "benchmark"))


def run(made: Plan, folder: Path, name: str) -> dict[str, float | None]:
    """Run one step in this process, after those that it needs."""
    step = next(step for step in made.steps if step.name == name)
    kept = folder / "outcomes"
    kept.mkdir(exist_ok=True)
    inputs = {need: Outcome.model_validate_json((kept / need).read_bytes()) for need in step.needs}
    began = time.monotonic()
    outcome = work.run(Task(step=step, inputs=inputs, attempt=1, store=(folder / "store").resolve().as_uri()), lambda event: None)
    (kept / step.digest).write_text(outcome.model_dump_json())
    verification = getattr(outcome.facts, "verification", None)
    return {
        "seconds": time.monotonic() - began,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "error": verification.max_relative_error if verification else None,
    }


def write_source(folder: Path, layers: int) -> None:
    """A Hugging Face folder of seeded bfloat16 weights, written block by block."""
    folder.mkdir(parents=True, exist_ok=True)
    kv = KV_HEADS * HIDDEN // HEADS
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    shapes["lm_head.weight"] = (VOCABULARY, HIDDEN)
    linears = {
        "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (kv, HIDDEN), "self_attn.v_proj": (kv, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (MLP, HIDDEN), "mlp.up_proj": (MLP, HIDDEN),
        "mlp.down_proj": (HIDDEN, MLP), "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,),
    }  # fmt: skip
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in linears.items()}
    generator = np.random.default_rng(1)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(encode_header(((name, "BF16", shape) for name, shape in shapes.items()), {"format": "pt"}))
        for shape in shapes.values():
            for begin in range(0, math.prod(shape), _BLOCK):
                count = min(_BLOCK, math.prod(shape) - begin)
                norm = len(shape) == 1
                values = np.ones(count, np.float32) if norm else generator.standard_normal(count, np.float32) * np.float32(0.02)
                file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": MLP,
        "num_hidden_layers": layers, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "vocab_size": VOCABULARY,
        "max_position_embeddings": 8192, "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1))


if __name__ == "__main__":
    main()
