"""Numbers of a config.json made small: what stays, what is in proportion, what no map may hide."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.work.miniature.prompts import crossable, prompts
from orchestrator.work.miniature.scaling import Scaling
from tests.support.wrong_rules import CONFIGS, hub_config

LLAMA: dict[str, Any] = {
    "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
    "num_hidden_layers": 32, "max_position_embeddings": 131072,
}  # fmt: skip


def small(config: dict[str, Any], defaults: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return Scaling(config, defaults or {}, **more).scaled(config)


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.json")))
def test_scaled_config_has_the_same_keys_with_the_same_kinds_of_values(name: str) -> None:
    config = hub_config(name)
    found = small(config)
    assert list(found) == list(config)
    for key, value in config.items():
        assert type(found[key]) is type(value), key
        if (not isinstance(value, int | list | dict) or isinstance(value, bool)) and key != "router_jitter_noise":
            assert found[key] == value, key


def test_scaled_config_leaves_null_missing_and_unknown_as_they_are() -> None:
    found = small({**LLAMA, "sliding_window": None, "head_dim": None, "novel_length": 4096, "novel": {"sliding_window": 7}})
    assert (found["sliding_window"], found["head_dim"], found["novel_length"]) == (None, None, 4096)
    assert found["novel"] == {"sliding_window": 7}
    assert "rope_scaling" not in found


@pytest.mark.parametrize(
    ("heads", "kv_heads", "expected"),
    [
        (32, 8, (8, 2)),
        (32, 32, (4, 4)),
        (8, 1, (8, 1)),
        (71, 1, (8, 1)),
        (14, 2, (14, 2)),
        (64, 4, (16, 2)),
        (9, 3, (6, 2)),
        (7, 1, (8, 1)),
    ],
)
def test_heads_keep_their_groups_and_split_over_two_ranks(heads: int, kv_heads: int, expected: tuple[int, int]) -> None:
    found = small({**LLAMA, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_size": heads * 128})
    assert (found["num_attention_heads"], found["num_key_value_heads"]) == expected
    assert found["hidden_size"] == expected[0] * 32


def test_head_size_that_is_not_what_follows_stays_so() -> None:
    found = small({**LLAMA, "hidden_size": 1024, "num_attention_heads": 16, "head_dim": 128})
    assert found["head_dim"] != found["hidden_size"] // found["num_attention_heads"]
    follows = small({**LLAMA, "head_dim": 128})
    assert follows["head_dim"] == follows["hidden_size"] // follows["num_attention_heads"]


@pytest.mark.parametrize("fraction", [0.75, 0.5, 0.25, 0.4])
def test_share_of_a_head_that_is_rotated_is_even(fraction: float) -> None:
    found = small({**LLAMA, "head_dim": 128, "partial_rotary_factor": fraction})
    rotated = int(found["head_dim"] * fraction)
    assert rotated % 2 == 0
    assert 0 < rotated < found["head_dim"]


def test_lengths_keep_their_order_their_ratio_and_their_equality() -> None:
    rope = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
    found = small({**LLAMA, "sliding_window": 4096, "attention_chunk_size": 8192, "rope_scaling": rope})
    assert (found["sliding_window"], found["attention_chunk_size"]) == (8, 13)
    assert (found["rope_scaling"]["original_max_position_embeddings"], found["max_position_embeddings"]) == (32, 512)
    assert found["rope_scaling"]["factor"] == 8.0
    equal = small({**LLAMA, "max_position_embeddings": 8192, "rope_scaling": rope})
    assert equal["max_position_embeddings"] == equal["rope_scaling"]["original_max_position_embeddings"] == 32


@given(st.lists(st.integers(1, 2**20), min_size=2, max_size=5, unique=True))
def test_different_lengths_stay_different_and_in_order(values: list[int]) -> None:
    keys = ["sliding_window", "attention_chunk_size", "window_size", "local_attention", "attention_window_size"]
    config = {**LLAMA, **dict(zip(keys, values, strict=False))}
    images = [small(config)[key] for key in keys[: len(values)]]
    assert [sorted(values).index(value) for value in values] == [sorted(images).index(image) for image in images]
    trained = {**LLAMA, "max_position_embeddings": values[0], "rope_scaling": {"original_max_position_embeddings": values[1]}}
    found = small(trained)
    assert (found["max_position_embeddings"] < found["rope_scaling"]["original_max_position_embeddings"]) == (values[0] < values[1])


def test_defaults_of_two_readers_are_mapped_alike_and_stay_apart() -> None:
    scaling = Scaling(LLAMA, {"sliding_window": 4096, "num_experts_per_tok": None}, [{"sliding_window": 8192, "hidden_size": 5}])
    assert scaling.scaled({"sliding_window": 4096}) == {"sliding_window": 8}
    assert scaling.scaled({"sliding_window": 8192}) == {"sliding_window": 13}
    assert scaling.scaled({"hidden_size": 5}) == {"hidden_size": 5}, "a size that is not the model's must fit nothing"


@pytest.mark.parametrize(
    ("experts", "chosen", "expected"),
    [(8, 2, (4, 2)), (128, 8, (4, 3)), (60, 4, (6, 4)), (64, 1, (4, 1)), (8, 8, (3, 3)), (2, 1, (2, 1))],
)
def test_experts_are_few_and_fewer_are_chosen_unless_all_are(experts: int, chosen: int, expected: tuple[int, int]) -> None:
    found = small({**LLAMA, "num_experts": experts, "num_experts_per_tok": chosen})
    assert (found["num_experts"], found["num_experts_per_tok"]) == expected


def test_layers_hold_every_kind_and_lists_of_them_are_cut_alike() -> None:
    kinds = (["sliding_attention"] * 5 + ["full_attention"]) * 8
    found = small({**LLAMA, "num_hidden_layers": 48, "layer_types": kinds, "sliding_window_pattern": 6})
    assert found["layer_types"] == kinds[:7]
    assert (found["num_hidden_layers"], found["sliding_window_pattern"]) == (7, 6)


@pytest.mark.parametrize("first", [1, 21, 47])
def test_layers_from_which_the_window_begins_are_among_the_few(first: int) -> None:
    kinds = ["full_attention"] * first + ["sliding_attention"] * (48 - first)
    for more in ({}, {"layer_types": kinds}):
        found = small({**LLAMA, "num_hidden_layers": 48, "max_window_layers": first, **more})
        count = found["num_hidden_layers"]
        assert 0 < found["max_window_layers"] < count <= 8
        assert (
            found.get("layer_types", ["full_attention"] * found["max_window_layers"])
            == (["full_attention"] * found["max_window_layers"] + ["sliding_attention"] * (count - found["max_window_layers"]))[
                : len(found.get("layer_types", [None] * found["max_window_layers"]))
            ]
        )


@pytest.mark.parametrize(("first", "relation"), [(28, 0), (40, 1)])
def test_layers_from_which_the_window_begins_beyond_the_last_stay_beyond(first: int, relation: int) -> None:
    found = small({**LLAMA, "num_hidden_layers": 28, "max_window_layers": first})
    assert found["max_window_layers"] - found["num_hidden_layers"] == relation


@pytest.mark.parametrize("difference", [-1, 1])
def test_lists_of_a_wrong_length_stay_wrong(difference: int) -> None:
    kinds = ["sliding_attention", "full_attention"] * 16
    wrong = kinds[:difference] if difference < 0 else [*kinds, "full_attention"]
    found = small({**LLAMA, "layer_types": wrong})
    assert len(found["layer_types"]) - found["num_hidden_layers"] == difference
    config = hub_config("phi-3.5-mini")
    factors = config["rope_scaling"]["long_factor"]
    config["rope_scaling"]["long_factor"] = factors[:difference] if difference < 0 else [*factors, 1.0]
    scaling = small(config)["rope_scaling"]
    assert len(scaling["long_factor"]) - len(scaling["short_factor"]) == difference


def test_factors_of_longrope_keep_their_range() -> None:
    config = hub_config("phi-4-mini")
    found = small(config)
    for key in ("short_factor", "long_factor"):
        factors = found["rope_scaling"][key]
        assert len(factors) == int(found["hidden_size"] // found["num_attention_heads"] * found["partial_rotary_factor"]) // 2
        assert (factors[0], factors[-1]) == (config["rope_scaling"][key][0], config["rope_scaling"][key][-1])


@pytest.mark.parametrize("value", ["many", -1, 0, True, 1.5, [], {"a": 1}], ids=str)
@pytest.mark.parametrize(
    "key",
    ["num_attention_heads", "hidden_size", "num_hidden_layers", "sliding_window", "layer_types", "rope_scaling", "num_experts"],
)
def test_scaled_config_of_impossible_values_is_made_all_the_same(key: str, value: Any) -> None:
    """Both readers are to see them, and refuse them."""
    config = {**LLAMA, "rope_scaling": {"factor": 2.0}, key: value}
    assert small(config)[key] == value


def test_prompts_lie_on_both_sides_of_each_length_and_cross_it_while_decoding() -> None:
    scaling = Scaling({**LLAMA, "sliding_window": 4096}, {})
    thresholds = crossable(scaling.thresholds())
    found = prompts([each.tokens for each in thresholds], 131)
    for each in thresholds:
        assert any(len(prompt.tokens) == each.tokens for prompt in found)
        assert any(prompt.prefill < each.tokens < len(prompt.tokens) for prompt in found)
        assert any(prompt.prefill > each.tokens for prompt in found)
    assert all(0 <= token < 131 for prompt in found for token in prompt.tokens)
