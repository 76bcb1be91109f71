from __future__ import annotations

import math
from typing import Any

import pytest

from orchestrator.base.dtypes import num_bytes
from orchestrator.base.errors import QuantizationError
from orchestrator.families.llama import LLAMA
from orchestrator.model.config import ModelConfig
from orchestrator.model.quantization import LinearFormat, ModelQuantization, linear_of
from orchestrator.model.targets import ArtifactScale, PackedScale, Target
from orchestrator.model.topology import Topology
from orchestrator.model.weight_map import weight_map
from orchestrator.quantizers import QUANTIZERS
from orchestrator.quantizers.resolve import model_quantization
from orchestrator.spec.build import QuantizationSpec
from tests.support.synthetic import model_config, synthetic_index

UNLIMITED = 10**18
CONFIG = model_config(hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2, head_size=64)
SHAPES: dict[str, list[tuple[str, str, tuple[int, ...]]]] = {
    # mlp.proj of two ranks: [256, 256] each
    "W8A16": [("weight", "I8", (256, 256)), ("weights_scaling_factor", "F32", (256,))],
    "W4A16": [("weight", "I8", (128, 256)), ("weights_scaling_factor", "F32", (256, 2))],
    "FP8_PER_CHANNEL_PER_TOKEN": [("weight", "F8_E4M3", (256, 256)), ("per_channel_scale", "F32", (256,))],
    "MXFP8": [("weight", "F8_E4M3", (256, 256)), ("weights_scaling_factor", "U8", (256, 8))],
    "FP8": [
        ("weight", "F8_E4M3", (256, 256)),
        ("weights_scaling_factor", "F32", (1,)),
        ("activation_scaling_factor", "F32", (1,)),
    ],
    "W8A8_SQ_PER_CHANNEL": [
        ("weight", "I8", (256, 256)),
        ("weights_scaling_factor", "F32", (256,)),
        ("activation_scaling_factor", "F32", (1,)),
        ("prequant_scaling_factor", "BF16", (256,)),
    ],
    "W4A16_AWQ": [
        ("weight", "I8", (128, 256)),
        ("weights_scaling_factor", "F32", (256, 2)),
        ("prequant_scaling_factor", "BF16", (256,)),
    ],
    "W4A8_AWQ": [
        ("weight", "I8", (128, 256)),
        ("weights_scaling_factor", "F32", (256, 2)),
        ("weights_scaling_factor_2", "F32", (1,)),
        ("activation_scaling_factor", "F32", (1,)),
        ("prequant_scaling_factor", "BF16", (256,)),
    ],
    "NVFP4": [
        ("weight", "U8", (256, 128)),
        ("weights_scaling_factor", "F8_E4M3", (256, 16)),
        ("weights_scaling_factor_2", "F32", ()),
        ("activation_scaling_factor", "F32", ()),
    ],
    "W4A16_NVFP4": [
        ("weight", "U8", (256, 128)),
        ("weights_scaling_factor", "F8_E4M3", (256, 16)),
        ("weights_scaling_factor_2", "F32", ()),
    ],
}
"""As Model Optimizer 0.47 exports them for TensorRT-LLM."""


def quantization(algorithm: str | None, **options: Any) -> ModelQuantization:
    return model_quantization(QuantizationSpec(algorithm=algorithm, **options), CONFIG.num_hidden_layers)


def targets(formats: ModelQuantization, tp: int = 2, config: ModelConfig = CONFIG) -> dict[str, Target]:
    made = weight_map(synthetic_index(config), LLAMA, config, Topology(tp, 1), UNLIMITED, formats)
    return {target.name: target for group in made.groups for target in group.targets}


@pytest.mark.parametrize("algorithm", QUANTIZERS)
def test_weight_map_quantized_row_parallel_linear_has_the_tensors_of_its_format(algorithm: str) -> None:
    prefix = "transformer.layers.1.mlp.proj."
    found = targets(quantization(algorithm, exclude=()))
    mine = [(name.removeprefix(prefix), item.dtype, item.shape) for name, item in found.items() if name.startswith(prefix)]
    assert mine == SHAPES[algorithm]


@pytest.mark.parametrize("algorithm", QUANTIZERS)
def test_weight_map_quantized_embedding_norms_and_head_keep_their_precision(algorithm: str) -> None:
    found = targets(quantization(algorithm))
    kept = {name for name, item in found.items() if item.quantized is None and item.scale is None and not linear_of(name)}
    plain = targets(ModelQuantization(algorithm=None))
    assert kept == {name for name in plain if not linear_of(name)}
    assert all(found[name] == plain[name] for name in kept)


def test_weight_map_quantized_scale_stands_behind_its_weight() -> None:
    names = list(targets(quantization("W4A8_AWQ")))
    for number, name in enumerate(names):
        if name.endswith("weights_scaling_factor"):
            assert names[number - 1] == name.replace("weights_scaling_factor", "weight")


def test_weight_map_fp8_gate_and_fc_share_their_scales_and_qkv_its_three() -> None:
    found = targets(quantization("FP8"))
    gate, fc, qkv = (found[f"transformer.layers.2.{name}.weight"].quantized for name in ("mlp.gate", "mlp.fc", "attention.qkv"))
    assert gate is not None
    assert fc is not None
    assert qkv is not None
    both = {"model.layers.2.mlp.gate_proj", "model.layers.2.mlp.up_proj"}
    assert set(gate.amax_modules[0]) == set(fc.amax_modules[0]) == both
    assert set(qkv.amax_modules[1]) == {f"model.layers.2.self_attn.{name}_proj" for name in "qkv"}
    scale = found["transformer.layers.2.mlp.fc.activation_scaling_factor"].scale
    assert isinstance(scale, ArtifactScale)
    assert set(scale.entries[0][0]) == both


def test_weight_map_awq_gate_and_fc_have_vectors_of_their_own() -> None:
    scale = targets(quantization("W4A16_AWQ"))["transformer.layers.0.mlp.fc.prequant_scaling_factor"].scale
    assert isinstance(scale, ArtifactScale)
    assert scale.entries == ((("model.layers.0.mlp.gate_proj",),),) * 2


def test_weight_map_awq_row_parallel_vector_is_cut_and_column_parallel_is_not() -> None:
    found = targets(quantization("W4A16_AWQ"))
    row, column = (found[f"transformer.layers.0.mlp.{name}.prequant_scaling_factor"].scale for name in ("proj", "fc"))
    assert isinstance(row, ArtifactScale)
    assert isinstance(column, ArtifactScale)
    assert [(span.begin, span.end) for span in row.spans] == [(0, 256), (256, 512)]
    assert column.spans == ()


def test_weight_map_kv_cache_has_three_scales_per_layer_of_the_attention() -> None:
    found = targets(quantization(None, kv_cache="FP8"))
    scales = {name: item for name, item in found.items() if "cache_scaling" in name}
    assert len(scales) == 3 * CONFIG.num_hidden_layers
    both = scales["transformer.layers.2.attention.kv_cache_scaling_factor"].scale
    assert both == ArtifactScale(("k_amax", "v_amax"), ((("model.layers.2.self_attn",),),) * 2, 448.0)


def test_weight_map_excluded_linear_keeps_its_precision() -> None:
    found = targets(quantization("FP8", exclude=("*.attention.*", "transformer.layers.0.*")))
    quantized = {name for name, item in found.items() if item.quantized is not None}
    assert quantized == {f"transformer.layers.{layer}.mlp.{name}.weight" for layer in (1, 2) for name in ("fc", "gate", "proj")}


def test_weight_map_mixture_gives_every_listed_linear_its_own_format() -> None:
    formats = {name: QUANTIZERS[name].linear for name in ("FP8", "W4A16_AWQ")}
    layers: dict[str, LinearFormat | None] = {
        "transformer.layers.0.mlp.fc": formats["FP8"],
        "transformer.layers.2.attention.qkv": formats["W4A16_AWQ"],
    }
    found = targets(ModelQuantization(algorithm="MIXED_PRECISION", layers=layers))
    assert {name.removesuffix(".weight"): item.quantized.format for name, item in found.items() if item.quantized} == layers


def test_weight_map_local_layers_of_a_later_stage_are_excluded_by_global_number() -> None:
    formats = quantization("W8A16", exclude=("transformer.layers.2.*",))
    made = weight_map(synthetic_index(CONFIG), LLAMA, CONFIG, Topology(1, 3), UNLIMITED, formats)
    by_stage = [any(target.quantized for target in group.targets) for group in made.groups]
    assert by_stage == [True, True, False]


def test_weight_map_sizes_count_packed_bytes() -> None:
    for target in targets(quantization("NVFP4")).values():
        assert target.num_bytes == num_bytes(target.dtype, math.prod(target.shape))
    (packed,) = [item for name, item in targets(quantization("NVFP4")).items() if name.endswith("1.mlp.proj.weight")]
    assert packed.num_bytes == 256 * 256 // 2


def test_weight_map_block_that_does_not_divide_a_rank_is_refused_with_the_legal_blocks() -> None:
    config = model_config(hidden_size=192, intermediate_size=384, num_attention_heads=3, num_key_value_heads=3, head_size=64)
    with pytest.raises(QuantizationError, match="are not a multiple of the block size 128") as caught:
        targets(quantization("W4A16_AWQ"), tp=1, config=config)
    assert "16, 32, 64" in caught.value.advice
    assert targets(quantization("W4A16_AWQ", group_size=64), tp=1, config=config)


def test_weight_map_odd_rows_cannot_be_packed_in_pairs() -> None:
    config = model_config(hidden_size=128, intermediate_size=384, num_attention_heads=128, num_key_value_heads=128, head_size=1)
    with pytest.raises(QuantizationError, match="odd number"):
        targets(quantization("W4A16"), tp=128, config=config)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"algorithm": "FP8", "group_size": 64}, "no choice of group_size"),
        ({"algorithm": "FP8", "alpha": 0.3}, "no alpha"),
        ({"algorithm": "NVFP4", "meta_recipe": True}, "no meta_recipe"),
        ({"algorithm": "fp_8"}, "no quantizer is named"),
    ],
)
def test_model_quantization_option_of_another_algorithm_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(QuantizationError, match=said):
        quantization(**options)


def test_model_quantization_metas_recipe_leaves_attention_and_the_outer_layers() -> None:
    found = targets(quantization("FP8_PER_CHANNEL_PER_TOKEN", meta_recipe=True))
    quantized = [item.quantized for item in found.values() if item.quantized is not None]
    assert len(quantized) == 3
    assert {item.format.activation_limit for item in quantized} == {1200.0}


def test_weight_map_packed_scales_name_a_weight_of_the_same_group() -> None:
    found = targets(quantization("W8A16"))
    for target in found.values():
        if isinstance(target.scale, PackedScale):
            assert found[target.scale.weight].quantized is not None
