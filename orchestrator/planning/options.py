"""The options of each kind of step: what decides its outputs, typed on both sides of the wire."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from orchestrator.model.checkpoint import CheckpointIndex, SourceFile
from orchestrator.model.config import ModelConfig
from orchestrator.model.quantization import CalibrationMethod, LinearFormat
from orchestrator.model.stage import StageNetwork, StageOptions
from orchestrator.model.targets import Target
from orchestrator.model.topology import Topology
from orchestrator.model.weight_map import LayerGroup
from orchestrator.quantizers.calibration_data import CalibrationData
from orchestrator.spec.build import BuildConfig, ToleranceSpec


class _Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ReferenceOptions(_Options):
    """Run the source model itself on the verification text."""

    format: str
    """Of the source: a name of checkpoints/."""
    files: tuple[SourceFile, ...]
    """Weights, config and tokenizer."""
    dtype: str
    """Weights are rounded to it first, then computed with in float32, so that only our own errors are measured."""
    vocab_size: int
    exact_weights: tuple[str, ...] = ()
    """Source tensors that the graph reads in float32 (Gemma's norms, routers): not rounded."""
    decode_steps: int | None = None
    """Tokens at the end of each sequence that go one by one through the cache, as in the verification: rotary scaling that
    depends on the length of a call gives other logits for one long call. None: one call, which is the same and faster."""
    prompts: tuple[str, ...] | None
    max_tokens: int


class CalibrateOptions(_Options):
    """Collect the calibration artifact of some consecutive layers, on one actor. Nothing here depends on a topology."""

    format: str
    """Of the source: a name of checkpoints/."""
    files: tuple[SourceFile, ...]
    """Weights, then config and tokenizer."""
    num_weight_files: int
    config: ModelConfig
    first_layer: int
    num_layers: int
    modules: tuple[str, ...]
    """Every source module of these layers that can be quantized."""
    method: CalibrationMethod
    formats: dict[str, LinearFormat] = {}
    """smoothquant and awq_lite: source module (model.layers.3.mlp.up_proj) -> its format. max: empty, all linears are watched."""
    resmooth: tuple[tuple[str, ...], ...] = ()
    """smoothquant and awq_lite: source modules that share one pre_quant_scale."""
    kv_cache: bool = True
    """Watch keys and values too."""
    data: CalibrationData
    layerwise: bool = False

    @property
    def is_first(self) -> bool:
        return self.first_layer == 0

    @property
    def is_last(self) -> bool:
        return self.first_layer + self.num_layers == self.config.num_hidden_layers


class ConvertOptions(_Options):
    """Cut one layer group for all tensor-parallel ranks of its stage."""

    format: str
    """Of the source: a name of checkpoints/."""
    files: tuple[SourceFile, ...]
    """Those that the targets read; `TensorInfo.file` counts in this list."""
    targets: tuple[Target, ...]
    shards: tuple[str, ...]
    """File name by tp_rank."""
    not_finite: Literal["warn", "error"] = "warn"
    """What a NaN or infinity among the weights is."""
    scales_sha256: str | None = None
    """Of a calibration artifact that the user brings; None: those that the needs committed."""

    @staticmethod
    def of(
        group: LayerGroup,
        index: CheckpointIndex,
        topology: Topology,
        not_finite: Literal["warn", "error"] = "warn",
        scales_sha256: str | None = None,
    ) -> ConvertOptions:
        used = sorted({file for tensor in group.sources().values() for file in tensor.files()})
        position = {old: new for new, old in enumerate(used)}
        targets = tuple(
            replace(
                target,
                reads=tuple(replace(read, tensor=read.tensor.renumbered(position)) for read in target.reads),
            )
            for target in group.targets
        )
        shards = tuple(group.shard_name(topology.file_number(tp_rank, group.pp_rank)) for tp_rank in range(topology.tp))
        return ConvertOptions(
            format=index.format,
            not_finite=not_finite,
            scales_sha256=scales_sha256,
            files=tuple(index.files[old] for old in used),
            targets=targets,
            shards=shards,
        )


class BuildOptions(_Options):
    """Compile one rank's graph with its weights."""

    network: StageNetwork
    tp_rank: int
    engine: BuildConfig
    tensorrt_version: str | None
    """The version that the plan was made for; None: whatever the worker has."""

    @property
    def rank(self) -> int:
        return self.stage.rank(self.tp_rank)

    @property
    def stage(self) -> StageOptions:
        return self.network.stage


class VerifyOptions(_Options):
    """Execute every rank of a stage and, on the last one, compare with the reference."""

    network: StageNetwork
    decode_steps: int
    tolerance: ToleranceSpec


class MiniatureOptions(_Options):
    """Compare the model, made small, with transformers. Nothing here depends on the weights."""

    config: dict[str, Any]
    """The source's config.json, undecoded."""
    family: str
    architecture: str
    ignored_keys: tuple[str, ...] = ()
    """Keys of config.json that are not looked at here; transformers looks at them."""
    use_parallel_embedding: bool = False
    embedding_sharding_dim: int = 0
    max_relative_error: float = 5e-5
    """Right models stay below 1e-5."""

    @property
    def layout(self) -> dict[str, Any]:
        """Fields of ModelConfig that config.json does not hold."""
        return {"use_parallel_embedding": self.use_parallel_embedding, "embedding_sharding_dim": self.embedding_sharding_dim}
