"""The form of a mixture's experts: what `auto` chooses, what may be asked for, and the weights that a decode step reads."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.base.errors import EngineBuildError, SpecError
from orchestrator.engines.experts import computed_experts, expert_choice, require_expert_layer
from orchestrator.model.config import ModelConfig, MoeConfig
from orchestrator.model.stage import StageOptions
from orchestrator.model.topology import Topology
from orchestrator.spec.build import BuildConfig
from tests.support.synthetic import model_config


def stage(experts: int = 128, top_k: int = 8, ep: int = 1, **changes: Any) -> StageOptions:
    config: ModelConfig = model_config(moe=MoeConfig(num_experts=experts, top_k=top_k), moe_intermediate_size=16, **changes)
    return StageOptions.of(config, Topology(ep, 1, moe_ep=ep), 0)


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt_rtx"])
@pytest.mark.parametrize("capabilities", [(), ("8.9",), ("9.0",), ("12.0",)])
@pytest.mark.parametrize(
    ("experts", "top_k", "ep", "batch", "form"),
    [
        (128, 8, 1, 1, "gathered"),
        (128, 8, 1, 8, "gathered"),
        (128, 8, 1, 9, "dense"),
        (256, 8, 8, 1, "gathered"),
        (256, 8, 8, 2, "gathered"),
        (256, 8, 16, 2, "dense"),
        (8, 2, 1, 1, "gathered"),
        (8, 2, 4, 1, "dense"),
    ],
)
def test_choice_gathers_where_a_decode_step_reads_half_of_the_experts_or_less_on_every_gpu(
    experts: int, top_k: int, ep: int, batch: int, form: str, backend: str, capabilities: tuple[str, ...]
) -> None:
    engine = BuildConfig.model_construct(
        **{**BuildConfig().__dict__, "backend": backend, "opt_batch_size": batch, "compute_capabilities": capabilities}
    )
    choice = expert_choice(stage(experts, top_k, ep), engine)
    assert choice.form == form
    assert f"up to {computed_experts(stage(experts, top_k, ep), batch)} of a rank's {experts // ep}" in choice.reason


@pytest.mark.parametrize("form", ["dense", "gathered"])
def test_choice_of_a_form_that_is_asked_for_is_that_form(form: Any) -> None:
    assert expert_choice(stage(), BuildConfig(experts=form)).form == form


TENSORRT = BuildConfig(backend="tensorrt", experts="trt_moe")


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"hidden_act": "gelu"}, "experts but SwiGLU ones"),
        ({"dtype": "float32"}, "float32"),
        ({"moe": MoeConfig(num_experts=8, top_k=2, expert_bias=True)}, "biases and bounds"),
        ({"moe": MoeConfig(num_experts=8, top_k=2, swiglu_limit=7.0)}, "biases and bounds"),
        ({"moe": MoeConfig(num_experts=8, top_k=2, gated=False)}, "experts but SwiGLU ones"),
    ],
)
def test_choice_of_tensorrts_layer_for_experts_that_it_lacks_is_refused(changes: dict[str, Any], missing: str) -> None:
    made = stage()
    with pytest.raises(SpecError, match=missing):
        expert_choice(made.model_copy(update={"config": made.config.model_copy(update=changes)}), TENSORRT)


def test_choice_of_tensorrts_layer_is_never_made_by_itself_and_taken_where_it_is_asked_for() -> None:
    assert expert_choice(stage(), TENSORRT).form == "trt_moe"
    assert expert_choice(stage(), BuildConfig(backend="tensorrt")).form == "gathered"


@pytest.mark.parametrize(("capability", "has"), [("9.0", False), ("10.0", True), ("10.3", True), ("11.0", False), ("12.0", False)])
def test_build_of_tensorrts_layer_needs_a_gpu_that_has_it(capability: str, has: bool) -> None:
    require_expert_layer("gathered", capability)
    if has:
        require_expert_layer("trt_moe", capability)
    else:
        with pytest.raises(EngineBuildError, match="SM100 or SM103"):
            require_expert_layer("trt_moe", capability)


def test_build_config_with_tensorrts_layer_for_rtx_is_refused() -> None:
    with pytest.raises(ValueError, match="TensorRT-RTX cannot compile that layer"):
        BuildConfig(experts="trt_moe")


def test_choice_for_a_model_without_experts_is_dense_and_a_form_is_refused() -> None:
    dense = StageOptions.of(model_config(), Topology(1, 1), 0)
    assert expert_choice(dense, BuildConfig()).form == "dense"
    with pytest.raises(SpecError, match="has no experts"):
        expert_choice(dense, BuildConfig(experts="gathered"))
