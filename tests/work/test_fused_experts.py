"""Experts in tensors of all experts: transposed, interleaved, in halves, with biases, cut for ranks against slices by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.numpy

from orchestrator.base.errors import ArchitectureError, WeightMapError
from orchestrator.checkpoints import read_source
from orchestrator.checkpoints.trtllm import _whole_tensors
from orchestrator.families.common_experts import fused_experts
from orchestrator.families.qwen import QWEN3_MOE
from orchestrator.model.config import ModelConfig, MoeConfig
from orchestrator.model.rules import Family, Layers
from orchestrator.model.topology import Topology
from orchestrator.model.weight_map import weight_map
from orchestrator.planning.options import ConvertOptions
from orchestrator.stores import open_source
from orchestrator.stores.source import planned_ranges
from orchestrator.work.convert.step import write_shards
from tests.support.synthetic import model_config

EXPERTS, HIDDEN, SIZE, LAYERS = 4, 16, 8, 2
Array = npt.NDArray[np.float32]
CONFIG = model_config(
    dtype="float32",
    num_hidden_layers=LAYERS,
    moe=MoeConfig(num_experts=EXPERTS, top_k=2, router_bias=True, expert_bias=True),
    moe_intermediate_size=SIZE,
    tie_word_embeddings=True,
)
LAYOUTS = [(transposed, interleaved) for transposed in (False, True) for interleaved in (False, True)]


def family(transposed: bool, interleaved: bool) -> Family:
    """Only the experts of a model, so that nothing else is in the files."""
    rules = fused_experts("mlp.router", "mlp.experts", transposed=transposed, interleaved=interleaved)
    return replace(QWEN3_MOE, rules=tuple(rule for rule in rules if rule.layers is Layers.EXPERTS), ignored=())


def write(folder: Path, transposed: bool, interleaved: bool, seed: int = 1) -> dict[str, Array]:
    """Write a checkpoint; returns gate, up and down of each layer, [experts, out, in], and the biases."""
    random, plain, stored = np.random.default_rng(seed), {}, {}

    def draw(*shape: int) -> Array:
        return random.normal(size=shape).astype(np.float32)

    for layer in range(LAYERS):
        gate, up, down = draw(EXPERTS, SIZE, HIDDEN), draw(EXPERTS, SIZE, HIDDEN), draw(EXPERTS, HIDDEN, SIZE)
        gate_bias, up_bias, down_bias = draw(EXPERTS, SIZE), draw(EXPERTS, SIZE), draw(EXPERTS, HIDDEN)
        prefix = f"model.layers.{layer}.mlp."
        both, both_bias = (
            np.stack(pair, 2).reshape(EXPERTS, 2 * SIZE, *pair[0].shape[2:]) if interleaved else np.concatenate(pair, 1)
            for pair in ((gate, up), (gate_bias, up_bias))
        )
        stored |= {
            prefix + "router.weight": draw(EXPERTS, HIDDEN),
            prefix + "router.bias": draw(EXPERTS),
            prefix + "experts.gate_up_proj": both.swapaxes(1, 2) if transposed else both,
            prefix + "experts.down_proj": down.swapaxes(1, 2) if transposed else down,
            prefix + "experts.gate_up_proj_bias": both_bias,
            prefix + "experts.down_proj_bias": down_bias,
        }
        names = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
        values = (gate, up, down, gate_bias, up_bias, down_bias)
        plain |= {f"{layer}.{name}": array for name, array in zip(names, values, strict=True)}
    folder.mkdir()
    safetensors.numpy.save_file({name: np.ascontiguousarray(array) for name, array in stored.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architectures": ["Qwen3MoeForCausalLM"]}))
    return plain


def convert(source: Path, made: Family, topology: Topology, config: ModelConfig = CONFIG) -> tuple[list[dict[str, Array]], int]:
    """Every rank's tensors of the one stage, and the bytes that were read."""
    index, _ = read_source(str(source))
    (group,) = weight_map(index, made, config, topology, 2**40).groups
    options = ConvertOptions.of(group, index, topology)
    planned = planned_ranges(read.tensor for target in options.targets for read in target.reads)
    with open_source(str(source)).open(options.files, planned) as reads:
        write_shards(options, reads, lambda name, _size: (source.parent / name).open("wb"), lambda _num_bytes: None)
        num_bytes = reads.bytes_read
    return [safetensors.numpy.load_file(source.parent / name) for name in options.shards], num_bytes


@pytest.mark.parametrize(("transposed", "interleaved"), LAYOUTS)
@pytest.mark.parametrize("topology", [Topology(1, 1), Topology(4, 1, moe_ep=2), Topology(2, 1), Topology(4, 1, moe_ep=4)], ids=str)
def test_fused_experts_are_cut_as_slices_by_hand(tmp_path: Path, transposed: bool, interleaved: bool, topology: Topology) -> None:
    plain = write(tmp_path / "model", transposed, interleaved)
    ranks, num_bytes = convert(tmp_path / "model", family(transposed, interleaved), topology)
    for rank, tensors in enumerate(ranks):
        moe_rank, group = topology.moe_ranks(rank)
        experts = slice(group * EXPERTS // topology.moe_ep, (group + 1) * EXPERTS // topology.moe_ep)
        width = SIZE // topology.moe_tp
        mine = slice(moe_rank * width, (moe_rank + 1) * width)
        for layer in range(LAYERS):
            prefix = f"transformer.layers.{layer}.mlp."
            for suffix, end in (("weight", ""), ("bias", "_bias")):
                halves = [plain[f"{layer}.{name}{end}"][experts, mine] for name in ("up", "gate")]
                np.testing.assert_array_equal(tensors[f"{prefix}fc.{suffix}"], np.concatenate(halves, 1))
            np.testing.assert_array_equal(tensors[prefix + "proj.weight"], plain[f"{layer}.down"][experts, :, mine])
            np.testing.assert_array_equal(tensors[prefix + "proj.bias"], plain[f"{layer}.down_bias"][experts])
    assert num_bytes == read_source(str(tmp_path / "model"))[0].num_bytes  # each stored byte is read once


def test_fused_experts_of_another_layout_are_refused_by_their_shape(tmp_path: Path) -> None:
    write(tmp_path / "model", True, True)
    with pytest.raises(
        WeightMapError, match=r"gate_up_proj is \[4, 16, 16\]|down_proj is \[4, 8, 16\], config.json says \[4, 16, 8\]"
    ):
        convert(tmp_path / "model", family(False, True), Topology(1, 1))


def test_fused_experts_read_by_the_wrong_order_differ(tmp_path: Path) -> None:
    """Halves taken for turns: the shapes agree, so only the numbers tell."""
    plain = write(tmp_path / "model", True, True)
    ((tensors,), _) = convert(tmp_path / "model", family(True, False), Topology(1, 1))
    right = np.concatenate([plain["0.up"], plain["0.gate"]], 1)
    assert not np.array_equal(tensors["transformer.layers.0.mlp.fc.weight"], right)


def test_fused_experts_cannot_be_joined_from_rank_files() -> None:
    with pytest.raises(ArchitectureError, match="rank files cannot be joined"):
        _whole_tensors(family(True, True), CONFIG)
