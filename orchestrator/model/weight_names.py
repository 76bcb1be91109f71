"""Names of the weights that a stage's network binds, from the config alone: conversion must write exactly these.

networks/ derives the same names when it writes graphs. Here they need no onnx, so that `plan` can check the family's rules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from orchestrator.base.errors import BUG, WeightMapError
from orchestrator.model.config import ModelConfig
from orchestrator.model.config_table import SWIGLU, XIELU
from orchestrator.model.rules import Family, Where
from orchestrator.model.stage import StageOptions
from orchestrator.model.topology import Topology

_TWIN = "_float32"
"""Suffix of the float32 copy of a norm that the network reads. The first copy is for TensorRT-LLM's format."""


def bound_names(stage: StageOptions) -> Iterator[str]:
    """Yield every weight that the network of an unquantized stage binds. All ranks of a stage bind the same names."""
    config = stage.config
    if stage.is_first:
        yield "transformer.vocab_embedding.weight"
    for layer in range(stage.num_layers):
        prefix = f"transformer.layers.{layer}"
        for name in _layer_norms(config):
            yield from _biased_norm(config, f"{prefix}.{name}")
        if config.qk_layernorm in ("head", "full"):
            yield from (_norm(config, f"{prefix}.attention.{name}_layernorm") for name in "qk")
        if config.layer_scalar:
            yield f"{prefix}.layer_scalar"
        yield from _attention(config, f"{prefix}.attention")
        mlp = _experts if config.has_experts(stage.first_layer + layer) else _mlp
        yield from mlp(config, f"{prefix}.mlp")
    if stage.is_last:
        yield from _biased_norm(config, "transformer.ln_f")
        yield from _linear("lm_head", config.head_bias)


def _layer_norms(config: ModelConfig) -> Iterator[str]:
    if config.norm_placement != "post":
        yield "input_layernorm"
    if not config.parallel_blocks:
        yield "post_layernorm"
    if config.norm_placement == "sandwich":
        yield "pre_feedforward_layernorm"
    if config.norm_placement != "pre":
        yield "post_feedforward_layernorm"


def _biased_norm(config: ModelConfig, name: str) -> Iterator[str]:
    yield _norm(config, name)
    if config.norm_bias:
        yield f"{name}.bias"


def _norm(config: ModelConfig, name: str) -> str:
    return f"{name}.weight{_TWIN}" if config.exact_norms else f"{name}.weight"


def _linear(name: str, bias: bool) -> Iterator[str]:
    yield f"{name}.weight"
    if bias:
        yield f"{name}.bias"


def _attention(config: ModelConfig, prefix: str) -> Iterator[str]:
    if config.attention_sinks:
        yield f"{prefix}.sinks"
    if config.is_latent:
        yield from _linear(f"{prefix}.fused_a", config.attn_bias)
        yield _norm(config, f"{prefix}.kv_a_layernorm")
        if config.q_lora_rank:
            yield _norm(config, f"{prefix}.q_a_layernorm")
        yield from (f"{prefix}.{name}.weight" for name in ("q_b_proj", "k_b_proj", "v_b_proj"))
    else:
        yield from _linear(f"{prefix}.qkv", config.attn_bias)
    if config.attention_gate:
        yield f"{prefix}.gate.weight"
    yield from _linear(f"{prefix}.dense", config.attn_dense_bias)


def _mlp(config: ModelConfig, prefix: str) -> Iterator[str]:
    has_gate = config.mlp_gated and config.hidden_act != SWIGLU
    for name in ("fc", "gate", "proj") if has_gate else ("fc", "proj"):
        yield from _linear(f"{prefix}.{name}", config.mlp_bias)
    if config.hidden_act == XIELU:
        yield from (f"{prefix}.act.{name}" for name in ("alpha_p", "alpha_n", "beta", "eps"))


def _experts(config: ModelConfig, prefix: str) -> Iterator[str]:
    moe = config.moe
    assert moe is not None
    yield from _linear(f"{prefix}.router", moe.router_bias)
    if moe.selection_bias:
        yield f"{prefix}.router.e_score_correction_bias"
    for name in ("fc", "proj"):
        yield from _linear(f"{prefix}.{name}", moe.expert_bias)
    if moe.own_norms:
        layer = prefix.removesuffix(".mlp")
        yield from (f"{prefix}.router.{name}" for name in ("scale", "per_expert_scale"))
        for name in ("post_feedforward_layernorm_1", "pre_feedforward_layernorm_2", "post_feedforward_layernorm_2"):
            yield from _biased_norm(config, f"{layer}.{name}")
    if moe.shared_expert_intermediate_size:
        yield from (f"{prefix}.shared_expert.{name}.weight" for name in ("fc", "proj"))
        if moe.shared_expert_gate:
            yield f"{prefix}.shared_expert_gate.weight"


def disagreements(family: Family, stage: StageOptions) -> dict[str, list[str]]:
    """Return what is wrong with the weights that a family's rules write for a stage -> their names, sorted; empty: nothing."""
    bound, written = set(bound_names(stage)), Counter(_written(family, stage))
    twins = {name.removesuffix(_TWIN) for name in bound if name.endswith(_TWIN)}
    found = {
        "are bound and not written": bound - written.keys(),
        "are written and not bound": written.keys() - bound - twins,
        "are written twice": {name for name, times in written.items() if times > 1},
    }
    return {problem: sorted(names) for problem, names in found.items() if names}


def check_names(family: Family, config: ModelConfig, topology: Topology) -> None:
    """Check that the family's rules write the weights that the network of each stage binds. Raises WeightMapError."""
    for pp_rank in range(topology.pp):
        for problem, names in disagreements(family, StageOptions.of(config, topology, pp_rank)).items():
            raise WeightMapError(
                f"the network of stage {pp_rank} and the rules of {family.name} disagree: {len(names)} weights {problem}, "
                f"such as {names[0]}",
                BUG,
            )


def _written(family: Family, stage: StageOptions) -> Iterator[str]:
    """Yield the targets of the rules that apply to a stage."""
    for rule in family.rules:
        if not rule.applies(stage.config):
            continue
        if rule.where is Where.EVERY_LAYER:
            held = (layer for layer in range(stage.num_layers) if rule.in_layer(stage.config, stage.first_layer + layer))
            yield from (rule.target.format(layer=layer) for layer in held)
        elif (rule.where is Where.FIRST_STAGE and stage.is_first) or (rule.where is Where.LAST_STAGE and stage.is_last):
            yield rule.target
