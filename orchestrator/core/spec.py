"""What the user wants (`BuildSpec`) and what there is (`ClusterSpec`), decoded once into frozen values.

Unknown keys are errors that name their path. Only what changes the engines' content stands in BuildSpec; places (paths of
the store and of scratch) and capacities stand in ClusterSpec.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from orchestrator.core.decoding import Frozen as Frozen
from orchestrator.core.decoding import decode as decode
from orchestrator.core.decoding import decode_yaml as decode_yaml
from orchestrator.core.errors import abbreviated
from orchestrator.core.secrets import PlaceText, holds_secret
from orchestrator.core.topology import Topology

Dtype = Literal["float16", "bfloat16", "float32"]
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(value: Any) -> Any:
    """'5GB' or '16 GiB' to a number of bytes; numbers pass through. Raises ValueError."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([KMGT]?i?B?)\s*", value, re.IGNORECASE)
    unit = match.group(2).upper() if match else "?"
    unit = unit + "B" if unit in {"K", "M", "G", "T"} else "" if unit == "B" else unit
    if match is None or unit not in _UNITS:
        raise ValueError(f"{abbreviated(value, 40)!r} is not a size such as 5GB or 16GiB")
    return int(Decimal(match.group(1)) * _UNITS[unit])


NumBytes = Annotated[int, BeforeValidator(parse_bytes), Field(ge=0, lt=2**63)]


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


KindName = Literal["miniature", "reference", "calibrate", "convert", "build", "verify"]
_STAND_INS: dict[str, tuple[str, ...]] = {"miniature": ("verify", "reference", "convert", "build")}
"""A kind that pools may leave out -> the kinds in whose pool it runs then."""


class PoolSpec(Frozen):
    """Machines of one kind."""

    nodes: int = Field(default=1, ge=1)
    """How many there are, for the simulation; a build takes those that it finds."""
    cpus: int | None = Field(default=None, ge=1)
    """CPU slots of each node, one per running step; absent: those of the machine."""
    gpus: int = Field(default=0, ge=0)
    """Of each node."""
    memory: NumBytes | None = None
    """Memory of each node that steps may reserve; absent: that of the machine."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Ray labels that select the pool's nodes, e.g. ray.io/accelerator-type: H100."""
    fallback: tuple[dict[str, str], ...] = ()
    """Other labels, in order, for steps that no node with `labels` has room for."""
    scratch: NumBytes | None = None
    """Room in each node's scratch folder that steps may reserve; absent: what the nodes have free."""
    steps: tuple[KindName, ...] = ("miniature", "reference", "calibrate", "convert", "build", "verify")
    """Kinds of step that run here; the first pool that lists a kind takes it. A miniature that no pool lists goes where verify
    does, else reference, else convert, else build."""


class RetrySpec(Frozen):
    """What happens when the machinery fails. A step's own error is never retried."""

    max_attempts: int = Field(default=4, ge=1)
    backoff_seconds: float = Field(default=2.0, ge=0)
    """Before the second attempt; doubles each time."""
    max_backoff_seconds: float = Field(default=60.0, ge=0)


class StoreOptions(Frozen):
    """How the store is reached. It decides nothing of what is built, and holds no credentials: those are found on each machine
    the way every AWS client finds them (environment, profile, web identity, instance role). S3 only; others ignore it.
    """

    endpoint_url: str | None = None
    """Of a server other than AWS; absent: as the environment or the profile says (AWS_ENDPOINT_URL)."""
    region: str | None = None
    profile: str | None = None
    """A name in ~/.aws/config of every node; only the name travels."""
    addressing_style: Literal["auto", "path", "virtual"] = "auto"
    """auto: virtual on AWS, path elsewhere."""
    checksums: Literal["auto", "when_supported", "when_required"] = "auto"
    """Checksums that botocore adds to uploads. auto: when_supported on AWS, when_required elsewhere: older servers refuse its
    trailers, and get Content-MD5. obstore sends the CRC64NVME of each part, which servers that do not know it ignore or refuse;
    with when_required it signs the part's SHA-256 over http, and leaves it to TLS over https."""
    transfer: Literal["auto", "s3fs", "obstore"] = "auto"
    """What carries large objects. auto: obstore where it is installed."""
    max_attempts: int = Field(default=10, ge=1)
    """Of one request, with doubling delays between: the default lasts about two minutes."""
    read_timeout_seconds: float = Field(default=60.0, gt=0)

    @field_validator("endpoint_url")
    @classmethod
    def _plain_endpoint(cls, value: str | None) -> str | None:
        if value is not None and (not value.startswith(("http://", "https://")) or holds_secret(value)):
            raise ValueError("expected http://host:port or https://host:port, without user, password or query")
        return value


class DriverSpec(Frozen):
    """Where the driver of a submitted build runs. Nothing given: on the head, with which it ends."""

    cpus: float = Field(default=0.0, ge=0)
    """CPU slots that it holds; a little, such as 0.1, lets it run on any node that has some."""
    memory: NumBytes = 0
    """Memory that it reserves."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Ray labels that select its node."""
    resources: dict[str, float] = Field(default_factory=dict)
    """Custom Ray resources that it holds, e.g. driver: 1."""
    python: str | None = Field(default=None, min_length=1)
    """Python that runs it; absent: that of the Ray on its node, where it can import this program, else the first on the PATH."""
    stop_seconds: int = Field(default=30, ge=1)
    """How long it may clean up after `orchestrator stop`, before it is killed."""


class ProfileSpec(Frozen):
    """Which steps run under Nsight Systems. Their traces are put into the store, and the last event of each names its own."""

    steps: tuple[KindName, ...] = ("build",)
    nsys: tuple[str, ...] = ("--trace=cuda,nvtx,osrt",)
    """Options of `nsys profile`."""


class ClusterSpec(Frozen):
    """What there is to build with."""

    kind: Literal["local", "ray", "mpi"] = "local"
    """local: processes of this machine; ray: actors of a Ray cluster; mpi: the ranks of an MPI job, for Slurm sites without Ray."""
    address: PlaceText | None = None
    """Of the Ray cluster; absent: start one on this machine."""
    store: PlaceText
    """URL of the store that keeps steps' outputs and releases; every node must reach it."""
    store_options: StoreOptions = StoreOptions()
    scratch: PlaceText | None = None
    """Folder for temporary files on every node; absent: the system's."""
    pools: dict[str, PoolSpec] = Field(default_factory=lambda: {"default": PoolSpec()}, min_length=1)
    driver: DriverSpec = DriverSpec()
    retries: RetrySpec = RetrySpec()
    profile: ProfileSpec | None = None
    log_format: Literal["text", "json"] = "text"
    """Of the log that each step leaves in the store. json: every line has step, kind, rank or stage, attempt and node."""
    threads_per_step: int = Field(default=1, ge=1)
    """OMP_NUM_THREADS of every step."""
    schedule_timeout_seconds: float = Field(default=600.0, gt=0)
    """How long a step may wait for a node that could take it (ray only): then the build ends and says what was missing."""
    probe_timeout_seconds: float = Field(default=60.0, gt=0)
    """How long a node may take to say what it has, before the first step (ray only)."""

    def pool_name_for(self, kind: str) -> str | None:
        """The first pool that lists a kind of step takes it; None when none does."""
        wanted = (kind, *_STAND_INS.get(kind, ()))
        return next((name for each in wanted for name, pool in self.pools.items() if each in pool.steps), None)

    def pool_for(self, kind: str) -> PoolSpec | None:
        """The pool that `pool_name_for` names."""
        name = self.pool_name_for(kind)
        return None if name is None else self.pools[name]
