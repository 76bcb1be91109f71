"""Conversion at tp=2 of a seeded 4 GB distributed checkpoint (torch_dist), against that of the same weights in safetensors.

    python -m benchmarks.megatron [--folder DIR] [--rounds N]

The checkpoint is that of a trainer at tp=4, pp=2: chunks of fused tensors, layers stacked, written with torch. Prints peak memory,
source bytes read / source size, bytes and requests that planning reads, and the ratio of wall times. Both write the same bytes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import pickle
import statistics
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.convert import GB, Measured, convert, plan_step
from benchmarks.sources import write_llama
from orchestrator.checkpoints import read_source
from orchestrator.checkpoints.reading import RowReader
from orchestrator.model.checkpoint import CheckpointIndex
from orchestrator.stores.source import LocalFolder

TP, PP = 4, 2


def main() -> None:
    """Write both checkpoints, run the rounds, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".cache/bench"))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    plain, source = arguments.folder / "llama-4gb", arguments.folder / "megatron-4gb"
    total = write_llama(plain, num_files=2, layers=8, vocab=32768)
    if not (source / ".metadata").is_file():  # in a process of its own: a child's peak memory begins with its parent's
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            pool.submit(write_megatron, plain, source).result()
    reads = planning_reads(source)
    steps = {"safetensors": plan_step(plain), "torch_dist": plan_step(source)}
    largest = max(read["tensor"]["num_bytes"] for target in steps["torch_dist"].options["targets"] for read in target["reads"])
    runs: dict[str, list[Measured]] = {name: [] for name in steps}
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            runs[name].append(convert(step, arguments.folder / "store"))
    written = {tuple((output.name, output.sha256) for output in run.outcome.outputs) for found in runs.values() for run in found}
    peak = max(run.outcome.facts.peak_memory_bytes for run in runs["torch_dist"])
    read = runs["torch_dist"][0].outcome.facts.source_bytes_read
    seconds = {name: statistics.median(run.wall_seconds for run in found) for name, found in runs.items()}
    limit = 2 * largest + 300_000_000
    print(
        f"source {total / GB:.2f} GB in {len(list(source.glob('*.distcp')))} .distcp files of tp={TP}, pp={PP}; converted to tp=2"
    )
    print(f"peak memory of the convert task   {peak / 1e6:8.0f} MB   (limit 2 x largest tensor + 300 MB = {limit / 1e6:.0f} MB)")
    print(f"source bytes read / source size   {read / total:8.4f}      (goal 1.00)")
    print(f"read by planning                  {sum(reads) / 1e6:8.2f} MB   in {len(reads)} requests")
    ratio = seconds["torch_dist"] / seconds["safetensors"]
    print(f"wall time / that of safetensors   {ratio:8.2f}      (median; safetensors took {seconds['safetensors']:.1f} s)")
    print(f"rank files                        {'the same' if len(written) == 1 else 'DIFFERENT'}")
    if peak > limit or read != total or len(written) != 1:
        raise SystemExit("a limit was missed")


def planning_reads(source: Path) -> list[int]:
    """Bytes of each read of the weights' files while the index is made."""
    found: list[int] = []
    original = LocalFolder.read

    def counted(self: LocalFolder, name: str, begin: int = 0, end: int | None = None) -> bytes:
        data = original(self, name, begin, end)
        found.append(len(data))
        return data

    LocalFolder.read = counted  # type: ignore[method-assign]
    try:
        read_source(str(source))
    finally:
        LocalFolder.read = original  # type: ignore[method-assign]
    return found


def write_megatron(plain: Path, folder: Path) -> None:
    """Write the Llama in `plain` as the ranks of a trainer would, one chunk at a time."""
    import torch
    from torch.distributed.checkpoint import metadata as dcp
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    index, _ = read_source(str(plain))
    folder.mkdir(parents=True, exist_ok=True)
    layers = index.config["num_hidden_layers"]
    tensors: dict[str, Any] = {}
    places: dict[Any, Any] = {}
    files = {(pp, tp): (folder / f"__{pp * TP + tp}_0.distcp").open("wb") for pp in range(PP) for tp in range(TP)}
    with LocalFolder(plain).open(index.files) as opened:
        reader = Reader(index, RowReader(index.format, opened))
        for name, whole, begin, part, rank in chunks(reader, layers):
            file = files[rank]
            offset = file.tell()
            torch.save(torch.from_numpy(part.view(np.int16)).view(torch.bfloat16), file)
            stored = tensors.setdefault(
                name, dcp.TensorStorageMetadata(dcp.TensorProperties(torch.bfloat16), torch.Size(whole), [])
            )
            stored.chunks.append(dcp.ChunkStorageMetadata(torch.Size(begin), torch.Size(part.shape)))
            places[dcp.MetadataIndex(name, begin)] = _StorageInfo(Path(file.name).name, offset, file.tell() - offset)
    for file in files.values():
        file.close()
    (folder / "run_config.yaml").write_text(yaml.safe_dump({"model": run_config(index.config)}))
    (folder / ".metadata").write_bytes(pickle.dumps(dcp.Metadata(tensors, None, places)))


class Reader:
    """Reads whole tensors of the Hugging Face checkpoint as 16-bit patterns."""

    def __init__(self, index: CheckpointIndex, rows: RowReader) -> None:
        self.config, self._index, self._rows = index.config, index, rows

    def __call__(self, name: str) -> Any:
        tensor = self._index.tensors[name]
        data = np.empty(tensor.num_bytes, np.uint8)
        self._rows.read(tensor, 0, tensor.shape[0], data.data)
        return data.view(np.uint16).reshape(tensor.shape)


def chunks(read: Reader, layers: int) -> Any:
    """Yield name, whole shape, first indices, elements and (pp_rank, tp_rank) of every chunk."""
    for name, source, pp in (
        ("embedding.word_embeddings.weight", "model.embed_tokens.weight", 0),
        ("output_layer.weight", "lm_head.weight", PP - 1),
    ):
        whole = read(source)
        for tp, part in enumerate(np.split(whole, TP)):
            yield name, whole.shape, (tp * len(part), 0), part, (pp, tp)
    norm = read("model.norm.weight")
    yield "decoder.final_layernorm.weight", norm.shape, (0,), norm, (PP - 1, 0)
    for layer in range(layers):
        pp = layer * PP // layers
        prefix = f"model.layers.{layer}."
        for name, source in (
            ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm"),
            ("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm"),
        ):
            norm = read(f"{prefix}{source}.weight")
            yield f"decoder.layers.{name}", (layers, *norm.shape), (layer, 0), norm[None], (pp, 0)
        groups = read.config["num_key_value_heads"]
        heads = [np.split(read(f"{prefix}self_attn.{letter}_proj.weight"), groups) for letter in "qkv"]
        fused = np.concatenate([part for group in zip(*heads, strict=True) for part in group])
        halves = [read(f"{prefix}mlp.{half}_proj.weight") for half in ("gate", "up")]
        rows = {"self_attention.linear_qkv.weight": fused, "mlp.linear_fc1.weight": np.concatenate(halves)}
        for name, whole in rows.items():
            parts = TP * (2 if "fc1" in name else 1)  # gate and up of a rank are chunks of their own
            for number, part in enumerate(np.split(whole, parts)):
                yield (
                    f"decoder.layers.{name}",
                    (layers, *whole.shape),
                    (layer, number * len(part), 0),
                    part[None],
                    (pp, number % TP),
                )
        for name, source in (("self_attention.linear_proj.weight", "self_attn.o_proj"), ("mlp.linear_fc2.weight", "mlp.down_proj")):
            whole = read(f"{prefix}{source}.weight")
            for tp, part in enumerate(np.split(whole, TP, axis=1)):
                begin = (layer, 0, tp * part.shape[1])
                yield f"decoder.layers.{name}", (layers, *whole.shape), begin, np.ascontiguousarray(part)[None], (pp, tp)


def run_config(config: Any) -> dict[str, Any]:
    """The model's arguments as Megatron-Bridge records them, those that are read."""
    return {
        "num_layers": config["num_hidden_layers"], "hidden_size": config["hidden_size"],
        "num_attention_heads": config["num_attention_heads"], "num_query_groups": config["num_key_value_heads"],
        "ffn_hidden_size": config["intermediate_size"], "seq_length": config["max_position_embeddings"],
        "layernorm_epsilon": config["rms_norm_eps"], "rotary_base": config["rope_theta"], "vocab_size": config["vocab_size"],
        "share_embeddings_and_output_weights": config["tie_word_embeddings"], "normalization": "RMSNorm",
        "gated_linear_unit": True, "position_embedding_type": "rope", "add_bias_linear": False,
        "activation_func": {"_target_": "torch.nn.functional.silu"},
    }  # fmt: skip


if __name__ == "__main__":
    main()
