"""Tables of the family llama, each broken in one way, for `orchestrator family check`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from orchestrator.families import FAMILIES
from orchestrator.families.common import norm
from orchestrator.model.config_table import RotaryTable
from orchestrator.model.rules import Family, Part, Rule


def _with_rules(change: Callable[[Rule], Rule | None]) -> Family:
    changed = (change(rule) for rule in FAMILIES["llama"].rules)
    return replace(FAMILIES["llama"], rules=tuple(rule for rule in changed if rule is not None))


def _without_down_projection(rule: Rule) -> Rule | None:
    return None if rule.target.endswith("mlp.proj.weight") else rule


def _with_another_name(rule: Rule) -> Rule:
    def renamed(part: Part) -> Part:
        return replace(part, source=part.source.replace("post_attention_layernorm", "ffn_norm"))

    return replace(rule, parts=tuple(map(renamed, rule.parts)))


def _with_gate_and_up_exchanged(rule: Rule) -> Rule:
    exchanged = {"mlp.fc.weight": "up_proj", "mlp.gate.weight": "gate_proj"}
    name = next((name for target, name in exchanged.items() if rule.target.endswith(target)), None)
    if name is None:
        return rule
    (part,) = rule.parts
    return replace(rule, parts=(replace(part, source=f"model.layers.{{layer}}.mlp.{name}.weight"),))


def _with_keys_as_wide_as_queries(rule: Rule) -> Rule:
    if not rule.target.endswith("attention.qkv.weight"):
        return rule
    first, second, third = rule.parts
    return replace(rule, parts=(first, replace(second, shape=("q", "hidden")), third))


def _without_a_key(family: Family) -> Family:
    defaults = {key: value for key, value in family.config.defaults.items() if key != "rms_norm_eps"}
    return replace(family, config=replace(family.config, defaults={**defaults, "layer_norm_eps": 1e-6}, epsilon="layer_norm_eps"))


def _with_a_constant(family: Family) -> Family:
    return replace(family, config=replace(family.config, constants={**family.config.constants, "attention_scale": 0.05}))


def _with_another_target(rule: Rule) -> Rule:
    return replace(rule, target=rule.target.replace("post_layernorm", "pre_feedforward_layernorm"))


def _with_a_misspelt_condition(rule: Rule) -> Rule:
    return replace(rule, when={"tie_word_embedding": True}) if rule.when.get("tie_word_embeddings") else rule


def _with_config(**changes: Any) -> Family:
    return replace(FAMILIES["llama"], config=replace(FAMILIES["llama"].config, **changes))


BROKEN = {
    "no rule for the MLP's second linear": _with_rules(_without_down_projection),
    "another name for a norm": _with_rules(_with_another_name),
    "gate and up exchanged": _with_rules(_with_gate_and_up_exchanged),
    "keys as wide as queries": _with_rules(_with_keys_as_wide_as_queries),
    "a key of config.json that the table lacks": _without_a_key(FAMILIES["llama"]),
    "a wrong scale of attention": _with_a_constant(FAMILIES["llama"]),
    "a target that the graph does not have": _with_rules(_with_another_target),
    "a rule too many": replace(FAMILIES["llama"], rules=(*FAMILIES["llama"].rules, norm("post_layernorm", "input_layernorm"))),
    "a misspelt condition": _with_rules(_with_a_misspelt_condition),
    "a misspelt constant": _with_config(constants={"norm_placment": "pre"}),
    "another default": _with_config(defaults={**FAMILIES["llama"].config.defaults, "rms_norm_eps": 1e-5}),
    "another default of the rotary base": _with_config(rotary=RotaryTable(theta=500_000.0)),
}
"""What is broken -> the table."""
