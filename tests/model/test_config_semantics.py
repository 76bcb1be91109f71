"""config.json means to us what it means to transformers: windows, rotary embedding, heads, scales, caps, experts, ties.

Both readings are compared on random config.json files of every family, in which keys are omitted, null, of another family, or
beside keys that say the contrary. transformers' is measured on a model that it built and ran (models/resolution.py).
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.base.errors import ArchitectureError
from orchestrator.families import FAMILIES, family_for
from orchestrator.model.config import ModelConfig
from orchestrator.model.config_hugging_face import from_hugging_face
from orchestrator.model.config_keys import DOES_NOT_MATTER, MUST_BE, REQUIRED, ROTARY_KEYS, config_warnings
from orchestrator.model.config_table import PassedOver
from tests.support.families import TINY
from tests.support.resolution import REFUSALS, Resolution, differences, ours, resolved

LAYERS = 4
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "vocab_size": 19,
    "pad_token_id": 0,
}  # fmt: skip
DENSE: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 8}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4, "q_lora_rank": 20, "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 8, "v_head_dim": 10,
}  # fmt: skip
MOE: dict[str, Any] = {
    "num_experts_per_tok": 2, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 20, "moe_k": 2,
    "moe_topk": 2, "top_k_experts": 2, "enable_moe_block": True, "hidden_size_per_layer_input": 0, "global_head_dim": 16,
    "num_global_key_value_heads": 2,
    "intermediate_size_mlp": 20, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
NOT_BUILT = re.compile(
    r"keys that this family does not know|which this family does not have|not supported|partial_rotary_factor|"
    r"has two values|beside the kinds of layers|scales the layers with a window|less than 1|frequencies would not decrease|"
    r"layer_types in config.json of \w+ is |one per rotated pair|"
    r"num_local_experts is (?:\d|None)|gives layers a window, but sliding_window is missing|"
    r"has the unknown key '(?:alpha|short_mscale)'|rope_theta in config.json of Gemma3ForCausalLM is None|"
    r"transformers would rotate other than|rope_local_base_freq in config.json of Gemma3ForCausalLM is null|"
    r"of \d groups, from which"
)
"""Refusals of what transformers would take: it has no graph here, or is no model that anybody means."""

OMITTED = object()
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALINGS = [
    {"rope_type": "default"},
    {"rope_type": "default", "factor": 8.0},
    {"rope_type": "linear", "factor": 2.0},
    {"type": "linear", "factor": 4, "finetuned": True},
    {"type": "linear"},
    {"type": "linear", "rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 77.0},
    LLAMA3,
    {**LLAMA3, "original_max_position_embeddings": 16},
    {key: value for key, value in LLAMA3.items() if key != "low_freq_factor"},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {"type": "yarn", "factor": 4.0, "beta_fast": None, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False},
    {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]},
    {"type": "su", "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]},
    {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0]},
    {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0], "short_mscale": 1.2, "long_mscale": 1.4},
    {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0], "short_mscale": 1.2},
    {"type": "longrope", "short_factor": [1.0] * 2, "long_factor": [2.0, 3.0], "original_max_position_embeddings": 8},
    {"type": "dynamic", "factor": 1.0, "alpha": 1000.0, "beta_fast": 32},
    {"type": "novel", "factor": 2.0},
    {"rope_type": None},
    {"rope_theta": 300.0},
    {"rope_theta": None},
    {},
]
KINDS = st.lists(st.sampled_from(["sliding_attention", "full_attention"]), min_size=LAYERS, max_size=LAYERS)
CHUNKS = ["chunked_attention"] * 2 + ["full_attention"] * 2
BOOLEANS = st.booleans() | st.none()
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "hidden_size": st.sampled_from([32, 34]),
    "num_key_value_heads": st.sampled_from([1, 2, 4, None]),
    "head_dim": st.sampled_from([8, 16, None]),
    "hidden_act": st.sampled_from(["silu", "gelu", "gelu_pytorch_tanh", "gelu_new", None]),
    "hidden_activation": st.sampled_from(["silu", "gelu", "gelu_pytorch_tanh", None]),
    "rms_norm_eps": st.sampled_from([1e-5, 1e-3]),
    "max_position_embeddings": st.sampled_from([32, 64]),
    "tie_word_embeddings": BOOLEANS,
    "attention_bias": BOOLEANS,
    "qkv_bias": BOOLEANS,
    "mlp_bias": BOOLEANS,
    "lm_head_bias": BOOLEANS,
    "sliding_window": st.sampled_from([3, 5, None]),
    "use_sliding_window": st.sampled_from([True, True, False, None]),
    "max_window_layers": st.sampled_from([0, 1, 2, 3, 9, None]),
    "layer_types": KINDS | st.none() | st.sampled_from([["full_attention"], ["novel"] * LAYERS, CHUNKS]),
    "sliding_window_pattern": st.sampled_from([1, 2, 3, None]),
    "_sliding_window_pattern": st.sampled_from([2, 3]),
    "attn_logit_softcapping": st.sampled_from([5.0, 0.25, None]),
    "final_logit_softcapping": st.sampled_from([5.0, 0.25, None]),
    "query_pre_attn_scalar": st.sampled_from([4, 24, None]),
    "rope_theta": st.sampled_from([500.0, 1e6, 10000, None]),
    "rope_local_base_freq": st.sampled_from([500.0, None]),
    "rope_scaling": st.sampled_from([*SCALINGS, None]),
    "rope_parameters": st.sampled_from([*SCALINGS, None]),
    "partial_rotary_factor": st.sampled_from([0.5, 1.0, None]),
    "original_max_position_embeddings": st.sampled_from([8, 16]),
    "num_experts": st.sampled_from([4, 6, None]),
    "num_local_experts": st.sampled_from([4, 6, None]),
    "num_experts_per_tok": st.sampled_from([1, 2, None]),
    "moe_intermediate_size": st.sampled_from([12, None]),
    "shared_expert_intermediate_size": st.sampled_from([20, None]),
    "n_routed_experts": st.sampled_from([4, 6, 8]),
    "n_shared_experts": st.sampled_from([1, 2]),
    "moe_num_experts": st.sampled_from([4, 6, None]),
    "moe_k": st.sampled_from([1, 2, None]),
    "num_shared_experts": st.sampled_from([1, 2]),
    "router_scaling_factor": st.sampled_from([2.5, 1.0]),
    "mlp_layer_types": st.sampled_from([["dense", "sparse", "sparse", "dense"], ["sparse"] * LAYERS, ["dense"], None]),
    "moe_num_shared_experts": st.sampled_from([0, 1, 2, None]),
    "moe_layer_start_index": st.sampled_from([0, 1, 3]),
    "moe_layer_end_index": st.sampled_from([-1, 1, 2, 9]),
    "moe_layer_interval": st.sampled_from([1, 2]),
    "use_bias": BOOLEANS,
    "attention_out_bias": BOOLEANS,
    "no_rope_layers": st.sampled_from([[1, 0, 1, 1], [0] * LAYERS, [1] * LAYERS, [], None]),
    "no_rope_layer_interval": st.sampled_from([1, 2, 4]),
    "shared_intermediate_size": st.sampled_from([0, 20]),
    "top_k_experts": st.sampled_from([1, 2, None]),
    "enable_moe_block": BOOLEANS,
    "hidden_size_per_layer_input": st.sampled_from([0, 4]),
    "num_kv_shared_layers": st.sampled_from([0, 1]),
    "global_head_dim": st.sampled_from([0, 8, 16]),
    "num_global_key_value_heads": st.sampled_from([1, 2, 4, None]),
    "attention_k_eq_v": BOOLEANS,
    "expert_selection_fn": st.sampled_from(["softmax", "sigmoid", "novel"]),
    "shared_expert_combination_strategy": st.sampled_from(["average", "sum"]),
    "prefix_dense_intermediate_size": st.sampled_from([20, None]),
    "prefix_dense_sliding_window_pattern": st.sampled_from([1, 2]),
    "layer_norm_eps": st.sampled_from([1e-5, 1e-3]),
    "num_dense_layers": st.sampled_from([0, 1, 2, 9]),
    "route_scale": st.sampled_from([2.5, 1.0]),
    "global_attn_every_n_layers": st.sampled_from([1, 2, 4]),
    "mup_enabled": BOOLEANS,
    "moe_topk": st.sampled_from([1, 2, [2] * LAYERS, [2, 1, 2, 2]]),
    "moe_layers": st.sampled_from([[], [1], [0, 3], None]),
    "interleave_moe_layer_step": st.sampled_from([1, 2, 4]),
    "attention_chunk_size": st.sampled_from([3, 5, None]),
    "attn_temperature_tuning": BOOLEANS,
    "floor_scale": st.sampled_from([4, 8192]),
    "attn_scale": st.sampled_from([0.5, 0.1]),
    "n_group": st.sampled_from([1, 2]),
    "topk_group": st.sampled_from([1, 2]),
    "routed_scaling_factor": st.sampled_from([2.5, 1.0]),
    "first_k_dense_replace": st.sampled_from([0, 1, 2, 9]),
    "use_qk_norm": st.sampled_from([True, False]),
    "norm_topk_prob": BOOLEANS,
    "router_jitter_noise": st.sampled_from([0.01, 0.3]),
    "decoder_sparse_step": st.sampled_from([1, 2]),
    "mlp_only_layers": st.sampled_from([[], None, [1]]),
    "q_lora_rank": st.sampled_from([16, None]),
    "kv_lora_rank": st.sampled_from([8, None]),
    "qk_nope_head_dim": st.sampled_from([4, 8]),
    "qk_rope_head_dim": st.sampled_from([4, 8, 10]),
    "v_head_dim": st.sampled_from([6, 8]),
    "rope_interleave": BOOLEANS,
    "embedding_multiplier": st.sampled_from([3.0, 1, None]),
    "attention_multiplier": st.sampled_from([0.5, None]),
    "residual_multiplier": st.sampled_from([0.5, None]),
    "logits_scaling": st.sampled_from([4.0, None]),
    "use_bidirectional_attention": BOOLEANS,
    "is_causal": st.sampled_from([True, False]),
    "num_nonsense": st.just(3),
}
CANNOT_RUN = re.compile("NoneType|Could not find a `sliding_window` argument|The size of tensor|validate_rope|^'full_attention'$")
"""Failures of transformers with what its config classes take: nulls that it computes with, sizes of heads that do not fit."""
NESTED = st.none() | st.fixed_dictionaries(
    {},
    optional={
        "full_attention": st.sampled_from([*SCALINGS[:8], None]),
        "sliding_attention": st.sampled_from([*SCALINGS[:3], {"rope_theta": 99.0}, None]),
    },
)


def base(family: str) -> dict[str, Any]:
    """The smallest config.json of a family whose sizes are not its defaults'."""
    made = {"architectures": [TINY[family].model], "model_type": FAMILIES[family].config.model_types[0], **SIZES}
    table = FAMILIES[family].config
    made |= LATENT if table.latent else DENSE
    made |= {key: value for key, value in MOE.items() if key in table.defaults}
    return made | ({table.experts.count: 4} if table.experts else {})


@st.composite
def config_files(draw: st.DrawFn, family: str) -> dict[str, Any]:
    """A config.json: keys of the family mostly, one or two of others, each given, null or omitted."""
    table = FAMILIES[family].config
    own = [key for key in VALUES if key in table.defaults or key in table.passed_over or key in (*ROTARY_KEYS, *REQUIRED)]
    if table.experts is not None:
        own.remove("hidden_size")  # torch multiplies experts in widths of 16 bytes only
    chosen = draw(st.lists(st.sampled_from(own), max_size=7, unique=True))
    chosen += draw(st.sampled_from([[], [], [], ["use_bidirectional_attention"], list(VALUES)[-2:], ["num_local_experts"]]))
    config = base(family)
    for key in chosen:
        nested = key == "rope_parameters" and table.rotary.local_theta is not None
        config[key] = draw(NESTED if nested else VALUES[key])
    for key in draw(
        st.lists(st.sampled_from(sorted(set(config) - {*REQUIRED, "model_type", "architectures", "pad_token_id"})), max_size=1)
    ):
        del config[key]
    return config


def read(config: dict[str, Any]) -> ModelConfig:
    family = family_for(config["architectures"][0])
    return from_hugging_face(config, config["architectures"][0], "float32", family.config)


def check(config: dict[str, Any]) -> bool:
    """Both refuse, or both read the same; or we refuse what is not built. Returns whether it was read."""
    found = attempt(read, config)
    if isinstance(found, ArchitectureError):
        if not NOT_BUILT.search(found.message):
            assert isinstance(attempt(resolved, copy.deepcopy(config)), Exception), (found.message, config)
        return False
    wanted = attempt(resolved, copy.deepcopy(config))
    assert isinstance(found, ModelConfig)
    if isinstance(wanted, Exception) and CANNOT_RUN.search(str(wanted)):
        return False
    assert isinstance(wanted, Resolution), (repr(wanted), config)
    assert not differences(ours(found), wanted), (differences(ours(found), wanted), config)
    return True


def attempt(function: Callable[[dict[str, Any]], Any], config: dict[str, Any]) -> Any:
    """What it returns, or what it refuses with."""
    try:
        return function(config)
    except (ArchitectureError, *REFUSALS) as error:
        return error


@pytest.mark.parametrize("family", TINY)
def test_reading_config_json_of_any_keys_equals_transformers(family: str) -> None:
    num_read = 0

    @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(config=config_files(family))
    def compare(config: dict[str, Any]) -> None:
        nonlocal num_read
        num_read += check(config)

    compare()
    assert num_read >= 10, "most of the files are refused, so little is compared"


@pytest.mark.parametrize("family", TINY)
def test_defaults_of_a_family_are_those_of_its_config_class(family: str) -> None:
    """Every field of the class has a meaning here, with the same default, or a reason why it has none."""
    table = FAMILIES[family].config
    fields = {item.name: item for item in dataclasses.fields(getattr(transformers, TINY[family].config)) if item.init}
    irrelevant = {key for keys in DOES_NOT_MATTER.values() for key in keys}
    unknown = fields.keys() - {*table.defaults, *table.passed_over, *MUST_BE, *irrelevant, *REQUIRED, *ROTARY_KEYS}
    assert not unknown, f"new in transformers: say in families/ or config_keys.py what {sorted(unknown)} mean"
    shared = fields.keys() & table.defaults.keys()
    assert {key: table.defaults[key] for key in shared} == {key: fields[key].default for key in shared}
    assert {key for key in shared if "None" in str(fields[key].type)} >= table.nullable - {"head_dim"}


@pytest.mark.parametrize("family", TINY)
def test_config_json_as_transformers_saves_it_is_read(family: str) -> None:
    heads = 4 if FAMILIES[family].config.latent else 2
    made = getattr(transformers, TINY[family].config)(**{**SIZES, "num_key_value_heads": heads}, architectures=[TINY[family].model])
    check(json.loads(made.to_json_string()))


def test_keys_have_one_reason_each() -> None:
    listed = [key for keys in DOES_NOT_MATTER.values() for key in keys] + [*MUST_BE]
    assert len(listed) == len(set(listed))
    known = {key for family in FAMILIES.values() for key in (*family.config.defaults, *family.config.passed_over)}
    assert not known & {key for keys in DOES_NOT_MATTER.values() for key in keys}
    generation = set(transformers.GenerationConfig._get_default_generation_params())
    assert generation <= set(listed)


def with_keys(family: str, **changes: Any) -> dict[str, Any]:
    return {key: value for key, value in {**base(family), **changes}.items() if value is not OMITTED}


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("llama", {"num_local_experts": 8}, "'num_local_experts'"),
        ("llama", {"attention_chunk_size": 8192}, "'attention_chunk_size'"),
        ("llama", {"is_causal": False}, "is_causal"),
        ("llama", {"rope_scaling": {"type": "novel", "factor": 2.0}}, "'novel' is not supported"),
        ("llama", {"rope_scaling": {key: LLAMA3[key] for key in ("rope_type", "factor")}}, "lacks 'low_freq_factor'"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "lacks 'factor'"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": "8"}}, "factor of rope_scaling"),
        ("llama", {"rope_scaling": "linear"}, "not a dictionary"),
        ("gemma3", {"rope_scaling": {"type": "linear", "factor": 8.0}}, "`type` is not supported"),
        ("llama", {"hidden_act": "relu2"}, "hidden_act"),
        ("llama", {"model_type": "mistral"}, "model_type"),
        ("llama", {"num_attention_heads": True}, "num_attention_heads"),
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads"),
        ("mistral", {"attention_bias": True}, "attention_bias"),
        ("qwen2", {"mlp_bias": True}, "mlp_bias"),
        ("phi3", {"lm_head_bias": True}, "lm_head_bias"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma2", {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping"),
        ("olmo2", {"layer_types": ["chunked_attention"] * LAYERS}, "layer_types"),
        ("qwen3", {"layer_types": ["sliding_attention"] * LAYERS}, "layer_types"),
        ("qwen2_moe", {"mlp_only_layers": [True]}, "mlp_only_layers"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ("glm4_moe", {"n_group": 3}, "n_group"),
        ("glm4_moe", {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 3}, "topk_group"),
        ("glm4_moe", {"first_k_dense_replace": -1}, "first_k_dense_replace"),
        ("gemma4", {"hidden_size_per_layer_input": OMITTED}, "hidden_size_per_layer_input"),
        ("gemma4", {"num_kv_shared_layers": 2}, "num_kv_shared_layers"),
        ("gemma4", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "short_factor"),
    ],
)  # fmt: skip
def test_config_json_that_is_not_built_is_refused_by_the_name_of_its_key(family: str, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ArchitectureError, match=re.escape(named)):
        read(with_keys(family, **changes))


def test_unknown_key_that_is_null_or_named_in_the_spec_is_no_obstacle() -> None:
    assert read(with_keys("llama", novel_feature=None)) == read(base("llama"))
    table = FAMILIES["llama"].config
    config = with_keys("llama", novel_feature=3)
    ignored = from_hugging_face(config, "LlamaForCausalLM", "float32", table, frozenset({"novel_feature"}))
    assert ignored == read(base("llama"))


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("llama", {"sliding_window": 4096}, "sliding_window 4096 .* is ignored, as in transformers"),
        ("granite", {"sliding_window": 4096}, "sliding_window 4096"),
        ("olmo2", {"sliding_window": 4096}, "sliding_window 4096"),
        ("gemma", {"sliding_window": 4096}, "sliding_window 4096"),
        ("mistral", {"use_sliding_window": False, "sliding_window": 3}, "use_sliding_window False .* sliding_window alone decides"),
        ("mixtral", {"norm_topk_prob": False}, "norm_topk_prob False .* always sum to one"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0"),
        ("gemma", {"hidden_act": "gelu"}, "hidden_act 'gelu' .* built is the exact GELU"),
        ("gemma", {"hidden_activation": "silu"}, "hidden_activation 'silu'"),
        ("qwen3_moe", {"layer_types": ["sliding_attention"] * LAYERS}, "layer_types"),
    ],
)
def test_config_json_that_asks_for_what_transformers_passes_over_is_warned_of(
    family: str, changes: dict[str, Any], said: str
) -> None:
    config = with_keys(family, **changes)
    check(config)
    (warning,) = config_warnings(config, config["architectures"][0], FAMILIES[family].config)
    assert re.search(said, warning)


@pytest.mark.parametrize(
    ("family", "wrong", "changes", "field"),
    [
        ("llama", {"windows": "all"}, {"sliding_window": 3}, "windows"),
        ("granite", {"windows": "all"}, {"sliding_window": 3}, "windows"),
        ("olmo2", {"windows": "all"}, {"sliding_window": 3}, "windows"),
        ("gemma", {"windows": "all"}, {"sliding_window": 3}, "windows"),
        ("mistral", {"windows": "none"}, {"sliding_window": 3, "use_sliding_window": False}, "windows"),
        ("qwen2", {"windows": "all"}, {"sliding_window": 3, "use_sliding_window": True, "max_window_layers": 2}, "windows"),
        ("qwen2", {"defaults": {"max_window_layers": 0}}, {"sliding_window": 3, "use_sliding_window": True}, "windows"),
        (
            "qwen3_moe",
            {"windows": "from_max_window_layers", "defaults": {"max_window_layers": 28}},
            {"sliding_window": 3, "use_sliding_window": True, "max_window_layers": 2},
            "windows",
        ),
        (
            "qwen2_moe",
            {"windows": "from_max_window_layers"},
            {"sliding_window": 3, "use_sliding_window": True, "max_window_layers": 3},
            "windows",
        ),
        ("gemma2", {"windows": "pattern"}, {"sliding_window": 3, "sliding_window_pattern": 3}, "windows"),
        ("vaultgemma", {"windows": "all"}, {"sliding_window": 3}, "windows"),
        ("vaultgemma", {"derived": {"attention_scale": ("is", "head_dim")}}, {"query_pre_attn_scalar": 24}, "attention_scale"),
        ("mixtral", {"experts": {"normalized": "norm_topk_prob"}}, {"norm_topk_prob": False}, "normalized"),
        ("qwen2_moe", {"experts": {"normalized": None}}, {}, "normalized"),
        ("qwen3_moe", {"defaults": {"num_experts_per_tok": 2}}, {"num_experts_per_tok": OMITTED, "num_experts": 9}, "moe"),
        ("gemma", {"activation": "hidden_activation"}, {"hidden_act": "gelu", "hidden_activation": "silu"}, "activation"),
        ("llama", {"rotary": {"partial": True}}, {"partial_rotary_factor": 0.5}, "rotary"),
        ("mixtral", {"rotary": {"theta": 10000.0}}, {}, "rotary"),
        ("gemma3", {"rotary": {"local_theta": 1_000_000.0}}, {}, "rotary"),
        (
            "gemma3",
            {"derived": {"attn_logit_softcapping": ("is", "attn_logit_softcapping")}},
            {"attn_logit_softcapping": 5.0},
            "attention_cap",
        ),
        ("qwen3", {"constants": {"qk_layernorm": "head", "attn_dense_bias": False}}, {"attention_bias": True}, "biases"),
        (
            "granite",
            {"derived": {"attention_scale": ("rsqrt", "attention_multiplier")}},
            {"attention_multiplier": 0.5},
            "attention_scale",
        ),
        ("qwen3_moe", {"experts": {"layers": "all"}}, {"decoder_sparse_step": 2}, "expert_layers"),
        ("qwen2_moe", {"experts": {"layers": "all"}}, {"mlp_only_layers": [1]}, "expert_layers"),
        ("glm4_moe", {"experts": {"layers": "all"}}, {}, "expert_layers"),
        ("glm4_moe", {"experts": {"routed_scale": None}}, {"routed_scaling_factor": 2.5}, "normalized"),
        ("glm4_moe", {"experts": {"groups": None}}, {"n_group": 2, "topk_group": 1}, "groups"),
        ("glm4_moe", {"experts": {"shared_count": None}}, {}, "moe"),
        ("glm4_moe", {"derived": {"qk_layernorm": ("per_head", "attention_bias")}}, {"use_qk_norm": True}, "qk_norm"),
        ("glm4_moe", {"rotary": {"fraction": 1.0}}, {}, "rotary"),
        ("qwen2", {"defaults": {"tie_word_embeddings": True}}, {}, "tied"),
        ("qwen3_moe", {"defaults": {"head_dim": 128}}, {"head_dim": OMITTED}, "head_size"),
    ],
)  # fmt: skip
def test_rule_of_a_family_that_is_wrong_is_found(family: str, wrong: dict[str, Any], changes: dict[str, Any], field: str) -> None:
    """The comparison looks at what these rules decide: each, planted, differs from transformers, and the right one does not."""
    config = {key: value for key, value in {**base(family), **changes}.items() if value is not OMITTED}
    wanted = attempt(resolved, config)
    architecture, table = config["architectures"][0], FAMILIES[family].config
    assert not differences(ours(from_hugging_face(config, architecture, "float32", table)), wanted)
    planted = dataclasses.replace(table, passed_over={**table.passed_over, "norm_topk_prob": PassedOver("")})
    for name, value in wrong.items():
        plain = getattr(table, name)
        if name in ("defaults", "derived"):
            value = {**plain, **value}
        elif name in ("experts", "rotary"):
            value = dataclasses.replace(plain, **value)
        planted = dataclasses.replace(planted, **{name: value})
    found = ours(from_hugging_face(config, architecture, "float32", planted))
    assert field in differences(found, wanted)
