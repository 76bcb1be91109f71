"""Heads of the layers without a window in config.json, where they differ from those with one (Gemma 4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.model.config_keys import Keys


def global_heads(keys: Keys, heads: int, kv_heads: int, head_size: int) -> dict[str, Any]:
    """Return the fields of ModelConfig. Raises ArchitectureError for heads that do not divide."""
    if not keys.table.global_heads:
        return {}
    alike = keys.flag("attention_k_eq_v")
    kv = keys.count("num_global_key_value_heads") if alike else kv_heads
    if heads % kv:
        raise keys.error("num_global_key_value_heads", f"is {kv}, which does not divide the {heads} attention heads")
    size = keys.count("global_head_dim", least=0) or head_size
    if size % 2:
        raise keys.error("global_head_dim", f"is {size}, an odd number, which cannot be rotated in pairs")
    return {"global_head_size": size, "global_kv_heads": kv, "values_are_keys": alike}


def global_head_keys(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of config.json that `global_heads` reads as these fields of ModelConfig."""
    return {
        "global_head_dim": fields["global_head_size"],
        "attention_k_eq_v": fields["values_are_keys"],
        "num_global_key_value_heads": fields["global_kv_heads"] if fields["values_are_keys"] else None,
    }
