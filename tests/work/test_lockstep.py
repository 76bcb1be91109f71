"""Ranks in lockstep: the cuts of a graph, its results against the whole graph, what stays in memory, faults of one rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest

from orchestrator.base.errors import VerificationError
from orchestrator.model.stage import StageNetwork
from orchestrator.model.topology import Topology
from orchestrator.networks import Network, Rendering, decoder_network
from orchestrator.networks.slices import cut, executable, key_of
from orchestrator.planning import preparation
from orchestrator.planning.options import VerifyOptions
from orchestrator.planning.steps import Kind
from orchestrator.work.binding import bind_portable
from orchestrator.work.shards import Weight, map_shards
from orchestrator.work.verify.inputs import make_calls
from orchestrator.work.verify.lockstep import Lockstep
from orchestrator.work.verify.ort import ort_value
from tests.conftest import SpecMaker
from tests.integration.steps import WITHOUT_ENGINES, forge, run_steps
from tests.networks.test_rendering import config_of, networks
from tests.support.families import TINY, write_tiny

Array = npt.NDArray[Any]
DECODE_STEPS = 3
TOKENS = np.random.default_rng(3).integers(3, 131, (2, 12))
LENGTHS = np.array([12, 8])
CALLS = make_calls(TOKENS, LENGTHS, DECODE_STEPS)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[StageNetwork, list[dict[str, Weight]]]]:
    """The network of a family's only stage, and the weights of its ranks, from a real conversion."""
    from orchestrator.spec.build import BuildSpec
    from orchestrator.spec.decoding import decode

    def convert(family: str, tp: int) -> tuple[StageNetwork, list[dict[str, Weight]]]:
        folder = tmp_path_factory.mktemp(family)
        plain = {
            "source": {"path": str(write_tiny(family, folder / "model"))}, "topology": {"tp": tp},
            "engine": {"max_batch_size": 2, "max_input_len": 16, "max_seq_len": 64}, "release": {"name": "tiny", "version": "1"},
        }  # fmt: skip
        made = preparation.plan(decode(BuildSpec, plain, "test"))
        outcomes = run_steps(made, (folder / "store").as_uri(), (Kind.CONVERT,))
        outputs = [output for outcome in outcomes.values() for output in outcome.outputs]
        network = VerifyOptions.model_validate(next(made.of_kind(Kind.VERIFY)).options).network
        return network, [
            map_shards([folder / "store" / output.key for output in outputs if output.name.startswith(f"rank{rank}")])
            for rank in range(tp)
        ]

    return convert


def whole(network: Network, weights: dict[str, Weight], layers: int) -> list[Array]:
    """A rank's graph as it is, in one session, call after call."""
    bound = {name: ort_value(value, kind) for name, (value, kind) in bind_portable(network, weights).items()}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.add_external_initializers(list(bound), list(bound.values()))
    session = onnxruntime.InferenceSession(network.model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    shapes = {value.name: value.shape for value in session.get_inputs() if value.name.startswith("past_")}
    cache = {name: np.full((2, shape[1], 13, shape[3]), 1e4, np.float32) for name, shape in shapes.items()}
    results = []
    for call in CALLS:
        feeds = {
            "input_ids": call.input_ids, "position_ids": call.position_ids, "write_indices": call.write_indices,
            "logit_indices": call.logit_indices,
        }  # fmt: skip
        names = [value.name for value in session.get_outputs()]
        outputs = dict(zip(names, session.run(names, {**feeds, **cache}), strict=True))
        cache = {name: outputs[name.replace("past_", "present_", 1)] for name in cache}
        results.append(outputs["logits"])
    return results


@pytest.mark.parametrize("family", TINY)
def test_slices_of_one_rank_compute_what_its_whole_graph_does(family: str, converted: Callable[..., Any]) -> None:
    """Not to the bit: the whole graph's constants are folded and its matrices packed before they are multiplied."""
    network, weights = converted(family, 1)
    sliced = Lockstep(network, weights, CALLS, []).run()
    expected = whole(decoder_network(network, 0, Rendering.executed()), weights[0], network.stage.num_layers)
    for found, wanted in zip(sliced, expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("family", TINY)
def test_every_node_stands_in_exactly_one_slice(family: str, tp: int) -> None:
    for network in networks(config_of(family), Topology(tp, 2)):
        for tp_rank in range(tp):
            graph = decoder_network(network, tp_rank, Rendering.executed())
            sliced = cut(graph)
            found = Counter(node.name for part in sliced.slices for node in part.nodes)
            found.update(part.collective.result for part in sliced.slices if part.collective)
            assert found == Counter(node.name for node in graph.model.graph.node)
            assert [part.layer for part in sliced.slices if part.layer is not None] == list(range(network.stage.num_layers))


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_slices_hold_one_of_the_two_linears_of_all_experts(family: str) -> None:
    for network in networks(config_of(family), Topology(2, 1)):
        for part in cut(decoder_network(network, 0, Rendering.executed())).slices:
            assert sum(name.endswith(("mlp.fc.weight", "mlp.proj.weight")) for name in part.weights) <= 1


def test_cut_of_a_graph_that_reads_a_cache_elsewhere_than_it_is_written_is_refused() -> None:
    (network,) = networks(config_of("llama"), Topology(1, 1))
    graph = decoder_network(network, 0, Rendering.executed())
    node = next(node for node in graph.model.graph.node if node.name == "transformer.layers.2.attention.qkv.matmul")
    node.input[0] = "past_key_values.0.key"
    with pytest.raises(ValueError, match=r"reads past_key_values\.0\.key, which another slice writes"):
        cut(graph)


@pytest.mark.parametrize("family", TINY)
def test_key_of_slices_tells_apart_what_their_models_tell_apart(family: str) -> None:
    models: dict[tuple[object, ...], bytes] = {}
    for network in networks(config_of(family), Topology(2, 2)):
        for tp_rank in range(2):
            graph = decoder_network(network, tp_rank, Rendering.executed())
            for part in cut(graph).slices:
                kinds = [onnx.TensorProto.FLOAT] * (len(part.inputs) + len(part.weights))
                model = executable(part, graph.model.opset_import, kinds).SerializeToString()
                assert models.setdefault(key_of(part), model) == model
    assert len(set(models.values())) == len(models)


@pytest.mark.parametrize("what", ["attribute", "constant", "operator", "input", "outputs"])
def test_key_of_a_slice_that_differs_in_one_thing_is_another(what: str) -> None:
    (network,) = networks(config_of("llama"), Topology(1, 1))
    part, other = (cut(decoder_network(network, 0, Rendering.executed())).slices[1] for _ in range(2))
    assert key_of(part) == key_of(other)
    scatter = next(node for node in other.nodes if node.op_type == "TensorScatter")
    match what:
        case "attribute":
            scatter.attribute[0].i = -1
        case "constant":
            other = replace(
                other, constants=(onnx.numpy_helper.from_array(np.array([7]), part.constants[0].name), *part.constants[1:])
            )
        case "operator":
            scatter.op_type = "ScatterElements"
        case "input":
            scatter.input[0], scatter.input[1] = scatter.input[1], scatter.input[0]
        case "outputs":
            other = replace(other, outputs=other.outputs[::-1])
    assert key_of(part) != key_of(other)


def test_layers_that_are_alike_are_compiled_once(converted: Callable[..., Any]) -> None:
    network, weights = converted("gemma3", 2)
    ranks = Lockstep(network, weights, CALLS, [])
    ranks.run()
    assert network.stage.num_layers == 7
    assert len(ranks._sessions) <= 6


def test_values_of_a_layer_are_dropped_at_its_end(converted: Callable[..., Any]) -> None:
    """What is kept does not grow with the layers: masks, the hidden states, and at last the logits."""
    network, weights = converted("llama", 2)
    ranks = Lockstep(network, weights, CALLS, [])
    kept: list[int] = []

    def count(done: int, total: int) -> None:
        if ranks._ranks[0].sliced.slices[done - 1].layer is not None:
            kept.append(sum(len(values) for rank in ranks._ranks for values in rank.values))
            assert not any(rank.cache for rank in ranks._ranks)

    ranks.run(count)
    assert kept[0] == kept[1]
    assert all(set(values) == {"logits"} for rank in ranks._ranks for values in rank.values)


def spoil(weights: dict[str, Weight], name: str, change: Callable[[npt.NDArray[np.uint16]], None]) -> dict[str, Weight]:
    data = weights[name].data.copy()
    change(data.view(np.uint16).reshape(weights[name].shape))
    return {**weights, name: replace(weights[name], data=data)}


def test_rank_with_another_norm_than_the_others_is_named_with_its_layer(converted: Callable[..., Any]) -> None:
    """A mistake that no sum over the ranks hides: their hidden states differ from there on."""
    network, weights = converted("olmo2", 2)
    name = "transformer.layers.1.post_feedforward_layernorm.weight"

    def negate(values: npt.NDArray[np.uint16]) -> None:
        values[3] ^= 0x8000

    with pytest.raises(VerificationError, match=r"rank 1 and rank 0 differ by .* after layer 1"):
        Lockstep(network, [weights[0], spoil(weights[1], name, negate)], CALLS, []).run()


def swap_heads(values: npt.NDArray[np.uint16]) -> None:
    values[[*range(16, 32), *range(16)]] = values[:32]


@pytest.mark.parametrize(
    ("family", "name", "change", "place"),
    [
        pytest.param(
            "llama", "transformer.layers.1.attention.qkv.weight", swap_heads, "jumps in layer 1, from", id="two-heads-swapped"
        ),
        pytest.param(
            "llama", "transformer.layers.2.mlp.proj.weight", lambda values: values.fill(0), "jumps in layer 2", id="adds-nothing"
        ),
        pytest.param(
            "llama", "lm_head.weight", lambda values: values[:2].fill(0), "in the last norm or the head", id="two-rows-of-head"
        ),
        pytest.param(
            "phimoe", "lm_head.bias", lambda values: values[:2].fill(0), "in the last norm or the head", id="bias-of-head"
        ),
    ],
)
def test_verification_of_a_fault_on_one_rank_fails_and_names_its_layer(
    tmp_path: Path,
    store_url: str,
    make_spec: SpecMaker,
    family: str,
    name: str,
    change: Callable[[npt.NDArray[np.uint16]], None],
    place: str,
) -> None:
    made = preparation.plan(make_spec(write_tiny(family, tmp_path / "model"), topology={"tp": 2}))
    outcomes = run_steps(made, store_url, (Kind.CONVERT,))
    shard = Path(store_url.removeprefix("file://")) / outcomes["convert/stage0/group0"].outputs[1].key
    weight = map_shards([shard])[name]
    spoilt = spoil({name: weight}, name, change)[name]
    data = bytearray(shard.read_bytes())
    begin = data.index(bytes(weight.data[:64]))
    data[begin : begin + len(spoilt.data)] = bytes(spoilt.data)
    shard.unlink()
    shard.write_bytes(data)
    forge(Path(store_url.removeprefix("file://")), outcomes["convert/stage0/group0"])
    with pytest.raises(VerificationError, match=f"relative error .*{place}"):
        run_steps(made, store_url, WITHOUT_ENGINES)
