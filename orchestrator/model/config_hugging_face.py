"""Translation of a Hugging Face config.json to a ModelConfig, by the table of its family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from orchestrator.base.errors import ArchitectureError
from orchestrator.model.config import ModelConfig
from orchestrator.model.config_experts import experts
from orchestrator.model.config_heads import global_heads
from orchestrator.model.config_keys import Keys, check_keys, check_sizes
from orchestrator.model.config_latent import LatentSizes, latent_sizes, softmax_scale
from orchestrator.model.config_rotary import rotary
from orchestrator.model.config_table import ConfigTable
from orchestrator.model.config_windows import windows

TRANSFORMS: dict[str, Callable[[float], float]] = {
    "is": lambda value: value,
    "sqrt": lambda value: value**0.5,
    "rsqrt": lambda value: value**-0.5,
    "inverse": lambda value: 1.0 / value,
}


QK_NORMS = {"per_head": "head", "where_rotated": "rotated"}
"""Transform of a switch of config.json -> qk_layernorm of ModelConfig where it is on."""


def from_hugging_face(
    config: Mapping[str, Any], architecture: str, dtype: str, table: ConfigTable, ignored: frozenset[str] = frozenset()
) -> ModelConfig:
    """Translate a Hugging Face config.json of transformers 4 or 5, as transformers 5 reads it. `ignored` keys are skipped.

    Raises ArchitectureError, which names the key, if a key is missing, unknown, impossible or not supported.
    """
    check_sizes(config, f"config.json of {architecture}")
    check_keys(config, architecture, table, ignored)
    keys = Keys({key: value for key, value in config.items() if key not in ignored}, architecture, table)
    try:
        fields = _translate(keys)
        return ModelConfig.model_validate({"architecture": architecture, "dtype": dtype, **fields, **table.constants})
    except (ValueError, TypeError, ArithmeticError, AttributeError, LookupError) as error:
        raise ArchitectureError(f"config.json of {architecture} holds an impossible value: {error}") from None


def _translate(keys: Keys) -> dict[str, Any]:
    heads, layers = keys.count("num_attention_heads"), keys.count("num_hidden_layers")
    kv_heads = keys.maybe_count("num_key_value_heads") or heads
    latent = latent_sizes(keys, heads, kv_heads) if keys.table.latent else None
    if heads % kv_heads:
        raise keys.error("num_key_value_heads", f"is {kv_heads}, which does not divide the {heads} attention heads")
    if keys.table.whole_heads and keys.count("hidden_size") % heads:
        raise keys.error("hidden_size", f"is {keys.get('hidden_size')}, no multiple of the {heads} attention heads")
    head_size = latent.head_size if latent else keys.maybe_count("head_dim") or _quotient(keys, heads)
    if keys.table.queries_fill_hidden and heads * head_size != keys.count("hidden_size"):
        raise keys.error("head_dim", f"is {head_size}: {heads} heads do not make up hidden_size {keys.get('hidden_size')}")
    return {
        "vocab_size": keys.count("vocab_size"),
        "hidden_size": keys.count("hidden_size"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 1 if latent else kv_heads,
        "head_size": head_size,
        "intermediate_size": keys.maybe_count(keys.table.dense_size) or keys.count("intermediate_size"),
        "hidden_act": keys.activation(),
        **_norms(keys),
        "max_position_embeddings": keys.count("max_position_embeddings"),
        "tie_word_embeddings": keys.flag("tie_word_embeddings"),
        **_rotary(keys, head_size, latent),
        **windows(keys, layers),
        **global_heads(keys, heads, kv_heads, head_size),
        **_embedding_multiplier(keys),
        **experts(keys, layers),
        **{field: _derived(keys, *derived) for field, derived in keys.table.derived.items()},
    }


def _rotary(keys: Keys, head_size: int, latent: LatentSizes | None) -> dict[str, Any]:
    """Return the fields of the rotary embedding, and with latent attention its sizes and its scale too."""
    if latent is None:
        return rotary(keys, head_size)
    if keys.table.rotary.partial:
        found = rotary(keys, head_size, latent.rope / head_size)
        if (rotated := found["rotary_embedding_dim"]) != latent.rope:
            raise keys.error("partial_rotary_factor", f"rotates {rotated} elements, qk_rope_head_dim is {latent.rope}")
    else:
        found = rotary(keys, latent.rope)
    scale = softmax_scale(found["rotary_scaling"], head_size) if keys.table.rotary.scales_softmax else None
    return {**found, **latent.fields(), "rotary_embedding_dim": latent.rope, "attention_scale": scale}


def _norms(keys: Keys) -> dict[str, Any]:
    """Return the epsilon of the norms, and their kind where config.json decides of it."""
    key = keys.table.rms_epsilon
    if key is None:
        return {"norm_epsilon": keys.number(keys.table.epsilon)}
    is_rms = keys.get(key) is not None
    return {"norm_epsilon": keys.number(key if is_rms else keys.table.epsilon), "norm_kind": "rms" if is_rms else "layer"}


def _embedding_multiplier(keys: Keys) -> dict[str, float]:
    switch = keys.table.embedding_switch
    is_on = switch is not None and keys.get(switch) is not None and keys.flag(switch)
    return {"embedding_multiplier": keys.count("hidden_size") ** 0.5} if is_on else {}


def _quotient(keys: Keys, heads: int) -> int:
    """Return hidden_size // heads; transformers drops the remainder."""
    size = keys.count("hidden_size") // heads
    if not size:
        raise keys.error("num_attention_heads", f"is {heads}, more than hidden_size")
    return size


def _derived(keys: Keys, transform: str, key: str) -> Any:
    if keys.get(key) is None:
        return False if isinstance(keys.table.defaults.get(key), bool) else None
    if isinstance(keys.table.defaults.get(key), bool):
        return (QK_NORMS[transform] if keys.flag(key) else "none") if transform in QK_NORMS else keys.flag(key)
    value = keys.number(key)
    if value <= 0:
        raise keys.error(key, f"is {value:g}, not positive")
    return TRANSFORMS[transform](value)
