"""The engine contract on both TensorRTs, and what only one of them has."""

from __future__ import annotations

import mmap
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.base.errors import EngineBuildError, SpecError
from orchestrator.engines import EngineRequest, backend
from orchestrator.engines.device import visible_gpus
from orchestrator.engines.profiles import resolved
from orchestrator.engines.tensorrt import Reported, mark_refittable, parse
from orchestrator.model.config import ModelConfig
from orchestrator.model.topology import Topology
from orchestrator.spec.build import BuildConfig
from orchestrator.work.shards import Weight
from tests.contracts.engine_contract import EngineContract


class TestTensorrtRtx(EngineContract):
    name = "tensorrt_rtx"

    def test_mark_refittable_marks_every_weight_of_the_graph_and_refuses_others(self) -> None:
        """Up to here both libraries are alike; the build itself would need a GPU."""
        trt = pytest.importorskip(self.name)
        request = self.request_for(Topology(2, 1))
        logger = trt.Logger()
        network = trt.Builder(logger).create_network(0)
        parser = trt.OnnxParser(network, logger)
        parse(parser, request)
        assert not any(network.are_weights_marked_refittable(name) for name in request.weights)
        mark_refittable(network, request.weights)
        assert "transformer.layers.1.mlp.proj.weight" in request.weights
        assert all(network.are_weights_marked_refittable(name) for name in request.weights)
        with pytest.raises(EngineBuildError, match="cannot make absent refittable"):
            mark_refittable(network, ["absent"])

    def test_version_compatible_engine_carries_no_lean_runtime(self) -> None:
        """TensorRT-RTX ships none, so that a build which asked for a copy would fail."""
        assert self.build(self.request_for(Topology(1, 1), version_compatible=True))

    def test_build_that_is_done_holds_no_pages_of_mapped_weights(self, tmp_path: Path) -> None:
        good = self.request_for(Topology(1, 1))
        name, array = max(good.weights.items(), key=lambda item: item[1].nbytes)
        file = tmp_path / "weights"
        file.write_bytes(array.tobytes())
        with file.open("rb") as opened:
            mapping = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        weight = Weight("F16", array.shape, np.frombuffer(mapping, np.uint8), mapping)
        request = replace(good, weights={**good.weights, name: weight.data}, release=weight.release)
        assert _resident_bytes(file) == 0
        assert weight.data.any()
        assert _resident_bytes(file) > 0
        assert self.build(request)
        assert _resident_bytes(file) <= mmap.PAGESIZE < array.nbytes

    def test_engine_for_named_compute_capabilities_records_them(self) -> None:
        good = self.request_for(Topology(1, 1))
        config = good.config.model_copy(update={"compute_capabilities": ("8.9", "12.0")})
        request = EngineRequest(good.model, good.weights, good.profiles, config)
        record = backend(self.name).build_engine(request, lambda data: None, lambda *_: None, lambda line: None)
        assert record.compute_capabilities == ("8.9", "12.0")

    def test_engine_for_an_unknown_compute_capability_lists_the_known(self) -> None:
        good = self.request_for(Topology(1, 1))
        config = good.config.model_copy(update={"compute_capabilities": ("9.0",)})
        request = EngineRequest(good.model, good.weights, good.profiles, config)
        with pytest.raises(SpecError) as caught:
            backend(self.name).build_engine(request, lambda data: None, lambda *_: None, lambda line: None)
        assert "SM89" in caught.value.advice

    @pytest.mark.skipif(bool(visible_gpus()), reason="what a machine without a GPU cannot do")
    def test_refittable_engine_is_refused_by_tensorrt_rtx_without_a_gpu(self) -> None:
        """The reason why the spec refuses refit for this backend: when this fails, it may allow it."""
        with pytest.raises(EngineBuildError, match="CUDA_SUCCESS"):
            self.build(self.request_for(Topology(1, 1), refit=True))


class TestTensorrt(EngineContract):
    name = "tensorrt"

    def test_refittable_engine_has_every_weight_of_the_checkpoint_by_its_name(self) -> None:
        import tensorrt

        request = self.request_for(Topology(1, 1), refit=True)
        data = self.build(request)
        logger = tensorrt.Logger()
        refitter = tensorrt.Refitter(tensorrt.Runtime(logger).deserialize_cuda_engine(data), logger)
        assert set(request.weights) <= set(refitter.get_all_weights())

    def test_version_compatible_engine_is_recorded_as_one(self) -> None:
        request = self.request_for(Topology(1, 1), version_compatible=True)
        record = backend(self.name).build_engine(request, lambda data: None, lambda *_: None, lambda line: None)
        assert record.version_compatible


def tiny_model(**changes: Any) -> ModelConfig:
    return ModelConfig.model_validate(
        {
            "architecture": "LlamaForCausalLM", "dtype": "float16", "vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 1, "num_key_value_heads": 1, "head_size": 8, "intermediate_size": 8, "hidden_act": "silu",
            "norm_epsilon": 1e-5, "max_position_embeddings": 64, "rotary_base": 10000.0, **changes,
        }
    )  # fmt: skip


def test_max_seq_len_shorter_than_the_input_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(SpecError, match="max_input_len 1024 is greater than the 64 positions"):
        resolved(model, BuildConfig(max_input_len=1024))


def test_default_max_input_len_of_a_small_model_is_as_long_as_its_cache() -> None:
    engine = resolved(tiny_model(), BuildConfig())
    assert (engine.max_seq_len, engine.max_input_len, engine.opt_input_len) == (64, 64, 32)
    assert resolved(tiny_model(), BuildConfig(max_seq_len=16)).max_input_len == 16


@pytest.mark.parametrize(
    ("scaling", "positions"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}, 64),
        ({"rope_type": "linear", "factor": 2.0}, 128),
        ({"rope_type": "dynamic", "factor": 3.0, "original_max_position_embeddings": 8}, 192),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8}, 64),
        (None, 64),
    ],
)
def test_max_seq_len_of_a_scaled_model_is_up_to_the_stretched_positions(scaling: dict[str, Any] | None, positions: int) -> None:
    model = tiny_model(rotary_scaling=scaling)
    assert resolved(model, BuildConfig(max_seq_len=positions, max_input_len=8)).max_seq_len == positions
    with pytest.raises(SpecError, match=f"greater than the model's {positions} positions"):
        resolved(model, BuildConfig(max_seq_len=positions + 1, max_input_len=8))


def test_reported_memory_is_that_of_the_most_demanding_profile() -> None:
    reported = Reported()
    for line in (
        "Total Device Persistent Memory: 100 bytes",
        "Total Activation Memory: 8000 bytes",
        "Total Device Persistent Memory: 0 bytes",
        "Total Activation Memory: 7000 bytes",
        "Total Weights Memory: 282880 bytes",
        "Total Host Persistent Memory: 999999 bytes",
    ):
        reported.read(line)
    assert (reported.context_bytes, reported.weights_bytes) == (8100, 282880)


def _resident_bytes(file: Path) -> int:
    """Bytes of a mapped file in this process's memory."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        if line.endswith(str(file)):
            return 1024 * next(int(each.split()[1]) for each in lines if each.startswith("Rss:"))
    raise AssertionError(f"{file} is not mapped")
