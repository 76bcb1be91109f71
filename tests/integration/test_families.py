"""Every family: converted, executed under MPI against transformers, and built by TensorRT."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.base.errors import ArchitectureError, QuantizationError, TopologyError
from orchestrator.families import FAMILIES
from orchestrator.planning import preparation
from orchestrator.planning.facts import Verification
from orchestrator.planning.plan import Plan
from orchestrator.planning.steps import Kind, Outcome
from tests.conftest import SpecMaker
from tests.integration.steps import WITHOUT_ENGINES, run_steps
from tests.support.families import BASE, TINY, write_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the module's models and its store lie, so that a reference is computed once."""
    return tmp_path_factory.mktemp("families")


def source(folder: Path, family: str) -> Path:
    made = folder / family
    return made if made.is_dir() else write_tiny(family, made)


def verified(folder: Path, family: str, topology: dict[str, int], make_spec: SpecMaker) -> Verification:
    return verified_and_built(preparation.plan(make_spec(source(folder, family), topology=topology)), folder, ())[0]


def verified_and_built(made: Plan, folder: Path, tp_ranks: Collection[int]) -> tuple[Verification, list[Outcome]]:
    """The proof of a plan, and the engines of these tensor-parallel ranks of each stage."""
    engines = [step for step in made.of_kind(Kind.BUILD) if step.options["tp_rank"] in tp_ranks]
    steps = tuple(step for step in made.steps if step.kind in WITHOUT_ENGINES or step in engines)
    outcomes = run_steps(replace(made, steps=steps), (folder / "store").as_uri())
    last = [step.name for step in made.of_kind(Kind.VERIFY)][-1]
    return outcomes[last].facts.verification, [outcomes[step.name] for step in engines]


def check(found: Verification) -> None:
    assert found.max_relative_error < 1e-3
    assert found.mean_kl < 1e-6
    assert found.top1_agreement == 1.0


def test_every_family_has_a_tiny_model() -> None:
    assert set(TINY) == set(FAMILIES)


@pytest.mark.slow
@pytest.mark.parametrize("family", TINY)
def test_family_with_duplicated_kv_heads_agrees_with_transformers(folder: Path, make_spec: SpecMaker, family: str) -> None:
    check(verified(folder, family, {"tp": 4}, make_spec))


@pytest.mark.slow
@pytest.mark.parametrize("family", TINY)
def test_family_on_uneven_stages_agrees_with_transformers_and_builds(folder: Path, make_spec: SpecMaker, family: str) -> None:
    """Of a stage the first rank's engine: the others' graphs are the same, with other weights."""
    plan = preparation.plan(make_spec(source(folder, family), topology={"tp": 2, "pp": 2}))
    found, engines = verified_and_built(plan, folder, (0,))
    check(found)
    assert len(engines) == 2


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.config.experts is not None])
@pytest.mark.parametrize(
    "topology", [{"tp": 2, "moe_ep": 2}, {"tp": 4, "moe_ep": 2}, {"tp": 4, "moe_ep": 4}], ids=["ep2", "tp2-ep2", "ep4"]
)
def test_experts_in_parallel_agree_with_transformers(
    folder: Path, make_spec: SpecMaker, family: str, topology: dict[str, int]
) -> None:
    check(verified(folder, family, topology, make_spec))


def test_experts_of_a_dense_model_are_refused(folder: Path, make_spec: SpecMaker) -> None:
    with pytest.raises(TopologyError, match="the model has no experts"):
        preparation.plan(make_spec(source(folder, "llama"), topology={"tp": 2, "moe_ep": 2}))


def test_experts_that_do_not_divide_are_refused(folder: Path, make_spec: SpecMaker) -> None:
    three = write_tiny("mixtral", folder / "three-experts", num_local_experts=3)
    with pytest.raises(TopologyError, match="moe_ep=2 does not divide the 3 experts"):
        preparation.plan(make_spec(three, topology={"tp": 2, "moe_ep": 2}))


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize("topology", [{}, {"tp": 2, "pp": 2}], ids=["one-rank", "tp2-pp2"])
def test_experts_in_some_layers_only_agree_with_transformers(
    folder: Path, make_spec: SpecMaker, family: str, topology: dict[str, int]
) -> None:
    mixed = folder / f"mixed-{family}"
    if not mixed.is_dir():
        write_tiny(family, mixed, num_hidden_layers=4, mlp_only_layers=[2], decoder_sparse_step=1)
    plan = preparation.plan(make_spec(mixed, topology=topology))
    outcomes = run_steps(plan, (folder / "store").as_uri(), WITHOUT_ENGINES)
    check(outcomes[[step.name for step in plan.of_kind(Kind.VERIFY)][-1]].facts.verification)


def test_stage_without_a_rotated_layer_agrees_with_transformers(folder: Path, make_spec: SpecMaker) -> None:
    """SmolLM3 rotates three of four layers: the second of these stages has only the fourth."""
    plan = preparation.plan(make_spec(source(folder, "smollm3"), topology={"pp": 3, "pp_partition": [3, 1, 1]}))
    outcomes = run_steps(plan, (folder / "store").as_uri(), tuple(Kind))
    check(outcomes[[step.name for step in plan.of_kind(Kind.VERIFY)][-1]].facts.verification)


def test_dense_layers_among_experts_limit_tensor_parallelism_too(folder: Path, make_spec: SpecMaker) -> None:
    mixed = write_tiny("qwen3_moe", folder / "narrow", mlp_only_layers=[1], intermediate_size=30)
    with pytest.raises(TopologyError, match="tp=4 does not divide intermediate_size 30"):
        preparation.plan(make_spec(mixed, topology={"tp": 4}))


def test_layer_that_predicts_further_tokens_is_left_out_and_noted(folder: Path, make_spec: SpecMaker) -> None:
    """A checkpoint with one layer more than config.json says, as GLM's."""
    longer = write_tiny("glm4_moe", folder / "with-mtp", num_hidden_layers=4)
    config = json.loads((longer / "config.json").read_text())
    (longer / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    (note,) = [note for note in preparation.plan(make_spec(longer)).notes if "model.layers.3." in note]
    assert "MTP" in note


def test_quantized_cache_of_latents_is_refused(folder: Path, make_spec: SpecMaker) -> None:
    with pytest.raises(QuantizationError, match=r"latent attention \(MLA\) holds latents, which are not quantized to FP8"):
        preparation.plan(make_spec(source(folder, "deepseek_v3"), quantization={"kv_cache": "FP8"}))


def test_queries_without_a_latent_of_their_own_agree_with_transformers(tmp_path: Path, make_spec: SpecMaker) -> None:
    """DeepSeek's smaller models make queries from the hidden states."""
    plan = preparation.plan(make_spec(write_tiny("deepseek_v3", tmp_path / "model", q_lora_rank=None), topology={"tp": 2}))
    check(run_steps(plan, (tmp_path / "store").as_uri(), WITHOUT_ENGINES)["verify/stage0"].facts.verification)


@pytest.mark.parametrize(
    ("alike", "head_size"), [(True, 32), (False, 32), (True, 16)], ids=["keys-as-values", "values", "same-size"]
)
def test_heads_of_two_kinds_without_experts_agree_with_transformers(
    tmp_path: Path, make_spec: SpecMaker, alike: bool, head_size: int
) -> None:
    """Gemma 4 31B; the second stage has both kinds of layers, at tp=4 with each global key/value head on two ranks."""
    made = write_tiny("gemma4", tmp_path / "model", enable_moe_block=False, attention_k_eq_v=alike, global_head_dim=head_size)
    plan = preparation.plan(make_spec(made, topology={"tp": 4, "pp": 2, "pp_partition": [4, 3]}))
    outcomes = run_steps(plan, (tmp_path / "store").as_uri(), WITHOUT_ENGINES)
    check(outcomes["verify/stage1"].facts.verification)


def test_portable_part_of_heads_of_two_sizes_is_refused(folder: Path, make_spec: SpecMaker) -> None:
    spec = make_spec(source(folder, "gemma4"), release={"name": "tiny", "version": "1", "include": ["engines", "portable"]})
    with pytest.raises(ArchitectureError, match="heads of two sizes"):
        preparation.plan(spec)


def test_linears_that_transformers_renames_are_calibrated(folder: Path, make_spec: SpecMaker) -> None:
    """Hy3's shared expert is stored as shared_mlp, and is shared_experts in transformers."""
    plan = preparation.plan(make_spec(source(folder, "hy_v3"), quantization={"algorithm": "FP8"}))
    (outcome,) = run_steps(plan, (folder / "store").as_uri(), (Kind.CALIBRATE,)).values()
    assert outcome.kind is Kind.CALIBRATE


def test_latent_attention_in_halves_rotates_what_transformers_does(tmp_path: Path, make_spec: SpecMaker) -> None:
    plan = preparation.plan(make_spec(write_tiny("deepseek_v3", tmp_path / "model", rope_interleave=False)))
    check(run_steps(plan, (tmp_path / "store").as_uri(), WITHOUT_ENGINES)["verify/stage0"].facts.verification)


def write_with_vision(folder: Path, dtype: str = "bfloat16") -> Path:
    """A Mistral3 with a vision tower around a tiny Ministral 3, as the hub has it: a head tied by the larger model."""
    import torch
    import transformers

    torch.manual_seed(2)
    text = transformers.Ministral3Config(**{**BASE, **TINY["ministral3"].fields})
    vision = transformers.PixtralVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
    )
    model = transformers.Mistral3ForConditionalGeneration(transformers.Mistral3Config(vision_config=vision, text_config=text))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def test_language_model_within_a_larger_model_agrees_with_transformers(tmp_path: Path, make_spec: SpecMaker) -> None:
    plan = preparation.plan(make_spec(write_with_vision(tmp_path / "model"), topology={"tp": 2}))
    assert plan.inputs.config.tie_word_embeddings
    (warning,) = [each for each in plan.warnings if "only the language model of Mistral3ForConditionalGeneration is built" in each]
    assert "vision_tower" in warning
    check(run_steps(plan, (tmp_path / "store").as_uri(), WITHOUT_ENGINES)["verify/stage0"].facts.verification)


def test_language_model_within_kimi_agrees_with_transformers(tmp_path: Path, make_spec: SpecMaker) -> None:
    """Kimi K2.5 as published: tensors with a prefix, the language model's config in text_config, with a model_type of its own."""
    from safetensors.numpy import load_file, save_file

    plain = write_tiny("deepseek_v3", tmp_path / "plain", dtype="float32")
    text = {**json.loads((plain / "config.json").read_text()), "model_type": "kimi_k2"}
    larger = tmp_path / "kimi"
    larger.mkdir()
    config = {"architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25", "text_config": text}
    (larger / "config.json").write_text(json.dumps(config))
    tensors = {f"language_model.{name}": array for name, array in load_file(plain / "model.safetensors").items()}
    tensors["vision_tower.patch_embed.proj.bias"] = np.zeros(4, np.float32)
    save_file(tensors, larger / "model.safetensors")
    plan = preparation.plan(make_spec(larger, topology={"tp": 2, "moe_ep": 2}))
    assert any("only the language model of KimiK25ForConditionalGeneration" in warning for warning in plan.warnings)
    check(run_steps(plan, (tmp_path / "store").as_uri(), WITHOUT_ENGINES)["verify/stage0"].facts.verification)


ROTARY: dict[str, dict[str, Any]] = {
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
}


@pytest.mark.parametrize("kind", ROTARY)
def test_rotary_scaling_agrees_with_transformers(tmp_path: Path, make_spec: SpecMaker, kind: str) -> None:
    made = write_tiny("llama", tmp_path / "model", rope_parameters=ROTARY[kind])
    plan = preparation.plan(make_spec(made))
    outcomes = run_steps(plan, (tmp_path / "store").as_uri(), WITHOUT_ENGINES)
    check(outcomes["verify/stage0"].facts.verification)


@pytest.mark.parametrize("original", [64, 7], ids=["short-texts", "long-texts"])
def test_longrope_agrees_with_transformers(tmp_path: Path, make_spec: SpecMaker, original: int) -> None:
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": original,
        "short_factor": [1.0 + 0.1 * number for number in range(8)], "long_factor": [2.0 + 0.3 * number for number in range(8)],
    }  # fmt: skip
    made = write_tiny("phi3", tmp_path / "model", rope_parameters=rope, original_max_position_embeddings=original)
    plan = preparation.plan(make_spec(made))
    outcomes = run_steps(plan, (tmp_path / "store").as_uri(), WITHOUT_ENGINES)
    check(outcomes["verify/stage0"].facts.verification)
