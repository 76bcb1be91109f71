"""The giants as they are published: plans from headers alone, and the proof of DeepSeek V3's real width.

    python -m benchmarks.giants plan [--folder DIR] [--rounds N]
    python -m benchmarks.giants prove [--folder DIR] [--tp 8]

`plan`: DeepSeek V3 (671B, 61 layers, 256 experts) in block FP8 at tp=8, pp=2, ep=8; Kimi K2 (1T, 384 experts) in INT4 of
compressed-tensors; gpt-oss-120b in MXFP4; Qwen3-235B-A22B in bfloat16; the first three also in the format that they are
served in; with the form of the experts of each, and the weights that a decode step reads. Names, shapes and
quantization_config are those of the published files; here the files hold holes. `prove`: one dense and one mixture layer of
DeepSeek V3 in block FP8 with seeded bytes, 16 GB, converted with the embedding split and verified, as
`orchestrator convert --verify` does: seconds and peak memory of every step.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.plan_scale import report
from benchmarks.proof import run
from orchestrator.base.dtypes import ITEM_BITS
from orchestrator.checkpoints.safetensors import encode_header
from orchestrator.planning.steps import Kind
from orchestrator.spec.build import BuildSpec
from orchestrator.spec.decoding import decode

Tensor = tuple[str, str, tuple[int, ...]]
"""Name, safetensors dtype, shape."""
_BLOCK = 1 << 24

DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "attention_bias": False, "bos_token_id": 0,
    "eos_token_id": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "intermediate_size": 18432,
    "kv_lora_rank": 512, "max_position_embeddings": 163840, "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8,
    "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_theta": 10000, "routed_scaling_factor": 2.5,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "scoring_func": "sigmoid", "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
    "v_head_dim": 128, "vocab_size": 129280,
    "quantization_config": {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
    },
}  # fmt: skip
KIMI_K2: dict[str, Any] = {
    **DEEPSEEK_V3, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "n_routed_experts": 384, "num_attention_heads": 64,
    "num_key_value_heads": 64, "num_nextn_predict_layers": 0, "rope_theta": 50000.0, "routed_scaling_factor": 2.827,
    "vocab_size": 163840, "bos_token_id": 163584, "eos_token_id": 163585, "max_position_embeddings": 262144,
    "rope_scaling": {**DEEPSEEK_V3["rope_scaling"], "factor": 64.0, "beta_fast": 1.0},
    "quantization_config": {
        "config_groups": {
            "group_0": {
                "input_activations": None, "output_activations": None, "targets": ["Linear"],
                "weights": {
                    "actorder": None, "block_structure": None, "dynamic": False, "group_size": 32, "num_bits": 4,
                    "observer": "minmax", "observer_kwargs": {}, "strategy": "group", "symmetric": True, "type": "int",
                },
            },
        },
        "format": "pack-quantized",
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\\\.(gate|up|gate_up|down)_proj.*"],
        "kv_cache_scheme": None, "quant_method": "compressed-tensors", "quantization_status": "compressed",
    },
}  # fmt: skip
GPT_OSS: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "eos_token_id": 200002,
    "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096,
    "intermediate_size": 2880, "max_position_embeddings": 131072, "model_type": "gpt_oss", "num_attention_heads": 64,
    "num_experts_per_tok": 4, "num_hidden_layers": 36, "num_key_value_heads": 8, "num_local_experts": 128, "pad_token_id": 199999,
    "layer_types": ["sliding_attention", "full_attention"] * 18, "output_router_logits": False, "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096, "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0, "tie_word_embeddings": False,
    "use_cache": True, "vocab_size": 201088,
    "quantization_config": {
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"],
        "quant_method": "mxfp4",
    },
}  # fmt: skip

QWEN3_235B = Path(__file__).parent.parent / "tests/data/configs/qwen3-235b-a22b.json"


def deepseek_tensors(config: dict[str, Any], *, form: str) -> Iterator[Tensor]:
    """Yield the tensors of a DeepSeek-V3-shaped checkpoint. `form`: fp8, all linears in blocks; int4, the routed experts packed."""
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    yield "model.embed_tokens.weight", "BF16", (config["vocab_size"], hidden)
    for layer in range(layers + config["num_nextn_predict_layers"]):
        prefix = f"model.layers.{layer}"
        yield from _latent_attention(config, f"{prefix}.self_attn", "fp8" if form == "fp8" else "bf16")
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{norm}.weight", "BF16", (hidden,)
        plain = "fp8" if form == "fp8" else "bf16"
        if layer < config["first_k_dense_replace"]:
            yield from _mlp(f"{prefix}.mlp", hidden, config["intermediate_size"], plain)
            continue
        yield f"{prefix}.mlp.gate.weight", "BF16", (config["n_routed_experts"], hidden)
        yield f"{prefix}.mlp.gate.e_score_correction_bias", "F32", (config["n_routed_experts"],)
        for expert in range(config["n_routed_experts"]):
            yield from _mlp(f"{prefix}.mlp.experts.{expert}", hidden, config["moe_intermediate_size"], form)
        yield from _mlp(f"{prefix}.mlp.shared_experts", hidden, config["moe_intermediate_size"], plain)
        if layer >= layers:  # the layer that predicts a further token
            yield f"{prefix}.embed_tokens.weight", "BF16", (config["vocab_size"], hidden)
            yield f"{prefix}.shared_head.head.weight", "BF16", (config["vocab_size"], hidden)
            yield f"{prefix}.eh_proj.weight", "BF16", (hidden, 2 * hidden)
            for norm in ("enorm", "hnorm", "shared_head.norm"):
                yield f"{prefix}.{norm}.weight", "BF16", (hidden,)
    yield "model.norm.weight", "BF16", (hidden,)
    yield "lm_head.weight", "BF16", (config["vocab_size"], hidden)


def _latent_attention(config: dict[str, Any], prefix: str, form: str) -> Iterator[Tensor]:
    hidden, heads, latent = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, value, rank = (config[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "q_lora_rank"))
    yield from _linear(f"{prefix}.q_a_proj", rank, hidden, form)
    yield from _linear(f"{prefix}.q_b_proj", heads * (nope + rope), rank, form)
    yield from _linear(f"{prefix}.kv_a_proj_with_mqa", latent + rope, hidden, form)
    yield from _linear(f"{prefix}.kv_b_proj", heads * (nope + value), latent, form)
    yield from _linear(f"{prefix}.o_proj", hidden, heads * value, form)
    yield f"{prefix}.q_a_layernorm.weight", "BF16", (rank,)
    yield f"{prefix}.kv_a_layernorm.weight", "BF16", (latent,)


def _mlp(prefix: str, hidden: int, inner: int, form: str) -> Iterator[Tensor]:
    yield from _linear(f"{prefix}.gate_proj", inner, hidden, form)
    yield from _linear(f"{prefix}.up_proj", inner, hidden, form)
    yield from _linear(f"{prefix}.down_proj", hidden, inner, form)


def _linear(name: str, rows: int, columns: int, form: str) -> Iterator[Tensor]:
    if form == "fp8":
        yield f"{name}.weight", "F8_E4M3", (rows, columns)
        yield f"{name}.weight_scale_inv", "F32", (-(-rows // 128), -(-columns // 128))
    elif form == "int4":
        yield f"{name}.weight_packed", "I32", (rows, columns // 8)
        yield f"{name}.weight_scale", "BF16", (rows, columns // 32)
        yield f"{name}.weight_shape", "I64", (2,)
    else:
        yield f"{name}.weight", "BF16", (rows, columns)


def gpt_oss_tensors(config: dict[str, Any]) -> Iterator[Tensor]:
    """Yield the tensors of a gpt-oss checkpoint in MXFP4."""
    hidden, inner, experts = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    query, key = (config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    yield "model.embed_tokens.weight", "BF16", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name, rows, columns in (("q", query, hidden), ("k", key, hidden), ("v", key, hidden), ("o", hidden, query)):
            yield f"{prefix}.self_attn.{name}_proj.weight", "BF16", (rows, columns)
            yield f"{prefix}.self_attn.{name}_proj.bias", "BF16", (rows,)
        yield f"{prefix}.self_attn.sinks", "BF16", (config["num_attention_heads"],)
        yield f"{prefix}.mlp.router.weight", "BF16", (experts, hidden)
        yield f"{prefix}.mlp.router.bias", "BF16", (experts,)
        for name, rows, columns in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
            yield f"{prefix}.mlp.experts.{name}_blocks", "U8", (experts, rows, columns // 32, 16)
            yield f"{prefix}.mlp.experts.{name}_scales", "U8", (experts, rows, columns // 32)
            yield f"{prefix}.mlp.experts.{name}_bias", "BF16", (experts, rows)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{norm}.weight", "BF16", (hidden,)
    yield "model.norm.weight", "BF16", (hidden,)
    yield "lm_head.weight", "BF16", (config["vocab_size"], hidden)


def qwen_moe_tensors(config: dict[str, Any]) -> Iterator[Tensor]:
    """Yield the tensors of a Qwen3 mixture."""
    hidden, size = config["hidden_size"], config["head_dim"]
    query, key = (config[name] * size for name in ("num_attention_heads", "num_key_value_heads"))
    yield "model.embed_tokens.weight", "BF16", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name, rows, columns in (("q", query, hidden), ("k", key, hidden), ("v", key, hidden), ("o", hidden, query)):
            yield f"{prefix}.self_attn.{name}_proj.weight", "BF16", (rows, columns)
        yield f"{prefix}.mlp.gate.weight", "BF16", (config["num_experts"], hidden)
        for expert in range(config["num_experts"]):
            yield from _mlp(f"{prefix}.mlp.experts.{expert}", hidden, config["moe_intermediate_size"], "bf16")
        for norm, width in (("input_layernorm", hidden), ("post_attention_layernorm", hidden), ("self_attn.q_norm", size),
                            ("self_attn.k_norm", size)):  # fmt: skip
            yield f"{prefix}.{norm}.weight", "BF16", (width,)
    yield "model.norm.weight", "BF16", (hidden,)
    yield "lm_head.weight", "BF16", (config["vocab_size"], hidden)


def write(folder: Path, config: dict[str, Any], tensors: list[Tensor], *, num_files: int, seed: int | None) -> Path:
    """Write a checkpoint under an index; kept if it is there. `seed` None: holes in place of the bytes."""
    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(_num_bytes(tensor) for tensor in tensors)
    shards: list[list[Tensor]] = [[] for _ in range(num_files)]
    filled = 0
    for tensor in tensors:
        shards[min(filled * num_files // total, num_files - 1)].append(tensor)
        filled += _num_bytes(tensor)
    listed = {}
    for number, members in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{num_files:05d}.safetensors"
        with (folder / file).open("wb") as target:
            target.write(encode_header(members, {"format": "pt"}))
            if seed is None:
                target.truncate(target.tell() + sum(_num_bytes(tensor) for tensor in members))
            else:
                source = _Seeded(seed + number)
                for tensor in members:
                    source.write(target, tensor)
        listed |= {name: file for name, _, _ in members}
    index = {"metadata": {"total_size": total}, "weight_map": listed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def _num_bytes(tensor: Tensor) -> int:
    return math.prod(tensor[2]) * ITEM_BITS[tensor[1]] // 8


class _Seeded:
    """Small random numbers of each dtype: a block, shifted from tensor to tensor, because drawing billions would take hours."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        bits = self._random.integers(0, 2**16, 2 * _BLOCK, dtype=np.uint16)
        self._wide = (bits & 0x807F) | 0x3C80  # bfloat16 near 2^-6
        self._narrow = ((bits & 0x87) | 0x28).astype(np.uint8)  # E4M3 from 0.25 to 0.47, with a sign

    def write(self, target: Any, tensor: Tensor) -> None:
        name, dtype, shape = tensor
        count = math.prod(shape)
        if "norm" in name:
            target.write(np.full(count, 0x3F80, np.uint16).tobytes())
        elif dtype == "F32":
            around = (-0.01, 0.01) if name.endswith("bias") else (0.03, 0.06)
            target.write(self._random.uniform(*around, count).astype(np.float32).tobytes())
        else:
            block = self._narrow if dtype == "F8_E4M3" else self._wide
            for begin in range(0, count, _BLOCK):
                shift = int(self._random.integers(0, _BLOCK))
                target.write(block[shift : shift + min(_BLOCK, count - begin)].tobytes())


def print_plans(folder: Path, num_rounds: int) -> None:
    """Plan each model as it is read, and in the format that it is served in."""
    qwen = json.loads(QWEN3_235B.read_text())
    deepseek = write(folder / "deepseek-v3", DEEPSEEK_V3, list(deepseek_tensors(DEEPSEEK_V3, form="fp8")), num_files=163, seed=None)
    kimi = write(folder / "kimi-k2", KIMI_K2, list(deepseek_tensors(KIMI_K2, form="int4")), num_files=62, seed=None)
    gpt_oss = write(folder / "gpt-oss-120b", GPT_OSS, list(gpt_oss_tensors(GPT_OSS)), num_files=15, seed=None)
    mixture = write(folder / "qwen3-235b", qwen, list(qwen_moe_tensors(qwen)), num_files=118, seed=None)
    by_layer = {"algorithm": "NVFP4", "calibration": {"num_stages": DEEPSEEK_V3["num_hidden_layers"]}}
    wide, deep = {"tp": 8, "pp": 2, "moe_ep": 8}, {"tp": 8, "pp": 8, "moe_ep": 8}
    report(deepseek, wide, num_rounds, False)
    report(deepseek, wide, num_rounds, False, by_layer)
    report(kimi, wide, num_rounds, False)
    for topology in (wide, deep):
        report(kimi, topology, num_rounds, False, {"algorithm": "source"})
    report(gpt_oss, {"tp": 4}, num_rounds, False)
    report(gpt_oss, {"tp": 4}, num_rounds, False, {"algorithm": "source"})
    report(mixture, {"tp": 4, "pp": 4, "moe_ep": 4}, num_rounds, False)


def main() -> None:
    """Run one of the two."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["plan", "prove"])
    parser.add_argument("--folder", type=Path, default=Path(".cache/giants"))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--tp", type=int, default=8)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folder: Path = arguments.folder
    if arguments.what == "plan":
        print_plans(folder, arguments.rounds)
        return
    config = {**DEEPSEEK_V3, "num_hidden_layers": 2, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0}
    source = write(folder / "width", config, list(deepseek_tensors(config, form="fp8")), num_files=4, seed=1)
    spec = {
        "source": {"path": str(source.resolve())}, "topology": {"tp": arguments.tp}, "release": {"name": "proof", "version": "1"},
        "conversion": {"use_parallel_embedding": True}, "engine": {"max_batch_size": 2, "max_input_len": 16, "max_seq_len": 64},
    }  # fmt: skip
    kinds = (Kind.MINIATURE, Kind.REFERENCE, Kind.CONVERT, Kind.VERIFY)
    run(decode(BuildSpec, spec, "benchmark"), (folder / "width-store").resolve().as_uri(), kinds)


if __name__ == "__main__":
    main()
