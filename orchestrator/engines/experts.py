"""Form of a mixture's experts in an engine: whether a rank computes all of its experts, or those that the tokens chose."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.base.errors import SpecError
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
    if engine.experts != "auto":
        return ExpertChoice(engine.experts, "engine.experts asks for it")
    local = moe.num_experts // stage.moe_ep
    if has_quantized_experts(stage):
        return ExpertChoice("dense", "TensorRT gathers no quantized weights: it could dequantize all of them first")
    chosen = computed_experts(stage, engine.opt_batch_size)
    reason = f"a decode step with opt_batch_size {engine.opt_batch_size} chooses up to {chosen} of a rank's {local}"
    return ExpertChoice("dense" if _GAIN * chosen > local else "gathered", reason)


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
