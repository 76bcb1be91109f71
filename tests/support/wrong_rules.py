"""Wrong readings of config.json, each of which was built and published as verified once: planted again, to see them caught.

A planted rule changes what `from_hugging_face` makes of a config; it is given the config (scaled down, when the miniature is
made) and the ModelConfig that is right.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.model.config import ModelConfig

CONFIGS = Path(__file__).resolve().parents[1] / "data" / "configs"
Rule = Callable[[Mapping[str, Any], ModelConfig], dict[str, Any]]


def hub_config(name: str, *without: str, **changes: Any) -> dict[str, Any]:
    """A model's config.json with some keys changed, some left out."""
    config = {**json.loads((CONFIGS / f"{name}.json").read_text()), **changes}
    return {key: value for key, value in config.items() if key not in without}


def _window_everywhere(config: Mapping[str, Any], _found: ModelConfig) -> dict[str, Any]:
    return {"sliding_window": config.get("sliding_window"), "window_layers": None}


def _no_window(_config: Mapping[str, Any], _found: ModelConfig) -> dict[str, Any]:
    return {"sliding_window": None, "window_layers": None}


def _window_from(config: Mapping[str, Any], found: ModelConfig) -> dict[str, Any]:
    """Qwen 2's rule, in families that have another."""
    chosen = tuple(layer >= config.get("max_window_layers", 0) for layer in range(found.num_hidden_layers))
    return {"sliding_window": config.get("sliding_window"), "window_layers": chosen}


def _window_by_layer_types(config: Mapping[str, Any], _found: ModelConfig) -> dict[str, Any]:
    chosen = tuple(kind == "sliding_attention" for kind in config.get("layer_types", ()))
    return {"sliding_window": config.get("sliding_window"), "window_layers": chosen or None}


def _window_one_longer(_config: Mapping[str, Any], found: ModelConfig) -> dict[str, Any]:
    return {"sliding_window": found.sliding_window and found.sliding_window + 1}


def _other_layers(_config: Mapping[str, Any], found: ModelConfig) -> dict[str, Any]:
    return {"window_layers": found.window_layers and tuple(not windowed for windowed in found.window_layers)}


def _moe(**changes: Any) -> Rule:
    def rule(_config: Mapping[str, Any], found: ModelConfig) -> dict[str, Any]:
        assert found.moe is not None
        return {"moe": found.moe.model_copy(update=changes)}

    return rule


def _half_the_jitter(_config: Mapping[str, Any], found: ModelConfig) -> dict[str, Any]:
    assert found.moe is not None
    return {"moe": found.moe.model_copy(update={"jitter": found.moe.jitter / 2})}


def _groups_off_by(step: int) -> Rule:
    def rule(_config: Mapping[str, Any], found: ModelConfig) -> dict[str, Any]:
        assert found.moe is not None
        return {"moe": found.moe.model_copy(update={"kept_groups": found.moe.kept_groups + step})}

    return rule


def _set(**fields: Any) -> Rule:
    return lambda _config, _found: fields


def _rotary_from_parameters(config: Mapping[str, Any], _found: ModelConfig) -> dict[str, Any]:
    parameters = config.get("rope_parameters")
    return {"rotary_base": parameters["rope_theta"], "rotary_scaling": None} if parameters else {}


def _half_rotated(_config: Mapping[str, Any], found: ModelConfig) -> dict[str, Any]:
    return {"rotary_embedding_dim": found.head_size // 2}


def _dense_layer_unrotated(_config: Mapping[str, Any], found: ModelConfig) -> dict[str, Any]:
    return {"rotary_layers": tuple(found.has_window(layer) for layer in range(found.num_hidden_layers))}


def _mscale_once(found: ModelConfig) -> float:
    assert found.attention_scale is not None
    return float((found.attention_scale * found.head_size**-0.5) ** 0.5)


def _latent(**changes: Any) -> Rule:
    """A wrong size or score of latent attention, by the right ModelConfig."""
    return lambda _config, found: {name: change(found) for name, change in changes.items()}


def _scaling_without(*keys: str, **changes: Any) -> Rule:
    def rule(_config: Mapping[str, Any], found: ModelConfig) -> dict[str, Any]:
        scaling = {**(found.rotary_scaling or {}), **changes}
        return {"rotary_scaling": {key: value for key, value in scaling.items() if key not in keys}}

    return rule


@dataclass(frozen=True)
class WrongRule:
    """A rule, and a config that it reads wrongly."""

    name: str
    config: dict[str, Any]
    rule: Rule

    def __str__(self) -> str:
        return self.name


QWEN2_WINDOW = {"use_sliding_window": True, "sliding_window": 4096}
_PHIMOE_ROTARY = hub_config("phi-3.5-moe")["rope_scaling"]
TWO_MSCALES = hub_config("phi-3.5-moe", rope_scaling={**_PHIMOE_ROTARY, "short_mscale": 1.25, "long_mscale": 1.6})
OLMO_KINDS = ["sliding_attention", "full_attention"] * 16
WRONG_RULES = [
    # Windows that transformers ignores, or does not
    WrongRule("llama window honoured", hub_config("llama-3-8b", sliding_window=4096), _window_everywhere),
    WrongRule("granite window honoured", hub_config("granite-3.1-2b", sliding_window=4096), _window_everywhere),
    WrongRule("olmo2 window honoured", hub_config("olmo-2-7b", sliding_window=2048), _window_everywhere),
    WrongRule("gemma window honoured", hub_config("gemma-1.1-2b-it", sliding_window=4096), _window_everywhere),
    WrongRule(
        "olmo2 layer_types honoured", hub_config("olmo-2-7b", sliding_window=2048, layer_types=OLMO_KINDS), _window_by_layer_types
    ),
    WrongRule("mistral use_sliding_window honoured", hub_config("mistral-7b-v0.1", use_sliding_window=False), _no_window),
    WrongRule("mistral default window missed", hub_config("mistral-7b-v0.1", "sliding_window"), _no_window),
    WrongRule("mistral window one too long", hub_config("mistral-7b-v0.1"), _window_one_longer),
    WrongRule("phi3 window missed", hub_config("phi-3-mini-4k"), _no_window),
    # Which layers have one
    WrongRule(
        "qwen2 default max_window_layers missed",
        hub_config("qwen2.5-72b-instruct", "max_window_layers", **QWEN2_WINDOW),
        _window_everywhere,
    ),
    WrongRule(
        "qwen2 default max_window_layers of a shallow model missed",
        hub_config("qwen2.5-0.5b", "max_window_layers", **QWEN2_WINDOW),
        _window_everywhere,
    ),
    WrongRule("qwen2 layers turned round", hub_config("qwen2-7b", **{**QWEN2_WINDOW, "max_window_layers": 21}), _other_layers),
    WrongRule("qwen3_moe layers of qwen2", hub_config("qwen3-30b-a3b", **{**QWEN2_WINDOW, "max_window_layers": 40}), _window_from),
    WrongRule("qwen2_moe layers of qwen2", hub_config("qwen2-57b-a14b", **{**QWEN2_WINDOW, "max_window_layers": 20}), _window_from),
    WrongRule("gemma2 layers turned round", hub_config("gemma-2-2b"), _other_layers),
    WrongRule("vaultgemma full layers windowed", hub_config("vaultgemma-1b"), _window_everywhere),
    WrongRule("gemma3 window everywhere", hub_config("gemma-3-1b-it"), _window_everywhere),
    # Null, defaults, precedence
    WrongRule(
        "gemma2 null caps defaulted",
        hub_config("gemma-2-2b", attn_logit_softcapping=None, final_logit_softcapping=None),
        _set(attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
    ),
    WrongRule(
        "vaultgemma null caps defaulted",
        hub_config("vaultgemma-1b"),
        _set(attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
    ),
    WrongRule("gemma2 cap on scores missed", hub_config("gemma-2-2b"), _set(attn_logit_softcapping=None)),
    WrongRule("gemma2 cap on logits missed", hub_config("gemma-2-2b"), _set(final_logit_softcapping=None)),
    WrongRule(
        "gemma3 cap on scores honoured", hub_config("gemma-3-270m", attn_logit_softcapping=50.0), _set(attn_logit_softcapping=50.0)
    ),
    WrongRule("gemma2 scale of the head size", hub_config("gemma-2-27b"), _set(attention_scale=None)),
    WrongRule("gemma3 one rotary base", hub_config("gemma-3-1b-it"), _set(rotary_base_local=None)),
    WrongRule("mixtral norm_topk_prob honoured", hub_config("mixtral-8x7b", norm_topk_prob=False), _moe(normalization_mode=0)),
    WrongRule("qwen3_moe norm_topk_prob missed", hub_config("qwen3-30b-a3b"), _moe(normalization_mode=0)),
    WrongRule("qwen2_moe default of num_experts_per_tok", hub_config("qwen2-57b-a14b", "num_experts_per_tok"), _moe(top_k=2)),
    WrongRule("qwen3_moe default of num_experts_per_tok", hub_config("qwen3-30b-a3b", "num_experts_per_tok"), _moe(top_k=2)),
    WrongRule("llama hidden_activation honoured", hub_config("llama-3-8b", hidden_activation="gelu"), _set(hidden_act="gelu")),
    WrongRule("gemma hidden_act missed", hub_config("gemma-2b"), _set(hidden_act="gelu_pytorch_tanh")),
    WrongRule("llama partial_rotary_factor honoured", hub_config("llama-3-8b", partial_rotary_factor=0.5), _half_rotated),
    WrongRule("phi3 partial_rotary_factor missed", hub_config("phi-4-mini", rope_scaling=None), _set(rotary_embedding_dim=None)),
    WrongRule("mixtral default of rope_theta", hub_config("mixtral-8x7b", "rope_theta"), _set(rotary_base=10000.0)),
    WrongRule(
        "llama rope_parameters before rope_scaling",
        hub_config("llama-3.1-8b-instruct", rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
        _rotary_from_parameters,
    ),
    WrongRule("llama3 scaling missed", hub_config("llama-3.1-8b-instruct"), _set(rotary_scaling=None)),
    WrongRule("llama3 scaling's band moved", hub_config("llama-3.1-8b-instruct"), _scaling_without(high_freq_factor=2.0)),
    WrongRule("linear scaling missed", hub_config("vicuna-7b-v1.5-16k"), _set(rotary_scaling=None)),
    WrongRule("yarn's factor on attention missed", hub_config("qwen2.5-7b-instruct-yarn"), _scaling_without(attention_factor=1.0)),
    WrongRule("ministral3 queries not scaled by position", hub_config("ministral-3-8b-text"), _set(query_scale_beta=None)),
    WrongRule("gpt-oss layers turned round", hub_config("gpt-oss-20b-bf16"), _other_layers),
    WrongRule("gpt-oss clamp left out", hub_config("gpt-oss-20b-bf16"), _moe(swiglu_limit=None)),
    WrongRule("gpt-oss yarn truncated", hub_config("gpt-oss-20b-bf16"), _scaling_without(truncate=True)),
    WrongRule("mistral4 queries not scaled by position", hub_config("mistral-small-4-text"), _set(query_scale_beta=None)),
    WrongRule("mistral4 mscale honoured", hub_config("mistral-small-4-text"), _latent(attention_scale=lambda found: 1.3)),
    WrongRule("deepseek's pairs rotated as halves", hub_config("deepseek-v3-bf16"), _set(rotary_interleaved=False)),
    WrongRule("deepseek's mscale left out of the scores", hub_config("deepseek-v3-bf16"), _set(attention_scale=None)),
    WrongRule("deepseek's mscale taken once", hub_config("deepseek-v3-bf16"), _latent(attention_scale=_mscale_once)),
    WrongRule("kimi's mscale left out of the scores", hub_config("kimi-k2-bf16"), _set(attention_scale=None)),
    WrongRule("granite's multiplier of residuals missed", hub_config("granite-3.1-2b"), _set(residual_multiplier=1.0)),
    WrongRule("granite's scale of attention missed", hub_config("granite-3.1-2b"), _set(attention_scale=None)),
    # Routers and partial rotary embedding
    WrongRule("glm4_moe factor of the weights missed", hub_config("glm-4.6"), _moe(routed_scale=1.0)),
    WrongRule("glm4_moe norm_topk_prob missed", hub_config("glm-4.6"), _moe(normalization_mode=0)),
    WrongRule("glm4_moe softmax for sigmoid", hub_config("glm-4.6"), _moe(scoring="softmax")),
    WrongRule("glm4_moe whole heads rotated", hub_config("glm-4.5-air"), _set(rotary_embedding_dim=None)),
    WrongRule("minimax_m2 rotary_dim missed", hub_config("minimax-m2"), _set(rotary_embedding_dim=None)),
    WrongRule("minimax_m2 softmax for sigmoid", hub_config("minimax-m2"), _moe(scoring="softmax")),
    WrongRule("minimax_m2 weights not normalized", hub_config("minimax-m2"), _moe(normalization_mode=0)),
    WrongRule("deepseek_v3 one group too many", hub_config("deepseek-v3-bf16"), _groups_off_by(1)),
    WrongRule("deepseek_v3 one group too few", hub_config("deepseek-v3-bf16"), _groups_off_by(-1)),
    WrongRule("deepseek_v3 groups missed", hub_config("deepseek-v3-bf16"), _moe(num_groups=1, kept_groups=1)),
    WrongRule("deepseek_v3 factor of the weights missed", hub_config("deepseek-v3-bf16"), _moe(routed_scale=1.0)),
    WrongRule("ernie4_5_moe weights not normalized", hub_config("ernie-4.5-21b-a3b"), _moe(normalization_mode=0)),
    WrongRule("smollm3 rotary embedding everywhere", hub_config("smollm3-3b"), _set(rotary_layers=None)),
    WrongRule("ernie4_5 halves for neighbours", hub_config("ernie-4.5-0.3b"), _set(rotary_interleaved=False)),
    WrongRule("dots1 factor of the weights missed", hub_config("dots.llm1"), _moe(routed_scale=1.0)),
    WrongRule("olmoe norm_topk_prob honoured as true", hub_config("olmoe-1b-7b-0924"), _moe(normalization_mode=1)),
    WrongRule("glm halves for neighbours", hub_config("glm-4-9b-chat"), _set(rotary_interleaved=False)),
    WrongRule("glm4 whole heads rotated", hub_config("glm-4-32b-0414"), _set(rotary_embedding_dim=None)),
    WrongRule("helium halves for neighbours", hub_config("helium-1-preview-2b"), _set(rotary_interleaved=False)),
    WrongRule("olmo3 layers turned round", hub_config("olmo-3-32b"), _other_layers),
    WrongRule("olmo3 rotary scaling in layers with a window", hub_config("olmo-3-32b"), _set(rotary_base_local=None)),
    WrongRule("exaone4 rotary embedding everywhere", hub_config("exaone-4.0-32b"), _set(rotary_layers=None)),
    WrongRule("exaone4 rotary embedding nowhere", hub_config("exaone-4.0-1.2b"), _set(rotary_layers=(False,) * 30)),
    WrongRule("cwm layers turned round", hub_config("cwm-32b"), _other_layers),
    WrongRule("youtu halves for neighbours", hub_config("youtu-llm-2b"), _set(rotary_interleaved=False)),
    WrongRule("starcoder2 RMSNorm for LayerNorm", hub_config("starcoder2-7b"), _set(norm_kind="rms")),
    WrongRule("starcoder2 biases of norms left out", hub_config("starcoder2-7b"), _set(norm_bias=False)),
    WrongRule("starcoder2 blocks side by side", hub_config("starcoder2-7b"), _set(parallel_blocks=True)),
    WrongRule("starcoder2 window missed", hub_config("starcoder2-7b"), _no_window),
    WrongRule("nemotron RMSNorm for LayerNorm", hub_config("minitron-8b"), _set(norm_kind="rms")),
    WrongRule("nemotron whole heads rotated", hub_config("minitron-8b"), _set(rotary_embedding_dim=None)),
    WrongRule("nemotron's epsilon of another key", hub_config("minitron-8b"), _set(norm_epsilon=1e-2)),
    WrongRule("jais2 SiLU for the square of a ReLU", hub_config("jais-2-8b"), _set(hidden_act="silu")),
    WrongRule("cohere RMSNorm for LayerNorm", hub_config("command-r"), _set(norm_kind="rms")),
    WrongRule("cohere logits not scaled", hub_config("command-r"), _set(logits_scaling=1.0)),
    WrongRule("cohere halves for neighbours", hub_config("command-r"), _set(rotary_interleaved=False)),
    WrongRule("cohere2 rotary embedding everywhere", hub_config("command-a-03-2025"), _set(rotary_layers=None)),
    WrongRule("cohere2 window everywhere", hub_config("command-r7b-12-2024"), _window_everywhere),
    WrongRule("flex_olmo sigmoid for softmax", hub_config("flex-olmo-7x7b-1t"), _moe(scoring="sigmoid")),
    WrongRule("llama4 windows that slide", hub_config("llama-4-scout-text"), _set(chunked_windows=False)),
    WrongRule("llama4 chunks everywhere", hub_config("llama-4-scout-text"), _set(window_layers=None)),
    WrongRule("llama4 rotary embedding everywhere", hub_config("llama-4-scout-text"), _set(rotary_layers=None)),
    WrongRule("llama4 heads not normed", hub_config("llama-4-scout-text"), _set(qk_layernorm="none")),
    WrongRule("llama4 use_qk_norm missed", hub_config("llama-4-maverick-text"), _set(qk_layernorm="rotated")),
    WrongRule(
        "llama4 heads normed before a rotation that scales them",
        hub_config("llama-4-scout-text", rope_scaling={"rope_type": "yarn", "factor": 16.0}),
        _set(qk_norm_after_rotary=False),
    ),
    WrongRule("llama4 queries not scaled by position", hub_config("llama-4-scout-text"), _set(query_scale_beta=None)),
    WrongRule("llama4 queries scaled as Ministral's", hub_config("llama-4-maverick-text"), _set(query_scale_floor=None)),
    WrongRule("llama4 outputs weighed", hub_config("llama-4-scout-text"), _moe(weighs_input=False)),
    WrongRule("llama4 softmax for sigmoid", hub_config("llama-4-maverick-text"), _moe(scoring="softmax_of_chosen")),
    WrongRule("llama4 halves for neighbours", hub_config("llama-4-scout-text"), _set(rotary_interleaved=False)),
    WrongRule("llama4 rotary scaling missed", hub_config("llama-4-scout-text"), _set(rotary_scaling=None)),
    WrongRule("exaone_moe rotary embedding everywhere", hub_config("k-exaone-236b-a23b"), _set(rotary_layers=None)),
    WrongRule("exaone_moe layers turned round", hub_config("k-exaone-236b-a23b"), _other_layers),
    WrongRule("exaone_moe factor of the weights missed", hub_config("k-exaone-236b-a23b"), _moe(routed_scale=1.0)),
    WrongRule("exaone_moe norm_topk_prob missed", hub_config("k-exaone-236b-a23b"), _moe(normalization_mode=0)),
    WrongRule("hy_v3 factor of the weights missed", hub_config("hy3"), _moe(routed_scale=1.0)),
    WrongRule("hy_v3 softmax for sigmoid", hub_config("hy3"), _moe(scoring="softmax")),
    WrongRule("hy_v3 default of rope_theta", hub_config("hy3", "rope_parameters"), _set(rotary_base=10000.0)),
    WrongRule("hunyuan alpha missed", hub_config("hunyuan-7b"), _scaling_without("alpha")),
    WrongRule("hunyuan heads normed before the rotation", hub_config("hunyuan-7b"), _set(qk_norm_after_rotary=False)),
    WrongRule("hunyuan_moe heads normed before the rotation", hub_config("hunyuan-a13b"), _set(qk_norm_after_rotary=False)),
    WrongRule("hunyuan_moe weights not normalized", hub_config("hunyuan-a13b"), _moe(normalization_mode=0)),
    WrongRule("hunyuan_moe one expert fewer", hub_config("hunyuan-a13b"), _moe(top_k=2)),
    WrongRule("granitemoe multiplier of residuals missed", hub_config("granite-3.1-3b-a800m"), _set(residual_multiplier=1.0)),
    WrongRule(
        "granitemoe softmax over all experts", hub_config("granite-3.1-3b-a800m"), _moe(scoring="softmax", normalization_mode=0)
    ),
    WrongRule("granitemoe scale of attention missed", hub_config("granite-3.1-3b-a800m"), _set(attention_scale=None)),
    WrongRule(
        "granitemoeshared multiplier of the embedding", hub_config("granite-moe-7b-a1b-shared"), _set(embedding_multiplier=1.0)
    ),
    WrongRule("granitemoeshared logits not scaled", hub_config("granite-moe-7b-a1b-shared"), _set(logits_scaling=1.0)),
    WrongRule("gemma4 values not normed", hub_config("gemma-4-31b-text"), _set(value_norm=False)),
    WrongRule("gemma4 scale of the head size", hub_config("gemma-4-31b-text"), _set(attention_scale=None)),
    WrongRule("gemma4 factors of layers left out", hub_config("gemma-4-26b-a4b-text"), _set(layer_scalar=False)),
    WrongRule("gemma4 whole heads rotated", hub_config("gemma-4-31b-text"), _scaling_without(partial_rotary_factor=1.0)),
    WrongRule("gemma4 one rotary base", hub_config("gemma-4-26b-a4b-text"), _set(rotary_base=10000.0)),
    WrongRule("gemma4 one expert fewer", hub_config("gemma-4-26b-a4b-text"), _moe(top_k=2)),
    WrongRule("gemma4 cap on logits missed", hub_config("gemma-4-31b-text"), _set(final_logit_softcapping=None)),
    WrongRule("afmoe attention without its gate", hub_config("trinity-mini"), _set(attention_gate=False)),
    WrongRule("afmoe rotary embedding everywhere", hub_config("trinity-mini"), _set(rotary_layers=None)),
    WrongRule("afmoe layers turned round", hub_config("trinity-mini"), _other_layers),
    WrongRule("afmoe embedding not multiplied", hub_config("trinity-mini"), _set(embedding_multiplier=1.0)),
    WrongRule("afmoe factor of the weights missed", hub_config("trinity-mini"), _moe(routed_scale=1.0)),
    WrongRule("cohere2_moe shared expert added", hub_config("command-a-moe"), _moe(output_scale=1.0)),
    WrongRule("cohere2_moe softmax for sigmoid", hub_config("command-a-moe"), _moe(scoring="softmax_of_chosen")),
    WrongRule("cohere2_moe norm_topk_prob missed", hub_config("command-a-moe"), _moe(normalization_mode=0)),
    WrongRule("cohere2_moe RMSNorm for LayerNorm", hub_config("command-a-moe"), _set(norm_kind="rms")),
    WrongRule("cohere2_moe dense layer not rotated", hub_config("command-a-moe"), _dense_layer_unrotated),
    WrongRule("cohere2_moe logits not scaled", hub_config("command-a-moe"), _set(logits_scaling=1.0)),
    WrongRule("phimoe softmax for SparseMixer", hub_config("phi-3.5-moe"), _moe(scoring="softmax")),
    WrongRule("phimoe softmax of the chosen for SparseMixer", hub_config("phi-3.5-moe"), _moe(scoring="softmax_of_chosen")),
    WrongRule("phimoe weights normalized", hub_config("phi-3.5-moe"), _moe(normalization_mode=1)),
    WrongRule("phimoe jitter missed", hub_config("phi-3.5-moe"), _moe(jitter=0.0)),
    WrongRule("phimoe jitter taken once", hub_config("phi-3.5-moe"), _half_the_jitter),
    WrongRule("phimoe default of the jitter", hub_config("phi-3.5-moe", "router_jitter_noise"), _moe(jitter=0.0)),
    WrongRule("phimoe mscales missed", hub_config("phi-3.5-moe"), _scaling_without("short_mscale", "long_mscale")),
    WrongRule("phimoe one mscale", TWO_MSCALES, _scaling_without(long_mscale=1.25)),
    WrongRule("phimoe mscales turned round", TWO_MSCALES, _scaling_without(short_mscale=1.6, long_mscale=1.25)),
    WrongRule("phimoe default of rope_theta", hub_config("phi-3.5-moe", "rope_theta"), _set(rotary_base=10000.0)),
    WrongRule("phimoe RMSNorm for LayerNorm", hub_config("phi-3.5-moe"), _set(norm_kind="rms")),
    WrongRule("phimoe biases of norms left out", hub_config("phi-3.5-moe"), _set(norm_bias=False)),
    WrongRule("epsilon of norms", hub_config("llama-2-7b"), _set(norm_epsilon=1e-3)),
]
