"""Parts of arrays as tensors, and the parameter trees of Orbax checkpoints that they belong to."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from orchestrator.base.errors import SourceCorruptError, abbreviated
from orchestrator.checkpoints.kernels import Kind

Shape = tuple[int, ...]


class Part(NamedTuple):
    """Part of an array that is a tensor."""

    name: str
    """Hugging Face's name."""
    kind: Kind
    fixed: tuple[tuple[int, int], ...] = ()
    """Axis and index of the part."""
    paired_rows: int = 0
    factor: float = 1.0
    divisor: float = 1.0
    add: float = 0.0


class Rule(NamedTuple):
    """How an array of a layer is stored."""

    name: str
    """Hugging Face's name within a layer, or in the model."""
    kind: Kind
    paired: bool = False
    """Whether neighbours of a head are rotated together: the rows of transformers' halves alternate."""
    factor: float = 1.0
    divisor: float = 1.0
    add: float = 0.0


@dataclass(frozen=True)
class Tree:
    """A parameter tree of a model."""

    sizes: Mapping[str, int]
    """Sizes of config.json."""
    rules: Callable[[str, Shape], Iterator[Part]]
    """Yields the parts of the array at a path."""
    prefix: re.Pattern[str]
    """Beginning of the names of parameters. Other arrays are not of the model."""
    warnings: tuple[str, ...] = ()

    def parameter(self, name: str) -> str | None:
        """Return the path of a parameter, parts joined by "/"; None: the array is no parameter."""
        path = name.replace(".", "/")
        found = self.prefix.match(path)
        return None if found is None else path[found.end() :]

    def parts(self, path: str, shape: Shape) -> Iterator[Part]:
        """Yield the tensors that an array holds. Raises SourceCorruptError, ArchitectureError."""
        return self.rules(path, shape)

    def most_rows(self, name: str) -> int:
        """Return the rows of a tensor without the padding of the vocabulary."""
        is_vocabulary = name in ("model.embed_tokens.weight", "lm_head.weight")
        return self.sizes["vocab_size"] if is_vocabulary else 2**62


def part_of(rule: Rule, name: str, fixed: tuple[tuple[int, int], ...] = (), head: int = 0) -> Part:
    """Return the part that a rule makes of an array, of heads with `head` rows."""
    return Part(name, rule.kind, fixed, head if rule.paired else 0, rule.factor, rule.divisor, rule.add)


_HEADS = {
    "GemmaForCausalLM": (16, 256),
    "Gemma2ForCausalLM": (4, 256),
    "Gemma3ForCausalLM": (4, 256),
    "Qwen3ForCausalLM": (32, 128),
}
"""num_key_value_heads and head_dim of a config.json without them, as in transformers' config classes."""


def sizes_of(config: Mapping[str, Any], where: str) -> dict[str, int]:
    """Return the sizes of config.json that tell how arrays are read. Raises SourceCorruptError."""

    def number(key: str, default: int | None = None) -> int:
        value = config.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not 0 < value < 2**40:
            raise SourceCorruptError(f"{where}/config.json: {key} is {abbreviated(repr(value), 40)}, not a positive number")
        return value

    hidden, heads = number("hidden_size"), number("num_attention_heads")
    shared, size = _HEADS.get(config["architectures"][0], (heads, max(1, hidden // heads)))
    return {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": number("num_key_value_heads", shared),
        "head_dim": number("head_dim", size),
        "num_hidden_layers": number("num_hidden_layers"),
        "vocab_size": number("vocab_size", 2**40),
    }
