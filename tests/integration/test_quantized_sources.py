"""Builds from quantized sources: rank files are those of the dense model of the same values, and every byte is read once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from typer.testing import CliRunner

from orchestrator.base.errors import OrchestratorError, VerificationError
from orchestrator.checkpoints.quantized.decoding import Dequantizer
from orchestrator.cli.commands import app
from orchestrator.planning import preparation
from orchestrator.planning.plan import Plan
from orchestrator.planning.steps import Kind
from tests.integration.steps import WITHOUT_ENGINES, run_steps
from tests.support.families import write_tiny
from tests.support.peaks import run_apart
from tests.support.quantized import BLOCK_FP8, block_fp8, int4_groups, mxfp4_groups, write_both, write_quantized
from tests.support.synthetic import build_spec

SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64, "num_hidden_layers": 2}
"""At tp=2 a rank has 192 of the 384 inner features: one block and a half of 128."""


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": {"symmetric": True, **weights}}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": ["lm_head"]}


INT4 = compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32)
MXFP4 = compressed("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32)
FORMATS = {"block fp8": (block_fp8, BLOCK_FP8), "int4": (int4_groups, INT4), "mxfp4": (mxfp4_groups, MXFP4)}


def made_plan(source: Path, dtype: str = "bfloat16", **topology: Any) -> Plan:
    return preparation.plan(build_spec(source, topology=topology or {"tp": 2}, dtype=dtype))


def rank_files(plan: Plan, store: Path) -> dict[str, str]:
    outcomes = run_steps(plan, store.as_uri(), (Kind.CONVERT,))
    return {output.name: output.sha256 for outcome in outcomes.values() for output in outcome.outputs}


@pytest.mark.parametrize("name", FORMATS)
def test_build_from_a_quantized_source_is_that_of_the_dense_model_and_verifies(tmp_path: Path, name: str) -> None:
    quantizer, quantization = FORMATS[name]
    quantized, dense = write_both(write_tiny("qwen3", tmp_path / "plain", **SIZES), tmp_path, quantizer, quantization)
    plan = made_plan(quantized)
    outcomes = run_steps(plan, (tmp_path / "store").as_uri(), WITHOUT_ENGINES)
    found = {o.name: o.sha256 for key, outcome in outcomes.items() if key.startswith("convert") for o in outcome.outputs}
    assert found == rank_files(made_plan(dense), tmp_path / "dense-store")
    assert outcomes["verify/stage0"].facts.verification.max_relative_error < 1e-3
    for step in plan.of_kind(Kind.CONVERT):
        assert outcomes[step.name].facts.source_bytes_read == step.estimate.read_bytes
    assert sum(step.estimate.read_bytes for step in plan.of_kind(Kind.CONVERT)) == plan.inputs.index.num_bytes


@pytest.mark.parametrize("topology", [{"tp": 2, "pp": 2}, {"tp": 2, "moe_ep": 2}, {"tp": 4}], ids=str)
def test_conversion_of_experts_in_block_fp8_is_that_of_the_dense_model(tmp_path: Path, topology: dict[str, int]) -> None:
    sizes = {**SIZES, "moe_intermediate_size": 192}
    quantized, dense = write_both(write_tiny("qwen3_moe", tmp_path / "plain", **sizes), tmp_path, block_fp8, BLOCK_FP8)
    expected = rank_files(made_plan(dense, **topology), tmp_path / "dense-store")
    assert rank_files(made_plan(quantized, **topology), tmp_path / "store") == expected


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe", "minimax_m2"])
def test_build_of_a_published_family_in_block_fp8_is_that_of_the_dense_model_and_verifies(tmp_path: Path, family: str) -> None:
    """DeepSeek's latent projections have heights that are no multiple of a block."""
    quantized, dense = write_both(write_tiny(family, tmp_path / "plain", hidden_size=160), tmp_path, block_fp8, BLOCK_FP8)
    plan = made_plan(quantized)
    outcomes = run_steps(plan, (tmp_path / "store").as_uri(), WITHOUT_ENGINES)
    found = {o.name: o.sha256 for key, outcome in outcomes.items() if key.startswith("convert") for o in outcome.outputs}
    assert found == rank_files(made_plan(dense), tmp_path / "dense-store")
    assert outcomes["verify/stage0"].facts.verification.max_relative_error < 1e-3


def write_gpt_oss_in_mxfp4(plain: Path, folder: Path) -> tuple[Path, Path]:
    """Experts in blocks and scales, as gpt-oss publishes them; also the dense model of the values that they mean."""
    import safetensors.torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(4)
    stored, meant = {}, {}
    for name, tensor in safetensors.torch.load_file(plain / "model.safetensors").items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[name] = meant[name] = tensor
            continue
        experts, inner, out = tensor.shape
        blocks = torch.randint(0, 256, (experts, out, inner // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(123, 126, (experts, out, inner // 32), generator=generator, dtype=torch.uint8)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        meant[name] = convert_moe_packed_tensors(blocks, scales).contiguous()
    config = json.loads((plain / "config.json").read_text())
    method = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
    }
    quantized = write_quantized(folder / "quantized", stored, method, **config)
    (folder / "dense").mkdir()
    safetensors.torch.save_file(meant, folder / "dense" / "model.safetensors", {"format": "pt"})
    (folder / "dense" / "config.json").write_text(json.dumps(config))
    return quantized, folder / "dense"


@pytest.mark.parametrize("topology", [{"tp": 2}, {"tp": 2, "moe_ep": 2}], ids=str)
def test_build_of_gpt_oss_in_mxfp4_is_that_of_the_dense_model_and_verifies(tmp_path: Path, topology: dict[str, int]) -> None:
    """Blocks lie along the inputs of an expert that transformers has transposed; gate and up alternate."""
    sizes = {"hidden_size": 96, "intermediate_size": 64}
    quantized, dense = write_gpt_oss_in_mxfp4(write_tiny("gpt_oss", tmp_path / "plain", **sizes), tmp_path)
    plan = made_plan(quantized, **topology)
    outcomes = run_steps(plan, (tmp_path / "store").as_uri(), WITHOUT_ENGINES)
    found = {o.name: o.sha256 for key, outcome in outcomes.items() if key.startswith("convert") for o in outcome.outputs}
    assert found == rank_files(made_plan(dense, **topology), tmp_path / "dense-store")
    assert outcomes["verify/stage0"].facts.verification.max_relative_error < 1e-3
    assert sum(step.estimate.read_bytes for step in plan.of_kind(Kind.CONVERT)) == plan.inputs.index.num_bytes


def test_conversion_of_a_remote_quantized_source_reads_every_byte_once(tmp_path: Path) -> None:
    quantized, _ = write_both(write_tiny("qwen3", tmp_path / "plain", **SIZES), tmp_path, int4_groups, INT4)
    expected = rank_files(made_plan(quantized), tmp_path / "store")
    files = fsspec.filesystem("memory")
    for path in quantized.iterdir():
        files.pipe_file(f"/quantized-source/{path.name}", path.read_bytes())
    plan = preparation.plan(build_spec("memory://quantized-source", topology={"tp": 2}, dtype="bfloat16"))
    (step,) = plan.of_kind(Kind.CONVERT)
    outcome = run_steps(plan, (tmp_path / "remote-store").as_uri(), (Kind.CONVERT,))[step.name]
    assert {output.name: output.sha256 for output in outcome.outputs} == expected
    assert outcome.facts.source_bytes_read == step.estimate.read_bytes


def test_conversion_of_fused_linears_reads_blocks_off_their_sections_once(tmp_path: Path) -> None:
    """Phi-3's gate and up projections are halves of one tensor, and so are not cut on blocks."""
    sizes = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
    quantized, dense = write_both(write_tiny("phi3", tmp_path / "plain", **sizes), tmp_path, block_fp8, BLOCK_FP8)
    plan = made_plan(quantized)
    assert rank_files(plan, tmp_path / "store") == rank_files(made_plan(dense), tmp_path / "dense-store")
    outcomes = run_steps(plan, (tmp_path / "again").as_uri(), (Kind.CONVERT,))
    assert sum(outcome.facts.source_bytes_read for outcome in outcomes.values()) == plan.inputs.index.num_bytes


def test_reference_of_block_fp8_is_transformers_own_dequantization(tmp_path: Path) -> None:
    """transformers loads the same folder with `dequantize`; neither reader knows the other."""
    import safetensors.numpy
    import transformers

    from orchestrator.stores.file import FileStore
    from orchestrator.work.reference.step import OUTPUT

    quantized, _ = write_both(write_tiny("qwen3", tmp_path / "plain", **SIZES), tmp_path, block_fp8, BLOCK_FP8)
    store = (tmp_path / "store").as_uri()
    outcome = run_steps(made_plan(quantized), store, (Kind.REFERENCE,))["reference"]
    ours = safetensors.numpy.load(FileStore(store).get(outcome.output(OUTPUT).key))
    config = transformers.FineGrainedFP8Config(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(quantized, quantization_config=config, dtype=torch.bfloat16)
    theirs = model.float()(torch.from_numpy(ours["tokens"][:1])).logits[0].detach()
    length = int(ours["lengths"][0])
    assert torch.allclose(torch.from_numpy(ours["logits"][0][:length]), theirs[:length], atol=1e-4, rtol=1e-4)


def test_quantized_source_may_be_quantized_again(tmp_path: Path) -> None:
    quantized, dense = write_both(write_tiny("qwen3", tmp_path / "plain", **SIZES), tmp_path, block_fp8, BLOCK_FP8)
    found = []
    for source in (quantized, dense):
        again = {"algorithm": "FP8", "calibration": {"num_samples": 2, "max_length": 8}}
        plan = preparation.plan(build_spec(source, topology={"tp": 2}, dtype="bfloat16", quantization=again))
        outcomes = run_steps(plan, (tmp_path / f"store-{source.name}").as_uri(), (Kind.CALIBRATE, Kind.CONVERT))
        found.append({o.name: o.sha256 for key, out in outcomes.items() if key.startswith("convert") for o in out.outputs})
    assert found[0] == found[1]


Fault = Callable[[pytest.MonkeyPatch], None]


def transposed(patch: pytest.MonkeyPatch) -> None:
    real = Dequantizer._grid

    def grid(self: Any, *given: Any) -> Any:
        found = real(self, *given)
        return found.T.copy() if found.shape[0] == found.shape[1] else found

    patch.setattr(Dequantizer, "_grid", grid)


def of_a_neighbour(patch: pytest.MonkeyPatch) -> None:
    real = Dequantizer._whole

    def whole(self: Any, stored: Any) -> Any:
        found = real(self, stored)
        return found[::-1].copy() if len(found) > 1 and stored.dtype == "F32" else found

    patch.setattr(Dequantizer, "_whole", whole)


@pytest.mark.parametrize("fault", [transposed, of_a_neighbour], ids=["transposed blocks", "scales of other rows"])
def test_verification_catches_scales_that_conversion_misplaces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    quantized, _ = write_both(uneven(tmp_path), tmp_path, block_fp8, BLOCK_FP8)
    plan = made_plan(quantized)
    store = (tmp_path / "store").as_uri()
    with monkeypatch.context() as patch:
        fault(patch)
        run_steps(plan, store, (Kind.CONVERT,))
    with pytest.raises(VerificationError):
        run_steps(plan, store, WITHOUT_ENGINES)


def test_verification_catches_a_conversion_that_reads_a_neighbours_scale(tmp_path: Path) -> None:
    quantized, _ = write_both(uneven(tmp_path), tmp_path, block_fp8, BLOCK_FP8)
    plan = made_plan(quantized)
    tensors = plan.inputs.index.tensors
    names = [f"model.layers.1.self_attn.{name}_proj.weight" for name in "kv"]
    offsets = [tensors[name].encoding.scale.offset for name in names]  # type: ignore[union-attr]
    wrong = swapped(plan, dict(zip(offsets, reversed(offsets), strict=True)))
    with pytest.raises(VerificationError):
        run_steps(wrong, (tmp_path / "store").as_uri(), WITHOUT_ENGINES)


def uneven(folder: Path) -> Path:
    """A model whose blocks have scales far apart."""
    import safetensors.torch

    plain = write_tiny("qwen3", folder / "plain", **SIZES)
    path = plain / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    for number, (name, tensor) in enumerate(tensors.items()):
        if ".layers." in name and tensor.dim() == 2:
            tensor[:128, :128] *= 2.0 + number % 3
            tensor[128:, :128] *= 0.5
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    return plain


def swapped(plan: Plan, offsets: dict[int, int]) -> Plan:
    """The plan with other offsets of scales in its conversion."""

    from dataclasses import replace

    def change(value: Any) -> Any:
        if isinstance(value, dict):
            changed = {key: change(item) for key, item in value.items()}
            if isinstance(changed.get("scale"), dict):
                changed["scale"]["offset"] = offsets.get(changed["scale"]["offset"], changed["scale"]["offset"])
            return changed
        return [change(item) for item in value] if isinstance(value, list) else value

    digests: dict[str, str] = {}
    steps = []
    for step in plan.steps:
        options = change(json.loads(json.dumps(step.options))) if step.kind is Kind.CONVERT else step.options
        moved = step.model_copy(update={"options": options, "needs": tuple(digests.get(need, need) for need in step.needs)})
        moved = type(step).model_validate(moved.model_dump())
        digests[step.digest] = moved.digest
        steps.append(moved)
    return replace(plan, steps=tuple(steps))


@pytest.mark.parametrize("name", FORMATS)
def test_peak_of_a_conversion_is_within_its_estimate(tmp_path: Path, name: str) -> None:
    quantizer, quantization = FORMATS[name]
    sizes = {"hidden_size": 2048, "intermediate_size": 4096, "head_dim": 128, "num_hidden_layers": 1}
    quantized, _ = write_both(write_tiny("qwen3", tmp_path / "plain", **sizes), tmp_path, quantizer, quantization)
    (step,) = made_plan(quantized).of_kind(Kind.CONVERT)
    measured = run_apart(step, {}, (tmp_path / "store").as_uri())
    estimate = step.resources.memory_bytes
    print(f"convert from {name}: {step.estimate.read_bytes:,} bytes read, peak {measured.peak_bytes:,}, estimate {estimate:,}")
    assert measured.peak_bytes < step.resources.memory_bytes
    assert measured.outcome.facts.source_bytes_read == step.estimate.read_bytes


def test_source_cut_short_within_a_scale_is_refused(tmp_path: Path) -> None:
    quantized, _ = write_both(write_tiny("qwen3", tmp_path / "plain", **SIZES), tmp_path, block_fp8, BLOCK_FP8)
    path = quantized / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(OrchestratorError, match="truncated"):
        made_plan(quantized)


def test_inspect_of_a_quantized_source_names_its_format_and_the_dense_dtypes(tmp_path: Path) -> None:
    quantized, _ = write_both(write_tiny("qwen3", tmp_path / "plain", **SIZES), tmp_path, block_fp8, BLOCK_FP8)
    result = CliRunner().invoke(app, ["inspect", str(quantized), "--json"])
    facts = json.loads(result.stdout)
    assert facts["quantized"] == "FP8 128x128"
    assert facts["files"][0]["dtypes"].keys() == {"BF16"}
