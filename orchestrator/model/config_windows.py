"""Rules that choose the layers with a sliding window, from the config classes and modeling code of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from orchestrator.model.config_experts import EXPERT_LAYERS
from orchestrator.model.config_keys import Keys, shown
from orchestrator.model.config_rotary import rotated_layers

FULL = "full_attention"
Rule = Callable[[Keys, int, "int | None"], list[bool]]


def _none(_keys: Keys, layers: int, _window: int | None) -> list[bool]:
    return [False] * layers


def _all(_keys: Keys, layers: int, window: int | None) -> list[bool]:
    """Mistral, Mixtral, Phi-3, Qwen 3 MoE: all layers have the window, if there is one."""
    return [window is not None] * layers


def _from_max_window_layers(keys: Keys, layers: int, window: int | None) -> list[bool]:
    """Qwen 2 and 3: all layers but the first max_window_layers have the window."""
    first = keys.count("max_window_layers", 0)
    return [window is not None and layer >= first for layer in range(layers)]


def _even_below_max_window_layers(keys: Keys, layers: int, _window: int | None) -> list[bool]:
    """Qwen 2 MoE: every other of the first max_window_layers layers has the window."""
    last = keys.count("max_window_layers", 0)
    return [keys.flag("use_sliding_window") and layer % 2 == 0 and layer < last for layer in range(layers)]


def _every_other(_keys: Keys, layers: int, _window: int | None) -> list[bool]:
    """Gemma 2: every other layer has the window; sliding_window_pattern is ignored."""
    return [layer % 2 == 0 for layer in range(layers)]


def _pattern(keys: Keys, layers: int, _window: int | None) -> list[bool]:
    """Gemma 3: all layers but every sliding_window_pattern-th have the window."""
    pattern = keys.count("sliding_window_pattern")
    return [(layer + 1) % pattern != 0 for layer in range(layers)]


def _but_fourth(_keys: Keys, layers: int, _window: int | None) -> list[bool]:
    """OLMo 3: all layers but every fourth have the window."""
    return [(layer + 1) % 4 != 0 for layer in range(layers)]


def _but_first_of_four(_keys: Keys, layers: int, _window: int | None) -> list[bool]:
    """CWM: all layers but the first of every four have the window."""
    return [layer % 4 != 0 for layer in range(layers)]


def _without_rotary(keys: Keys, layers: int, window: int | None) -> list[bool]:
    """SmolLM3: the layers without rotary embedding have the window."""
    return [window is not None and not rotated for rotated in rotated_layers(keys, layers)]


def _but_sixth(_keys: Keys, layers: int, _window: int | None) -> list[bool]:
    """Gemma 4: all layers but every sixth have the window."""
    return [(layer + 1) % 6 != 0 for layer in range(layers)]


def _but_every_nth(keys: Keys, layers: int, _window: int | None) -> list[bool]:
    """AFMoE: all layers but every global_attn_every_n_layers-th have the window."""
    step = keys.count("global_attn_every_n_layers")
    return [(layer + 1) % step != 0 for layer in range(layers)]


def _after_prefix(keys: Keys, layers: int, _window: int | None) -> list[bool]:
    """Cohere 2 MoE: the first layers, without experts, and those after them have patterns of their own."""
    first = min(keys.count("first_k_dense_replace", least=0), layers)
    early, late = keys.count("prefix_dense_sliding_window_pattern"), keys.count("sliding_window_pattern")
    return [(layer + 1) % early != 0 for layer in range(first)] + [(layer + 1) % late != 0 for layer in range(layers - first)]


def _with_rotary(keys: Keys, layers: int, _window: int | None) -> list[bool]:
    """Llama 4: the layers with rotary embedding have the window."""
    return list(rotated_layers(keys, layers))


WINDOW_RULES: dict[str, Rule] = {
    "none": _none,
    "all": _all,
    "from_max_window_layers": _from_max_window_layers,
    "even_below_max_window_layers": _even_below_max_window_layers,
    "every_other": _every_other,
    "pattern": _pattern,
    "but_fourth": _but_fourth,
    "after_prefix": _after_prefix,
    "but_every_nth": _but_every_nth,
    "but_sixth": _but_sixth,
    "but_first_of_four": _but_first_of_four,
    "without_rotary": _without_rotary,
    "with_rotary": _with_rotary,
}


def windows(keys: Keys, layers: int) -> dict[str, Any]:
    """Return sliding_window and window_layers of ModelConfig, and rotary_layers where windows decide of it.

    Raises ArchitectureError for keys that contradict each other.
    """
    table = keys.table
    if table.windows == "none":
        _check_kinds(keys, layers)
        return {"sliding_window": None}
    used = "use_sliding_window" not in table.defaults or keys.flag("use_sliding_window")
    window = keys.maybe_count(table.window_key) if used else None
    kinds = _check_kinds(keys, layers)
    listed = kinds is not None and "layer_types" in table.defaults
    chosen = [kind == table.window_kind for kind in kinds or ()] if listed else WINDOW_RULES[table.windows](keys, layers, window)
    if table.last_is_full:
        chosen = [*chosen[:-1], False]
    if any(chosen) and window is None:
        what = "layer_types" if listed else "use_sliding_window" if "use_sliding_window" in table.defaults else "sliding_window"
        raise keys.error(what, "gives layers a window, but sliding_window is missing", "Set sliding_window, or give no layer one.")
    turned = _rotated_too(keys, layers, chosen)
    rotated = {"rotary_layers": turned} if table.rotary.only_windows and window and not all(turned) else {}
    if not any(chosen):
        return {"sliding_window": None, **rotated}
    return {"sliding_window": window, "window_layers": None if all(chosen) else tuple(chosen), **rotated}


def _rotated_too(keys: Keys, layers: int, windowed: list[bool]) -> tuple[bool, ...]:
    """Return the layers with rotary embedding where windows decide of it: those with one, and maybe those without experts."""
    key, experts = keys.table.rotary.dense_too, keys.table.experts
    if key is None or experts is None or keys.count(key) != 1:
        return tuple(windowed)
    has_experts = EXPERT_LAYERS[experts.layers](keys, layers)
    return tuple(window or not has for window, has in zip(windowed, has_experts, strict=True))


def _check_kinds(keys: Keys, layers: int) -> list[str] | None:
    """Return layer_types; None: missing. It is checked in families that do not read it too, as in transformers."""
    kinds = keys.get("layer_types")
    if kinds is None:
        return None
    window = keys.table.window_kind
    if not isinstance(kinds, list) or any(kind not in (window, FULL) for kind in kinds):
        raise keys.error("layer_types", f"is {shown(kinds)}", f"Its entries must be {window} or {FULL}.")
    if len(kinds) != layers:
        raise keys.error("layer_types", f"has {len(kinds)} entries for {layers} layers")
    return kinds
