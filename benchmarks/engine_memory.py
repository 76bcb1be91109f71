"""Peak memory of engine builds by the size of a rank's weights, dense and mixture: the factor that the plan's estimates take.

    python -m benchmarks.engine_memory [--folder DIR]

Each engine is built by TensorRT-RTX in a process of its own, at two sizes: the slope between the two is bytes of memory per byte of
weights. The peak is of resident memory, pages of the mapped weights included: the build releases them while it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.giants import QWEN3_235B, qwen_moe_tensors, write
from benchmarks.proof import Width, write_source
from orchestrator.planning import preparation
from orchestrator.planning.steps import Kind, Outcome
from orchestrator.spec.build import BuildSpec
from orchestrator.spec.decoding import decode
from tests.support.peaks import Measured, run_apart

_DENSE = Width(2048, 8192, 16, vocabulary=16000)
_MIXTURE = {
    "hidden_size": 1024, "moe_intermediate_size": 1024, "intermediate_size": 1024, "num_experts": 32, "num_experts_per_tok": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 16000,
}  # fmt: skip
_LAYERS = {"dense": (4, 12), "mixture": (2, 6)}


def main() -> None:
    """Write the models, build, print the table and the slopes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".cache/engine-memory"))
    folder: Path = parser.parse_args().folder
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    table = Table("model", "layers", "weights, GB", "peak, GB", "reserved, GB", "seconds", box=None)
    slopes = []
    for name, sizes in _LAYERS.items():
        found = [_build(_model(folder / f"{name}-{layers}", name, layers), folder / "store") for layers in sizes]
        for layers, measured in zip(sizes, found, strict=True):
            numbers = (_weights(measured), measured.peak_bytes, measured.step.resources.memory_bytes)
            table.add_row(name, str(layers), *(f"{number / 1e9:.2f}" for number in numbers), f"{measured.outcome.seconds:.0f}")
        small, large = found
        slope = (large.peak_bytes - small.peak_bytes) / (_weights(large) - _weights(small))
        slopes.append(f"{name} {slope:.2f}")
    Console(width=120).print(table)
    print(f"bytes of memory per byte of weights: {', '.join(slopes)}")


def _model(folder: Path, name: str, layers: int) -> Path:
    if name == "dense":
        write_source(folder, _DENSE, layers)
        return folder
    config: dict[str, Any] = {**json.loads(QWEN3_235B.read_text()), **_MIXTURE, "num_hidden_layers": layers}
    return write(folder, config, list(qwen_moe_tensors(config)), num_files=1, seed=1)


def _build(source: Path, store: Path) -> Measured:
    """Convert, then build the only rank's engine in a process of its own."""
    shutil.rmtree(store, ignore_errors=True)
    plain = {
        "source": {"path": str(source.resolve())}, "release": {"name": "none", "version": "0"},
        "engine": {"max_batch_size": 2, "max_input_len": 16, "max_seq_len": 64},
    }  # fmt: skip
    outcomes: dict[str, Outcome] = {}
    for step in preparation.plan(decode(BuildSpec, plain, "benchmark")).steps:
        if step.kind in (Kind.CONVERT, Kind.BUILD):
            measured = run_apart(step, outcomes, store.resolve().as_uri())
            outcomes[step.digest] = measured.outcome
            if step.kind is Kind.BUILD:
                shutil.rmtree(store)
                return measured
    raise AssertionError("the plan has no engine")


def _weights(measured: Measured) -> int:
    return measured.step.resources.scratch_bytes


if __name__ == "__main__":
    main()
