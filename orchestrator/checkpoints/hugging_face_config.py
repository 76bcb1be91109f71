"""Writer of config.json in Hugging Face's format, by the tables by which it is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from orchestrator.base.errors import ArchitectureError
from orchestrator.model.config import ModelConfig
from orchestrator.model.config_experts import layer_keys
from orchestrator.model.config_heads import global_head_keys
from orchestrator.model.config_hugging_face import from_hugging_face
from orchestrator.model.config_latent import LATENT_KEYS
from orchestrator.model.config_table import ConfigTable
from orchestrator.model.rules import Family

_LAYOUT = {"use_parallel_embedding", "embedding_sharding_dim"}
"""Fields that describe the layout of the ranks, not the model."""
_INVERSES: dict[str, Callable[[Any], Any]] = {
    "is": lambda value: value,
    "sqrt": lambda value: value**2,
    "rsqrt": lambda value: value**-2,
    "inverse": lambda value: 1.0 / value,
    "per_head": lambda value: value == "head",
    "where_rotated": lambda value: value == "rotated",
}
"""Inverses of model.config_hugging_face.TRANSFORMS."""


def hugging_face_config(config: ModelConfig, family: Family) -> dict[str, Any]:
    """Return a config.json that from_hugging_face reads as `config`. Raises ArchitectureError when there is none."""
    table, layers = family.config, range(config.num_hidden_layers)
    made: dict[str, Any] = {
        **{key: built[0] for key, built in table.only.items()},
        "architectures": [config.architecture],
        "dtype": config.dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_size,
        table.dense_size: config.intermediate_size,
        table.activation: next((name for name, act in table.activations.items() if act == config.hidden_act), config.hidden_act),
        **_norm_keys(config, table),
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_parameters": _rotary_keys(config),
        **_window_keys(config, table),
        **({} if table.rotary.layers is None else {table.rotary.layers: [int(config.has_rotary(layer)) for layer in layers]}),
        **_temperature_keys(config, table),
        **({} if table.embedding_switch is None else {table.embedding_switch: config.embedding_multiplier != 1.0}),
        **(global_head_keys(config.model_dump()) if table.global_heads else {}),
        **_rotated_keys(config, table),
        **_expert_keys(config, table),
        **_latent_keys(config, table),
    }
    if config.rotary_embedding_dim and not config.is_latent:
        made["partial_rotary_factor"] = config.rotary_embedding_dim / config.head_size
    if "original_max_position_embeddings" in table.defaults:
        made["original_max_position_embeddings"] = (config.rotary_scaling or {}).get("original_max_position_embeddings", 1)
    for field, (transform, key) in table.derived.items():
        value = getattr(config, field)
        if key not in made:
            made[key] = value if value is None or isinstance(value, bool) else _INVERSES[transform](value)
    read = from_hugging_face(made, config.architecture, config.dtype, table)
    fields = ModelConfig.model_fields.keys() - _LAYOUT - {"rotary_scaling"}
    wrong = sorted(field for field in fields if getattr(read, field) != getattr(config, field))
    if not _is_same_scaling(read.rotary_scaling, config.rotary_scaling):
        wrong.append("rotary_scaling")
    if wrong:
        raise ArchitectureError(
            f"config.json of this {config.architecture} cannot be read as {family.name}: {', '.join(wrong)} differ",
            "Build from the Hugging Face checkpoint.",
        )
    return made


def _is_same_scaling(read: Mapping[str, Any] | None, given: Mapping[str, Any] | None) -> bool:
    """Whether the complete dictionary `read` agrees with `given`, which may lack defaults and have unused keys."""
    if read is None or given is None:
        return read is given
    return all(given.get(key) in (None, value) for key, value in read.items())


def _rotary_keys(config: ModelConfig) -> dict[str, Any]:
    """Return rope_parameters: one dictionary for all layers, or one per kind of layer."""
    full = {"rope_type": "default", **(config.rotary_scaling or {}), "rope_theta": config.rotary_base}
    if config.query_scale_beta is not None and config.query_scale_floor is None:
        full["llama_4_scaling_beta"] = config.query_scale_beta
    if config.rotary_base_local is None:
        return full
    return {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": config.rotary_base_local}}


def _window_keys(config: ModelConfig, table: ConfigTable) -> dict[str, Any]:
    """Return the keys that the family's rule for windows reads."""
    if table.windows == "none":
        return {}
    made: dict[str, Any] = {table.window_key: config.sliding_window}
    if "use_sliding_window" in table.defaults:
        made["use_sliding_window"] = config.sliding_window is not None
    if "layer_types" in table.defaults:
        layers = range(config.num_hidden_layers)
        made["layer_types"] = [table.window_kind if config.has_window(layer) else "full_attention" for layer in layers]
    return made


def _rotated_keys(config: ModelConfig, table: ConfigTable) -> dict[str, int]:
    """Return the key that rotates layers without a window too."""
    if table.rotary.dense_too is None:
        return {}
    layers = range(config.num_hidden_layers)
    return {table.rotary.dense_too: 1 if any(config.has_rotary(each) and not config.has_window(each) for each in layers) else 2}


def _norm_keys(config: ModelConfig, table: ConfigTable) -> dict[str, float | None]:
    if table.rms_epsilon is None:
        return {table.epsilon: config.norm_epsilon}
    if config.norm_kind == "rms":
        return {table.rms_epsilon: config.norm_epsilon}
    return {table.epsilon: config.norm_epsilon, table.rms_epsilon: None}


def _temperature_keys(config: ModelConfig, table: ConfigTable) -> dict[str, Any]:
    """Return the keys of the scale of queries by position in the layers without rotary embedding."""
    if table.rotary.temperature is None:
        return {}
    switch, length, factor = table.rotary.temperature
    if config.query_scale_beta is None:
        return {switch: False}
    return {switch: True, length: config.query_scale_floor, factor: config.query_scale_beta}


def _latent_keys(config: ModelConfig, table: ConfigTable) -> dict[str, Any]:
    """Return the sizes of latent attention, and the key/value heads as such models count them."""
    if not config.is_latent:
        return {}
    return {
        "num_key_value_heads": config.num_attention_heads,
        "head_dim": config.head_size if table.rotary.partial else config.qk_rope_head_dim,
        **{key: getattr(config, key) for key in LATENT_KEYS},
        "q_lora_rank": config.q_lora_rank or None,
    }


def _expert_keys(config: ModelConfig, table: ConfigTable) -> dict[str, Any]:
    experts, moe = table.experts, config.moe
    if experts is None or moe is None:
        return {} if experts is None or experts.switch is None else {experts.switch: False}
    made: dict[str, Any] = {
        experts.count: moe.num_experts,
        experts.chosen: moe.top_k,
        experts.size: config.expert_size,
        **layer_keys(moe.layers or (True,) * config.num_hidden_layers, experts),
    }
    optional = {
        experts.switch: True,
        experts.selection: moe.scoring.removesuffix("_of_chosen"),
        experts.combination: "sum" if moe.output_scale == 1.0 else "average",
        experts.normalized: moe.normalization_mode == 1,
        experts.shared_size: moe.shared_expert_intermediate_size,
        experts.shared_count: moe.shared_expert_intermediate_size // config.expert_size,
        experts.routed_scale: moe.routed_scale,
        experts.sum_minimum: moe.sum_minimum,
        experts.jitter: moe.jitter,
    }
    made |= {key: value for key, value in optional.items() if key is not None}
    if experts.groups:
        made |= dict(zip(experts.groups, (moe.num_groups, moe.kept_groups), strict=True))
    return made
