"""Names, shapes, dtypes and bytes of rank files against a plain reading of TensorRT-LLM's rules, on whole tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from orchestrator.base.errors import NotFiniteError, WeightMapError
from orchestrator.planning import preparation
from orchestrator.planning.plan import Plan
from orchestrator.planning.steps import Kind
from tests.conftest import SpecMaker
from tests.integration.steps import run_steps
from tests.support.families import TINY, write_tiny

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


def converted(plan: Plan, store: Path) -> dict[int, Tensors]:
    """Every rank's tensors."""
    ranks: dict[int, Tensors] = {}
    for outcome in run_steps(plan, store.as_uri(), (Kind.CONVERT,)).values():
        for output in outcome.outputs:
            rank = int(output.name.removeprefix("rank").split(".")[0].split("-")[0])
            ranks.setdefault(rank, {}).update(load_file(store / output.key))
    return ranks


def expected(source: Tensors, plan: Plan, rank: int) -> Tensors:
    """A rank's tensors, cut from whole ones."""
    config, topology = plan.inputs.config, plan.topology
    place = topology.coordinates(rank)
    tp, r = topology.tp, place.tp_rank
    gemma = config.architecture.startswith("Gemma")

    def norm(name: str) -> torch.Tensor:
        return (source[name].float() + 1.0).to(source[name].dtype) if gemma else source[name]

    def rows(weight: torch.Tensor) -> torch.Tensor:
        return weight.chunk(tp, 0)[r]

    def kv_rows(weight: torch.Tensor) -> torch.Tensor:
        heads = weight.unflatten(0, (config.num_key_value_heads, config.head_size))
        if tp > config.num_key_value_heads:
            heads = heads.repeat_interleave(tp // config.num_key_value_heads, 0)
        return heads.chunk(tp, 0)[r].flatten(0, 1)

    made: Tensors = {}
    if place.pp_rank == 0:
        made["transformer.vocab_embedding.weight"] = source["model.embed_tokens.weight"]
    for local, layer in enumerate(topology.stages(config.num_hidden_layers)[place.pp_rank]):
        old, new = f"model.layers.{layer}.", f"transformer.layers.{local}."
        made[new + "input_layernorm.weight"] = norm(old + "input_layernorm.weight")
        made[new + "post_layernorm.weight"] = norm(old + "post_attention_layernorm.weight")
        for what in ("weight", "bias"):
            q, k, v = (old + f"self_attn.{name}_proj.{what}" for name in "qkv")
            if q in source:
                made[new + f"attention.qkv.{what}"] = torch.cat([rows(source[q]), kv_rows(source[k]), kv_rows(source[v])])
        made[new + "attention.dense.weight"] = source[old + "self_attn.o_proj.weight"].chunk(tp, 1)[r]
        made |= _mlp(source, plan, r, old, new)
    if place.pp_rank == topology.pp - 1:
        made["transformer.ln_f.weight"] = norm("model.norm.weight")
        head = source.get("lm_head.weight", source["model.embed_tokens.weight"])
        padding = torch.zeros(-len(head) % tp, head.shape[1], dtype=head.dtype)
        made["lm_head.weight"] = torch.cat([head, padding]).chunk(tp, 0)[r]
    return made


def _mlp(source: Tensors, plan: Plan, r: int, old: str, new: str) -> Tensors:
    topology, moe = plan.topology, plan.inputs.config.moe
    if moe is None:
        return {
            new + "mlp.fc.weight": source[old + "mlp.gate_proj.weight"].chunk(topology.tp, 0)[r],
            new + "mlp.gate.weight": source[old + "mlp.up_proj.weight"].chunk(topology.tp, 0)[r],
            new + "mlp.proj.weight": source[old + "mlp.down_proj.weight"].chunk(topology.tp, 1)[r],
        }
    moe_tp, ep = topology.tp // topology.moe_ep, topology.moe_ep
    tp_rank, ep_rank = r // ep, r % ep
    mine = range(ep_rank * moe.num_experts // ep, (ep_rank + 1) * moe.num_experts // ep)
    expert = old + "block_sparse_moe.experts.{}.w{}.weight"
    fc = [torch.cat([source[expert.format(e, half)].chunk(moe_tp, 0)[tp_rank] for half in (3, 1)]) for e in mine]
    proj = [source[expert.format(e, 2)].chunk(moe_tp, 1)[tp_rank] for e in mine]
    return {
        new + "mlp.router.weight": source[old + "block_sparse_moe.gate.weight"].float(),
        new + "mlp.fc.weight": torch.stack(fc),
        new + "mlp.proj.weight": torch.stack(proj),
    }


TOPOLOGIES = [{"tp": 1}, {"tp": 2, "pp": 2}, {"tp": 4}, {"pp": 3}]


@pytest.mark.parametrize(
    ("family", "topology"),
    [(family, topology) for family in ("llama", "qwen2", "mistral", "gemma", "mixtral") for topology in TOPOLOGIES]
    + [("mixtral", {"tp": 2, "moe_ep": 2}), ("mixtral", {"tp": 4, "moe_ep": 2, "pp": 2}), ("mixtral", {"tp": 4, "moe_ep": 4})],
    ids=str,
)  # fmt: skip
def test_rank_files_hold_what_tensorrt_llms_rules_say(
    folder: Path, tmp_path: Path, make_spec: SpecMaker, family: str, topology: dict[str, Any]
) -> None:
    source = folder / family
    if not source.is_dir():
        write_tiny(family, source)
    plan = preparation.plan(make_spec(source, topology=topology))
    whole = load_file(source / "model.safetensors")
    ranks = converted(plan, tmp_path / "store")
    assert set(ranks) == set(range(plan.topology.world_size))
    for rank, tensors in ranks.items():
        wanted = expected(whole, plan, rank)
        # Beside them Gemma's norms stand exactly: TensorRT-LLM warns of tensors that it does not know, and goes on.
        twins = {f"{name}_float32": name for name in wanted if family == "gemma" and name.endswith(("norm.weight", "ln_f.weight"))}
        assert set(tensors) == set(wanted) | set(twins)
        for twin, name in twins.items():
            assert tensors[twin].dtype == torch.float32
            assert torch.equal(tensors[twin].bfloat16(), wanted[name])
        for name, tensor in wanted.items():
            assert (tensors[name].dtype, tensors[name].shape) == (tensor.dtype, tensor.shape), name
            assert torch.equal(tensors[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


@pytest.mark.parametrize("family", TINY)
def test_every_source_byte_is_read_once(folder: Path, make_spec: SpecMaker, family: str) -> None:
    source = folder / family
    if not source.is_dir():
        write_tiny(family, source)
    plan = preparation.plan(make_spec(source, topology={"tp": 2}))
    outcomes = run_steps(plan, (folder / "once").as_uri(), (Kind.CONVERT,))
    assert sum(outcome.facts.source_bytes_read for outcome in outcomes.values()) == plan.inputs.index.num_bytes


def spoil(source: Path, name: str, value: float) -> None:
    from safetensors.torch import save_file

    tensors = load_file(source / "model.safetensors")
    tensors[name].view(-1)[-1] = value
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_convert_of_weights_that_are_not_finite_names_them(tmp_path: Path, make_spec: SpecMaker, value: float, dtype: str) -> None:
    source = write_tiny("llama", tmp_path / "model", dtype=dtype)
    victim = "model.layers.1.mlp.down_proj.weight"
    spoil(source, victim, value)
    warned = preparation.plan(make_spec(source, topology={"tp": 2}, dtype=dtype))
    (outcome,) = run_steps(warned, (tmp_path / "store").as_uri(), (Kind.CONVERT,)).values()
    assert outcome.facts.not_finite == (victim,)
    refused = preparation.plan(make_spec(source, topology={"tp": 2}, dtype=dtype, conversion={"not_finite": "error"}))
    with pytest.raises(NotFiniteError, match="down_proj"):
        run_steps(refused, (tmp_path / "other").as_uri(), (Kind.CONVERT,))
    assert not [path for path in (tmp_path / "other").rglob("*") if path.is_file()]


@pytest.mark.parametrize("value", [3.3e38, -3.3e38, 0.0, 1e-40])
def test_convert_of_large_and_small_finite_weights_warns_of_nothing(tmp_path: Path, make_spec: SpecMaker, value: float) -> None:
    source = write_tiny("llama", tmp_path / "model")
    spoil(source, "model.layers.0.mlp.up_proj.weight", value)
    (outcome,) = run_steps(preparation.plan(make_spec(source)), (tmp_path / "store").as_uri(), (Kind.CONVERT,)).values()
    assert outcome.facts.not_finite == ()


def test_plan_of_a_norm_that_is_no_float_is_refused(tmp_path: Path, make_spec: SpecMaker) -> None:
    from safetensors.torch import save_file

    source = write_tiny("llama", tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int64)
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(WeightMapError, match=r"model\.norm\.weight is I64"):
        preparation.plan(make_spec(source))
