from __future__ import annotations

import pytest

from orchestrator.base.errors import QuantizationError, SpecError
from orchestrator.model.compute_capability import check_target, parse
from orchestrator.model.quantization import KvCacheFormat, ModelQuantization
from orchestrator.quantizers import QUANTIZERS

LEAST = {
    "W8A16": None, "W8A8_SQ_PER_CHANNEL": None, "W4A16": "8.0", "W4A16_AWQ": "8.0", "W4A8_AWQ": "8.9", "FP8": "8.9",
    "FP8_PER_CHANNEL_PER_TOKEN": "8.9", "MXFP8": "8.9", "NVFP4": "10.0", "W4A16_NVFP4": "10.0",
}  # fmt: skip
"""As tried with TensorRT-RTX 1.7, which has no 10.0 but refuses 8.9 and takes 12.0; the hardware's own limit for FP4."""
CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "10.0", "12.0")


def model(algorithm: str | None, kv_cache: KvCacheFormat | None = None) -> ModelQuantization:
    linear = QUANTIZERS[algorithm].linear if algorithm else None
    return ModelQuantization(algorithm=algorithm, linear=linear, kv_cache=kv_cache)


@pytest.mark.parametrize("algorithm", QUANTIZERS)
def test_check_target_gpus_below_the_formats_least_are_refused_and_others_pass(algorithm: str) -> None:
    least = LEAST[algorithm]
    for capability in CAPABILITIES:
        if least is not None and parse(capability) < parse(least):
            with pytest.raises(QuantizationError, match=f"{algorithm} needs compute capability {least}"):
                check_target(model(algorithm), [capability])
        else:
            check_target(model(algorithm), [capability])


@pytest.mark.parametrize("algorithm", QUANTIZERS)
def test_check_target_without_capabilities_leaves_the_choice_to_the_library(algorithm: str) -> None:
    check_target(model(algorithm, "FP8"), [])


def test_check_target_names_only_the_old_ones_and_what_to_use_there() -> None:
    with pytest.raises(QuantizationError, match=r"has 8\.6, sm89") as caught:
        check_target(model("NVFP4"), ["8.6", "12.0", "sm89"])
    assert caught.value.advice == "Leave 8.6, sm89 out of engine.compute_capabilities, or use FP8 or W4A16_AWQ there."


def test_check_target_fp8_cache_is_a_format_of_its_own() -> None:
    with pytest.raises(QuantizationError, match=r"an FP8 KV cache needs compute capability 8\.9") as caught:
        check_target(model("W4A16", "FP8"), ["8.0"])
    assert "kv_cache: INT8" in caught.value.advice
    check_target(model("W4A16", "INT8"), ["8.0"])


def test_check_target_unquantized_model_passes_everywhere() -> None:
    check_target(None, ["7.5"])


def test_check_target_mixture_needs_the_newest_of_its_formats() -> None:
    layers = {
        "transformer.layers.0.mlp.fc": QUANTIZERS["W8A16"].linear,
        "transformer.layers.0.mlp.proj": QUANTIZERS["NVFP4"].linear,
    }
    with pytest.raises(QuantizationError, match="NVFP4 needs"):
        check_target(ModelQuantization(algorithm="MIXED_PRECISION", layers=layers), ["8.9"])


@pytest.mark.parametrize("text", ["8.9", "sm89", "SM_89"])
def test_parse_spellings_of_one_capability_agree(text: str) -> None:
    assert parse(text) == (8, 9)


@pytest.mark.parametrize("text", ["", "ampere", "8", "8.9.1"])
def test_parse_of_no_capability_is_a_wrong_spec(text: str) -> None:
    with pytest.raises(SpecError, match="is not a compute capability"):
        parse(text)
