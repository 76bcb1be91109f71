"""Form of a mixture's experts in an engine: whether a rank computes all of its experts, or those that the tokens chose."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.base.errors import EngineBuildError, SpecError
from orchestrator.model.stage import ExpertForm, StageOptions
from orchestrator.spec.build import BuildConfig

_GAIN = 2
"""Least number of times that the dense form reads more experts, for `auto` to gather: gathering copies what it reads."""


@dataclass(frozen=True, slots=True)
class ExpertChoice:
    """Form of the experts of a stage."""

    form: ExpertForm
    reason: str
    """Empty for a stage without experts."""


def expert_choice(stage: StageOptions, engine: BuildConfig) -> ExpertChoice:
    """Return the form that engine.experts asks for, or the one that a decode step is faster with (`auto`).

    Raises SpecError if the option names a form for a model without experts.
    """
    moe = stage.config.moe
    if moe is None:
        if engine.experts != "auto":
            raise SpecError(
                f"engine.experts is {engine.experts}, and {stage.config.architecture} has no experts", "Remove engine.experts."
            )
        return ExpertChoice("dense", "")
    if engine.experts == "trt_moe" and (problem := _layer_problem(stage)):
        raise SpecError(f"engine.experts trt_moe: TensorRT's layer has no {problem}", "Use gathered or dense.")
    if engine.experts != "auto":
        return ExpertChoice(engine.experts, "engine.experts asks for it")
    local = moe.num_experts // stage.moe_ep
    if has_quantized_experts(stage):
        return ExpertChoice("dense", "TensorRT gathers no quantized weights: it could dequantize all of them first")
    chosen = computed_experts(stage, engine.opt_batch_size)
    reason = f"a decode step with opt_batch_size {engine.opt_batch_size} chooses up to {chosen} of a rank's {local}"
    return ExpertChoice("dense" if _GAIN * chosen > local else "gathered", reason)


def _layer_problem(stage: StageOptions) -> str:
    """Return what of the stage's experts TensorRT's layer does not have, or what was never tried with it; empty: nothing."""
    moe, config = stage.config.moe, stage.config
    assert moe is not None
    if has_quantized_experts(stage):
        return "quantized weights that this project writes"
    if moe.expert_bias or moe.swiglu_limit is not None or moe.swiglu_alpha != 1.0 or moe.swiglu_beta:
        return "biases and bounds"
    if moe.weighs_input:
        return "weights of the experts' inputs"
    if not moe.gated or config.hidden_act not in ("silu", "swish", "swiglu"):
        return f"experts but SwiGLU ones; {config.architecture}'s are {config.hidden_act}"
    return "" if config.dtype != "float32" else "float32"


_WITH_LAYER = ("10.0", "10.3")
"""Compute capabilities whose GPUs have TensorRT's layer of experts (NvInfer.h 11.1; 12.x is named as not supported)."""


def require_expert_layer(form: ExpertForm, compute_capability: str) -> None:
    """Check that a GPU has the layer that the form needs. Raises EngineBuildError."""
    if form == "trt_moe" and compute_capability not in _WITH_LAYER:
        raise EngineBuildError(
            f"engine.experts trt_moe needs a GPU of SM100 or SM103; this one is of compute capability {compute_capability}",
            "Build on such a GPU, or use engine.experts gathered or dense.",
        )


def computed_experts(stage: StageOptions, num_tokens: int) -> int:
    """Return how many experts of a layer the gathered form computes on a rank, in a call of `num_tokens` tokens.

    Raises ValueError for a model without experts.
    """
    if stage.config.moe is None:
        raise ValueError(f"{stage.config.architecture} has no experts")
    return min(num_tokens * stage.config.moe.top_k, stage.config.moe.num_experts // stage.moe_ep)


def has_quantized_experts(stage: StageOptions) -> bool:
    """Whether a linear of the stage's experts is quantized."""
    layers = (layer for layer in range(stage.num_layers) if stage.config.has_experts(stage.first_layer + layer))
    names = (f"transformer.layers.{layer}.mlp.{linear}" for layer in layers for linear in ("fc", "proj"))
    return any(stage.format_of(name) is not None for name in names)
