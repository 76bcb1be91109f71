"""SmolLM2-135M, tp=3, pp=2, under every algorithm: built, verified and published on a machine without a GPU.

    python -m benchmarks.quantization [--only FP8,NVFP4] [--model DIR] [--store DIR]

Tolerances are the algorithms' own. Calibration that algorithms share is done once; committed steps are not repeated, so seconds
are those of the first run in a store. 576 input features are no multiple of 128, so INT4 blocks have 64.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from orchestrator import building
from orchestrator.base.errors import OrchestratorError
from orchestrator.quantizers import QUANTIZERS
from orchestrator.spec.build import BuildSpec
from orchestrator.spec.cluster import ClusterSpec
from orchestrator.spec.decoding import decode

KV_ONLY = {"FP8 KV cache": {"kv_cache": "FP8"}, "INT8 KV cache": {"kv_cache": "INT8"}}
BOTH = {"FP8 + FP8 KV cache": {"algorithm": "FP8", "kv_cache": "FP8"}}


def main() -> None:
    """Build each and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--model", type=Path, default=Path(".cache/smollm2-135m-instruct"))
    parser.add_argument("--store", type=Path, default=Path(".cache/quantization"))
    arguments = parser.parse_args()
    wanted = {name: _options(name) for name in QUANTIZERS} | KV_ONLY | BOTH
    names = arguments.only.split(",") if arguments.only else list(wanted)
    table = Table("algorithm", "built", "verified", "KL", "top-1", "perplexity", "engine bytes", "seconds", box=None)
    console = Console(width=140)
    for number, name in enumerate(names):
        row = build(arguments.model, wanted[name], arguments.store.resolve().as_uri(), f"1.{number}")
        console.print(name, *row, sep="  ")
        table.add_row(name, *row)
    console.print(table)


def _options(algorithm: str) -> dict[str, Any]:
    blocks = {"group_size": 64} if QUANTIZERS[algorithm].linear.weight.value.startswith("int4") else {}
    return {"algorithm": algorithm, **blocks}


def build(model: Path, quantization: dict[str, Any], store: str, version: str) -> tuple[str, ...]:
    """Built, verified, KL, top-1, perplexity ratio, engine bytes, seconds."""
    spec = decode(
        BuildSpec,
        {
            "source": {"path": str(model.resolve())},
            "dtype": "bfloat16",
            "topology": {"tp": 3, "pp": 2},
            "quantization": quantization,
            "engine": {"max_batch_size": 2, "max_input_len": 128, "max_seq_len": 256},
            "release": {"name": "smollm2-quantized", "version": version + "." + "-".join(map(str, quantization.values()))},
        },
        "benchmark",
    )
    began = time.monotonic()
    try:
        made = building.build(spec, ClusterSpec(store=store))
    except OrchestratorError as error:
        return "no", error.message[:80], "", "", "", "", f"{time.monotonic() - began:.0f}"
    found = made.manifest.verification
    assert found is not None
    engines = sum(file.num_bytes for record in made.manifest.ranks for file in record.files)
    return (
        f"{len(made.manifest.ranks)} engines",
        "yes",
        f"{found.mean_kl:.4f}",
        f"{found.top1_agreement:.3f}",
        f"x {found.perplexity_ratio:.3f}",
        f"{engines / 1e6:.1f} MB",
        f"{time.monotonic() - began:.0f}",
    )


if __name__ == "__main__":
    main()
