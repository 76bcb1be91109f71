"""Descriptions of quantized sources as published models have them are decoded; what they mean is kept."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.base.errors import QuantizationError
from orchestrator.checkpoints.quantized.recipes import WeightArgs, decode_recipe

LAYER = "model.layers.3."
KIMI_WEIGHTS = {
    "actorder": None, "block_structure": None, "dynamic": False, "group_size": 32, "num_bits": 4, "observer": "minmax",
    "observer_kwargs": {}, "strategy": "group", "symmetric": True, "type": "int",
}  # fmt: skip
KIMI = {
    "config_groups": {
        "group_0": {"input_activations": None, "output_activations": None, "targets": ["Linear"], "weights": KIMI_WEIGHTS}
    },
    "format": "pack-quantized",
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
    "kv_cache_scheme": None, "quant_method": "compressed-tensors", "quantization_status": "compressed",
}  # fmt: skip
TOKEN = {**KIMI_WEIGHTS, "dynamic": True, "group_size": None, "num_bits": 8, "observer": None, "strategy": "token", "type": "float"}
DYNAMIC = {
    "config_groups": {
        "group_0": {
            "input_activations": TOKEN, "output_activations": None, "targets": ["Linear"],
            "weights": {**TOKEN, "dynamic": False, "observer": "minmax", "strategy": "channel"},
        }
    },
    "format": "float-quantized", "global_compression_ratio": 1.2, "ignore": ["lm_head"], "kv_cache_scheme": None,
    "quant_method": "compressed-tensors", "quantization_status": "compressed", "sparsity_config": {}, "transform_config": {},
    "version": "0.9.1",
}  # fmt: skip
GPTQ = {
    "batch_size": 1, "bits": 4, "block_name_to_quantize": None, "cache_block_outputs": True, "damp_percent": 0.01, "dataset": None,
    "desc_act": False, "exllama_config": {"version": 1}, "group_size": 128, "max_input_length": None, "model_seqlen": None,
    "module_name_preceding_first_block": None, "modules_in_block_to_quantize": None, "pad_token_id": None, "quant_method": "gptq",
    "sym": True, "tokenizer": None, "true_sequential": True, "use_cuda_fp16": False, "use_exllama": True,
}  # fmt: skip
DEEPSEEK = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
MINIMAX = {**DEEPSEEK, "fmt": "float8_e4m3fn", "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"]}
MISTRAL = {
    "activation_scheme": "static", "dequantize": False, "quant_method": "fp8", "weight_block_size": None,
    "modules_to_not_convert": ["model.vision_tower", "lm_head"],
}  # fmt: skip
GPT_OSS = {
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"],
    "quant_method": "mxfp4",
}  # fmt: skip
LLAMA_405B = {
    "activation_scale_ub": 1200.0, "quant_method": "fbgemm_fp8",
    "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.down_proj", "model.layers.3.self_attn.q_proj"],
}  # fmt: skip
NVIDIA = {
    "producer": {"name": "modelopt", "version": "0.23.0"},
    "quantization": {
        "quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16,
        "exclude_modules": ["lm_head", "model.layers.3.self_attn*"],
    },
}  # fmt: skip
AWQ = {"bits": 4, "group_size": 128, "modules_to_not_convert": None, "quant_method": "awq", "version": "gemm", "zero_point": True}
CASES: dict[str, tuple[str, dict[str, Any], str, list[str], list[str]]] = {
    "deepseek": ("fp8", DEEPSEEK, "FP8 128x128", [], ["mlp.experts.7.up_proj"]),
    "deepseek 3.1": ("fp8", {**DEEPSEEK, "scale_fmt": "ue8m0"}, "FP8 128x128", [], ["self_attn.q_a_proj"]),
    "minimax": ("fp8", MINIMAX, "FP8 128x128", ["block_sparse_moe.gate"], ["self_attn.q_proj", "block_sparse_moe.experts.1.w1"]),
    "mistral": ("fp8", MISTRAL, "FP8 per tensor", [], ["mlp.up_proj"]),
    "gpt-oss": ("mxfp4", GPT_OSS, "MXFP4", ["self_attn.q_proj", "mlp.router"], ["mlp.experts.gate_up_proj"]),
    "llama 405b": ("fbgemm_fp8", LLAMA_405B, "FP8 per row", ["self_attn.q_proj"], ["mlp.down_proj"]),
    "kimi": ("compressed-tensors", KIMI, "INT4 group 32", ["self_attn.o_proj", "mlp.up_proj"], ["mlp.experts.9.up_proj"]),
    "fp8 dynamic": ("compressed-tensors", DYNAMIC, "FP8 per row", [], ["mlp.up_proj"]),
    "nvidia": ("modelopt", NVIDIA, "NVFP4 (Model Optimizer)", ["self_attn.q_proj"], ["mlp.up_proj"]),
    "awq": ("awq", AWQ, "INT4 group 128 (AWQ)", [], ["mlp.up_proj"]),
    "gptq": ("gptq", GPTQ, "INT4 group 128 (GPTQ)", [], ["mlp.up_proj"]),
}
"""Model -> method, description, its name, modules of a layer that are not quantized, modules that are."""


@pytest.mark.parametrize("name", CASES)
def test_description_of_a_published_model_is_decoded(name: str) -> None:
    method, found, shown, ignored, quantized = CASES[name]
    recipe = decode_recipe(method, found, "config.json")
    assert recipe.algorithm == shown
    assert [module for module in ignored if not recipe.ignores(LAYER + module)] == []
    assert [module for module in quantized if recipe.ignores(LAYER + module)] == []


def test_groups_of_compressed_tensors_are_found_by_name_before_class() -> None:
    eight = {"targets": ["re:.*down_proj$"], "weights": {**KIMI_WEIGHTS, "num_bits": 8, "strategy": "channel", "group_size": None}}
    both = {**KIMI, "format": "mixed-precision", "config_groups": {**KIMI["config_groups"], "group_1": eight}}  # type: ignore[dict-item]
    recipe = decode_recipe("compressed-tensors", both, "config.json")
    assert recipe.args_of("model.layers.0.mlp.experts.1.down_proj") == WeightArgs(8, False, True, -1)
    assert recipe.args_of("model.layers.0.mlp.experts.1.up_proj") == WeightArgs(4, False, True, 32)


@pytest.mark.parametrize(
    ("method", "found", "words"),
    [
        ("gptq", {**GPTQ, "dynamic": {"-:.*": {}}}, "unknown keys of the quantization: dynamic"),
        ("compressed-tensors", {**KIMI, "ignore": "lm_head"}, "ignore is not a list of names"),
        ("compressed-tensors", {**KIMI, "quantization_status": "calibration"}, "quantization_status is 'calibration'"),
        ("awq", {**AWQ, "group_size": "128"}, "group_size is '128', not a number"),
        ("fbgemm_fp8", {**LLAMA_405B, "activation_scale_ub": -1}, "activation_scale_ub is -1"),
        ("modelopt", {"quantization": {"quant_algo": None}}, "quant_algo is None"),
        ("modelopt", {"quantization": {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": 1}}}, "quantized_layers is not"),
        (
            "compressed-tensors",
            {**KIMI, "config_groups": {"g": {"weights": {**KIMI_WEIGHTS, "group_size": "32"}}}},
            "group_size is '32'",
        ),
        ("modelopt", {"quantization": {"quant_algo": "FP8", "rotate": 1}}, "unknown keys of the quantization: rotate: 1"),
    ],
)
def test_description_that_cannot_be_kept_is_refused_by_key(method: str, found: dict[str, Any], words: str) -> None:
    with pytest.raises(QuantizationError, match=words):
        decode_recipe(method, found, "config.json")
