from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.base.errors import WeightMapError
from orchestrator.families.llama import LLAMA
from orchestrator.model.checkpoint import CheckpointIndex
from orchestrator.model.config import ModelConfig
from orchestrator.model.topology import Topology
from orchestrator.model.weight_map import LayerGroup, WeightMap, weight_map
from tests.support.strategies import parallel_models
from tests.support.synthetic import model_config, synthetic_index

UNLIMITED = 10**18
ONE = Topology(1, 1)


def expand(config: ModelConfig, topology: Topology = ONE, max_shard_bytes: int = UNLIMITED, **extra: tuple[int, ...]) -> WeightMap:
    return weight_map(synthetic_index(config, **extra), LLAMA, config, topology, max_shard_bytes)


def local_shapes(config: ModelConfig, topology: Topology, pp_rank: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a rank as TensorRT-LLM has them, from the sizes alone."""
    tp, hidden, size = topology.tp, config.hidden_size, config.head_size
    heads = config.num_attention_heads // tp
    qkv, inter = (heads + 2 * max(config.num_key_value_heads // tp, 1)) * size, config.intermediate_size // tp
    shapes: dict[str, tuple[int, ...]] = {}
    if pp_rank == 0:
        shapes["transformer.vocab_embedding.weight"] = (config.vocab_size, hidden)
    for local in range(len(topology.stages(config.num_hidden_layers)[pp_rank])):
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (hidden,),
            "attention.qkv.weight": (qkv, hidden),
            "attention.dense.weight": (hidden, heads * size),
            "post_layernorm.weight": (hidden,),
            "mlp.fc.weight": (inter, hidden),
            "mlp.gate.weight": (inter, hidden),
            "mlp.proj.weight": (hidden, inter),
        }
        if config.attn_bias:
            layer |= {"attention.qkv.bias": (qkv,), "attention.dense.bias": (hidden,)}
        if config.mlp_bias:
            layer |= {"mlp.fc.bias": (inter,), "mlp.gate.bias": (inter,), "mlp.proj.bias": (hidden,)}
        shapes |= {f"transformer.layers.{local}.{name}": shape for name, shape in layer.items()}
    if pp_rank == topology.pp - 1:
        shapes["transformer.ln_f.weight"] = (hidden,)
        shapes["lm_head.weight"] = (-(-config.vocab_size // tp), hidden)
    return shapes


@given(model=parallel_models())
def test_weight_map_every_source_tensor_is_used_and_none_ignored(model: tuple[ModelConfig, Topology]) -> None:
    config, topology = model
    made = expand(config, topology)
    used = {name for group in made.groups for name in group.sources()}
    assert used == set(synthetic_index(config).tensors)
    assert made.ignored == ()


@given(model=parallel_models(), max_shard_bytes=st.sampled_from([1, 500, UNLIMITED]))
def test_weight_map_targets_of_a_stage_are_unique_with_local_shapes(
    model: tuple[ModelConfig, Topology], max_shard_bytes: int
) -> None:
    config, topology = model
    made = expand(config, topology, max_shard_bytes)
    for pp_rank in range(topology.pp):
        targets = [target for group in made.stage(pp_rank) for target in group.targets]
        assert len({target.name for target in targets}) == len(targets)
        assert {target.name: target.shape for target in targets} == local_shapes(config, topology, pp_rank)
        assert {target.dtype for target in targets} == {"BF16"}


@given(model=parallel_models())
def test_weight_map_reads_fill_their_targets_exactly(model: tuple[ModelConfig, Topology]) -> None:
    config, topology = model
    for group in expand(config, topology).groups:
        for target in group.targets:
            for tp_rank in range(topology.tp):
                assert sum(_elements(read, tp_rank) for read in target.reads) * 2 == target.num_bytes


def _elements(read: Any, tp_rank: int) -> int:
    if read.axis is None:
        return int(read.tensor.num_elements)
    return int(read.tensor.num_elements // read.tensor.shape[read.axis] * read.spans[tp_rank].length)


@given(model=parallel_models(), max_shard_bytes=st.integers(1, 4000))
def test_weight_map_shards_are_filled_in_order_up_to_the_limit(model: tuple[ModelConfig, Topology], max_shard_bytes: int) -> None:
    config, topology = model
    made, whole, blocks = expand(config, topology, max_shard_bytes), expand(config, topology), expand(config, topology, 1)
    for pp_rank in range(topology.pp):
        groups = made.stage(pp_rank)
        (everything,) = whole.stage(pp_rank)
        assert tuple(target for group in groups for target in group.targets) == everything.targets
        assert [layer for group in groups for layer in group.layers] == list(everything.layers)
        assert [(group.index, group.num_groups) for group in groups] == [(number, len(groups)) for number in range(len(groups))]
        assert [group.shard_bytes for group in groups] == _filled(
            [block.shard_bytes for block in blocks.stage(pp_rank)], max_shard_bytes
        )


def test_weight_map_stage_that_just_fits_is_one_shard() -> None:
    config = model_config()
    (whole,) = expand(config).groups
    assert len(expand(config, ONE, whole.shard_bytes).groups) == 1
    assert len(expand(config, ONE, whole.shard_bytes - 1).groups) == 2


def _filled(sizes: list[int], limit: int) -> list[int]:
    """Sizes of shards when each takes blocks while they fit, and at least one."""
    shards = [sizes[0]]
    for size in sizes[1:]:
        if shards[-1] + size <= limit:
            shards[-1] += size
        else:
            shards.append(size)
    return shards


def test_weight_map_stages_hold_their_own_layers_numbered_from_zero() -> None:
    config = model_config(num_hidden_layers=5)
    made = expand(config, Topology(1, 2))
    assert [group.layers for group in made.groups] == [range(3), range(3, 5)]
    (second,) = made.stage(1)
    norm = next(target for target in second.targets if target.name == "transformer.layers.0.input_layernorm.weight")
    assert [read.tensor.name for read in norm.reads] == ["model.layers.3.input_layernorm.weight"]


def test_weight_map_fused_qkv_joins_query_key_value_in_this_order() -> None:
    (group,) = expand(model_config(num_hidden_layers=1)).groups
    qkv = next(target for target in group.targets if target.name.endswith("qkv.weight"))
    assert [read.tensor.name.split(".")[-2] for read in qkv.reads] == ["q_proj", "k_proj", "v_proj"]


@pytest.mark.parametrize(("target", "source"), [("fc", "gate_proj"), ("gate", "up_proj"), ("proj", "down_proj")])
def test_weight_map_mlp_names_follow_tensorrt_llm(target: str, source: str) -> None:
    (group,) = expand(model_config(num_hidden_layers=1)).groups
    found = next(item for item in group.targets if item.name == f"transformer.layers.0.mlp.{target}.weight")
    assert [read.tensor.name for read in found.reads] == [f"model.layers.0.mlp.{source}.weight"]


def test_weight_map_tied_head_is_a_cut_copy_of_the_embedding() -> None:
    made = expand(model_config(tie_word_embeddings=True), Topology(2, 2))
    head = made.stage(1)[-1].targets[-1]
    assert head.name == "lm_head.weight"
    assert [read.tensor.name for read in head.reads] == ["model.embed_tokens.weight"]
    assert head.reads[0].axis == 0


def test_weight_map_tensors_left_out_on_purpose_are_named_with_their_reason() -> None:
    config = model_config(tie_word_embeddings=True)
    extra = {"model__layers__0__self_attn__rotary_emb__inv_freq": (2,), "lm_head__weight": (37, 16)}
    made = expand(config, **extra)
    assert dict(made.ignored) == {
        "model.layers.0.self_attn.rotary_emb.inv_freq": "the rotary table is computed",
        "lm_head.weight": "tied to the embedding",
    }


def _without(index: CheckpointIndex, *names: str) -> CheckpointIndex:
    return replace(index, tensors={name: tensor for name, tensor in index.tensors.items() if name not in names})


def _error(index: CheckpointIndex, config: ModelConfig) -> str:
    with pytest.raises(WeightMapError) as caught:
        weight_map(index, LLAMA, config, ONE, UNLIMITED)
    assert caught.value.exit_code == 16
    assert caught.value.advice
    return caught.value.message


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.layers.1.self_attn.k_proj.weight"])
def test_weight_map_missing_tensor_is_named(name: str) -> None:
    config = model_config()
    message = _error(_without(synthetic_index(config), name), config)
    assert f"lacks 1 tensors that llama needs: {name}" in message


def test_weight_map_many_missing_tensors_are_counted_and_some_named() -> None:
    config = model_config()
    gone = [f"model.layers.{layer}.mlp.{kind}_proj.weight" for layer in range(3) for kind in ("gate", "up")]
    message = _error(_without(synthetic_index(config), *gone), config)
    assert "lacks 6 tensors" in message
    assert "model.layers.0.mlp.gate_proj.weight" in message
    assert message.endswith("and 3 more")


def test_weight_map_tied_embedding_that_is_missing_is_counted_once() -> None:
    config = model_config(tie_word_embeddings=True)
    assert "lacks 1 tensors" in _error(_without(synthetic_index(config), "model.embed_tokens.weight"), config)


def test_weight_map_tensor_of_another_shape_is_named_with_both() -> None:
    config = model_config()
    message = _error(synthetic_index(config), config.model_copy(update={"vocab_size": 41}))
    assert "model.embed_tokens.weight is [37, 16], config.json says [41, 16]" in message
    assert message.startswith("2 tensors have another shape")


def test_weight_map_tensor_without_a_rule_is_refused() -> None:
    config = model_config()
    message = _error(synthetic_index(config, model__layers__0__self_attn__q_norm__weight=(4,)), config)
    assert "1 tensors of the checkpoint would be dropped" in message
    assert "model.layers.0.self_attn.q_norm.weight" in message


def test_weight_map_bias_that_the_config_denies_is_refused() -> None:
    config = model_config(attn_bias=True)
    assert "bias" in _error(synthetic_index(config), config.model_copy(update={"attn_bias": False}))


def test_weight_map_untied_model_with_only_an_embedding_is_refused() -> None:
    tied = model_config(tie_word_embeddings=True)
    assert "lm_head.weight" in _error(synthetic_index(tied), tied.model_copy(update={"tie_word_embeddings": False}))


@pytest.mark.parametrize(
    ("num_groups", "index", "expected"), [(1, 0, "rank3.safetensors"), (4, 2, "rank3-00003-of-00004.safetensors")]
)
def test_shard_name_follows_hugging_face_numbering(num_groups: int, index: int, expected: str) -> None:
    assert LayerGroup(0, index, num_groups, range(1), ()).shard_name(3) == expected


@settings(max_examples=20)
@given(layers=st.integers(1, 6))
def test_weight_map_same_checkpoint_gives_the_same_map(layers: int) -> None:
    config = model_config(num_hidden_layers=layers)
    assert expand(config, Topology(2, 1), 900) == expand(config, Topology(2, 1), 900)
