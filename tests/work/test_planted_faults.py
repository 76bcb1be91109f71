"""Faults planted in graphs and shards: each ends a verification with an error that names its layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import helper

from orchestrator.base.errors import VerificationError
from orchestrator.model.stage import StageNetwork
from orchestrator.networks import Network, Rendering
from orchestrator.planning import preparation
from orchestrator.planning.plan import Plan
from orchestrator.planning.steps import Kind
from orchestrator.work.shards import map_shards
from orchestrator.work.verify import lockstep
from tests.conftest import SpecMaker
from tests.integration.steps import WITHOUT_ENGINES, forge, run_steps
from tests.support.families import write_tiny

LAYER = "transformer.layers.1"
Change = Callable[[Network], None]


def node_of(network: Network, name: str) -> tuple[int, onnx.NodeProto]:
    return next((number, node) for number, node in enumerate(network.model.graph.node) if node.name == name)


def leave_out_the_all_reduce(network: Network) -> None:
    number, node = node_of(network, f"{LAYER}.attention.dense.matmul.all_reduce")
    alone = helper.make_node("Identity", list(node.input), list(node.output), name=node.name)
    network.model.graph.node.remove(node)
    network.model.graph.node.insert(number, alone)


def use_another_rotary_base(network: Network) -> None:
    """A base twice as large, in the layer's queries and keys."""
    positions, half = network.tables["rotary_cos"].shape
    angles = np.arange(positions)[:, None] * (20_000.0 ** -(np.arange(half) / half))[None]
    for what, function in (("cos", np.cos), ("sin", np.sin)):
        network.tables[f"wrong_{what}"] = function(angles).astype(np.float32)  # type: ignore[index]
        (known,) = (tensor for tensor in network.model.graph.initializer if tensor.name == f"rotary_{what}")
        copy = network.model.graph.initializer.add()
        copy.CopyFrom(known)
        copy.name = f"wrong_{what}"
        copy.external_data[0].value = copy.name
    for head in ("q", "k"):
        _, node = node_of(network, f"{LAYER}.attention.{head}.heads.rotary")
        node.input[1], node.input[2] = "wrong_cos", "wrong_sin"


def write_one_slot_early(network: Network) -> None:
    """Decode steps write their keys and values over those of the token before."""
    number, _ = node_of(network, "present_key_values.1.key")
    early = [
        helper.make_node("Sub", ["write_indices", "one"], ["early.below"], name="early.below"),
        helper.make_node("Max", ["early.below", "zero"], ["early"], name="early"),
    ]
    for node in reversed(early):
        network.model.graph.node.insert(number, node)
    for what in ("key", "value"):
        node_of(network, f"present_key_values.1.{what}")[1].input[2] = "early"


@pytest.mark.parametrize("change", [leave_out_the_all_reduce, use_another_rotary_base, write_one_slot_early])
def test_verification_of_a_graph_with_a_fault_in_a_layer_names_it(
    tmp_path: Path, store_url: str, make_spec: SpecMaker, monkeypatch: pytest.MonkeyPatch, change: Change
) -> None:
    right = lockstep.decoder_network

    def wrong(network: StageNetwork, tp_rank: int, rendering: Rendering) -> Network:
        graph = right(network, tp_rank, rendering)
        change(graph)
        return graph

    made = preparation.plan(make_spec(write_tiny("llama", tmp_path / "model"), topology={"tp": 2}))
    monkeypatch.setattr(lockstep, "decoder_network", wrong)
    with pytest.raises(VerificationError, match=r"jumps in layer 1, from|differ by .* after layer 1"):
        run_steps(made, store_url, WITHOUT_ENGINES)


def shards_of(made: Plan, store_url: str) -> list[Path]:
    """Converted shards by rank; the outcome that names them is made to fit before they are verified."""
    outcomes = run_steps(made, store_url, (Kind.CONVERT,))
    store = Path(store_url.removeprefix("file://"))
    return [store / output.key for output in outcomes["convert/stage0/group0"].outputs]


def forge_converted(made: Plan, store_url: str) -> None:
    forge(Path(store_url.removeprefix("file://")), run_steps(made, store_url, (Kind.CONVERT,))["convert/stage0/group0"])


def test_verification_with_the_shard_of_another_rank_names_the_first_layer(
    tmp_path: Path, store_url: str, make_spec: SpecMaker
) -> None:
    made = preparation.plan(make_spec(write_tiny("llama", tmp_path / "model"), topology={"tp": 2}))
    first, second = shards_of(made, store_url)
    data = first.read_bytes()
    second.unlink()
    second.write_bytes(data)
    forge_converted(made, store_url)
    with pytest.raises(VerificationError, match="jumps in layer 0"):
        run_steps(made, store_url, WITHOUT_ENGINES)


def exchange_experts(values: npt.NDArray[np.uint16]) -> None:
    values[[0, 1]] = values[[1, 0]]


def test_verification_with_the_weights_of_two_experts_exchanged_names_their_layer(
    tmp_path: Path, store_url: str, make_spec: SpecMaker
) -> None:
    made = preparation.plan(make_spec(write_tiny("mixtral", tmp_path / "model"), topology={"tp": 2}))
    shard = shards_of(made, store_url)[1]
    weight = map_shards([shard])[f"{LAYER}.mlp.proj.weight"]
    values = weight.data.copy()
    exchange_experts(values.view(np.uint16).reshape(weight.shape))
    data = bytearray(shard.read_bytes())
    data[weight.offset : weight.offset + len(values)] = values.tobytes()
    shard.unlink()
    shard.write_bytes(data)
    forge_converted(made, store_url)
    with pytest.raises(VerificationError, match="jumps in layer 1, from"):
        run_steps(made, store_url, WITHOUT_ENGINES)
