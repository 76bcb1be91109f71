"""Translation of a ModelConfig to config.json of a TensorRT-LLM checkpoint, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.base.errors import TopologyError
from orchestrator.model.config import ModelConfig
from orchestrator.model.config_keys import check_sizes
from orchestrator.model.config_table import SWIGLU
from orchestrator.model.quantization import ModelQuantization, quantization_config
from orchestrator.model.topology import Topology


def to_trtllm(config: ModelConfig, topology: Topology, quantization: ModelQuantization | None = None) -> dict[str, Any]:
    """Return config.json of a TensorRT-LLM checkpoint, with field names and values of TensorRT-LLM 0.16.

    Fields that TensorRT-LLM does not have are written only if they differ from their default, because its reader warns of
    unknown keys.
    """
    mapping: dict[str, Any] = {
        "world_size": topology.world_size, "gpus_per_node": 8,
        "cp_size": topology.cp, "tp_size": topology.tp, "pp_size": topology.pp,
        "moe_tp_size": topology.moe_tp, "moe_ep_size": topology.moe_ep,
    }  # fmt: skip
    if topology.pp_partition is not None:
        mapping["pp_partition"] = list(topology.pp_partition)
    fields = {
        name: value
        for name, value in config.model_dump(mode="json").items()
        if name in _ALWAYS or value != ModelConfig.model_fields[name].default
    }
    if config.attn_bias and not config.attn_dense_bias and not _is_qwen(config.architecture):
        fields["attn_dense_bias"] = False  # else the biases of queries, keys and values would mean one of the output too
    if config.moe is not None and config.hidden_act in ("silu", "swish"):
        fields["hidden_act"] = SWIGLU  # TensorRT-LLM's experts are gated when their activation says so
    return {
        **fields,
        "logits_dtype": "float32",
        "position_embedding_type": "rope_gptj" if config.rotary_interleaved else "rope_gpt_neox",
        "rotary_embedding_dim": config.qk_rope_head_dim,
        **({"qk_rope_head_dim": config.qk_rope_head_dim} if config.is_latent else {}),
        "use_parallel_embedding": config.use_parallel_embedding,
        "embedding_sharding_dim": config.embedding_sharding_dim,
        "qk_layernorm": config.qk_layernorm != "none",
        "qk_layernorm_kind": config.qk_layernorm,
        "mapping": mapping,
        "quantization": quantization_config(quantization),
    }


_ALWAYS = {
    "architecture", "dtype", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_size", "intermediate_size", "hidden_act", "norm_epsilon", "max_position_embeddings", "rotary_base", "rotary_scaling",
    "attn_bias", "mlp_bias", "tie_word_embeddings",
}  # fmt: skip


def _is_qwen(architecture: str) -> bool:
    """Whether TensorRT-LLM's readers take attn_bias not to mean a bias of the output."""
    return "Qwen" in architecture


def from_trtllm(config: Mapping[str, Any]) -> tuple[ModelConfig, Topology]:
    """Read config.json of a TensorRT-LLM checkpoint, ours or NVIDIA's. Keys that ModelConfig does not have are skipped.

    Raises TopologyError for a mapping that contradicts itself, ValueError for values that no model can have.
    """
    check_sizes(config, "config.json of the TensorRT-LLM checkpoint")
    try:
        return _from_trtllm(config)
    except (TypeError, AttributeError, ArithmeticError, LookupError) as error:
        raise ValueError(f"a value is of the wrong type: {error}") from None


def _from_trtllm(config: Mapping[str, Any]) -> tuple[ModelConfig, Topology]:
    topology = _mapping(config.get("mapping") or {}, has_experts=bool((config.get("moe") or {}).get("num_experts")))
    known = {key: value for key, value in config.items() if key in ModelConfig.model_fields and value is not None}
    heads = known.get("num_attention_heads", 1)
    known.setdefault("num_key_value_heads", heads)
    known.setdefault("head_size", known.get("hidden_size", 1) // heads)
    known.setdefault("rotary_base", 10000.0)
    known.setdefault("norm_epsilon", 1e-5)
    architecture = str(known.get("architecture", ""))
    known.setdefault("attn_dense_bias", bool(known.get("attn_bias")) and not _is_qwen(architecture))
    known["qk_layernorm"] = config.get("qk_layernorm_kind") or ("head" if config.get("qk_layernorm") else "none")
    if known.get("rotary_embedding_dim") == known["head_size"]:
        del known["rotary_embedding_dim"]
    if not (known.get("moe") or {}).get("num_experts"):
        known.pop("moe", None)
    elif known.get("hidden_act") == SWIGLU:
        known["hidden_act"] = "silu"
    return ModelConfig.model_validate(known), topology


def _mapping(mapping: Mapping[str, Any], *, has_experts: bool) -> Topology:
    """Return the topology of `mapping`: all keys (TensorRT-LLM's converter) or world_size, tp_size and pp_size (Model Optimizer).

    The moe sizes are ignored without experts, because versions differ in what they write there.
    """
    tp, pp, cp = (int(mapping.get(key) or 1) for key in ("tp_size", "pp_size", "cp_size"))
    moe_ep = int(mapping.get("moe_ep_size") or 1) if has_experts else 1
    moe_tp = int(mapping.get("moe_tp_size") or -1)
    partition = mapping.get("pp_partition")
    topology = Topology(tp, pp, tuple(partition) if partition else None, max(moe_ep, 1), cp)
    world_size = mapping.get("world_size", topology.world_size)
    if world_size != topology.world_size:
        raise TopologyError(
            f"mapping of config.json: world_size {world_size} is not tp_size {tp} x pp_size {pp} x cp_size {cp}",
            f"Set world_size to {topology.world_size}, or the sizes to those of the checkpoint.",
        )
    if has_experts and moe_tp > 0 and moe_tp * topology.moe_ep != tp:
        legal = ", ".join(f"{tp // ep} x {ep}" for ep in range(1, tp + 1) if tp % ep == 0)
        raise TopologyError(
            f"mapping of config.json: moe_tp_size {moe_tp} x moe_ep_size {topology.moe_ep} is not tp_size {tp}",
            f"Legal here: moe_tp_size x moe_ep_size in {legal}.",
        )
    return topology
