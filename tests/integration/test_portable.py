"""The portable part against transformers and the verification: what ONNX Runtime GenAI, which knows nothing of us, makes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file

from orchestrator.base.errors import QuantizationError, VerificationError
from orchestrator.networks import portable_experts
from orchestrator.networks.graph import GraphWriter
from orchestrator.networks.router import Routing
from orchestrator.networks.shape import RankShape
from orchestrator.planning import preparation
from orchestrator.planning.facts import ExportFacts
from orchestrator.planning.plan import Plan
from orchestrator.planning.steps import Kind
from orchestrator.work.export import step as exporting
from tests.conftest import SpecMaker
from tests.support.families import PORTABLE, write_tiny
from tests.support.portable import greedy, likeliest_tokens, next_logits, portable_folder, random_prompts

TOPOLOGIES = [{}, {"tp": 2}, {"pp": 2}, {"tp": 2, "pp": 2}]
NUM_TOKENS, NUM_PROMPTS = 64, 8
POSITIONS = 96
INCLUDE = {"name": "tiny", "version": "1", "include": ["engines", "portable"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the module's models and its store lie, so that a reference is computed once."""
    return tmp_path_factory.mktemp("portable")


def source(folder: Path, family: str) -> Path:
    made = folder / family
    changes: dict[str, Any] = {"original_max_position_embeddings": POSITIONS} if family == "phi3" else {}
    if not made.is_dir():
        write_tiny(family, made, dtype="float32", max_position_embeddings=POSITIONS, **changes)
    return made


def planned(path: Path, make_spec: SpecMaker, **sections: Any) -> Plan:
    sizes = {"max_batch_size": 2, "max_input_len": 16, "max_seq_len": POSITIONS}
    return preparation.plan(make_spec(path, dtype="float32", engine=sizes, release=INCLUDE, **sections))


def assert_greedy(path: Path, prompts: list[list[int]], found: list[list[int]]) -> None:
    """Assert that every prompt has its tokens, up to one that ends the text, and that they are those of greedy decoding."""
    ends = transformers.AutoConfig.from_pretrained(path).eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    for answer in found:
        last = [number for number, token in enumerate(answer) if token in ends] or [NUM_TOKENS - 1]
        assert len(answer) == last[0] + 1
    assert found == likeliest_tokens(path, prompts, found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "topology"),
    [*((family, {"tp": 2, "pp": 2}) for family in PORTABLE), *(("llama", topology) for topology in TOPOLOGIES[:3]),
     ("mixtral", {"tp": 2, "moe_ep": 2})],
    ids=str,
)  # fmt: skip
def test_genai_on_the_portable_part_generates_what_transformers_generates(
    family: str, topology: dict[str, int], folder: Path, make_spec: SpecMaker, tmp_path: Path
) -> None:
    path = source(folder, family)
    made = planned(path, make_spec, topology=topology)
    outcomes = portable_folder(made, folder / "store", tmp_path / "model")
    prompts = random_prompts(NUM_PROMPTS, made.inputs.config.vocab_size)
    assert_greedy(path, prompts, greedy(tmp_path / "model", prompts, NUM_TOKENS))
    errors = [outcome.facts_as(ExportFacts).max_relative_error for outcome in outcomes.values() if outcome.kind is Kind.EXPORT]
    assert len(errors) == made.topology.pp
    assert max(error for error in errors if error is not None) < 1e-6


@pytest.mark.parametrize(("family", "dtype"), [("llama", "bfloat16"), ("llama", "float16"), ("gpt_oss", "bfloat16")])
def test_genai_on_weights_of_16_bits_generates_what_transformers_generates(
    family: str, dtype: str, make_spec: SpecMaker, tmp_path: Path
) -> None:
    path = write_tiny(family, tmp_path / "source", dtype=dtype, max_position_embeddings=POSITIONS)
    sizes = {"max_batch_size": 2, "max_input_len": 16, "max_seq_len": POSITIONS}
    made = preparation.plan(make_spec(path, engine=sizes, release=INCLUDE, topology={"tp": 2, "pp": 2}))
    portable_folder(made, tmp_path / "store", tmp_path / "model")
    prompts = random_prompts(4, made.inputs.config.vocab_size)
    assert_greedy(path, prompts, greedy(tmp_path / "model", prompts, NUM_TOKENS))


@pytest.mark.slow
@pytest.mark.parametrize(
    "quantization",
    [{"algorithm": "FP8"}, {"algorithm": "W8A16"}, {"algorithm": "W4A16_AWQ", "group_size": 16},
     {"algorithm": "FP8", "kv_cache": "FP8"}, {"kv_cache": "INT8"}],
    ids=str,
)  # fmt: skip
def test_genai_on_a_quantized_portable_part_computes_the_verified_logits(
    quantization: dict[str, Any], folder: Path, make_spec: SpecMaker, tmp_path: Path
) -> None:
    tolerance = {"max_relative_error": None, "max_mean_kl": 10.0, "min_top1_agreement": 0.0}
    made = planned(
        source(folder, "llama"), make_spec, topology={"tp": 2, "pp": 2}, quantization=quantization,
        verification={"max_tokens": 12, "decode_steps": 3, "tolerance": tolerance},
    )  # fmt: skip
    outcomes = portable_folder(made, folder / "store", tmp_path / "model")
    store = folder / "store"
    reference = load_file(store / outcomes["reference"].output("reference.safetensors").key)
    verified = load_file(store / outcomes["verify/stage1"].output("logits.safetensors").key)["call0"]
    for sequence, length in enumerate(reference["lengths"]):
        prompt = reference["tokens"][sequence, : max(int(length) - 3, 1)]
        found = next_logits(tmp_path / "model", prompt.tolist())
        expected = verified[sequence, 0]
        assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("algorithm", ["NVFP4", "W4A16_NVFP4", "MXFP8"])
def test_plan_portable_part_of_a_format_that_only_tensorrt_computes_is_refused(
    algorithm: str, folder: Path, make_spec: SpecMaker
) -> None:
    with pytest.raises(QuantizationError, match="ONNX Runtime has no operators") as caught:
        planned(source(folder, "llama"), make_spec, quantization={"algorithm": algorithm})
    assert "release.include" in caught.value.advice


def test_export_graph_that_maps_the_weights_of_another_rank_is_refused(
    folder: Path, make_spec: SpecMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = planned(source(folder, "llama"), make_spec, topology={"tp": 2})
    right = exporting.portable_stage
    monkeypatch.setattr(exporting, "portable_stage", lambda network, weights, same: right(network, weights[::-1], same))
    with pytest.raises(VerificationError, match="portable graph of stage 0 differs from the verified ranks"):
        portable_folder(made, tmp_path / "store", tmp_path / "model")


def _halves_swapped(graph: GraphWriter, weight: str, width: int) -> str:
    """Give the layer of experts the up where it takes the gate."""
    rows = graph.constant(f"by_turns_{width}", np.stack([np.arange(width), np.arange(width) + width], axis=1).reshape(-1))
    return graph.node("Gather", [weight, rows], f"{weight}.by_turns", axis=1)


def _without_total(graph: GraphWriter, shape: RankShape, routing: Routing, prefix: str) -> tuple[str, str]:
    """Leave the sum of a token's weights out, which is the family's `routed_scale`."""
    logits, _ = _LOGITS(graph, shape, routing, prefix)
    return logits, graph.scalar("whole", 1.0, "float32")


_LOGITS = portable_experts._logits


@pytest.mark.parametrize("wrong", [_halves_swapped, _without_total], ids=["halves", "total"])
def test_export_graph_with_wrong_operands_of_the_layer_of_experts_is_refused(
    wrong: Callable[..., Any], folder: Path, make_spec: SpecMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = planned(source(folder, "deepseek_v3"), make_spec)
    monkeypatch.setattr(portable_experts, "_by_turns" if wrong is _halves_swapped else "_logits", wrong)
    with pytest.raises(VerificationError, match="portable graph of stage 0 differs from the verified ranks"):
        portable_folder(made, tmp_path / "store", tmp_path / "model")


def test_export_graph_that_answers_for_the_first_token_is_refused(
    folder: Path, make_spec: SpecMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = planned(source(folder, "llama"), make_spec)
    right = exporting.portable_stage

    def first(*given: Any) -> Any:
        model = right(*given)
        (node,) = (node for node in model.graph.node if node.name == "logit_indices")
        node.op_type = "ArgMin"
        return model

    monkeypatch.setattr(exporting, "portable_stage", first)
    with pytest.raises(VerificationError, match="portable graph of stage 0 differs"):
        portable_folder(made, tmp_path / "store", tmp_path / "model")
