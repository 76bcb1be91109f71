"""`algorithm: source`: rank files hold the source's own codes and scales, engines are compiled from them, nothing is calibrated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from orchestrator.base.errors import QuantizationError, SpecError, VerificationError
from orchestrator.model.quantization import (
    FP4_MAX,
    FP8_MAX,
    MIXED_PRECISION,
    LinearFormat,
    WeightFormat,
    linear_of,
    quant_cfg,
    quantization_config,
)
from orchestrator.planning import preparation
from orchestrator.planning.plan import Plan
from orchestrator.planning.steps import Kind, Outcome
from orchestrator.quantizers.formats import unpack_rows
from orchestrator.quantizers.resolve import from_checkpoint
from orchestrator.stores.file import FileStore
from tests.integration.steps import WITHOUT_ENGINES, run_steps
from tests.support.families import write_tiny
from tests.support.quantized import (
    BLOCK_FP8,
    Quantizer,
    block_fp8,
    compressed_nvfp4,
    fp8_dynamic,
    fp8_rows,
    fp8_tensor,
    int4_groups,
    mxfp4_groups,
    mxfp8,
    nvfp4,
    write_both,
    write_quantized,
)
from tests.support.synthetic import build_spec

SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32, "num_hidden_layers": 2}
SOURCE = {"algorithm": "source"}
ROUNDED = {"max_relative_error": None, "max_mean_kl": 0.3, "min_top1_agreement": 0.4}
"""Tolerance where activations are rounded: tiny models and random tokens lose more by it than real ones."""


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": {"symmetric": True, **weights}}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": ["lm_head"]}


MODELOPT_FP8 = {"quant_method": "modelopt", "quant_algo": "FP8"}
MODELOPT_NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}
FBGEMM = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}
INT4 = compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32)
NVFP4 = compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16)
MXFP4 = compressed("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32)
FORMATS: dict[str, tuple[Quantizer, dict[str, Any], str]] = {
    "fp8 per tensor": (fp8_tensor, MODELOPT_FP8, MIXED_PRECISION),
    "fp8 per row": (fp8_rows, FBGEMM, "FP8_PER_CHANNEL_PER_TOKEN"),
    "nvfp4": (nvfp4, MODELOPT_NVFP4, "NVFP4"),
    "mxfp4": (mxfp4_groups, MXFP4, "W4A16_NVFP4"),
    "int4": (int4_groups, INT4, "W4A16"),
}
CONVERTED: dict[str, tuple[Quantizer, dict[str, Any], str]] = {
    **FORMATS,
    "fp8 per tensor, dynamic": (fp8_dynamic, {"quant_method": "fp8", "weight_block_size": None}, "FP8_PER_CHANNEL_PER_TOKEN"),
    "mxfp8": (mxfp8, {"quant_method": "modelopt", "quant_algo": "MXFP8"}, "MXFP8"),
    "nvfp4 of compressed-tensors": (compressed_nvfp4, NVFP4, "NVFP4"),
}
"""Source format -> writer, description, algorithm that the model gets."""
ROUNDING = ("fp8 per tensor", "fp8 per row", "nvfp4")


def made_plan(
    source: Path, dtype: str = "bfloat16", quantization: dict[str, Any] | None = None, rounds: bool = False, **topology: int
) -> Plan:
    """`rounds`: whether activations are rounded, for the tolerance."""
    sections: dict[str, Any] = {"quantization": quantization} if quantization else {}
    sections |= {"verification": {"tolerance": ROUNDED}} if rounds else {}
    return preparation.plan(build_spec(source, topology=topology or {"tp": 2}, dtype=dtype, **sections))


def ranks(plan: Plan, store: Path, outcomes: dict[str, Outcome]) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors of each rank file."""
    found = {}
    for key, outcome in outcomes.items():
        for output in outcome.outputs if key.startswith("convert") else ():
            path = store / "copy" / output.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(FileStore(store.as_uri()).get(output.key))
            found[output.name] = load_file(path)
    return found


def unpacked(tensors: dict[str, torch.Tensor], name: str, fmt: LinearFormat) -> torch.Tensor:
    """A rank's weight in float32, [rows, in]; experts follow each other."""
    linear = name.removesuffix(".weight")
    weight = tensors[name]
    count = len(weight) if weight.dim() == 3 else 1
    suffix = "per_channel_scale" if fmt.weight is WeightFormat.FP8_CHANNEL else "weights_scaling_factor"
    scales, second = tensors[f"{linear}.{suffix}"], tensors.get(f"{linear}.weights_scaling_factor_2")
    found = []
    for expert in range(count):
        bits = weight.view(torch.uint8).reshape(count, -1, weight.shape[-1])[expert]
        if fmt.weight is WeightFormat.FP8_TENSOR:
            amax = float(scales.reshape(count)[expert]) * FP8_MAX
            found.append(unpack_rows(bits, fmt, None, amax))
            continue
        each = scales.reshape(count, -1, *scales.shape[1:][-1:])[expert] if fmt.block_size else scales.reshape(count, -1)[expert]
        amax = float(second.reshape(count)[expert]) * FP4_MAX * FP8_MAX if second is not None else None
        found.append(unpack_rows(bits, fmt, each, amax))
    return torch.cat(found)


def assert_same_values(plan: Plan, found: dict[str, Any], dense: dict[str, Any]) -> None:
    formats = plan.inputs.model_quantization
    assert formats is not None
    count = 0
    for name, tensors in found.items():
        for target, expected in dense[name].items():
            linear = linear_of(target)
            if linear is None or formats.format_of(linear) is None:
                continue
            fmt = formats.format_of(linear)
            assert fmt is not None
            assert torch.equal(unpacked(tensors, target, fmt), expected.reshape(-1, expected.shape[-1])), target
            count += 1
    assert count


@pytest.mark.parametrize("name", FORMATS)
def test_source_format_is_kept_to_the_bit_verified_and_compiled(tmp_path: Path, name: str) -> None:
    quantizer, description, algorithm = FORMATS[name]
    plain = write_tiny("qwen3", tmp_path / "plain", **SIZES)
    quantized, dense = write_both(plain, tmp_path, quantizer, description, torch.float32)
    plan = made_plan(quantized, quantization=SOURCE, rounds=name in ROUNDING)
    assert plan.inputs.model_quantization is not None
    assert plan.inputs.model_quantization.algorithm == algorithm
    assert not list(plan.of_kind(Kind.CALIBRATE))
    outcomes = run_steps(plan, (tmp_path / "store").as_uri())
    exact = made_plan(dense, "float32")
    wide = ranks(exact, tmp_path / "dense-store", run_steps(exact, (tmp_path / "dense-store").as_uri(), (Kind.CONVERT,)))
    assert_same_values(plan, ranks(plan, tmp_path / "store", outcomes), wide)
    for step in plan.of_kind(Kind.CONVERT):
        assert outcomes[step.name].facts.source_bytes_read == step.estimate.read_bytes
    assert outcomes["build/rank1"].outputs
    print(name, outcomes["verify/stage0"].facts.verification)


@pytest.mark.parametrize("topology", [{"tp": 2, "moe_ep": 2}, {"tp": 2}, {"tp": 2, "pp": 2}], ids=str)
@pytest.mark.parametrize("name", CONVERTED)
def test_experts_keep_the_source_format_to_the_bit(tmp_path: Path, name: str, topology: dict[str, int]) -> None:
    quantizer, description, algorithm = CONVERTED[name]
    plain = write_tiny("qwen3_moe", tmp_path / "plain", **{**SIZES, "moe_intermediate_size": 64})
    quantized, dense = write_both(plain, tmp_path, quantizer, description, torch.float32)
    plan, exact = made_plan(quantized, quantization=SOURCE, **topology), made_plan(dense, "float32", **topology)
    assert plan.inputs.model_quantization is not None
    assert plan.inputs.model_quantization.algorithm == algorithm
    outcomes = run_steps(plan, (tmp_path / "store").as_uri(), (Kind.CONVERT,))
    wide = ranks(exact, tmp_path / "dense-store", run_steps(exact, (tmp_path / "dense-store").as_uri(), (Kind.CONVERT,)))
    assert_same_values(plan, ranks(plan, tmp_path / "store", outcomes), wide)


def write_gpt_oss(folder: Path) -> tuple[Path, Path]:
    """A tiny gpt-oss with experts in MXFP4, and the same model with their values in float32."""
    plain = write_tiny("gpt_oss", folder / "plain", num_local_experts=4)
    config, tensors = json.loads((plain / "config.json").read_text()), load_file(plain / "model.safetensors")
    stored, dense = dict(tensors), dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inner, out = tensor.shape
            packed = [mxfp4_groups(one.T.contiguous())[0] for one in tensor]
            blocks = torch.stack([one["weight_packed"] for one in packed]).reshape(experts, out, inner // 32, 16)
            scales = torch.stack([one["weight_scale"] for one in packed])
            del stored[name]
            stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            dense[name] = convert_moe_packed_tensors(blocks, scales).float()
    (folder / "dense").mkdir()
    (folder / "dense" / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in dense.items()}, folder / "dense" / "model.safetensors")
    return write_quantized(folder / "quantized", stored, {"quant_method": "mxfp4"}, **config), folder / "dense"


@pytest.mark.parametrize("topology", [{"tp": 2}, {"tp": 2, "moe_ep": 2}], ids=str)
def test_gpt_oss_keeps_its_experts_as_nvfp4_to_the_bit_verified_and_compiled(tmp_path: Path, topology: dict[str, int]) -> None:
    quantized, dense = write_gpt_oss(tmp_path)
    plan, exact = made_plan(quantized, quantization=SOURCE, **topology), made_plan(dense, "float32", **topology)
    outcomes = run_steps(plan, (tmp_path / "store").as_uri())
    wide = ranks(exact, tmp_path / "dense-store", run_steps(exact, (tmp_path / "dense-store").as_uri(), (Kind.CONVERT,)))
    found = ranks(plan, tmp_path / "store", outcomes)
    assert_same_values(plan, found, wide)
    assert found["rank0.safetensors"]["transformer.layers.0.mlp.fc.weight"].dtype == torch.uint8
    assert found["rank0.safetensors"]["transformer.layers.0.attention.qkv.weight"].dtype == torch.bfloat16
    for step in plan.of_kind(Kind.CONVERT):
        assert outcomes[step.name].facts.source_bytes_read == step.estimate.read_bytes
    assert outcomes["build/rank1"].outputs


def test_excluded_linears_are_dequantized_to_the_models_dtype(tmp_path: Path) -> None:
    plain = write_tiny("qwen3", tmp_path / "plain", **SIZES)
    quantized, _ = write_both(plain, tmp_path, int4_groups, INT4)
    plan = made_plan(quantized, quantization={**SOURCE, "exclude": ["*.mlp.proj"]})
    outcomes = run_steps(plan, (tmp_path / "store").as_uri(), WITHOUT_ENGINES)
    tensors = ranks(plan, tmp_path / "store", outcomes)["rank0.safetensors"]
    assert tensors["transformer.layers.0.mlp.proj.weight"].dtype == torch.bfloat16
    assert tensors["transformer.layers.0.mlp.fc.weight"].dtype == torch.int8


def test_joined_linears_with_different_second_scales_are_refused_by_name(tmp_path: Path) -> None:
    def uneven(weight: torch.Tensor) -> Any:
        tensors, meant = nvfp4(weight)
        factor = 1.0 + float(weight[0, 0].abs())
        return {**tensors, "weight_scale_2": tensors["weight_scale_2"] * factor}, meant * factor

    quantized, _ = write_both(write_tiny("qwen3", tmp_path / "plain", **SIZES), tmp_path, uneven, MODELOPT_NVFP4)
    with pytest.raises(QuantizationError, match=r"layers\.0\.attention\.qkv.* joins weights .* different scales: .*q_proj"):
        run_steps(made_plan(quantized, quantization=SOURCE), (tmp_path / "store").as_uri(), (Kind.CONVERT,))
    left_out = {**SOURCE, "exclude": ["*.attention.qkv"]}
    run_steps(made_plan(quantized, quantization=left_out), (tmp_path / "other").as_uri(), (Kind.CONVERT,))


def test_formats_of_joined_fp8_linears_survive_the_checkpoints_own_description(tmp_path: Path) -> None:
    plain = write_tiny("qwen3", tmp_path / "plain", **SIZES)
    quantized, _ = write_both(plain, tmp_path, fp8_tensor, MODELOPT_FP8)
    model = made_plan(quantized, quantization=SOURCE).inputs.model_quantization
    assert model is not None
    assert model.layers["transformer.layers.1.attention.qkv"] != model.layers["transformer.layers.1.attention.dense"]
    again = from_checkpoint(quantization_config(model), quant_cfg(model))
    assert again is not None
    assert again.layers == model.layers


def test_power_of_two_scales_that_e4m3_cannot_hold_are_refused(tmp_path: Path) -> None:
    def wide(weight: torch.Tensor) -> Any:
        changed = weight.float().clone()
        changed[0, :32] *= 2.0**-30
        return mxfp4_groups(changed)

    quantized, _ = write_both(write_tiny("qwen3", tmp_path / "plain", **SIZES), tmp_path, wide, MXFP4)
    with pytest.raises(QuantizationError, match=r"E4M3 holds 2\*\*-17"):
        run_steps(made_plan(quantized, quantization=SOURCE), (tmp_path / "store").as_uri(), (Kind.CONVERT,))


@pytest.mark.parametrize("which", ["plain", "block fp8"])
def test_source_without_a_format_to_keep_is_refused(tmp_path: Path, which: str) -> None:
    plain = write_tiny("qwen3", tmp_path / "plain", **SIZES)
    quantized, _ = write_both(plain, tmp_path, block_fp8, BLOCK_FP8)
    with pytest.raises(QuantizationError, match="no linear can keep the source's format") as caught:
        made_plan(plain if which == "plain" else quantized, quantization=SOURCE)
    assert "INT4 in groups" in caught.value.advice


def test_options_of_other_algorithms_are_refused_beside_source(tmp_path: Path) -> None:
    plain = write_tiny("qwen3", tmp_path / "plain", **SIZES)
    with pytest.raises(SpecError, match="group_size is of other algorithms than source"):
        made_plan(plain, quantization={**SOURCE, "group_size": 64})


def test_verification_catches_pairs_of_rows_in_the_wrong_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.checkpoints.quantized.recoding import Recoder

    real = Recoder._row_pairs

    def turned(self: Any, *given: Any) -> Any:
        found = real(self, *given)
        return (found >> 4) | (found << 4)

    quantized, _ = write_both(write_tiny("qwen3", tmp_path / "plain", **SIZES), tmp_path, int4_groups, INT4)
    plan, store = made_plan(quantized, quantization=SOURCE), (tmp_path / "store").as_uri()
    with monkeypatch.context() as patch:
        patch.setattr(Recoder, "_row_pairs", turned)
        run_steps(plan, store, (Kind.CONVERT,))
    with pytest.raises(VerificationError):
        run_steps(plan, store, WITHOUT_ENGINES)
