"""Scale down the numbers in a model's config.json, and change nothing else.

Missing, null and unknown keys stay as they are, because the proof is about how the config is read. Each number is mapped
independently of its key: equal numbers stay equal, different ones different, and numbers of one kind keep their order. So a
default that two readers take from different places can be mapped alike on both sides.

    sizes          to a few dozen, keeping the ratio of heads to key/value heads, and a head size that is given or derived
    layers         to a few that hold every kind of layer; lists with one entry per layer are cut alike
    windows        to 8, 13, 18 ... tokens
    positions      trained lengths to 32 tokens for the smallest, the others in proportion
    factor lists   of longrope to the new head size
    jitter         of a SparseMixer to a larger one: few of the miniature's experts would be near each other
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

Config = Mapping[str, Any]
Map = Callable[[Any], Any]

WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window_size", "window_size", "local_attention")
POSITIONS = ("max_position_embeddings", "original_max_position_embeddings", "floor_scale")
ROTARY = ("rope_scaling", "rope_parameters")
FACTORS = ("short_factor", "long_factor")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts")
LAYER_NUMBERS = ("mlp_only_layers", "moe_layers")
"""Keys of lists of layer numbers."""
STEPS = ("decoder_sparse_step", "moe_layer_interval", "interleave_moe_layer_step")
"""Keys of the distance between layers with experts."""
FIRST_LAYERS = ("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers")
"""Keys that count first layers without experts."""
_FIRST_WINDOW, _WINDOW_STEP = 8, 5
_TRAINED = 32
_HEAD_SIZES = (32, 40, 48, 64, 80, 128)
_JITTER = 16
"""Factor of a SparseMixer's jitter, which is 0.01 in published models."""
_ROTATED = 8
"""Rotated elements of a head with latent attention."""
_MAX_GROUP = 8
_PATTERN_LAYERS, _LISTED_LAYERS = 16, 8
_VOCABULARY = 131
"""Vocabulary size: odd, so that two ranks need padding."""


@dataclass(frozen=True, slots=True)
class Threshold:
    """A length at which a model changes what it computes."""

    key: str
    value: int
    """Length in tokens, in the model's config."""
    tokens: int
    """Length in tokens, in the miniature."""


def is_count(value: Any) -> TypeGuard[int]:
    """Whether a value is a positive integer and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


class Scaling:
    """Map from one model's numbers to the miniature's."""

    def __init__(
        self, config: Config, defaults: Config, others: Iterable[Config] = (), kinds: Iterable[Sequence[Any]] = ()
    ) -> None:
        """`defaults`: transformers' values for keys that `config` lacks. `others`: defaults of other readers.

        `kinds`: the kind of each layer of the model, per reader.
        """
        self._config, self._defaults = config, defaults
        assumed = [{key: value for key, value in found.items() if key not in config} for found in (defaults, *others)]
        self._everything = (config, *assumed)
        self._maps: dict[str, Map] = {}
        self._scale_heads()
        self._scale_sizes()
        self._scale_layers([list(found) for found in kinds])
        self._scale_thresholds()

    def raw(self, key: str) -> Any:
        """Return a value of the model: from config.json, null too, else transformers' default."""
        return self._config[key] if key in self._config else self._defaults.get(key)

    def scaled(self, config: Config) -> dict[str, Any]:
        """Return `config` (config.json, or a table of defaults) with its numbers mapped; null and other types stay."""
        return {key: self._value(key, value) for key, value in config.items()}

    def scaled_only(self, defaults: Config) -> dict[str, Any]:
        """Return the non-null entries of a table of defaults that have a map."""
        return {key: self._maps[key](value) for key, value in defaults.items() if key in self._maps and value is not None}

    def _value(self, key: str, value: Any) -> Any:
        if key in ROTARY and isinstance(value, dict):
            return self._rotary(value)
        if key.endswith("_token_id"):
            return [_id(each) for each in value] if isinstance(value, list) else _id(value)
        if isinstance(value, list) and self._is_per_layer(key, value):
            found = self._per_layer(key, value)
            return [self._maps[key](each) for each in found] if key in CHOSEN and key in self._maps else found
        return self._maps[key](value) if key in self._maps and value is not None else value

    def _rotary(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in parameters.items():
            if isinstance(value, dict):
                found[key] = self._rotary(value)
            elif key in FACTORS and isinstance(value, list):
                found[key] = self._factors(value)
            else:
                found[key] = self._maps[key](value) if key in POSITIONS and value is not None else value
        return found

    # Heads and sizes

    def _scale_heads(self) -> None:
        heads = self.raw("num_attention_heads")
        kv_heads = self.raw("num_key_value_heads")
        kv_heads = heads if kv_heads is None else kv_heads
        hidden, head = self.raw("hidden_size"), self.raw("head_dim")
        if not (is_count(heads) and is_count(kv_heads) and is_count(hidden)) or heads % kv_heads:
            self.num_heads = self.head_size = 0
            return  # no reader accepts such a config
        group = heads // kv_heads
        small_kv = {1: 1, heads: 4}.get(kv_heads, 2)
        small_group = min(group, _MAX_GROUP)
        if small_kv == 1 and small_group % 2:
            small_group += 1
        self.num_heads = small_kv * small_group
        derived = hidden // heads
        real_head = head if is_count(head) else derived
        self._real_rotated = [int(real_head * fraction) for fraction in self._fractions()]
        self.head_size = next(
            (size for size in _HEAD_SIZES if all(int(size * fraction) % 2 == 0 for fraction in self._fractions())), _HEAD_SIZES[0]
        )
        width = self.num_heads * self.head_size
        small_hidden = width
        if real_head != derived:
            ratio = min(max(hidden / (heads * real_head), 0.25), 4.0)
            step = math.lcm(self.num_heads, 2)
            small_hidden = max(round(width * ratio / step), 1) * step
            if small_hidden == width:
                small_hidden += step
        self._maps["num_attention_heads"] = _only(heads, self.num_heads)
        self._maps["num_key_value_heads"] = _only(kv_heads, small_kv)
        self._maps["hidden_size"] = _only(hidden, small_hidden)
        self._maps["head_dim"] = _only(real_head, self.head_size)
        self._maps["global_head_dim"] = _only(self.raw("global_head_dim"), 2 * self.head_size)
        self._maps["num_global_key_value_heads"] = _only(self.raw("num_global_key_value_heads"), max(small_kv // 2, 1))
        self._maps["rotary_dim"] = lambda dim: round(self.head_size * dim / real_head) if is_count(dim) else dim
        if is_count(self.raw("kv_lora_rank")):
            self._scale_latents()

    def _scale_latents(self) -> None:
        """Scale the sizes of latent attention to different ones, with the rotated part that a fraction names, if any."""
        rope, fraction = _ROTATED, self._fractions()[-1]
        small = {
            "q_lora_rank": 40,
            "kv_lora_rank": 32,
            "qk_rope_head_dim": rope,
            "qk_nope_head_dim": 12 if fraction == 1 else round(rope / fraction) - rope,
            "v_head_dim": 20,
        }
        sizes = {key: self.raw(key) for key in small}
        whole = small["qk_nope_head_dim"] + rope
        self._maps["qk_head_dim"] = _only(self.raw("qk_head_dim"), whole)
        for key, size in small.items():
            self._maps[key] = _only(sizes[key], size)
        if self.raw("head_dim") == sizes["qk_rope_head_dim"]:
            self._maps["head_dim"] = self._maps["qk_rope_head_dim"]
        elif is_count(sizes["qk_nope_head_dim"]) and is_count(sizes["qk_rope_head_dim"]):
            self._maps["head_dim"] = _only(sizes["qk_nope_head_dim"] + sizes["qk_rope_head_dim"], whole)

    def _fractions(self) -> list[float]:
        """Return every rotated fraction of a head that the config names."""
        found = [1.0]
        for place in (self._config, *self._rotary_dictionaries(self._config)):
            fraction = place.get("partial_rotary_factor")
            if isinstance(fraction, int | float) and 0 < fraction <= 1:
                found.append(float(fraction))
        dim, head = self.raw("rotary_dim"), self.raw("head_dim")
        return [*found, dim / head] if is_count(dim) and is_count(head) and dim <= head else found

    def _scale_sizes(self) -> None:
        small = {
            "intermediate_size": 96, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 80,
            "intermediate_size_mlp": 112, "shared_intermediate_size": 80,
            "prefix_dense_intermediate_size": 112,
        }  # fmt: skip
        for key, size in {**small, "vocab_size": _VOCABULARY}.items():
            self._maps[key] = _only(self.raw(key), size)
        experts = next((self.raw(key) for key in EXPERTS if is_count(self.raw(key))), None)
        chosen: Any = next((value for key in CHOSEN if is_count(value := _one(self.raw(key)))), None)
        if experts is None:
            return
        few = chosen if chosen is None or chosen <= 4 else 3
        small_experts = few if chosen == experts else min(experts, 6 if few == 4 else 4)
        groups, kept = self.raw("n_group"), self.raw("topk_group")
        if is_count(groups) and is_count(kept) and groups > 1 and experts % groups == 0:
            # Groups of three, of which some are left out: the two best of a group are not all of it.
            few_kept = groups if kept == groups else min(kept, 2)
            small_groups = min(groups, 4)
            self._maps["n_group"], self._maps["topk_group"] = _only(groups, small_groups), _only(kept, min(few_kept, small_groups))
            small_experts = small_groups * min(experts // groups, 3)
        self._maps["router_jitter_noise"] = lambda jitter: _JITTER * jitter if isinstance(jitter, float) else jitter
        for key in CHOSEN:
            self._maps[key] = _around(chosen, few)
        for key in EXPERTS:
            self._maps[key] = _only(experts, small_experts)

    # Layers

    def _scale_layers(self, kinds: list[list[Any]]) -> None:
        layers = self.raw("num_hidden_layers")
        if not is_count(layers):
            self.kept = [0, 1]
            return
        first = self.raw("max_window_layers")
        listed = [value for value in self._config.values() if isinstance(value, list) and len(value) == layers]
        kinds = [found for found in [*kinds, *listed, self._sparse(layers)] if len(found) == layers and all(map(_hashable, found))]
        needed = max((_prefix(found) for found in kinds), default=1)
        limit = _LISTED_LAYERS if is_count(first) else _PATTERN_LAYERS
        self.kept = list(range(min(max(needed + 1, 2), layers)))
        if needed + 1 > limit:
            self.kept = _around_changes(kinds, layers)
        if is_count(first) and first < layers and len({index < first for index in self.kept}) == 1:
            self.kept = sorted({0, first - 1, first, layers - 1})
        count = len(self.kept)
        self._maps["num_hidden_layers"] = _only(layers, count)
        for key in FIRST_LAYERS:
            self._maps[key] = lambda value: sum(index < value for index in self.kept) if is_count(value) else value
        self._maps["moe_layer_end_index"] = lambda value: (
            sum(index <= value for index in self.kept) - 1 if is_count(value) else value
        )
        self._maps["max_window_layers"] = lambda value: (
            value if not is_count(value) else sum(index < value for index in self.kept) + (value > layers)
        )

    def _sparse(self, layers: int) -> list[Any]:
        """Return whether each layer has experts by the keys that families have for it, whatever a reader makes of them."""

        def count(key: str, otherwise: int) -> int:
            value = self.raw(key)
            return value if is_count(value) else otherwise

        step = math.lcm(*(count(key, 1) for key in STEPS))
        first, last = max(count(key, 0) for key in FIRST_LAYERS), count("moe_layer_end_index", layers)
        dense = self.raw("mlp_only_layers")
        dense = dense if isinstance(dense, list) else []
        return [(layer + 1) % step == 0 and first <= layer <= last and layer not in dense for layer in range(layers)]

    def _is_per_layer(self, key: str, value: list[Any]) -> bool:
        return key in ("layer_types", *LAYER_NUMBERS) or len(value) == self.raw("num_hidden_layers")

    def _per_layer(self, key: str, value: list[Any]) -> list[Any]:
        """Return the entries of the kept layers, or their new numbers. A list of a wrong length stays too long or too short."""
        layers = self.raw("num_hidden_layers")
        if key in LAYER_NUMBERS:
            return [number for number, index in enumerate(self.kept) if index in value]
        found = [value[index] for index in self.kept if index < len(value)]
        if len(value) > layers:
            return [*found, value[-1]]
        return found[:-1] if len(value) < layers and len(found) == len(self.kept) else found

    # Thresholds

    def _scale_thresholds(self) -> None:
        windows = sorted({value for _, value in self._lengths(WINDOWS)})
        self._windows = {value: _FIRST_WINDOW + number * _WINDOW_STEP for number, value in enumerate(windows)}
        self._positions: dict[int, int] = {}
        for value in sorted({value for _, value in self._lengths(POSITIONS)}):
            first = next(iter(self._positions), value)
            smallest = max(self._positions.values(), default=0) + 1
            self._positions[value] = max(round(_TRAINED * value / first), smallest)
        for key in WINDOWS:
            self._maps[key] = lambda value: self._windows.get(value, value) if is_count(value) else value
        for key in POSITIONS:
            self._maps[key] = lambda value: self._positions.get(value, value) if is_count(value) else value

    def _lengths(self, keys: Iterable[str]) -> Iterator[tuple[str, int]]:
        """Yield every length that config.json, or a default in its place, gives under one of these keys."""
        for config in self._everything:
            for place in (config, *self._rotary_dictionaries(config)):
                yield from ((key, value) for key in keys if is_count(value := place.get(key)))

    def _rotary_dictionaries(self, config: Config) -> Iterable[Config]:
        for key in ROTARY:
            parameters = config.get(key)
            if isinstance(parameters, dict):
                yield parameters
                yield from (value for value in parameters.values() if isinstance(value, dict))

    def thresholds(self) -> list[Threshold]:
        """Return every length named in config.json or by a default in its place; the shortest first."""
        found: dict[tuple[int, int], Threshold] = {}
        for keys, images in ((WINDOWS, self._windows), (POSITIONS, self._positions)):
            for key, value in self._lengths(keys):
                found.setdefault((value, images[value]), Threshold(key, value, images[value]))
        return sorted(found.values(), key=lambda threshold: threshold.tokens)

    def _factors(self, values: list[Any]) -> list[Any]:
        """Return factors over the same range for the new number of head pairs. A list of a wrong length stays wrong."""
        if not self.head_size or not values:
            return values
        fraction = self._fractions()[-1]
        wanted = int(self.head_size * fraction) // 2
        expected = self._real_rotated[-1] // 2
        if len(values) != expected:
            wanted = max(wanted + (1 if len(values) > expected else -1), 1)
        last = max(wanted - 1, 1)
        return [values[round(number * (len(values) - 1) / last)] for number in range(wanted)]


def _one(value: Any) -> Any:
    """Return the first number of a list with one for each layer, or the number that is given for all."""
    return value[0] if isinstance(value, list) and value else value


def _only(value: Any, image: Any) -> Map:
    """Map `value` to `image`; other numbers stay and then fit nothing."""
    return lambda given: image if given == value and is_count(given) else given


def _around(value: Any, image: int) -> Map:
    """Map `value` to `image`, smaller numbers to one less (at least 1), larger ones to one more."""

    def mapped(given: Any) -> Any:
        if not is_count(given) or not is_count(value) or given == value:
            return image if is_count(given) else given
        return max(image - 1, 1) if given < value else image + 1

    return mapped


def _id(value: Any) -> Any:
    """Map a token id into the small vocabulary."""
    return value % _VOCABULARY if is_count(value) else value


def _hashable(value: Any) -> bool:
    return isinstance(value, str | int | float | bool | None)


def _prefix(kinds: Sequence[Any]) -> int:
    """Return how many first layers hold every kind."""
    return max(list(kinds).index(kind) for kind in set(kinds)) + 1


def _around_changes(kinds: Iterable[Sequence[Any]], layers: int) -> list[int]:
    """Return the first and the last layer, and both sides of the first changes of kind."""
    kept = {0, layers - 1}
    for found in kinds:
        changes = [index for index in range(1, layers) if found[index] != found[index - 1]]
        kept |= {index for change in changes[:3] for index in (change - 1, change)}
    return sorted(kept)
