from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.families.llama import LLAMA
from orchestrator.model.config import ModelConfig, MoeConfig
from orchestrator.model.quantization import LinearFormat, ModelQuantization, WeightFormat
from orchestrator.model.topology import Topology, legal_tp
from orchestrator.model.weight_map import weight_map
from orchestrator.planning.advice import gemm_warnings, kernel_warnings, padding_notes, repeated_reads
from tests.support.synthetic import model_config, synthetic_index

NO_LIMIT = 2**62


def wide(**changes: Any) -> ModelConfig:
    """Qwen2-72B's widths: 29568 / 8 = 3696 is no multiple of 32."""
    fields: dict[str, Any] = {
        "hidden_size": 8192, "num_attention_heads": 64, "num_key_value_heads": 8, "head_size": 128, "intermediate_size": 29568,
        "dtype": "bfloat16",
    }  # fmt: skip
    return model_config(**{**fields, **changes})


def test_gemm_warnings_aligned_widths_say_nothing() -> None:
    assert gemm_warnings(wide(), Topology(8, 1)) == ()  # 3696 elements are 7392 bytes


def test_gemm_warnings_unaligned_intermediate_size_names_bytes_and_the_aligned_tp() -> None:
    (said,) = gemm_warnings(wide(intermediate_size=29560), Topology(8, 1))
    assert said.startswith("intermediate_size of a rank: 3695 elements of bfloat16, 7390 bytes, not a multiple of 16 ")
    assert said.endswith("no legal tp makes it one")
    (said,) = gemm_warnings(wide(intermediate_size=29632), Topology(8, 1))
    assert "3704 elements of bfloat16, 7408 bytes, not a multiple of 32 " in said
    assert said.endswith("a multiple of 32 with tp in {1, 2, 4}")


def test_gemm_warnings_a_wider_dtype_needs_fewer_elements() -> None:
    assert gemm_warnings(wide(intermediate_size=29632, dtype="float32"), Topology(8, 1)) == ()


def test_gemm_warnings_count_the_bytes_of_packed_weights() -> None:
    """Qwen2-72B in 4 bits at tp=8: 3696 elements are 1848 bytes, on which weight-only kernels failed."""
    linear = LinearFormat(algorithm="W4A16_AWQ", weight=WeightFormat.INT4_BLOCK, block_size=16)
    quantization = ModelQuantization(algorithm="W4A16_AWQ", linear=linear)
    (said,) = gemm_warnings(wide(), Topology(8, 1), quantization)
    assert "3696 elements of W4A16_AWQ, 1848 bytes, not a multiple of 16 " in said
    assert said.endswith("a multiple of 32 with tp in {1, 2}")


def test_gemm_warnings_hidden_size_and_heads_are_named_apart() -> None:
    said = gemm_warnings(model_config(hidden_size=12, head_size=3, num_attention_heads=4, num_key_value_heads=2), Topology(2, 1))
    assert [line.split(":")[0] for line in said] == [
        "hidden_size", "query heads of a rank", "key/value heads of a rank", "intermediate_size of a rank",
    ]  # fmt: skip


def test_gemm_warnings_of_experts_count_expert_parallelism() -> None:
    config = wide(moe=MoeConfig(num_experts=8, top_k=2), moe_intermediate_size=72)
    (said,) = gemm_warnings(config, Topology(8, 1, moe_ep=2))
    assert said.startswith("intermediate size of an expert on a rank: 18 elements")
    assert gemm_warnings(config.model_copy(update={"moe_intermediate_size": 64}), Topology(8, 1, moe_ep=2)) == ()


@given(inter=st.integers(1, 4096), tp=st.sampled_from([1, 2, 4, 8]))
def test_gemm_warnings_follow_the_advice_and_the_warning_is_gone(inter: int, tp: int) -> None:
    config = wide(intermediate_size=8 * inter)
    for said in gemm_warnings(config, Topology(tp, 1)):
        for legal in legal_tp(config.limits()):
            advised = f"{{{legal}," in said or f" {legal}," in said or f" {legal}}}" in said or f"{{{legal}}}" in said
            assert advised == (gemm_warnings(config, Topology(legal, 1)) == ())


@pytest.mark.parametrize(
    ("vocab", "tp", "changes", "words"),
    [
        (37, 2, {}, "37 is padded to 38 for tp=2: 1 row of zeros at the end of lm_head"),
        (37, 4, {"use_parallel_embedding": True}, "padded to 40 for tp=4: 3 rows of zeros at the end of lm_head and embedding"),
        (37, 4, {"use_parallel_embedding": True, "embedding_sharding_dim": 1}, "3 rows of zeros at the end of lm_head"),
    ],
)
def test_padding_notes_say_how_many_rows(vocab: int, tp: int, changes: dict[str, Any], words: str) -> None:
    (said,) = padding_notes(model_config(vocab_size=vocab, **changes), Topology(tp, 1))
    assert said.endswith(words)


def test_padding_notes_vocabulary_that_divides_is_not_mentioned() -> None:
    assert padding_notes(model_config(vocab_size=40), Topology(4, 1)) == ()


@pytest.mark.parametrize(
    ("tied", "pp", "max_shard_bytes", "times"),
    [(True, 1, NO_LIMIT, 0), (False, 2, NO_LIMIT, 0), (True, 2, NO_LIMIT, 2), (True, 1, 1, 2)],
)
def test_repeated_reads_tied_embedding_of_two_tasks_is_named(tied: bool, pp: int, max_shard_bytes: int, times: int) -> None:
    config = model_config(tie_word_embeddings=tied)
    said = repeated_reads(weight_map(synthetic_index(config), LLAMA, config, Topology(1, pp), max_shard_bytes))
    assert [line.split(":")[0] for line in said] == (
        ["model.embed_tokens.weight (1,184 bytes) is read 2 times, by separate conversion tasks"] if times else []
    )


def test_kernel_warnings_name_the_heads_that_tensorrt_rtx_has_no_fused_kernel_for() -> None:
    latent = wide().model_copy(update={"kv_lora_rank": 512, "rotary_embedding_dim": 64, "num_key_value_heads": 1})
    (warning,) = kernel_warnings(latent, "tensorrt_rtx")
    assert warning.startswith("latent attention (MLA) has heads of 576 elements")
    assert kernel_warnings(latent, "tensorrt") == kernel_warnings(wide(), "tensorrt_rtx") == ()
