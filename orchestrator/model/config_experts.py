"""Mixture of experts of config.json: the router, the experts' sizes, and the layers that have experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from orchestrator.model.config_keys import Keys, shown
from orchestrator.model.config_table import ExpertTable


def _more(default: Any, **limits: Any) -> Any:
    """Return a field that TensorRT-LLM's dictionary does not have: it is written only where it differs from its default."""
    return Field(default, exclude_if=lambda value: value == default, **limits)


class MoeConfig(BaseModel):
    """Mixture of experts, with the names of TensorRT-LLM's `moe` dictionary.

    A router scores all experts, chooses `top_k` of them and weighs their outputs. Fields after the first four are written only
    where they differ from their default.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    num_experts: int = Field(ge=1)
    top_k: int = Field(ge=1)
    normalization_mode: int = 1
    """1: scale the chosen experts' weights to sum to one; 0: do not."""
    shared_expert_intermediate_size: int = 0
    """Intermediate size of the shared expert; 0: there is none. Several shared experts are one of summed size."""
    layers: tuple[bool, ...] | None = _more(None)
    """Whether each layer has experts, or a dense MLP; None: all have experts."""
    scoring: Literal["softmax", "sigmoid", "softmax_of_chosen", "sigmoid_of_chosen", "sparse_mixer"] = _more("softmax")
    """How router logits become scores: before the choice, of the chosen only (gpt-oss, Llama 4), or of each chosen expert among
    those near it (SparseMixer, Phi-3.5-MoE)."""
    jitter: float = _more(0.0, ge=0)
    """Half the distance within which an expert is near another, as a share of its logit's size (SparseMixer)."""
    selection_bias: bool = _more(False)
    """Whether experts are chosen by score + bias. Their weights are scores without the bias."""
    num_groups: int = _more(1, ge=1)
    """Groups of consecutive experts. A group's score is the sum of its two largest."""
    kept_groups: int = _more(1, ge=1)
    """Groups among which experts are chosen."""
    routed_scale: float = _more(1.0)
    """Factor of the weights, after they are scaled to sum to one."""
    sum_epsilon: float = _more(0.0)
    """Number added to the sum of the weights before it divides them."""
    sum_minimum: float = _more(0.0)
    """Smallest number that divides the weights."""
    output_scale: float = _more(1.0)
    """Factor of the sum of the experts and the shared expert."""
    weighs_input: bool = _more(False)
    """Whether the weights multiply the experts' inputs instead of their outputs (Llama 4)."""
    router_bias: bool = _more(False)
    expert_bias: bool = _more(False)
    """Whether the experts' linears have biases."""
    shared_expert_gate: bool = _more(True)
    """Whether the shared expert is weighted by the sigmoid of a gate."""
    own_norms: bool = _more(False)
    """Whether experts stand beside a dense MLP, which is the shared expert here, both with norms of their own before and after; the
    router norms its input, and a factor multiplies each expert's weight (Gemma 4)."""
    gated: bool = _more(True)
    """Whether experts, the shared one too, compute act(gate) * up; else act(up)."""
    swiglu_limit: float | None = _more(None)
    """Bound on the gate from above, and on up from both sides (gpt-oss); None: none."""
    swiglu_alpha: float = _more(1.0)
    """Factor of the gate in its sigmoid: gate * sigmoid(alpha * gate) * (up + beta)."""
    swiglu_beta: float = _more(0.0)

    @property
    def has_shared_expert(self) -> bool:
        return self.shared_expert_intermediate_size > 0


def experts(keys: Keys, num_layers: int) -> dict[str, Any]:
    """Return moe and moe_intermediate_size of ModelConfig. Raises ArchitectureError, which names the key."""
    table = keys.table.experts
    if table is None or (table.switch is not None and not keys.flag(table.switch)):
        return {}
    count = keys.count(_name_of_count(keys, table))
    chosen = _chosen(keys, table.chosen, num_layers)
    if chosen > count:
        raise keys.error(table.chosen, f"is {chosen}, and there are {count} experts")
    size = keys.count(table.size)
    layers = EXPERT_LAYERS[table.layers](keys, num_layers)
    moe = {
        "num_experts": count,
        "top_k": chosen,
        "normalization_mode": 1 if table.normalized is None else int(keys.flag(table.normalized)),
        "shared_expert_intermediate_size": _shared_size(keys, table, size),
        "layers": None if all(layers) else layers,
        **_groups(keys, table, count, chosen),
        **({"routed_scale": keys.number(table.routed_scale)} if table.routed_scale else {}),
        **_selection(keys, table),
        **_combination(keys, table),
        **({"sum_minimum": keys.number(table.sum_minimum)} if table.sum_minimum else {}),
        **({"jitter": keys.number(table.jitter)} if table.jitter else {}),
        **table.constants,
    }
    return {"moe": moe, "moe_intermediate_size": None if table.size == keys.table.dense_size else size}


def _selection(keys: Keys, table: ExpertTable) -> dict[str, Any]:
    """Return scoring and normalization_mode of a family whose config.json names the function."""
    if table.selection is None:
        return {}
    kind = keys.get(table.selection)
    if kind not in ("softmax", "sigmoid"):
        raise keys.error(table.selection, f"is {shown(kind)}, which is not supported", "Supported: softmax, sigmoid.")
    return {"scoring": f"{kind}_of_chosen", **({"normalization_mode": 1} if kind == "softmax" else {})}


def _combination(keys: Keys, table: ExpertTable) -> dict[str, float]:
    """Return output_scale of a family whose config.json says how the shared expert is added."""
    if table.combination is None:
        return {}
    kind = keys.get(table.combination)
    if kind not in ("average", "sum"):
        raise keys.error(table.combination, f"is {shown(kind)}, which is not supported", "Supported: average, sum.")
    has_shared = table.shared_count is not None and keys.count(table.shared_count, least=0) > 0
    return {"output_scale": 0.5 if kind == "average" and has_shared else 1.0}


def _chosen(keys: Keys, key: str, num_layers: int) -> int:
    """Return the number of experts per token, which some config.json list for each layer (Hunyuan): it must be the same in all."""
    listed = keys.get(key)
    if not isinstance(listed, list) or not keys.table.experts or not keys.table.experts.listed_choice:
        return keys.count(key)
    if len(listed) < num_layers or any(is_wrong_count(each) or each != listed[0] for each in listed[:num_layers]):
        raise keys.error(key, f"is {shown(listed)}, which is not supported", "Supported is one number in all layers.")
    return int(listed[0])


def is_wrong_count(value: Any) -> bool:
    """Whether a value is no positive integer."""
    return not isinstance(value, int) or isinstance(value, bool) or value < 1


def _shared_size(keys: Keys, table: ExpertTable, size: int) -> int:
    """Return the intermediate size of the shared expert; several of an expert's size are one of summed size."""
    if table.shared_count:
        return keys.count(table.shared_count, least=0) * size
    return keys.count(table.shared_size, least=0) if table.shared_size else 0


def _groups(keys: Keys, table: ExpertTable, count: int, chosen: int) -> dict[str, int]:
    """Return num_groups and kept_groups. Raises ArchitectureError for groups from which the experts cannot be chosen."""
    if table.groups is None:
        return {}
    groups, kept = (keys.count(key) for key in table.groups)
    if count % groups or count // groups < 2:
        raise keys.error(table.groups[0], f"is {groups}: {count} experts do not make that many groups of two or more")
    if kept > groups or chosen > kept * (count // groups):
        raise keys.error(table.groups[1], f"is {kept} of {groups} groups, from which {chosen} experts cannot be chosen")
    return {"num_groups": groups, "kept_groups": kept}


def _name_of_count(keys: Keys, table: ExpertTable) -> str:
    """Return the key of the number of experts: in some families transformers has two names for it, and saves either."""
    if table.alias is None or table.alias not in keys.given:
        return table.count
    if table.count in keys.given and keys.get(table.count) != keys.get(table.alias):
        raise keys.error(table.count, f"is {shown(keys.get(table.count))}, {table.alias} is {shown(keys.get(table.alias))}")
    return table.alias


def _every(_keys: Keys, num_layers: int) -> tuple[bool, ...]:
    return (True,) * num_layers


def _sparse_step(keys: Keys, num_layers: int) -> tuple[bool, ...]:
    """Return the layers of Qwen's rule: every decoder_sparse_step-th, without those of mlp_only_layers."""
    step, dense = keys.count("decoder_sparse_step"), keys.get("mlp_only_layers") or []
    if not isinstance(dense, list) or any(isinstance(layer, bool) or not isinstance(layer, int) for layer in dense):
        raise keys.error("mlp_only_layers", f"is {shown(dense)}, not a list of layer numbers")
    return tuple((layer + 1) % step == 0 and layer not in dense for layer in range(num_layers))


def _after_first(keys: Keys, num_layers: int) -> tuple[bool, ...]:
    """Return the layers of DeepSeek's rule: all but the first ones."""
    assert keys.table.experts is not None
    first = keys.count(keys.table.experts.first, least=0)
    return tuple(layer >= first for layer in range(num_layers))


def _listed(keys: Keys, num_layers: int) -> tuple[bool, ...]:
    """Return the layers that mlp_layer_types calls sparse; without it, all but the first ones: one (GLM-4.7-Flash), or as many as
    first_k_dense_replace says in families that read it (EXAONE)."""
    kinds = keys.get("mlp_layer_types")
    if kinds is None:
        key = "first_k_dense_replace"
        first = keys.count(key, least=0) if key in keys.table.defaults else 1
        return tuple(layer >= first for layer in range(num_layers))
    if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in ("dense", "sparse") for kind in kinds):
        raise keys.error("mlp_layer_types", f"is {shown(kinds)}, not {num_layers} entries that are dense or sparse")
    return tuple(kind == "sparse" for kind in kinds)


def _between(keys: Keys, num_layers: int) -> tuple[bool, ...]:
    """Return the layers of Ernie's rule: every moe_layer_interval-th from a first to a last layer (-1: the model's last)."""
    step, first = keys.count("moe_layer_interval"), keys.count("moe_layer_start_index", least=0)
    last = keys.count("moe_layer_end_index", least=-1)
    last = num_layers - 1 if last == -1 else last
    return tuple((layer + 1) % step == 0 and first <= layer <= last for layer in range(num_layers))


def _interleaved(keys: Keys, num_layers: int) -> tuple[bool, ...]:
    """Return the layers of Llama 4's rule: those of moe_layers; without it, every interleave_moe_layer_step-th."""
    listed = keys.get("moe_layers")
    if listed is None:
        step = keys.count("interleave_moe_layer_step")
        return tuple((layer + 1) % step == 0 for layer in range(num_layers))
    if not isinstance(listed, list) or any(isinstance(layer, bool) or not isinstance(layer, int) for layer in listed):
        raise keys.error("moe_layers", f"is {shown(listed)}, not a list of layer numbers")
    return tuple(layer in listed for layer in range(num_layers))


EXPERT_LAYERS: dict[str, Callable[[Keys, int], tuple[bool, ...]]] = {
    "all": _every,
    "sparse_step": _sparse_step,
    "after_first": _after_first,
    "listed": _listed,
    "between": _between,
    "interleaved": _interleaved,
}
"""Rules by which families say which layers have experts."""


def layer_keys(layers: tuple[bool, ...], table: ExpertTable) -> dict[str, Any]:
    """Return the keys of config.json by which the family's rule finds these layers, as far as it can."""
    first = layers.index(True) if True in layers else len(layers)
    match table.layers:
        case "sparse_step":
            return {"decoder_sparse_step": 1, "mlp_only_layers": [number for number, has in enumerate(layers) if not has]}
        case "after_first":
            return {table.first: first}
        case "listed":
            return {"mlp_layer_types": ["sparse" if has else "dense" for has in layers]}
        case "between":
            last = len(layers) - 1 - layers[::-1].index(True) if True in layers else 0
            return {"moe_layer_interval": 1, "moe_layer_start_index": first, "moe_layer_end_index": last}
        case "interleaved":
            return {"moe_layers": [number for number, has in enumerate(layers) if has]}
    return {}
