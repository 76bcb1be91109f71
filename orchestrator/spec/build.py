"""What the user wants (`BuildSpec`) and what there is (`ClusterSpec`), decoded once into frozen values.

Unknown keys are errors that name their path. Only what changes the engines' content stands in BuildSpec; places (paths of
the store and of scratch) and capacities stand in ClusterSpec.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from orchestrator.base.urls import PlaceText
from orchestrator.model.topology import Topology
from orchestrator.spec.decoding import Frozen as Frozen
from orchestrator.spec.decoding import decode as decode
from orchestrator.spec.decoding import decode_yaml as decode_yaml
from orchestrator.spec.values import NumBytes

DATA_SUFFIXES = (".txt", ".jsonl", ".parquet")
"""Of files with calibration texts."""
Dtype = Literal["float16", "bfloat16", "float32"]


class SourceSpec(Frozen):
    """The checkpoint to build from."""

    path: PlaceText
    """A folder; a relative one counts from the spec file."""
    format: str = "auto"
    """A name of checkpoints/, or auto: by the files that are there."""
    family: str = "auto"
    """A name of families/, or auto: from config.json's architectures."""
    ignored_keys: tuple[str, ...] = ()
    """Keys of config.json that no family knows and that the model does not depend on: without this, they are refused."""


class TopologySpec(Frozen):
    """Tensor parallel x pipeline parallel, and the sizes within them."""

    tp: int = Field(default=1, ge=1)
    pp: int = Field(default=1, ge=1)
    pp_partition: tuple[int, ...] | None = None
    """Layers of each stage; absent: as even as can be, the first stages one more."""
    moe_ep: int = Field(default=1, ge=1)
    """Expert-parallel groups among the tp ranks; moe_tp is tp / moe_ep."""
    cp: int = Field(default=1, ge=1)
    """Context-parallel ranks, for checkpoints only: the engines built here do not split sequences."""

    def topology(self) -> Topology:
        return Topology(self.tp, self.pp, self.pp_partition, self.moe_ep, self.cp)


class ConversionSpec(Frozen):
    """How the converted checkpoint is laid out."""

    max_shard_bytes: NumBytes = Field(default=5_000_000_000, ge=1)
    """A rank with more weights is split by layer groups, each converted by a task of its own."""
    not_finite: Literal["warn", "error"] = "warn"
    """What a NaN or infinity among the source's weights is."""
    use_parallel_embedding: bool = False
    """Split the embedding over the tensor-parallel ranks instead of holding it whole on each."""
    embedding_sharding_dim: Literal[0, 1] = 0
    """With use_parallel_embedding. 0: by vocabulary; 1: by hidden size."""


class CalibrationSpec(Frozen):
    """The text that Model Optimizer watches the model read, and how."""

    dataset: PlaceText = "default"
    """default: text that comes with the package. Or a .txt, .jsonl or .parquet file, or the name of a Hugging Face dataset."""
    num_samples: int = Field(default=64, ge=1)
    max_length: int = Field(default=256, ge=2)
    """Tokens of each sample."""
    batch_size: int = Field(default=16, ge=1)
    """Samples per forward pass; AWQ searches once per pass, so few large ones are faster."""
    seed: int = 1234
    """Of the choice among more samples than asked for."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    layerwise: bool = False
    """Calibrate one decoder layer after the other, resumable after each."""
    num_stages: int | None = Field(default=None, ge=1)
    """Parts of the model, each calibrated by an actor that holds its layers only; absent: the pipeline stages."""


class QuantizationSpec(Frozen):
    """Calibrated once, on rank 0 of each stage; applied to the weights while they are converted."""

    algorithm: str | None = None
    """A name of quantizers/ (TensorRT-LLM's QuantAlgo), or MIXED_PRECISION; absent: only the KV cache is quantized."""
    kv_cache: Literal["INT8", "FP8"] | None = None
    exclude: tuple[str, ...] | None = None
    """Linears that keep the model's precision: patterns of names such as transformer.layers.0.mlp.proj or *attention.qkv.
    Absent: the algorithm's own list."""
    group_size: int | None = Field(default=None, ge=16)
    """Input features that share a scale, for blockwise algorithms; absent: the algorithm's own."""
    alpha: float | None = Field(default=None, ge=0, le=1)
    """SmoothQuant's; absent: the algorithm's own."""
    meta_recipe: bool = False
    """FP8_PER_CHANNEL_PER_TOKEN only: MLPs only, first and last layer left out, activations' scales bounded."""
    quant_cfg: PlaceText | None = None
    """MIXED_PRECISION only: path of a quant_cfg.json that names every quantized linear and its algorithm."""
    scales: PlaceText | None = None
    """Folder of a calibration artifact to apply instead of calibrating (`orchestrator quantize --output`)."""
    calibration: CalibrationSpec = CalibrationSpec()

    @model_validator(mode="after")
    def _something_is_quantized(self) -> QuantizationSpec:
        if self.algorithm is None and self.kv_cache is None:
            raise ValueError("neither algorithm nor kv_cache is given")
        if (self.algorithm == "MIXED_PRECISION") != (self.quant_cfg is not None):
            raise ValueError("quant_cfg and algorithm MIXED_PRECISION belong together")
        return self


class BuildConfig(Frozen):
    """How TensorRT compiles a rank; TensorRT-LLM's names where it has them."""

    backend: Literal["tensorrt", "tensorrt_rtx"] = "tensorrt_rtx"
    """tensorrt: data-centre GPUs, needs one of the target type. tensorrt_rtx: ahead of time, no GPU needed."""
    max_batch_size: int = Field(default=8, ge=1)
    opt_batch_size: int = Field(default=1, ge=1)
    max_input_len: int = Field(default=1024, ge=1)
    """Tokens per sequence of one prefill call; absent: 1024, or as many as the cache holds."""
    opt_input_len: int | None = Field(default=None, ge=1)
    """Absent: half of max_input_len."""
    max_seq_len: int | None = Field(default=None, ge=1)
    """Slots of the KV cache; absent: the model's max_position_embeddings. A model whose rotary scaling is yarn, linear or dynamic
    may have `factor` times the positions that it was trained on."""
    max_logits_per_sequence: int = Field(default=1, ge=1)
    """Positions per sequence that logits may be asked for in one call: 1 serves sampling, max_input_len gathers all."""
    gather_logits: bool = True
    """True: every tensor-parallel rank gets the whole vocabulary; False: its own slice of it."""
    compute_capabilities: tuple[str, ...] = ()
    """Targets such as 8.9 or 12.0 (tensorrt_rtx only); empty: every one that the library supports."""
    optimization_level: int | None = Field(default=None, ge=0, le=5)
    workspace_bytes: NumBytes | None = None
    weight_streaming: bool = False
    refit: bool = False
    """Keep the weights replaceable one by one."""
    profiling_verbosity: Literal["layer_names_only", "detailed", "none"] = "layer_names_only"

    @model_validator(mode="after")
    def _ordered(self) -> BuildConfig:
        if self.opt_batch_size > self.max_batch_size:
            raise ValueError("opt_batch_size is greater than max_batch_size")
        if self.opt_input_len is not None and self.opt_input_len > self.max_input_len:
            raise ValueError("opt_input_len is greater than max_input_len")
        given = "max_input_len" in self.model_fields_set
        if given and self.max_seq_len is not None and self.max_seq_len < self.max_input_len:
            raise ValueError("max_seq_len is smaller than max_input_len")
        if self.max_logits_per_sequence > self.max_input_len:
            raise ValueError("max_logits_per_sequence is greater than max_input_len")
        if self.backend == "tensorrt" and self.compute_capabilities:
            raise ValueError("compute_capabilities need backend tensorrt_rtx: tensorrt builds for the GPU that it runs on")
        return self


class ToleranceSpec(Frozen):
    """How far float32 execution of the graphs may be from the reference."""

    max_relative_error: float | None = Field(default=5e-5, gt=0)
    """Per position: max |logit - reference| / max |reference|; the worst position counts. null: any."""
    max_mean_kl: float = Field(default=1e-4, gt=0)
    """Mean over positions of KL(reference || graph), in nats."""
    min_top1_agreement: float = Field(default=1.0, ge=0, le=1)


class VerificationSpec(Frozen):
    """How every rank is proven right before anything is published."""

    enabled: bool = True
    prompts: tuple[str, ...] | None = None
    """Absent: text that comes with the package."""
    max_tokens: int = Field(default=32, ge=2)
    """Tokens taken of each prompt."""
    decode_steps: int = Field(default=4, ge=1)
    """How many of them go one by one through the KV cache, after a prefill with the others."""
    tolerance: ToleranceSpec | None = None
    """Absent: that of exact conversion, or of the quantization algorithm."""

    @model_validator(mode="after")
    def _prefill_remains(self) -> VerificationSpec:
        if self.decode_steps >= self.max_tokens:
            raise ValueError("decode_steps must be smaller than max_tokens, or nothing is left for the prefill")
        return self


RELEASE_NAME = r"^[a-z0-9][a-z0-9._-]{0,127}$"
RELEASE_VERSION = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class ReleaseSpec(Frozen):
    """Where the set is published in the store: releases/<name>/<version>/."""

    name: str = Field(pattern=RELEASE_NAME)
    version: str = Field(pattern=RELEASE_VERSION)


class BuildSpec(Frozen):
    """A build: source, topology, precision, engines, proof, release."""

    source: SourceSpec
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    """auto: the source's; float32 becomes float16, as TensorRT-LLM does."""
    topology: TopologySpec = TopologySpec()
    conversion: ConversionSpec = ConversionSpec()
    quantization: QuantizationSpec | None = None
    engine: BuildConfig = BuildConfig()
    verification: VerificationSpec = VerificationSpec()
    release: ReleaseSpec
