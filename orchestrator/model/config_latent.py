"""Sizes of multi-head latent attention (MLA) in config.json, and its scale, as in transformers' DeepSeek V3."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.model.config_keys import Keys, shown

LATENT_KEYS = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
"""Keys of the sizes."""


@dataclass(frozen=True, slots=True)
class LatentSizes:
    """Sizes of a latent attention."""

    q_lora: int
    """0: queries are made from the hidden states."""
    kv_lora: int
    nope: int
    rope: int
    value: int

    @property
    def head_size(self) -> int:
        """Size of a query head."""
        return self.nope + self.rope

    def fields(self) -> dict[str, int]:
        """Return the fields of ModelConfig."""
        return {
            "q_lora_rank": self.q_lora,
            "kv_lora_rank": self.kv_lora,
            "qk_nope_head_dim": self.nope,
            "v_head_dim": self.value,
        }


def latent_sizes(keys: Keys, heads: int, kv_heads: int) -> LatentSizes:
    """Return the sizes. Raises ArchitectureError for sizes that transformers cannot run."""
    if kv_heads != heads:
        raise keys.error("num_key_value_heads", f"is {kv_heads}: with latent attention, it is that of the {heads} attention heads")
    rope = keys.count("qk_rope_head_dim", 2)
    if rope % 2:
        raise keys.error("qk_rope_head_dim", f"is {rope}, an odd number, which cannot be rotated in pairs")
    nope = keys.count("qk_nope_head_dim")
    rotated_from = nope + rope if keys.table.rotary.partial else rope
    if keys.given.get("head_dim") not in (None, rotated_from):
        raise keys.error("head_dim", f"is {shown(keys.given['head_dim'])}: transformers would rotate other than {rope} elements")
    if keys.given.get("qk_head_dim") not in (None, nope + rope):
        raise keys.error("qk_head_dim", f"is {shown(keys.given['qk_head_dim'])}, not {nope + rope}, the sum of its parts")
    return LatentSizes(
        keys.maybe_count("q_lora_rank") or 0,
        keys.count("kv_lora_rank"),
        nope,
        rope,
        keys.count("v_head_dim"),
    )


def softmax_scale(scaling: Mapping[str, Any] | None, head_size: int) -> float | None:
    """Return the factor of the scores with mscale_all_dim of a rotary scaling; None: the usual head_size ** -0.5."""
    multiplier = (scaling or {}).get("mscale_all_dim")
    if not scaling or not multiplier or scaling["factor"] <= 1:
        return None
    mscale = 0.1 * float(multiplier) * math.log(scaling["factor"]) + 1.0
    return float(head_size**-0.5 * mscale * mscale)
