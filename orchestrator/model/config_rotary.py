"""Rotary embedding of config.json: transformers 5 (`rope_parameters`) or 4 (`rope_theta`, `rope_scaling`).

Precedence as in transformers: `rope_scaling`, unless empty, replaces `rope_parameters`; a base in the dictionary comes before
`rope_theta`. Returned dictionaries hold every value that the formula needs, with its type checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.base.errors import ArchitectureError
from orchestrator.model.config_keys import Keys, number, shown
from orchestrator.model.config_table import RotaryTable

_NUMBERS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
_OPTIONAL_NUMBERS = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    "longrope": ("attention_factor", "factor"),
    "proportional": ("factor",),
}
_LISTS = {"longrope": ("short_factor", "long_factor")}
_FLAGS = {"yarn": ("truncate",)}
_TRAINED = ("llama3", "yarn", "longrope")
"""Kinds that need the trained length."""
_ORIGINAL = "original_max_position_embeddings"
_OF_NO_KIND = {"rope_type", "type", "rope_theta", "partial_rotary_factor", _ORIGINAL, "finetuned"}
"""Keys allowed with every kind. `finetuned` records how the model was trained."""
_BETA = "llama_4_scaling_beta"
_ALPHA = "alpha"
_MSCALES = ("short_mscale", "long_mscale")
_OF_SCALED_QUERIES = {_BETA, "max_position_embeddings"}
"""Keys allowed where queries are scaled by position. The second is not read (transformers writes it)."""
_OF_SOME_KIND = {name for table in (_NUMBERS, _OPTIONAL_NUMBERS, _LISTS, _FLAGS) for names in table.values() for name in names}
"""Keys of particular kinds. transformers ignores keys of other kinds than the dictionary's."""
_KINDS_OF_LAYERS = {"full_attention", "sliding_attention"}


def rotary(keys: Keys, head_size: int, part: float | None = None) -> dict[str, Any]:
    """Return rotary_base, rotary_scaling, rotary_base_local and rotary_embedding_dim of ModelConfig.

    `part`: rotated part of a head where config.json names none; None: the family's. Raises ArchitectureError for a kind, key or
    value that is not supported.
    """
    table = keys.table.rotary
    found = _by_layer_kind(keys) if table.local_theta is not None else (_given(keys), None)
    parameters, local = found
    where = _where(keys)
    base = _base(parameters, keys, "rope_theta", table.theta)
    kind = _kind(parameters, table, where)
    dim = _rotated(parameters, keys, kind, head_size, keys.table.rotary.fraction if part is None else part)
    scaling = None if kind == "default" else _scaling(parameters, kind, keys, dim)
    made: dict[str, Any] = {"rotary_base": base, "rotary_scaling": scaling}
    if local is not None:
        if _kind(local, table, where) != "default":
            raise ArchitectureError(f"{where} scales the layers with a window", "Supported there is rope_type default.")
        made["rotary_base_local"] = _base(local, keys, "rope_local_base_freq", table.local_theta or 0.0)
    if table.scales_queries:
        if _BETA not in parameters:
            raise ArchitectureError(f"{where} lacks {_BETA!r}, by which queries are scaled", "Use the complete config.json.")
        made["query_scale_beta"] = _positive(parameters[_BETA], f"{_BETA} of {where}")
    made |= _temperature(keys)
    made["rotary_embedding_dim"] = None if dim == head_size else dim
    layers = rotated_layers(keys, keys.count("num_hidden_layers"))
    return made if all(layers) else {**made, "rotary_layers": layers}


def rotated_layers(keys: Keys, num_layers: int) -> tuple[bool, ...]:
    """Return whether each layer has rotary embedding. Raises ArchitectureError, which names the key."""
    key = keys.table.rotary.layers
    if key is None:
        return (True,) * num_layers
    listed = keys.get(key)
    if listed is None or (listed == [] and keys.table.rotary.no_layers_mean_default):
        interval = keys.count("no_rope_layer_interval")
        return tuple((layer + 1) % interval != 0 for layer in range(num_layers))
    if not isinstance(listed, list) or any(each not in (0, 1) for each in listed):
        raise keys.error(key, f"is {shown(listed)}, not a list of ones and zeros")
    if len(listed) != num_layers:
        raise keys.error(key, f"has {len(listed)} entries for {num_layers} layers")
    return tuple(each == 1 for each in listed)


def _temperature(keys: Keys) -> dict[str, Any]:
    """Return the fields of Llama 4's scale of queries by position."""
    names = keys.table.rotary.temperature
    if names is None or not keys.flag(names[0]):
        return {}
    factor = _positive(keys.get(names[2]), f"{names[2]} in config.json of {keys.architecture}")
    return {"query_scale_floor": keys.count(names[1]), "query_scale_beta": factor}


def _where(keys: Keys) -> str:
    name = "rope_scaling" if keys.given.get("rope_scaling") else "rope_parameters"
    return f"{name} in config.json of {keys.architecture}"


def _dictionary(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ArchitectureError(f"{where} is {shown(value)}, not a dictionary")
    return dict(value)


def _given(keys: Keys) -> dict[str, Any]:
    if keys.table.rotary.complete:
        if keys.given.get("rope_scaling") is not None:
            raise keys.error("rope_scaling", "is not supported: transformers passes over it here", "Write it as rope_parameters.")
        if "rope_theta" not in (keys.given.get("rope_parameters") or {"rope_theta": None}):
            raise keys.error("rope_parameters", "is not supported without rope_theta")
    scaling = keys.given.get("rope_scaling") or keys.given.get("rope_parameters")
    return _dictionary(scaling if scaling is not None else keys.table.rotary.parameters, _where(keys))


def _by_layer_kind(keys: Keys) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the rotary parameters of the layers with full attention, and of the layers with a window (Gemma 3)."""
    where = _where(keys)
    if keys.table.rotary.by_kind:
        return _of_kinds(keys, where)
    nested = _dictionary(keys.given.get("rope_parameters") or {}, where)
    # transformers writes the plain defaults beside the kinds
    stray = sorted(key for key, value in nested.items() if key not in _KINDS_OF_LAYERS and value not in (None, "default"))
    if stray:
        raise ArchitectureError(
            f"{where} has {shown(stray[0])} beside the kinds of layers", f"Its keys are {' and '.join(sorted(_KINDS_OF_LAYERS))}."
        )
    full, sliding = (_dictionary(nested.get(kind) or {}, where) for kind in ("full_attention", "sliding_attention"))
    full |= _dictionary(keys.given.get("rope_scaling") or {}, where)
    return full, sliding


def _of_kinds(keys: Keys, where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same where rope_parameters alone is read, with both kinds in it (Gemma 4)."""
    for key in ("rope_scaling", "rope_theta", "rope_local_base_freq", "partial_rotary_factor"):
        if keys.given.get(key) is not None:
            raise keys.error(key, "is not supported in this family", "rope_parameters says it, for each kind of layer.")
    given = keys.given.get("rope_parameters")
    nested = _dictionary(keys.table.rotary.parameters if given is None else given, where)
    if set(nested) != _KINDS_OF_LAYERS:
        raise ArchitectureError(f"{where} is not supported: its keys must be {' and '.join(sorted(_KINDS_OF_LAYERS))}")
    full, sliding = (_dictionary(nested[kind], where) for kind in ("full_attention", "sliding_attention"))
    if full.get("rope_type") != "proportional" or sliding.get("rope_type", "default") != "default":
        raise ArchitectureError(f"{where} is not supported", "Supported is proportional for full, default for sliding attention.")
    return full, sliding


def _base(parameters: Mapping[str, Any], keys: Keys, key: str, default: float) -> float:
    value = parameters["rope_theta"] if "rope_theta" in parameters else keys.given.get(key, default)
    found = number(value, f"{key} in config.json of {keys.architecture}")
    if found <= 1:
        raise keys.error(key, f"is {shown(value)}: frequencies would not decrease")
    return found


def _kind(parameters: Mapping[str, Any], table: RotaryTable, where: str) -> str:
    if not table.reads_type and "type" in parameters and "rope_type" not in parameters:
        raise ArchitectureError(f"{where}: `type` is not supported, transformers reads rope_type here", "Name it rope_type.")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    kind = table.aliases.get(kind, kind) if isinstance(kind, str) else kind
    if kind not in table.kinds:
        raise ArchitectureError(f"{where}: the kind {shown(kind)} is not supported", f"Supported: {', '.join(table.kinds)}.")
    allowed = _OF_NO_KIND | (_OF_SCALED_QUERIES if table.scales_queries else set()) | ({_ALPHA} if table.alpha else set())
    allowed |= set(_MSCALES) if table.mscales else set()
    for key in parameters:
        if key not in allowed and key not in _OF_SOME_KIND:
            raise ArchitectureError(f"{where} has the unknown key {shown(key)}", "Remove it if the model does not depend on it.")
    return str(kind)


def _rotated(parameters: Mapping[str, Any], keys: Keys, kind: str, head_size: int, default: float) -> int:
    """Return the number of leading elements of a head that are rotated."""
    if kind == "proportional":
        return head_size
    given = [place["partial_rotary_factor"] for place in (parameters, keys.given) if place.get("partial_rotary_factor") is not None]
    dim_key = keys.table.rotary.dim
    if dim_key and keys.get(dim_key) is not None:
        given.append(keys.count(dim_key) / head_size)
    where = f"partial_rotary_factor in config.json of {keys.architecture}"
    factors = {number(value, where) for value in given} or {default}
    if not keys.table.rotary.partial:
        if (kind != "default" or keys.table.rotary.whole) and factors != {1.0}:
            raise keys.error("partial_rotary_factor", "rotates a part of each head, which this family does not", "Remove it.")
        return head_size
    if not given and default != 1.0 and "partial_rotary_factor" in keys.given:
        raise keys.error("partial_rotary_factor", f"is null, which rotates other than the family's {default:g}", "Remove it.")
    if len(factors) > 1:
        raise keys.error("partial_rotary_factor", f"has two values, {sorted(factors)}", "Leave one of them.")
    (factor,) = factors
    dim = int(head_size * factor)
    if not 0 < factor <= 1 or dim < 2 or dim % 2:
        raise keys.error("partial_rotary_factor", f"is {factor}: it would rotate {dim} of {head_size} elements")
    return dim


def _scaling(parameters: Mapping[str, Any], kind: str, keys: Keys, dim: int) -> dict[str, Any]:
    """Return rotary_scaling with all keys of its kind."""
    where = _where(keys)
    found: dict[str, Any] = {"rope_type": kind}
    numbers = (*_NUMBERS.get(kind, ()), *(_MSCALES if keys.table.rotary.mscales else ()))
    for name in (*numbers, *_LISTS.get(kind, ())):
        if name not in parameters:
            raise ArchitectureError(f"{where} lacks {name!r}, which {kind} needs", "Use the complete config.json of the model.")
    for name in numbers:
        found[name] = _positive(parameters[name], f"{name} of {where}")
    for name in _OPTIONAL_NUMBERS.get(kind, ()):
        if parameters.get(name) is not None:
            found[name] = _positive(parameters[name], f"{name} of {where}")
    if kind == "dynamic" and keys.table.rotary.alpha and parameters.get(_ALPHA):
        found[_ALPHA] = _positive(parameters[_ALPHA], f"{_ALPHA} of {where}")
    for name in _LISTS.get(kind, ()):
        found[name] = _factors(parameters[name], name, where, dim // 2)
    if kind == "proportional":
        found["partial_rotary_factor"] = _part(parameters.get("partial_rotary_factor", 1.0), where)
    found |= {name: bool(parameters[name]) for name in _FLAGS.get(kind, ()) if name in parameters}
    if kind in _TRAINED:
        found[_ORIGINAL] = _original(parameters, keys)
    _check_factors(found, where)
    return found


def _check_factors(scaling: Mapping[str, Any], where: str) -> None:
    if scaling.get("factor", 1.0) < 1:
        raise ArchitectureError(f"factor of {where} is {scaling['factor']}, less than 1")
    if scaling["rope_type"] == "llama3" and scaling["low_freq_factor"] > scaling["high_freq_factor"]:
        raise ArchitectureError(f"{where}: low_freq_factor is more than high_freq_factor")


def _part(value: Any, where: str) -> float:
    found = _positive(value, f"partial_rotary_factor of {where}")
    if found > 1:
        raise ArchitectureError(f"partial_rotary_factor of {where} is {found}, more than the whole head")
    return found


def _positive(value: Any, where: str) -> float:
    found = number(value, where)
    if found <= 0:
        raise ArchitectureError(f"{where} is {shown(value)}, not positive")
    return found


def _factors(value: Any, name: str, where: str, length: int) -> list[float]:
    if not isinstance(value, list) or len(value) != length:
        what = f"has {len(value)} entries" if isinstance(value, list) else f"is {shown(value)}"
        raise ArchitectureError(f"{name} of {where} {what}, not {length} numbers, one per rotated pair")
    return [_positive(item, f"{name} of {where}") for item in value]


def _original(parameters: Mapping[str, Any], keys: Keys) -> int:
    """Return the trained length: the key of config.json, else the dictionary's, else max_position_embeddings."""
    if keys.get(_ORIGINAL) is not None:
        return keys.count(_ORIGINAL)
    if _ORIGINAL not in parameters:
        return keys.count("max_position_embeddings")
    value = parameters[_ORIGINAL]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ArchitectureError(f"{_ORIGINAL} of {_where(keys)} is {shown(value)}, not a positive number")
    return value
