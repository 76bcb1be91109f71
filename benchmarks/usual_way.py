"""Conversion as converter scripts do it: the whole model in memory, one rank after another. Measured by convert_vs_usual.

python -m benchmarks.usual_way SOURCE OUTPUT TP PP
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers

Weights = dict[str, Any]


def main() -> None:
    """Load, slice, save and hash every rank."""
    source, output = Path(sys.argv[1]), Path(sys.argv[2])
    tp, pp = int(sys.argv[3]), int(sys.argv[4])
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, local_files_only=True)
    weights = model.state_dict()
    layers = model.config.num_hidden_layers // pp
    for rank in range(tp * pp):
        path = output / f"rank{rank}.safetensors"
        mine = rank_weights(weights, rank % tp, tp, range(rank // tp * layers, rank // tp * layers + layers), rank // tp, pp)
        safetensors.torch.save_file(mine, path, metadata={"format": "pt"})
        with path.open("rb") as file:
            print(path.name, hashlib.file_digest(file, "sha256").hexdigest())


def rank_weights(weights: Weights, tp_rank: int, tp: int, layers: range, stage: int, pp: int) -> Weights:
    """The tensors of one rank, under TensorRT-LLM's names."""

    def rows(name: str) -> Any:
        return weights[name].chunk(tp, 0)[tp_rank].contiguous()

    def columns(name: str) -> Any:
        return weights[name].chunk(tp, 1)[tp_rank].contiguous()

    found: Weights = {}
    if stage == 0:
        found["transformer.vocab_embedding.weight"] = weights["model.embed_tokens.weight"]
    for local, layer in enumerate(layers):
        source, target = f"model.layers.{layer}.", f"transformer.layers.{local}."
        found[target + "input_layernorm.weight"] = weights[source + "input_layernorm.weight"]
        found[target + "post_layernorm.weight"] = weights[source + "post_attention_layernorm.weight"]
        parts = [rows(f"{source}self_attn.{part}_proj.weight") for part in "qkv"]
        found[target + "attention.qkv.weight"] = torch.cat(parts)
        found[target + "attention.dense.weight"] = columns(source + "self_attn.o_proj.weight")
        found[target + "mlp.fc.weight"] = rows(source + "mlp.gate_proj.weight")
        found[target + "mlp.gate.weight"] = rows(source + "mlp.up_proj.weight")
        found[target + "mlp.proj.weight"] = columns(source + "mlp.down_proj.weight")
    if stage == pp - 1:
        found["transformer.ln_f.weight"] = weights["model.norm.weight"]
        found["lm_head.weight"] = rows("lm_head.weight")
    return found


if __name__ == "__main__":
    main()
