"""Experts as one linear each compute what transformers' tensors of all experts do."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from orchestrator.model.quantized_targets import expert_part
from orchestrator.work.calibrate.experts import Experts
from orchestrator.work.calibrate.step import _expert_of, _fill_unseen, _summary
from tests.support.families import BASE, TINY

FAMILIES = ["mixtral", "granitemoe", "gemma4", "mistral4", "llama4", "gpt_oss"]


def block_of(family: str) -> Any:
    """The module of a tiny model that has router and experts, or the layer that has both; weights and biases are random."""
    tiny = TINY[family]
    config = getattr(transformers, tiny.config)(**{**BASE, **tiny.fields})
    torch.manual_seed(7)
    model = getattr(transformers, tiny.model)(config).float().eval().requires_grad_(False)
    block = next(module for module in model.modules() if hasattr(getattr(module, "experts", None), "gate_up_proj"))
    for parameter in block.experts.parameters():
        parameter.normal_(std=0.3)
    return block


def called(experts: Any, seen: list[Any]) -> Any:
    experts.register_forward_pre_hook(lambda _module, args: seen.append(args))
    return experts


@pytest.mark.parametrize("family", FAMILIES)
def test_unfused_experts_compute_what_transformers_do_and_count_their_tokens(family: str) -> None:
    block = block_of(family)
    calls: list[Any] = []
    hidden, router = torch.randn(11, 64), getattr(block, "router", getattr(block, "gate", None))
    assert router is not None
    if family == "gemma4":  # the layer itself routes
        _, weights, chosen = router(hidden)
        calls.append((hidden, chosen, weights))
    else:
        called(block.experts, calls)
        block(hidden[None])
    (arguments,) = calls
    fused = copy.deepcopy(block.experts)
    expected = fused(*arguments)
    experts = Experts(fused)
    assert not list(fused.parameters())  # no weight is held twice
    torch.testing.assert_close(experts(*arguments), expected, rtol=1e-5, atol=1e-5)
    chosen = arguments[1] if len(arguments) > 1 else router(hidden)[0].topk(router.top_k).indices
    assert experts.num_tokens == torch.bincount(chosen.flatten(), minlength=len(experts)).tolist()
    assert sum(experts.num_tokens) == 11 * chosen.shape[1]


def test_unfused_experts_stored_as_the_linears_are_share_their_memory() -> None:
    fused = block_of("mixtral").experts
    stored = [fused.gate_up_proj.data_ptr(), fused.down_proj.data_ptr()]
    experts = Experts(fused)
    assert [experts[0].gate.weight.data_ptr(), experts[0].down.weight.data_ptr()] == stored


def test_unseen_expert_takes_the_largest_of_its_own_kind_of_linear_and_of_experts_only() -> None:
    """Gate and down of a fused expert both begin at row 0; a shared expert may have a tensor of the experts' name."""
    experts = "model.layers.2.block_sparse_moe"
    names = {
        f"{experts}.input_linear.weight.0.0": 3.0, f"{experts}.input_linear.weight.0.32": 3.0,
        f"{experts}.output_linear.weight.0.0": 9.0, "model.layers.2.shared_mlp.input_linear": 50.0,
        "model.layers.1.block_sparse_moe.input_linear.weight.0.0": 70.0,
    }  # fmt: skip
    artifact: dict[str, Any] = {f"{name}.input_amax": np.float32(value) for name, value in names.items()}
    unseen = [f"{experts}.input_linear.weight.1.32", f"{experts}.output_linear.weight.1.0"]
    _fill_unseen(artifact, unseen)
    assert [float(artifact[f"{name}.input_amax"]) for name in unseen] == [3.0, 9.0]
    assert _summary(artifact)["output_linear"] == (9.0, 9.0, 9.0)
    assert [_expert_of(name) for name in unseen] == [f"{experts}.1", f"{experts}.1"]
    assert _expert_of("model.layers.0.mlp.experts.3.up_proj") == "model.layers.0.mlp.experts.3"


@pytest.mark.parametrize("module", ["model.layers.0.mlp.experts.3.w1", "model.layers.0.mlp.up_proj", "model.layers.3"])
def test_module_with_a_tensor_of_its_own_is_no_part_of_all_experts(module: str) -> None:
    assert expert_part(module) is None
