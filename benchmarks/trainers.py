"""Conversion of a seeded 2.2 GB Llama from KerasHub's and Orbax's files, against the same weights in safetensors.

    python -m benchmarks.trainers [--folder DIR]

Prints the peak memory of every conversion task, in a process of its own, its estimate in the plan, bytes read over bytes of the
source, and whether every shard is that of the safetensors. Orbax's arrays are written as from one device: a chunk is an array of
all layers, compressed. They are converted in one task, and in several, which read such arrays again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from benchmarks.sources import llama_tensors
from orchestrator.checkpoints.safetensors import encode_header
from orchestrator.model.config import ModelConfig
from orchestrator.planning import preparation
from orchestrator.planning.plan import Plan
from orchestrator.planning.steps import Kind
from tests.support.keras import write_preset
from tests.support.peaks import run_apart
from tests.support.synthetic import build_spec, hugging_face_config, model_config

Array = npt.NDArray[Any]
_SHAPE: dict[str, Any] = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8, "head_size": 64,
    "num_hidden_layers": 16, "vocab_size": 32768,
}  # fmt: skip
CONFIG: ModelConfig = model_config(**_SHAPE)


class Weights(Mapping[str, Array]):
    """Tensors of the model, each made when it is asked for: small normal numbers in bfloat16."""

    def __init__(self) -> None:
        self.shapes = dict(llama_tensors(2048, 8192, 32, 8, CONFIG.num_hidden_layers, CONFIG.vocab_size))

    def __getitem__(self, name: str) -> Array:
        bits = np.random.default_rng(zlib.crc32(name.encode())).integers(0, 2**16, self.shapes[name], dtype=np.uint16)
        return ((bits & 0x807F) | 0x3C80).view(ml_dtypes.bfloat16)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def write_safetensors(folder: Path, weights: Weights) -> None:
    """Write the source to compare with."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(hugging_face_config(CONFIG)))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(encode_header(((name, "BF16", shape) for name, shape in weights.shapes.items()), {"format": "pt"}))
        for name in weights:
            file.write(weights[name].view(np.uint8).data)


def write_orbax(folder: Path, weights: Weights) -> None:
    """Write MaxText's tree as Orbax does from one device, with TensorStore."""
    import tensorstore as ts

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(hugging_face_config(CONFIG)))
    context = ts.Context()
    for path, array in _maxtext(weights):
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "ocdbt", "base": f"file://{folder.resolve()}/items/", "path": f"params.params.{path}/"},
            "metadata": {
                "shape": list(array.shape), "chunks": list(array.shape), "dtype": "bfloat16", "order": "C", "fill_value": None,
                "compressor": {"id": "zstd", "level": 1},
            },
        }  # fmt: skip
        ts.open(spec, create=True, context=context).result().write(array).result()
    (folder / "items" / "_METADATA").write_text("{}")


def _maxtext(weights: Weights) -> Iterator[tuple[str, Array]]:
    """Yield MaxText's arrays. The scale of queries, 1/8, is exact."""
    layers, hidden, head = range(CONFIG.num_hidden_layers), CONFIG.hidden_size, CONFIG.head_size

    def stacked(name: str, change: Callable[[Array], Array]) -> Array:
        return np.stack([change(weights[f"model.layers.{layer}.{name}.weight"]) for layer in layers], 1)

    yield "token_embedder.embedding", weights["model.embed_tokens.weight"]
    yield "decoder.decoder_norm.scale", weights["model.norm.weight"]
    yield "decoder.logits_dense.kernel", np.ascontiguousarray(weights["lm_head.weight"].T)
    for name, factor in (("query", 0.125), ("key", 1), ("value", 1)):
        own = f"self_attn.{name[0]}_proj"
        yield (
            f"decoder.layers.self_attention.{name}.kernel",
            stacked(own, lambda w, f=factor: (w.T * w.dtype.type(f)).reshape(hidden, -1, head)),
        )
    yield "decoder.layers.self_attention.out.kernel", stacked("self_attn.o_proj", lambda w: w.T.reshape(-1, head, hidden))
    for name, own in (("wi_0", "gate"), ("wi_1", "up"), ("wo", "down")):
        yield f"decoder.layers.mlp.{name}.kernel", stacked(f"mlp.{own}_proj", lambda w: w.T)
    yield "decoder.layers.pre_self_attention_layer_norm.scale", stacked("input_layernorm", lambda w: w)
    yield "decoder.layers.post_self_attention_layer_norm.scale", stacked("post_attention_layernorm", lambda w: w)


def converted(name: str, plan: Plan, store: Path) -> dict[str, str]:
    """Run the conversion tasks; prints their figures. Returns sha256 by shard."""
    shutil.rmtree(store, ignore_errors=True)
    found: dict[str, str] = {}
    read = 0
    for step in (step for step in plan.steps if step.kind is Kind.CONVERT):
        start = time.perf_counter()
        done = run_apart(step, {}, store.resolve().as_uri())
        seconds, facts = time.perf_counter() - start, done.outcome.facts
        read += facts.source_bytes_read
        found |= {output.name: output.sha256 for output in done.outcome.outputs}
        peak, estimate = done.peak_bytes / 2**20, step.resources.memory_bytes / 2**20
        print(f"{name} {step.name}: peak {peak:.0f} MiB, estimate {estimate:.0f} MiB, {seconds:.1f} s")
    source = plan.inputs.index.num_bytes
    print(f"{name}: {read:,} bytes read of {source:,}: {read / source:.3f} times")
    return found


def main() -> None:
    """Write the sources that are missing, convert each, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".cache/bench"))
    folder: Path = parser.parse_args().folder
    weights = Weights()
    writers: dict[str, Callable[[Path], object]] = {
        "safetensors": lambda path: write_safetensors(path, weights),
        "keras": lambda path: write_preset(path, CONFIG, weights),
        "orbax": lambda path: write_orbax(path, weights),
    }
    expected: dict[int, dict[str, str]] = {}
    for name, write in writers.items():
        source = folder / f"trainers-{name}"
        if not source.exists():
            write(source.with_suffix(".part"))
            source.with_suffix(".part").rename(source)
        for shard in (5 * 10**9, 5 * 10**8):
            plan = preparation.plan(build_spec(source, topology={"tp": 2}, dtype="bfloat16", conversion={"max_shard_bytes": shard}))
            for note in plan.notes:
                print(f"{name}: note: {note}")
            shards = converted(f"{name}, shards up to {shard // 10**6} MB,", plan, folder / "trainers-store")
            same = "the reference" if expected.setdefault(shard, shards) is shards else shards == expected[shard]
            print(f"{name}: equal to safetensors: {same}")
    shutil.rmtree(folder / "trainers-store", ignore_errors=True)


if __name__ == "__main__":
    main()
