"""The build spec: what a user asks for, decoded once into frozen values.

Unknown keys are errors that name their path. BuildSpec holds only what changes the content of the engines. Where they are built,
and with what, stands in ClusterSpec (spec/cluster.py).
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from orchestrator.base.urls import PlaceText
from orchestrator.model.topology import Topology
from orchestrator.spec.decoding import Frozen
from orchestrator.spec.values import NumBytes

DATA_SUFFIXES = (".txt", ".jsonl", ".parquet")
"""Endings of files with calibration texts."""


class SourceSpec(Frozen):
    """The checkpoint to build from."""

    path: PlaceText
    """Folder or URL of the checkpoint. A relative folder counts from the spec file."""
    format: str = "auto"
    """Source format, a name of checkpoints/. auto: recognize it by its files."""
    family: str = "auto"
    """Model family, a name of families/. auto: take it from `architectures` in config.json."""
    ignored_keys: tuple[str, ...] = ()
    """Keys of config.json to ignore: unknown keys are refused, because the model may depend on them."""
    tokenizer: PlaceText | None = None
    """Folder or URL of the tokenizer and generation_config.json. Absent: where the source's format keeps them."""


class TopologySpec(Frozen):
    """Degrees of parallelism."""

    tp: int = Field(default=1, ge=1)
    """Tensor-parallel ranks."""
    pp: int = Field(default=1, ge=1)
    """Pipeline stages."""
    pp_partition: tuple[int, ...] | None = None
    """Number of layers of each stage. Absent: an even split, with the remainder on the first stages."""
    moe_ep: int = Field(default=1, ge=1)
    """Expert-parallel groups among the tp ranks. moe_tp is tp / moe_ep."""
    cp: int = Field(default=1, ge=1)
    """Context-parallel ranks. For `convert` only: engines do not split sequences."""

    def topology(self) -> Topology:
        return Topology(self.tp, self.pp, self.pp_partition, self.moe_ep, self.cp)


class ConversionSpec(Frozen):
    """Layout of the converted checkpoint."""

    max_shard_bytes: NumBytes = Field(default=5_000_000_000, ge=1)
    """Largest shard. A rank with more weights is split by groups of layers, one convert task each."""
    not_finite: Literal["warn", "error"] = "warn"
    """Whether NaN or infinity in the source is a warning or an error."""
    use_parallel_embedding: bool = False
    """Split the embedding over the tensor-parallel ranks instead of holding it whole on each."""
    embedding_sharding_dim: Literal[0, 1] = 0
    """Axis of the split embedding. 0: vocabulary; 1: hidden size."""


class CalibrationSpec(Frozen):
    """Calibration data and how it is read."""

    dataset: PlaceText = "default"
    """Calibration texts: `default` (they come with the package), a .txt, .jsonl or .parquet file, or a Hugging Face dataset."""
    num_samples: int = Field(default=64, ge=1)
    """Number of samples."""
    max_length: int = Field(default=256, ge=2)
    """Tokens per sample."""
    batch_size: int = Field(default=16, ge=1)
    """Samples per forward pass. AWQ searches once per pass, so large batches are faster."""
    seed: int = 1234
    """Seed of the choice of samples when there are more than `num_samples`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the calibration. auto: a GPU where its pool has some."""
    layerwise: bool = False
    """Calibrate one decoder layer at a time; a killed calibration resumes at its layer."""
    num_stages: int | None = Field(default=None, ge=1)
    """Number of parts that are calibrated by separate actors, each with its layers only. Absent: the pipeline stages."""


SOURCE = "source"
"""quantization.algorithm that keeps the format of a quantized source."""


class QuantizationSpec(Frozen):
    """Quantization, calibrated once on rank 0 and applied while the weights are converted."""

    algorithm: str | None = None
    """Algorithm, TensorRT-LLM's QuantAlgo or MIXED_PRECISION; source: keep the format of a quantized source.
    Absent: quantize the KV cache only."""
    kv_cache: Literal["INT8", "FP8"] | None = None
    """Number format of the KV cache. Absent: the model's dtype."""
    exclude: tuple[str, ...] | None = None
    """Patterns of linears that keep the model's dtype, such as transformer.layers.0.mlp.proj or *attention.qkv.
    Absent: the algorithm's own list."""
    group_size: int | None = Field(default=None, ge=16)
    """Input features per scale, for blockwise algorithms. Absent: the algorithm's own."""
    alpha: float | None = Field(default=None, ge=0, le=1)
    """Migration strength of SmoothQuant. Absent: the algorithm's own."""
    meta_recipe: bool = False
    """For FP8_PER_CHANNEL_PER_TOKEN: quantize MLPs only, skip the first and last layer, bound the activation scales."""
    quant_cfg: PlaceText | None = None
    """For MIXED_PRECISION: path of a quant_cfg.json that names every quantized linear and its algorithm."""
    scales: PlaceText | None = None
    """Folder of a calibration artifact (`orchestrator quantize --output`) to apply instead of calibrating."""
    calibration: CalibrationSpec = CalibrationSpec()

    @model_validator(mode="after")
    def _something_is_quantized(self) -> QuantizationSpec:
        if self.algorithm is None and self.kv_cache is None:
            raise ValueError("neither algorithm nor kv_cache is given")
        if (self.algorithm == "MIXED_PRECISION") != (self.quant_cfg is not None):
            raise ValueError("quant_cfg and algorithm MIXED_PRECISION belong together")
        given = [name for name in ("group_size", "alpha", "meta_recipe", "scales") if getattr(self, name)]
        if self.algorithm == SOURCE and given:
            raise ValueError(f"{given[0]} is of other algorithms than {SOURCE}, which keeps what the source has")
        return self


def _later(default: bool | str) -> Any:
    """Return a field that came after the first releases: left out of digests and manifests while it has its default."""
    return Field(default=default, exclude_if=lambda value: value == default)


_NOT_IN_RTX = {
    "for_triton": "Triton has no backend that loads engines of TensorRT-RTX",
    "refit": "without a GPU, TensorRT-RTX compiles no refittable weights",
    "version_compatible": "TensorRT-RTX has no lean runtime, and its engines load in the version that built them",
}
"""Options of BuildConfig that tensorrt_rtx does not have -> the reason."""


class BuildConfig(Frozen):
    """TensorRT options of every rank, under TensorRT-LLM's names where it has them."""

    backend: Literal["tensorrt", "tensorrt_rtx"] = "tensorrt_rtx"
    """TensorRT library. tensorrt: for data-centre GPUs, builds on a GPU of the target type. tensorrt_rtx: builds without a GPU."""
    max_batch_size: int = Field(default=8, ge=1)
    """Largest number of sequences in a call."""
    opt_batch_size: int = Field(default=1, ge=1)
    """Number of sequences that the engine is tuned for."""
    max_input_len: int = Field(default=1024, ge=1)
    """Largest number of tokens per sequence in a prefill call. Absent: 1024, or all that the cache holds if fewer."""
    opt_input_len: int | None = Field(default=None, ge=1)
    """Number of prefill tokens that the engine is tuned for. Absent: half of max_input_len."""
    max_seq_len: int | None = Field(default=None, ge=1)
    """Slots of the KV cache per sequence. Absent: the model's max_position_embeddings. With yarn, linear or dynamic rotary scaling
    it may be `factor` times as many."""
    max_logits_per_sequence: int = Field(default=1, ge=1)
    """Largest number of positions per sequence that a call returns logits for. 1 serves sampling; max_input_len returns all."""
    gather_logits: bool = True
    """Return the logits of the whole vocabulary on every tensor-parallel rank; false: each returns its slice."""
    compute_capabilities: tuple[str, ...] = ()
    """Target GPUs such as 8.9 or 12.0, for tensorrt_rtx. Empty: every one that the library supports."""
    optimization_level: int | None = Field(default=None, ge=0, le=5)
    """TensorRT's builder optimization level. Absent: TensorRT's default."""
    workspace_bytes: NumBytes | None = None
    """Limit of TensorRT's workspace. Absent: TensorRT's default."""
    weight_streaming: bool = False
    """Let the runtime keep a part of the weights in host memory."""
    refit: bool = False
    """Let every weight of the checkpoint be replaced in the built engine, under its name in the converted checkpoint. Needs backend
    tensorrt: without a GPU, TensorRT-RTX compiles no refittable weights."""
    version_compatible: bool = _later(False)
    """Build engines that later TensorRT versions of the same major number load, and the lean runtime too (tensorrt-lean-cu13).
    Needs backend tensorrt."""
    for_triton: bool = _later(False)
    """Build what Triton's TensorRT backend can run: one optimization profile, and KV caches that are written as a whole, not in
    place, which takes more memory and time. Needs backend tensorrt."""
    experts: Literal["auto", "dense", "gathered", "trt_moe"] = _later("auto")
    """Experts that a rank of a mixture computes. dense: all of them for every token; gathered: those that the call's tokens chose,
    so that a decode step reads fewer weights, and a prefill copies them; trt_moe: TensorRT's own layer for SM100 and SM103, backend
    tensorrt, unquantized SwiGLU experts without biases, which nobody has run yet. auto: gathered where a decode step of
    opt_batch_size sequences chooses at most half of the rank's experts and they are not quantized."""
    profiling_verbosity: Literal["layer_names_only", "detailed", "none"] = "layer_names_only"
    """How much of its layers the engine tells profilers."""

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
        if self.experts == "trt_moe" and self.backend != "tensorrt":
            raise ValueError("experts trt_moe needs backend tensorrt: TensorRT-RTX cannot compile that layer")
        if self.backend == "tensorrt_rtx":
            for option, reason in _NOT_IN_RTX.items():
                if getattr(self, option):
                    raise ValueError(f"{option} needs backend tensorrt: {reason}")
        if self.backend == "tensorrt" and self.compute_capabilities:
            raise ValueError("compute_capabilities need backend tensorrt_rtx: tensorrt builds for the GPU that it runs on")
        return self


class ToleranceSpec(Frozen):
    """Tolerance of the verification: float32 execution of the graphs against the reference."""

    max_relative_error: float | None = Field(default=5e-5, gt=0)
    """Largest over positions of max |logit - reference| / max |reference|. null: no limit."""
    max_mean_kl: float = Field(default=1e-4, gt=0)
    """Mean over positions of KL(reference || graph), in nats."""
    min_top1_agreement: float = Field(default=1.0, ge=0, le=1)
    """Smallest fraction of positions whose largest logit is the same."""


class VerificationSpec(Frozen):
    """Verification of every rank, before anything is published."""

    enabled: bool = True
    """Verify. false: publish engines that nobody compared with the model."""
    prompts: tuple[str, ...] | None = None
    """Texts to verify with. Absent: texts that come with the package."""
    max_tokens: int = Field(default=32, ge=2)
    """Tokens of each prompt that are used."""
    decode_steps: int = Field(default=4, ge=1)
    """How many of these tokens are decoded one by one through the KV cache, after a prefill of the others."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the reference and of the ranks' graphs. cuda: reserve a GPU; auto: do so where the pool has some. No part of the
    build's identity."""
    tolerance: ToleranceSpec | None = None
    """Tolerance. Absent: that of an exact conversion, or of the quantization algorithm."""

    @model_validator(mode="after")
    def _prefill_remains(self) -> VerificationSpec:
        if self.decode_steps >= self.max_tokens:
            raise ValueError("decode_steps must be smaller than max_tokens, or nothing is left for the prefill")
        return self


RELEASE_NAME = r"^[a-z0-9][a-z0-9._-]{0,127}$"
RELEASE_VERSION = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class ReleaseSpec(Frozen):
    """The release in the store: its address, releases/<name>/<version>/, and its parts."""

    name: str = Field(pattern=RELEASE_NAME)
    """Name: lower-case letters, digits, dots, dashes and underscores."""
    version: str = Field(pattern=RELEASE_VERSION)
    """Version. Releases are immutable: other contents need another one."""
    include: tuple[Literal["engines", "portable", "checkpoint"], ...] = ("engines",)
    """Parts. engines: a TensorRT engine per rank, always there. portable: graphs that ONNX Runtime GenAI runs on any machine, and
    the ranks' weights. checkpoint: the TensorRT-LLM checkpoint, with the same weights."""

    @model_validator(mode="after")
    def _engines_are_included(self) -> ReleaseSpec:
        if "engines" not in self.include:
            raise ValueError("include lacks engines: for a checkpoint without engines, use `orchestrator convert`")
        return self

    @property
    def has_weights(self) -> bool:
        """Whether the ranks' weights are published."""
        return len(self.include) > 1


class BuildSpec(Frozen):
    """A build: source, topology, precision, engines, proof, release."""

    source: SourceSpec
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    """Model dtype. auto: that of the source, where float32 becomes float16 as in TensorRT-LLM."""
    topology: TopologySpec = TopologySpec()
    conversion: ConversionSpec = ConversionSpec()
    quantization: QuantizationSpec | None = None
    engine: BuildConfig = BuildConfig()
    verification: VerificationSpec = VerificationSpec()
    release: ReleaseSpec
