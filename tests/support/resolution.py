"""What transformers makes of a config.json: measured on a model that it built and ran, not read from the config class.

The model is tiny, its weights are seeded. Windows are counted in the masks that attention was called with, caps in the logits,
scales between embedding and first layer: so nothing depends on which key the modeling code reads.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassError

from orchestrator.model.config import ModelConfig
from orchestrator.work.as_hugging_face import causal_class

NUM_TOKENS = 12
"""More than any window that the tests draw."""
REFUSALS = (
    StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, IndexError, ArithmeticError,
    AssertionError,
)  # fmt: skip


@dataclass(frozen=True)
class Resolution:
    """What decides the network, in the terms of our ModelConfig."""

    windows: tuple[int | None, ...]
    """Positions that the last token of each layer sees; None: all."""
    head_size: int
    num_key_value_heads: int
    heads: tuple[tuple[int, int, bool], ...]
    """Of each layer: head size, key/value heads, whether it projects values."""
    biases: tuple[bool, bool, bool]
    """Of queries, of the attention's output, of the MLP."""
    activation: str
    norm_epsilon: float
    attention_scale: float
    attention_cap: float | None
    final_cap: float | None
    embedding_multiplier: float
    residual_multiplier: float
    logits_scaling: float
    tied: bool
    rotary: tuple[tuple[Any, ...], ...]
    """(rope_type, base, rotated elements) of the full layers, then of those with a window if they differ."""
    scaling: Mapping[str, Any] = field(default_factory=dict)
    moe: tuple[int, int, int, int] | None = None
    """Experts, chosen, intermediate size, that of the shared expert."""
    normalized: float | None = None
    """Sum of the chosen experts' weights; 0: not the same for all tokens; None: no experts, or all are chosen."""
    expert_layers: tuple[bool, ...] = ()
    output_scale: float = 1.0
    """Factor of the sum of the experts and the shared expert."""
    groups: tuple[int, int] = (1, 1)
    """Groups of experts, and those that are kept."""
    qk_norm: bool = False
    rotated_layers: tuple[bool, ...] = ()
    latent: tuple[int, int, int, int, bool] | None = None
    """Sizes of latent attention: queries' latent, latent, plain part of a query, value; whether rotated pairs are neighbours."""
    query_scale: tuple[float, ...] | None = None
    """Factor of the logarithm of the position that scales queries, and for Llama 4 the length that it counts."""
    sinks: bool = False
    head_bias: bool = False
    jitter: float | None = None
    """Threshold of a SparseMixer; None: the router is another."""


def resolved(config: Mapping[str, Any]) -> Resolution:
    """Build and run the model of `config`. Raises one of REFUSALS when transformers does not take it."""
    import torch
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(3)
    made = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    made._attn_implementation = "eager"
    model: Any = causal_class(made)(made).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
        return _measure(model, made)


def _measure(model: Any, made: Any) -> Resolution:
    import torch

    has_experts = tuple(hasattr(_block(layer), "experts") for layer in model.model.layers)
    calls, hidden = _run(model)
    layer, attention = model.model.layers[0], model.model.layers[0].self_attn
    tokens = torch.arange(NUM_TOKENS) % made.vocab_size
    embedded = model.model.embed_tokens.weight[tokens]
    multiplier = float((hidden[0] / embedded).median())
    size = attention.qk_head_dim if hasattr(attention, "qk_head_dim") else attention.head_dim
    mixture = next((layer for layer, has in zip(model.model.layers, has_experts, strict=True) if has), layer)
    moe, normalized, groups = _experts(mixture)
    norm = model.model.norm
    return Resolution(
        windows=tuple(_window(call["mask"]) for call in calls),
        head_size=size,
        num_key_value_heads=calls[0]["kv_heads"],
        heads=tuple(
            (call["head_size"], call["kv_heads"], getattr(each.self_attn, "v_proj", True) is not None)
            for call, each in zip(calls, model.model.layers, strict=True)
        ),
        biases=(
            _bias(attention, "kv_a_proj_with_mqa", "q_proj", "qkv_proj"),
            _bias(attention, "o_proj"),
            _bias(_mlp(layer), "gate_proj", "gate_up_proj", "up_proj", "c_fc"),
        ),
        activation=_activation(_activation_of(_mlp(layer))),
        norm_epsilon=getattr(norm, "variance_epsilon", None) or norm.eps,
        attention_scale=calls[0]["scaling"],
        attention_cap=calls[0]["softcap"],
        final_cap=_final_cap(model),
        embedding_multiplier=multiplier,
        residual_multiplier=getattr(layer, "residual_multiplier", 1.0),
        logits_scaling=made.logits_scaling if made.model_type.startswith("granite") else 1.0 / getattr(made, "logit_scale", 1.0),
        tied=model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr(),
        rotary=_rotary(model.model.rotary_emb, made),
        scaling=_scaling(made),
        moe=moe,
        normalized=normalized,
        expert_layers=has_experts,
        output_scale=_output_scale(_block(mixture)),
        groups=groups,
        qk_norm=hasattr(attention, "q_norm")
        or hasattr(attention, "query_layernorm")
        or any(hasattr(each.self_attn, "qk_norm") for each in model.model.layers),
        rotated_layers=tuple(call["rotated"] for call in calls),
        latent=_latent(attention, made),
        query_scale=_query_scale(made),
        sinks=hasattr(attention, "sinks"),
        head_bias=model.lm_head.bias is not None,
        jitter=_jitter(_block(mixture)),
    )


def _mlp(layer: Any) -> Any:
    """The MLP or the experts of a layer."""
    return next(getattr(layer, name) for name in ("mlp", "feed_forward", "block_sparse_moe") if hasattr(layer, name))


def _block(layer: Any) -> Any:
    """The owner of a layer's experts, if it has any."""
    return layer if hasattr(layer, "experts") else _mlp(layer)


def _output_scale(block: Any) -> float:
    has_average = getattr(block, "shared_expert_combination_strategy", "sum") == "average" and block.num_shared_experts > 0
    return 0.5 if has_average else 1.0


def _jitter(block: Any) -> float | None:
    router = getattr(block, "router", None)
    return router.router_jitter_noise if hasattr(router, "input_jitter_noise") else None


def _latent(attention: Any, made: Any) -> tuple[int, int, int, int, bool] | None:
    """Sizes of latent attention, and whether rotated pairs are neighbours."""
    if not hasattr(attention, "kv_lora_rank"):
        return None
    query = 0 if hasattr(attention, "q_proj") else attention.q_a_proj.weight.shape[0]
    nope, value = attention.qk_nope_head_dim, attention.v_head_dim
    return query, attention.kv_a_layernorm.weight.shape[0], nope, value, bool(made.rope_interleave)


def _query_scale(made: Any) -> tuple[float, ...] | None:
    """The factor by which the logarithm of the position scales queries."""
    if made.model_type == "llama4_text":
        return (float(made.attn_scale), float(made.floor_scale)) if made.attn_temperature_tuning else None
    scales = made.model_type in ("ministral3", "mistral4")
    return (float(made.rope_parameters["llama_4_scaling_beta"]),) if scales else None


def _run(model: Any) -> tuple[list[dict[str, Any]], Any]:
    """What attention was called with in each layer, whether it was rotated, and the first layer's input."""
    import torch

    module = importlib.import_module(type(model).__module__)
    calls: list[dict[str, Any]] = []
    caught: list[Any] = []
    plain = module.eager_attention_forward
    rotations = {name: function for name, function in vars(module).items() if name.startswith("apply_rotary_")}
    rotated: list[bool] = []

    def rotating(function: Any) -> Any:
        def rotate(*args: Any, **kwargs: Any) -> Any:
            rotated.append(True)
            return function(*args, **kwargs)

        return rotate

    def recorded(layer: Any, query: Any, key: Any, value: Any, mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        mask = kwargs.pop("attention_mask", mask)
        scaling = kwargs.get("scaling")
        scaling = layer.head_dim**-0.5 if scaling is None else scaling
        calls.append({"mask": mask, "scaling": scaling, "softcap": kwargs.get("softcap"), "kv_heads": key.shape[1]})
        calls[-1]["head_size"] = query.shape[-1]
        calls[-1]["rotated"] = bool(rotated)
        rotated.clear()
        return plain(layer, query, key, value, mask, *args, **kwargs)

    hook = model.model.layers[0].register_forward_pre_hook(lambda _module, args: caught.append(args[0]))
    patch = pytest.MonkeyPatch()
    try:
        patch.setattr(module, "eager_attention_forward", recorded)
        for name, function in rotations.items():
            patch.setattr(module, name, rotating(function))
        model(torch.arange(NUM_TOKENS)[None] % model.config.vocab_size, use_cache=False)
    finally:
        hook.remove()
        patch.undo()
    return calls, caught[0]


def _window(mask: Any) -> int | None:
    if mask is None:
        return None
    seen = int((mask[0, 0, -1] == 0).sum())
    return None if seen == NUM_TOKENS else seen


def _bias(module: Any, *names: str) -> bool:
    found = [getattr(module, name) for name in names if hasattr(module, name)]
    return bool(found) and found[0].bias is not None


def _activation_of(mlp: Any) -> Any:
    import torch

    if hasattr(mlp, "act"):
        return mlp.act
    parts = (mlp, getattr(mlp, "experts", None))
    owner = next((part for part in parts if hasattr(part, "act_fn") or hasattr(part, "activation_fn")), None)
    if owner is None:  # gpt-oss has a SwiGLU of its own
        return torch.nn.functional.silu
    return owner.act_fn if hasattr(owner, "act_fn") else owner.activation_fn


def _activation(function: Any) -> str:
    """Its name, from its values."""
    import torch
    from torch.nn import functional

    if hasattr(function, "alpha_p"):
        return "xielu"
    x = torch.linspace(-3, 3, 13)
    known = {
        "silu": functional.silu(x),
        "gelu": functional.gelu(x),
        "gelu_pytorch_tanh": functional.gelu(x, approximate="tanh"),
        "relu": functional.relu(x),
        "relu2": functional.relu(x) ** 2,
    }
    return next(name for name, values in known.items() if torch.allclose(function(x), values, atol=1e-6))


def _final_cap(model: Any) -> float | None:
    """The value at which logits end: the head is made so large that a cap would be reached."""
    import torch

    model.lm_head.weight.mul_(1e4)
    logits = model(torch.tensor([[1, 2]]), use_cache=False).logits
    largest = float(logits.abs().max())
    return round(largest, 3) if largest < 50 else None


def _rotary(rotary: Any, made: Any) -> tuple[tuple[Any, ...], ...]:
    parameters = made.rope_parameters
    if hasattr(rotary, "inv_freq"):
        return ((parameters["rope_type"], float(parameters["rope_theta"]), 2 * len(rotary.inv_freq)),)
    found = []
    for kind in ("full_attention", "sliding_attention"):
        if hasattr(rotary, f"{kind}_inv_freq"):
            own = parameters[kind]
            found.append((own["rope_type"], float(own["rope_theta"]), 2 * len(getattr(rotary, f"{kind}_inv_freq"))))
        else:
            found.append((None, None, None))
    return tuple(found)


def _scaling(made: Any) -> dict[str, Any]:
    parameters = made.rope_parameters
    return dict(parameters.get("full_attention", parameters))


def _width(mlp: Any) -> int:
    """Its intermediate size."""
    return int(mlp.output_linear.weight.shape[1] if hasattr(mlp, "output_linear") else mlp.gate_proj.weight.shape[0])


def _experts(layer: Any) -> tuple[tuple[int, int, int, int] | None, float | None, tuple[int, int]]:
    import torch

    block = _block(layer)
    if not hasattr(block, "experts"):
        return None, None, (1, 1)
    gate = block.gate if hasattr(block, "gate") else block.router
    bias = [getattr(block, name) for name in ("e_score_correction_bias", "expert_bias") if hasattr(block, name)]
    linear = next((getattr(gate, name) for name in ("wg", "proj", "gate") if hasattr(gate, name)), gate)
    if hasattr(gate, "per_expert_scale"):
        gate.per_expert_scale.fill_(1.0)
    inputs = torch.randn(5, linear.weight.shape[1])
    found = gate(inputs[None] if hasattr(gate, "route_scale") else inputs, *bias)
    sums = (found[0] if len(found) == 2 else found[1]).sum(-1)  # Llama 4's gives the weights of all experts first
    size = getattr(block.experts, "intermediate_size", block.experts.down_proj.shape[-1])
    names = ("shared_expert", "shared_experts", "shared_mlp")
    together = next((getattr(owner, name) for owner in (block, layer) for name in names if getattr(owner, name, None)), None)
    together = layer.mlp if block is layer else together  # Gemma 4's dense MLP
    shared = 0 if together is None else _width(together)
    chosen = gate.top_k if hasattr(gate, "top_k") else gate.config.top_k_experts
    count = block.experts.num_experts
    normalized = round(float(sums[0]), 3) if torch.allclose(sums, sums[:1], atol=1e-3) else 0.0
    normalized = 0.0 if _jitter(block) is not None else normalized  # often two by chance: each weight is one where none is near
    groups = (getattr(gate, "num_group", 1), getattr(gate, "topk_group", 1))
    return (count, chosen, size, shared), None if chosen == count else normalized, groups


def ours(config: ModelConfig) -> Resolution:
    """The same facts of our reading of a config.json."""
    window = [_our_window(config) if config.has_window(layer) else None for layer in range(config.num_hidden_layers)]
    scaling = dict(config.rotary_scaling or {"rope_type": "default"})
    rotated = tuple(config.has_rotary(layer) for layer in range(config.num_hidden_layers))
    size = config.rotary_embedding_dim or config.head_size
    whole = config.global_head_size or size
    rotary: tuple[tuple[Any, ...], ...] = ((scaling["rope_type"], config.rotary_base, whole),)
    if config.rotary_base_local is not None:
        rotary += (("default", config.rotary_base_local, size),)
    moe = config.moe
    chosen = None if moe is None or moe.top_k == moe.num_experts else moe.routed_scale * moe.normalization_mode
    has_experts = tuple(config.has_experts(layer) for layer in range(config.num_hidden_layers))
    moe = moe if any(has_experts) else None
    return Resolution(
        windows=tuple(None if size is None or size >= NUM_TOKENS else size for size in window),
        head_size=config.of_layer(0).head_size,
        num_key_value_heads=_our_heads(config, 0)[1],
        heads=tuple(_our_heads(config, layer) for layer in range(config.num_hidden_layers)),
        biases=(config.attn_bias, config.attn_dense_bias, config.mlp_bias),
        activation={"swish": "silu", "swiglu": "silu", "gelu_new": "gelu_pytorch_tanh"}.get(config.hidden_act, config.hidden_act),
        norm_epsilon=config.norm_epsilon,
        attention_scale=config.head_size**-0.5 if config.attention_scale is None else config.attention_scale,
        attention_cap=config.attn_logit_softcapping,
        final_cap=config.final_logit_softcapping,
        embedding_multiplier=config.embedding_multiplier,
        residual_multiplier=config.residual_multiplier,
        logits_scaling=config.logits_scaling,
        tied=config.tie_word_embeddings,
        rotary=rotary,
        scaling=scaling,
        moe=None if moe is None else (moe.num_experts, moe.top_k, config.expert_size, moe.shared_expert_intermediate_size),
        normalized=None if moe is None else chosen,
        expert_layers=has_experts,
        output_scale=moe.output_scale if moe else 1.0,
        groups=(moe.num_groups, moe.kept_groups) if moe else (1, 1),
        qk_norm=any(rotated) if config.qk_layernorm == "rotated" else config.qk_layernorm != "none",
        rotated_layers=rotated,
        latent=_our_latent(config),
        query_scale=_our_query_scale(config),
        sinks=config.attention_sinks,
        head_bias=config.head_bias,
        jitter=moe.jitter if moe and moe.scoring == "sparse_mixer" else None,
    )


def _our_heads(config: ModelConfig, layer: int) -> tuple[int, int, bool]:
    own = config.of_layer(layer)
    return own.head_size, own.num_attention_heads if own.is_latent else own.num_key_value_heads, config.has_values(layer)


def _our_window(config: ModelConfig) -> int | None:
    """Positions that the last token sees through a window: of its chunk, those up to it."""
    size = config.sliding_window
    return (NUM_TOKENS - 1) % size + 1 if size and config.chunked_windows else size


def _our_query_scale(config: ModelConfig) -> tuple[float, ...] | None:
    numbers = (config.query_scale_beta, config.query_scale_floor)
    return tuple(float(number) for number in numbers if number is not None) or None


def _our_latent(config: ModelConfig) -> tuple[int, int, int, int, bool] | None:
    sizes = (config.q_lora_rank, config.kv_lora_rank, config.qk_nope_head_dim, config.value_size)
    return (*sizes, config.rotary_interleaved) if config.is_latent else None


def differences(found: Resolution, wanted: Resolution) -> dict[str, tuple[Any, Any]]:
    """Fields in which our reading (`found`) and transformers' differ."""
    wrong: dict[str, tuple[Any, Any]] = {}
    for name in Resolution.__dataclass_fields__:
        one, two = getattr(found, name), getattr(wanted, name)
        if name == "scaling":  # transformers keeps the base and what it passes over in the same dictionary
            two = {key: two.get(key) for key in one}
        if name == "rotary":  # the kinds of layers that a model has not got have no table
            one = tuple(own if theirs[0] is not None else (None, None, None) for own, theirs in zip(one, two, strict=True))
        if isinstance(two, float):
            one, two = pytest.approx(one, rel=1e-5), two
        if one != two:
            wrong[name] = (one, two)
    return wrong
