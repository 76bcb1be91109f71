"""Match nodes with a pool's labels, in the syntax of Ray's label selectors: VALUE, !VALUE, in(A, B), !in(A, B)."""

from __future__ import annotations

from collections.abc import Mapping


def selects(wanted: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether a node with `labels` meets every condition of `wanted`. A negated condition holds where the label is absent."""
    return all(_meets(condition, labels.get(name)) for name, condition in wanted.items())


def _meets(condition: str, value: str | None) -> bool:
    if condition.startswith("!"):
        return not _meets(condition[1:], value)
    if condition.startswith("in(") and condition.endswith(")"):
        return value in [item.strip() for item in condition[3:-1].split(",")]
    return value == condition
