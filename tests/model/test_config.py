from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.base.errors import ArchitectureError
from orchestrator.families.llama import LLAMA
from orchestrator.families.mistral import MISTRAL
from orchestrator.model.config import ModelConfig, MoeConfig
from orchestrator.model.config_hugging_face import from_hugging_face
from orchestrator.model.config_trtllm import from_trtllm, to_trtllm
from orchestrator.model.topology import Topology
from tests.support.strategies import parallel_models
from tests.support.synthetic import hugging_face_config, model_config

HF = {key: value for key, value in hugging_face_config(model_config()).items() if key != "rope_parameters"}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

# What TensorRT-LLM's own converter writes for a small Llama at tp 2, pp 2.
NVIDIA: dict[str, Any] = {
    "mlp_bias": False,
    "attn_bias": False,
    "rotary_base": 500000.0,
    "rotary_scaling": None,
    "residual_mlp": False,
    "disable_weight_only_quant_plugin": False,
    "moe": {"num_experts": 0, "top_k": 0, "normalization_mode": None, "sparse_mixer_epsilon": 0.01, "tp_mode": 0},
    "remove_duplicated_kv_heads": False,
    "architecture": "LlamaForCausalLM",
    "dtype": "float16",
    "vocab_size": 131,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "hidden_act": "silu",
    "logits_dtype": "float32",
    "norm_epsilon": 1e-05,
    "runtime_defaults": None,
    "position_embedding_type": "rope_gpt_neox",
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "mapping": {"world_size": 4, "gpus_per_node": 8, "cp_size": 1, "tp_size": 2, "pp_size": 2, "moe_tp_size": 2, "moe_ep_size": 1},
    "quantization": {"quant_algo": None, "kv_cache_quant_algo": None, "group_size": 128, "exclude_modules": None},
    "use_parallel_embedding": False,
    "embedding_sharding_dim": 0,
    "head_size": 16,
    "qk_layernorm": False,
    "rotary_embedding_dim": 16,
    "tie_word_embeddings": False,
}  # fmt: skip


def read(**changes: Any) -> ModelConfig:
    merged = {key: value for key, value in {**HF, **changes}.items() if value != "absent"}
    return from_hugging_face(merged, "LlamaForCausalLM", "bfloat16", LLAMA.config)


@pytest.mark.parametrize(
    ("fields", "base", "scaling"),
    [
        ({}, 10000.0, None),
        ({"rope_theta": 500000.0}, 500000.0, None),
        ({"rope_theta": 500000, "rope_scaling": None}, 500000.0, None),
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}, 5e5, {"rope_type": "llama3", **LLAMA3}),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 10000.0, {"rope_type": "linear", "factor": 2.0}),
        ({"rope_theta": 7.0, "rope_scaling": {"rope_type": "default"}}, 7.0, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}, 500000.0, None),
        ({"rope_parameters": {"rope_theta": 1e6}}, 1e6, None),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}}, 5e5, {"rope_type": "llama3", **LLAMA3}),
        (
            {"rope_theta": 3.0, "rope_parameters": {"rope_type": "yarn", "factor": 4, "rope_theta": 2.0}},
            2.0,
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        ),
    ],
)  # fmt: skip
def test_from_hugging_face_rope_of_transformers_4_and_5_is_read(
    fields: dict[str, Any], base: float, scaling: dict[str, Any] | None
) -> None:
    config = read(**fields)
    assert config.rotary_base == base
    assert config.rotary_scaling == scaling


def test_from_hugging_face_both_versions_give_one_config() -> None:
    old = read(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **LLAMA3})
    assert old == read(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3})


def test_from_hugging_face_reading_leaves_the_file_untouched() -> None:
    parameters = {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}
    read(rope_parameters=parameters)
    assert parameters["rope_theta"] == 5e5


def test_from_hugging_face_complete_config_is_translated() -> None:
    assert from_hugging_face(hugging_face_config(model_config()), "LlamaForCausalLM", "bfloat16", LLAMA.config) == model_config()


@pytest.mark.parametrize("missing", ["absent", None])
def test_from_hugging_face_heads_that_may_be_left_out_follow_the_others(missing: Any) -> None:
    config = read(num_key_value_heads=missing, head_dim=missing)
    assert config.num_key_value_heads == config.num_attention_heads == 4
    assert config.head_size == config.hidden_size // config.num_attention_heads == 4


def test_from_hugging_face_omitted_fields_have_the_defaults_of_the_config_class() -> None:
    config = read(hidden_act="absent", attention_bias="absent", rms_norm_eps="absent", max_position_embeddings="absent")
    assert config.hidden_act == "silu"
    assert config.norm_epsilon == 1e-6
    assert config.max_position_embeddings == 2048
    assert config.attn_bias is False


@pytest.mark.parametrize("key", ["hidden_act", "attention_bias", "rms_norm_eps", "tie_word_embeddings", "rope_theta", "vocab_size"])
def test_from_hugging_face_null_is_no_omitted_key(key: str) -> None:
    with pytest.raises(ArchitectureError, match=f"{key} in config.json of LlamaForCausalLM is (null|None)"):
        read(**{key: None, "rope_parameters": "absent"})


def test_from_hugging_face_head_size_may_differ_from_the_quotient() -> None:
    assert read(head_dim=32).head_size == 32


@pytest.mark.parametrize(("value", "expected"), [(9, 9), (None, None), ("absent", 4096)])
def test_from_hugging_face_sliding_window_of_a_mistral_is_kept(value: Any, expected: int | None) -> None:
    merged = {key: given for key, given in {**HF, "model_type": "mistral", "sliding_window": value}.items() if given != "absent"}
    config = from_hugging_face(merged, "MistralForCausalLM", "bfloat16", MISTRAL.config)
    assert (config.sliding_window, config.window_layers) == (expected, None)


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size"])
def test_from_hugging_face_missing_key_is_named(key: str) -> None:
    with pytest.raises(ArchitectureError, match=f"LlamaForCausalLM has no '{key}'"):
        read(**{key: "absent"})


@pytest.mark.parametrize(("key", "value"), [("vocab_size", 0), ("hidden_size", "large"), ("num_attention_heads", 0)])
def test_from_hugging_face_impossible_value_is_an_error_of_the_user(key: str, value: Any) -> None:
    with pytest.raises(ArchitectureError, match=key):
        read(**{key: value})


@given(
    model=parallel_models(), window=st.none() | st.integers(1, 99), scaling=st.none() | st.just({"rope_type": "llama3", **LLAMA3})
)
def test_to_trtllm_config_and_topology_come_back(
    model: tuple[ModelConfig, Topology], window: int | None, scaling: dict[str, Any] | None
) -> None:
    config = model[0].model_copy(update={"sliding_window": window, "rotary_scaling": scaling})
    assert from_trtllm(to_trtllm(config, model[1])) == (config, model[1])


def test_to_trtllm_has_what_nvidia_writes() -> None:
    config = model_config(dtype="float16", rotary_base=500000.0, vocab_size=131)
    written = to_trtllm(config, Topology(2, 2))
    shared = set(NVIDIA) - {
        "residual_mlp",
        "disable_weight_only_quant_plugin",
        "moe",
        "remove_duplicated_kv_heads",
        "runtime_defaults",
    }
    assert shared <= set(written)
    assert written["mapping"] == NVIDIA["mapping"]
    for key in (
        "logits_dtype",
        "position_embedding_type",
        "use_parallel_embedding",
        "embedding_sharding_dim",
        "qk_layernorm",
        "dtype",
    ):
        assert written[key] == NVIDIA[key]
    assert NVIDIA["quantization"].items() <= written["quantization"].items()
    assert written["num_hidden_layers"] == config.num_hidden_layers
    assert written["vocab_size"] == 131
    assert "sliding_window" not in written


def test_to_trtllm_of_experts_says_swiglu_as_tensorrt_llm_does() -> None:
    config = model_config(moe=MoeConfig(num_experts=4, top_k=2))
    written = to_trtllm(config, Topology(1, 1))
    assert written["hidden_act"] == "swiglu"
    assert from_trtllm(written)[0] == config


def test_to_trtllm_explicit_partition_is_kept() -> None:
    topology = Topology(1, 2, (1, 2))
    written = to_trtllm(model_config(), topology)
    assert written["mapping"]["pp_partition"] == [1, 2]
    assert from_trtllm(written)[1] == topology


@pytest.mark.parametrize("change", [{"num_attention_heads": "4"}, {"hidden_size": [1]}, {"mapping": 3}, {"moe": "many"}])
def test_from_trtllm_value_of_another_type_is_a_value_error(change: dict[str, Any]) -> None:
    plain = to_trtllm(model_config(), Topology(1, 1))
    with pytest.raises(ValueError):  # noqa: PT011  # pydantic's words, or ours
        from_trtllm({**plain, "head_size": None, **change})


def test_from_trtllm_keys_of_nvidia_that_we_do_not_know_are_passed_over() -> None:
    config, topology = from_trtllm(NVIDIA)
    assert topology == Topology(2, 2, None)
    assert (config.num_hidden_layers, config.head_size, config.rotary_base, config.norm_epsilon) == (4, 16, 500000.0, 1e-5)


@pytest.mark.parametrize("nulls", [False, True])
def test_from_trtllm_short_mapping_and_left_out_fields_are_completed(nulls: bool) -> None:
    left_out = {"num_key_value_heads", "head_size", "rotary_base"}
    short = {key: value for key, value in NVIDIA.items() if key not in left_out}
    short |= dict.fromkeys(left_out) if nulls else {}
    config, topology = from_trtllm({**short, "mapping": {"world_size": 2, "tp_size": 2, "pp_size": 1}})
    assert (config.num_key_value_heads, config.head_size, config.rotary_base) == (4, 16, 10000.0)
    assert topology == Topology(2, 1)


@pytest.mark.parametrize(("vocab", "tp", "padded"), [(32000, 2, 32000), (32001, 2, 32002), (5, 4, 8), (131, 3, 132)])
def test_padded_vocab_size_is_the_next_multiple_of_tp(vocab: int, tp: int, padded: int) -> None:
    assert model_config(vocab_size=vocab).padded_vocab_size(tp) == padded


@pytest.mark.parametrize(("kv_heads", "tp", "expected"), [(8, 2, 4), (8, 8, 1), (2, 8, 1), (1, 1, 1)])
def test_kv_heads_per_rank_is_never_less_than_one(kv_heads: int, tp: int, expected: int) -> None:
    assert model_config(num_attention_heads=8, num_key_value_heads=kv_heads).kv_heads_per_rank(tp) == expected
