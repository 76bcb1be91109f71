"""Options of each kind of step, which determine its outputs. Typed for the planner and for the worker."""

from __future__ import annotations

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
    """Options of a step that runs the source model on the verification text."""

    format: str
    """Source format, a name of checkpoints/."""
    files: tuple[SourceFile, ...]
    """Files with weights, config and tokenizer."""
    dtype: str
    """Dtype to which weights are rounded before computing in float32, so that verification does not measure that rounding."""
    vocab_size: int
    exact_weights: tuple[str, ...] = ()
    """Source tensors that are not rounded, because the graph reads them in float32 (Gemma's norms, routers)."""
    decode_steps: int | None = None
    """Number of tokens at the end of each sequence that are decoded one by one, as in the verification: if rotary scaling depends
    on the length of a call, one long call gives other logits. None: one call, which is equivalent and faster."""
    prompts: tuple[str, ...] | None
    max_tokens: int


class CalibrateOptions(_Options):
    """Options of a step that calibrates some consecutive layers. Independent of the topology."""

    format: str
    """Source format, a name of checkpoints/."""
    files: tuple[SourceFile, ...]
    """Files with weights, then with config and tokenizer."""
    num_weight_files: int
    config: ModelConfig
    first_layer: int
    num_layers: int
    modules: tuple[str, ...]
    """Source modules of these layers that can be quantized."""
    method: CalibrationMethod
    formats: dict[str, LinearFormat] = {}
    """Source module (model.layers.3.mlp.up_proj) -> format, for smoothquant and awq_lite; empty: max, which covers all linears."""
    resmooth: tuple[tuple[str, ...], ...] = ()
    """Groups of source modules that share one pre_quant_scale, for smoothquant and awq_lite."""
    kv_cache: bool = True
    """Whether to collect amax of keys and values too."""
    data: CalibrationData
    layerwise: bool = False

    @property
    def is_first(self) -> bool:
        return self.first_layer == 0

    @property
    def is_last(self) -> bool:
        return self.first_layer + self.num_layers == self.config.num_hidden_layers


class ConvertOptions(_Options):
    """Options of a step that cuts one layer group for all tensor-parallel ranks of its stage."""

    format: str
    """Source format, a name of checkpoints/."""
    files: tuple[SourceFile, ...]
    """Files that the targets read. `TensorInfo.file` is an index into them."""
    targets: tuple[Target, ...]
    shards: tuple[str, ...]
    """File name of the shard of each tp_rank."""
    not_finite: Literal["warn", "error"] = "warn"
    """Whether NaN or infinity in the weights is a warning or an error."""
    scales_sha256: str | None = None
    """sha256 of the user's calibration artifact; None: the scales of the needed calibrate steps."""

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
        targets = tuple(target.renumbered(position) for target in group.targets)
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
    """Options of a step that compiles one rank's graph with its weights."""

    network: StageNetwork
    tp_rank: int
    engine: BuildConfig
    tensorrt_version: str | None
    """Version that the plan was made for; None: the worker's."""

    @property
    def rank(self) -> int:
        return self.stage.rank(self.tp_rank)

    @property
    def stage(self) -> StageOptions:
        return self.network.stage


class VerifyOptions(_Options):
    """Options of a step that executes all ranks of a stage and, on the last stage, compares the logits with the reference."""

    network: StageNetwork
    decode_steps: int
    tolerance: ToleranceSpec


class ExportOptions(_Options):
    """Options of a step that writes a stage's portable graph and, in a verified build, executes it."""

    network: StageNetwork
    decode_steps: int | None
    """As in the verification; None: the build is not verified."""


class MiniatureOptions(_Options):
    """Options of a step that compares the model, made small, with transformers. Independent of the weights."""

    config: dict[str, Any]
    """config.json of the source, undecoded."""
    family: str
    architecture: str
    ignored_keys: tuple[str, ...] = ()
    """Keys of config.json that are ignored here, but not by transformers."""
    use_parallel_embedding: bool = False
    embedding_sharding_dim: int = 0
    max_relative_error: float = 5e-5
    """Largest max |logit - reference| / max |reference|. Correct models stay below 1e-5."""

    @property
    def layout(self) -> dict[str, Any]:
        """Fields of ModelConfig that config.json does not hold."""
        return {"use_parallel_embedding": self.use_parallel_embedding, "embedding_sharding_dim": self.embedding_sharding_dim}
