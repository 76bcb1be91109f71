"""Seeded Llama-shaped checkpoints of any size, written without a model library."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from orchestrator.checkpoints.safetensors import encode_header

Shape = tuple[int, ...]


def llama_tensors(hidden: int, inter: int, heads: int, kv_heads: int, layers: int, vocab: int) -> list[tuple[str, Shape]]:
    """Name and shape of every tensor of an untied Llama."""
    kv = hidden // heads * kv_heads
    found: list[tuple[str, Shape]] = [("model.embed_tokens.weight", (vocab, hidden))]
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        found += [
            (prefix + "input_layernorm.weight", (hidden,)),
            (prefix + "self_attn.q_proj.weight", (hidden, hidden)),
            (prefix + "self_attn.k_proj.weight", (kv, hidden)),
            (prefix + "self_attn.v_proj.weight", (kv, hidden)),
            (prefix + "self_attn.o_proj.weight", (hidden, hidden)),
            (prefix + "post_attention_layernorm.weight", (hidden,)),
            (prefix + "mlp.gate_proj.weight", (inter, hidden)),
            (prefix + "mlp.up_proj.weight", (inter, hidden)),
            (prefix + "mlp.down_proj.weight", (hidden, inter)),
        ]
    return [*found, ("model.norm.weight", (hidden,)), ("lm_head.weight", (vocab, hidden))]


def write_llama(
    folder: Path,
    *,
    num_files: int,
    hidden: int = 4096,
    inter: int = 14336,
    heads: int = 32,
    kv_heads: int = 8,
    layers: int,
    vocab: int,
    sparse: bool = False,
) -> int:
    """Write a bfloat16 checkpoint of seeded bytes in `num_files` shards; returns its tensor bytes. Kept if it is there.

    `sparse` writes headers only and leaves holes of the right size: enough to plan with, and it takes no room.
    """
    tensors = llama_tensors(hidden, inter, heads, kv_heads, layers, vocab)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": inter,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "num_hidden_layers": layers, "vocab_size": vocab,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "max_position_embeddings": 8192, "rope_theta": 500000.0,
        "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    return write_checkpoint(folder, tensors, config, num_files=num_files, sparse=sparse)


def write_moe_headers(folder: Path, *, num_files: int, layers: int, num_experts: int) -> int:
    """Headers and holes of a Qwen3-MoE-shaped checkpoint; returns its tensor bytes."""
    hidden, expert, heads, head, vocab = 7168, 2048, 64, 128, 129280
    tensors: list[tuple[str, Shape]] = [("model.embed_tokens.weight", (vocab, hidden))]
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        tensors += [(prefix + f"{name}.weight", (hidden,)) for name in ("input_layernorm", "post_attention_layernorm")]
        tensors += [(prefix + f"self_attn.{name}_proj.weight", (heads * head, hidden)) for name in "qkv"]
        tensors += [(prefix + f"self_attn.{name}_norm.weight", (head,)) for name in "qk"]
        tensors += [
            (prefix + "self_attn.o_proj.weight", (hidden, heads * head)),
            (prefix + "mlp.gate.weight", (num_experts, hidden)),
        ]
        for number in range(num_experts):
            names = (("gate_proj", (expert, hidden)), ("up_proj", (expert, hidden)), ("down_proj", (hidden, expert)))
            tensors += [(prefix + f"mlp.experts.{number}.{name}.weight", shape) for name, shape in names]
    tensors += [("model.norm.weight", (hidden,)), ("lm_head.weight", (vocab, hidden))]
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": hidden, "intermediate_size": 18432, "head_dim": head,
        "moe_intermediate_size": expert, "num_attention_heads": heads, "num_key_value_heads": heads, "num_experts": num_experts,
        "num_experts_per_tok": 8, "norm_topk_prob": True, "num_hidden_layers": layers, "vocab_size": vocab,
        "tie_word_embeddings": False,
    }  # fmt: skip
    return write_checkpoint(folder, tensors, config, num_files=num_files, sparse=True)


def write_checkpoint(
    folder: Path, tensors: list[tuple[str, Shape]], config: dict[str, object], *, num_files: int, sparse: bool
) -> int:
    """Write bfloat16 tensors in `num_files` shards under an index; returns their bytes. A folder that is there is kept."""
    total = sum(math.prod(shape) * 2 for _, shape in tensors)
    if (folder / "config.json").is_file():
        return total
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[tuple[str, Shape]]] = [[] for _ in range(num_files)]
    filled = 0
    for name, shape in tensors:
        shards[min(filled * num_files // total, num_files - 1)].append((name, shape))
        filled += math.prod(shape) * 2
    listed = {}
    for number, members in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{num_files:05d}.safetensors"
        if sparse:
            _write_hole(folder / file, members)
        else:
            _write_shard(folder / file, members, seed=number)
        listed |= {name: file for name, _ in members}
    index = {"metadata": {"total_size": total}, "weight_map": listed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return total


def _header(members: list[tuple[str, Shape]]) -> bytes:
    """Padded to 8 bytes, as the safetensors library does: tensors of real checkpoints do not begin on pages, as ours do."""
    text = encode_header([(name, "BF16", shape) for name, shape in members], {"format": "pt"})[8:].rstrip()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_hole(path: Path, members: list[tuple[str, Shape]]) -> None:
    with path.open("wb") as file:
        file.write(_header(members))
        file.truncate(file.tell() + sum(math.prod(shape) * 2 for _, shape in members))


def _write_shard(path: Path, members: list[tuple[str, Shape]], seed: int) -> None:
    """Small normal numbers: 16-bit patterns of sign, an exponent near 2^-6, and a random mantissa."""
    generator = np.random.default_rng(seed)
    with path.open("wb") as file:
        file.write(_header(members))
        for _, shape in members:
            left = math.prod(shape)
            while left:
                count = min(left, 2**23)
                bits = generator.integers(0, 2**16, count, dtype=np.uint16)
                file.write(((bits & 0x807F) | 0x3C80).tobytes())
                left -= count
