"""config.json as the hub's models publish it, with all its odd keys: planned, and read as transformers reads it.

Names that end in -bf16 are of models that are published quantized, without their quantization_config; those that end in -text are
the text_config of a larger model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.families import FAMILIES, family_for
from orchestrator.model.config_hugging_face import from_hugging_face
from orchestrator.model.config_keys import config_warnings
from orchestrator.work.as_hugging_face import with_known_type, with_rotated_part
from tests.support.resolution import differences, ours, resolved

CONFIGS = sorted((Path(__file__).parents[1] / "data" / "configs").glob("*.json"))
SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 24, "vocab_size": 29, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "moe_intermediate_size": 12, "shared_expert_intermediate_size": 20, "intermediate_size_mlp": 28,
    "shared_intermediate_size": 20, "prefix_dense_intermediate_size": 28,
}  # fmt: skip
HEAD_SIZE = 16


def load(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _chosen(config: dict[str, Any]) -> int:
    found = next(config[key] for key in ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts") if config.get(key))
    return int(found[0] if isinstance(found, list) else found)


def smaller(config: dict[str, Any]) -> dict[str, Any]:
    """The same file with narrow widths; layers, heads' ratio, windows, positions and rotary embedding stay."""
    heads = 4 if config["num_attention_heads"] > config["num_key_value_heads"] else 2
    kept = {key: value for key, value in SMALL.items() if key in config}
    made = {**config, **kept, "num_attention_heads": heads, "num_key_value_heads": 2, "hidden_size": heads * HEAD_SIZE}
    if (config.get("n_group") or 1) > 1:
        made |= {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}
    made |= {"rotary_dim": HEAD_SIZE // 2} if "rotary_dim" in config else {}
    for key in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"):
        made |= {key: (made.get("n_group") or 1) * (_chosen(made) + 1)} if config.get(key) else {}
    if config.get("kv_lora_rank") is not None:
        made |= {"num_attention_heads": 2, "q_lora_rank": 20, "kv_lora_rank": 12, "qk_nope_head_dim": 6, "v_head_dim": 10}
        made |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "qk_head_dim": 16, "hidden_size": 2 * HEAD_SIZE}
    made |= {"head_dim": 8 if config["head_dim"] == config.get("qk_rope_head_dim") else HEAD_SIZE} if "head_dim" in config else {}
    made |= {"global_head_dim": 2 * HEAD_SIZE, "num_global_key_value_heads": 1} if "global_head_dim" in config else {}
    scaling = config.get("rope_scaling") or {}
    if "long_factor" in scaling:
        pairs = int(HEAD_SIZE * config.get("partial_rotary_factor", 1.0)) // 2
        made["rope_scaling"] = {**scaling, **{key: scaling[key][:pairs] for key in ("short_factor", "long_factor")}}
    return made


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_published_config_json_is_read_as_transformers_reads_it(path: Path) -> None:
    config = load(path)
    architecture = config["architectures"][0]
    table = family_for(architecture).config
    read = from_hugging_face(config, architecture, "bfloat16", table)
    assert (read.hidden_size, read.num_hidden_layers) == (config["hidden_size"], config["num_hidden_layers"])
    small = smaller(config)
    assert not differences(
        ours(from_hugging_face(small, architecture, "bfloat16", table)), resolved(with_rotated_part(with_known_type(small)))
    )
    warned = config_warnings(config, architecture, table)
    assert bool(warned) == (path.stem in ("gemma-2b", "gemma-7b", "mistral-small-4-text")), warned


def test_published_configs_are_of_every_family() -> None:
    assert {family_for(load(path)["architectures"][0]).name for path in CONFIGS} == set(FAMILIES)
    assert len(CONFIGS) >= 40
