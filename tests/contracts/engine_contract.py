"""What every engine backend must do. A subclass gives the backend's name."""

from __future__ import annotations

import importlib.util
from typing import ClassVar

import numpy as np
import pytest

from orchestrator.base.errors import EngineBuildError, StoreError, ToolError
from orchestrator.engines import EngineRequest, backend, require_version
from orchestrator.engines.profiles import rank_profiles, resolved
from orchestrator.model.config import ModelConfig
from orchestrator.model.stage import StageNetwork, StageOptions
from orchestrator.model.topology import Topology
from orchestrator.networks import Network, Rendering, decoder_network
from orchestrator.spec.build import BuildConfig
from orchestrator.work.build.step import bind
from orchestrator.work.shards import Weight


class EngineContract:
    """Build small seeded decoders; 3 query heads on 1 key/value head have no fused attention kernel."""

    name: ClassVar[str]

    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        if importlib.util.find_spec(self.name) is None:
            pytest.skip(f"{self.name} is not installed")

    def config(self) -> BuildConfig:
        return BuildConfig.model_validate({"backend": self.name, "max_batch_size": 2, "max_input_len": 8, "max_seq_len": 32})

    def request_for(
        self, topology: Topology, pp_rank: int = 0, dtype: str = "bfloat16", heads: int = 6, kv_heads: int = 2, **options: bool
    ) -> EngineRequest:
        model = ModelConfig.model_validate(
            {
                "architecture": "LlamaForCausalLM", "dtype": dtype, "vocab_size": 65, "hidden_size": heads * 16,
                "num_hidden_layers": 2, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_size": 16,
                "intermediate_size": 64, "hidden_act": "silu", "norm_epsilon": 1e-5, "max_position_embeddings": 64,
                "rotary_base": 10000.0,
            }
        )  # fmt: skip
        stage = StageOptions.of(model, topology, pp_rank)
        wanted = StageNetwork(stage=stage, max_seq_len=32)
        config = self.config().model_copy(update=options)
        network = decoder_network(wanted, 0, Rendering.compiled(wanted, not config.for_triton))
        weights = bind(network, seeded_weights(network, dtype), dtype)
        return EngineRequest(network.model.SerializeToString(), weights, rank_profiles(wanted, resolved(model, config)), config)

    def build(self, request: EngineRequest) -> bytes:
        chunks: list[bytes] = []
        backend(self.name).build_engine(request, lambda data: chunks.append(bytes(data)), lambda *_: None, lambda line: None)
        return b"".join(chunks)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
    def test_engine_of_every_dtype_is_built_and_described(self, dtype: str) -> None:
        chunks: list[bytes] = []
        log: list[str] = []
        progress: list[tuple[int, int]] = []
        record = backend(self.name).build_engine(
            self.request_for(Topology(1, 1), dtype=dtype),
            lambda data: chunks.append(bytes(data)),
            lambda phase, done, total: progress.append((done, total)),
            log.append,
        )
        assert sum(map(len, chunks)) > 10_000
        assert log
        assert all(0 < done <= total for done, total in progress)
        assert record.backend == self.name
        assert record.profiles == ("prefill", "decode")
        modes = {tensor.name: tensor.mode for tensor in record.tensors}
        assert modes["input_ids"] == "input"
        assert modes["logits"] == "output"

    @pytest.mark.parametrize("pp_rank", [0, 1])
    def test_engine_of_a_parallel_rank_is_built(self, pp_rank: int) -> None:
        sizes: list[int] = []
        record = backend(self.name).build_engine(
            self.request_for(Topology(2, 2), pp_rank), lambda data: sizes.append(len(data)), lambda *_: None, lambda line: None
        )
        assert sum(sizes) > 10_000
        names = {tensor.name for tensor in record.tensors}
        assert ("input_ids" in names) == (pp_rank == 0)
        assert ("hidden_states" in names) == (pp_rank == 1)
        assert ("logits" in names) == (pp_rank == 1)

    @pytest.mark.parametrize("for_triton", [False, True])
    def test_engine_for_triton_has_one_profile_and_caches_of_their_own(self, for_triton: bool) -> None:
        request = self.request_for(Topology(1, 1), for_triton=for_triton)  # the spec asks for backend tensorrt too
        record = backend(self.name).build_engine(request, lambda data: None, lambda *_: None, lambda line: None)
        assert record.profiles == (("prefill",) if for_triton else ("prefill", "decode"))
        present = {tensor.name: tensor.aliases for tensor in record.tensors if tensor.name.startswith("present_")}
        assert len(present) == 4
        for name, aliases in present.items():
            assert aliases == (None if for_triton else name.replace("present_", "past_"))

    def test_engine_of_a_damaged_graph_is_refused(self) -> None:
        good = self.request_for(Topology(1, 1))
        bad = EngineRequest(b"not a model", good.weights, good.profiles, good.config)
        with pytest.raises(EngineBuildError):
            backend(self.name).build_engine(bad, lambda data: None, lambda *_: None, lambda line: None)

    def test_engine_with_a_missing_weight_is_refused(self) -> None:
        good = self.request_for(Topology(1, 1))
        weights = dict(good.weights)
        del weights["lm_head.weight"]
        bad = EngineRequest(good.model, weights, good.profiles, good.config)
        with pytest.raises(EngineBuildError):
            backend(self.name).build_engine(bad, lambda data: None, lambda *_: None, lambda line: None)

    def test_engine_whose_store_fails_raises_the_stores_error(self) -> None:
        def write(data: memoryview) -> None:
            raise StoreError("disk full")

        with pytest.raises(StoreError, match="disk full"):
            backend(self.name).build_engine(self.request_for(Topology(1, 1)), write, lambda *_: None, lambda line: None)

    def test_version_other_than_the_plans_is_refused(self) -> None:
        with pytest.raises(ToolError, match=r"the plan was made for 0\.0\.1"):
            require_version(self.name, "0.0.1")

    @pytest.mark.parametrize("place", ["write", "progress", "log"])
    def test_interrupt_in_a_callback_cancels_the_build_and_is_raised(self, place: str) -> None:
        """Ctrl-C arrives wherever Python code runs, and TensorRT swallows what its callbacks raise."""
        called = []

        def interrupt(*_: object) -> None:
            called.append(place)
            raise KeyboardInterrupt

        callbacks = {"write": lambda data: None, "progress": lambda *_: None, "log": lambda line: None, place: interrupt}
        with pytest.raises(KeyboardInterrupt):
            backend(self.name).build_engine(self.request_for(Topology(1, 1)), *callbacks.values())
        assert called


def seeded_weights(network: Network, dtype: str) -> dict[str, Weight]:
    """Small random values for every weight of the graph."""
    import ml_dtypes

    kinds = {"float16": (np.float16, "F16"), "bfloat16": (ml_dtypes.bfloat16, "BF16"), "float32": (np.float32, "F32")}
    kind, name = kinds[dtype]
    generator = np.random.default_rng(5)
    shapes = {tensor.name: tuple(tensor.dims) for tensor in network.model.graph.initializer}
    return {
        weight: Weight(
            name, shapes[weight], (generator.standard_normal(shapes[weight]) * 0.1).astype(kind).reshape(-1).view(np.uint8)
        )
        for weight in network.weight_names()
    }
