"""Bounds of the numbers in config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.base.errors import ArchitectureError, abbreviated

_MOST = {
    "num_hidden_layers": 10_000, "num_attention_heads": 2**16, "num_key_value_heads": 2**16, "num_experts": 2**16,
    "num_local_experts": 2**16,
}  # fmt: skip
_MOST_OF_ANYTHING = 2**40


def check_sizes(config: Mapping[str, Any], where: str) -> None:
    """Refuse numbers that no model has, before any loop runs up to them. Raises ArchitectureError."""
    for key, value in config.items():
        if isinstance(value, (int, float)) and not abs(value) <= _MOST.get(key, _MOST_OF_ANYTHING):
            raise ArchitectureError(
                f"{abbreviated(key, 60)} in {where} is {abbreviated(repr(value), 40)}, which no model has",
                "Use the config.json of the model's publisher.",
            )
