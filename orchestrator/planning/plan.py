"""The plan of a build: a value that can be printed, hashed, simulated and resumed, made from headers alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from orchestrator.base.digest import digest_of
from orchestrator.engines.profiles import network_of
from orchestrator.model.checkpoint import CheckpointIndex, SourceFile
from orchestrator.model.config import ModelConfig
from orchestrator.model.quantization import ModelQuantization, WeightFormat
from orchestrator.model.stage import StageNetwork, StageOptions
from orchestrator.model.topology import Topology
from orchestrator.model.weight_map import LayerGroup, WeightMap
from orchestrator.planning.advice import (
    gemm_warnings,
    kernel_warnings,
    left_out_notes,
    padding_notes,
    repeated_reads,
    shared_chunks,
)
from orchestrator.planning.calibration import Quantization, calibrations, in_layers
from orchestrator.planning.estimates import (
    MINIATURE_MEMORY_BYTES,
    build_memory,
    calibrate_memory,
    convert_memory,
    dequantization_memory,
    estimate,
    export_memory,
    reference_memory,
    rounding_memory,
    transposition_memory,
    verify_memory,
)
from orchestrator.planning.experts import DecodeReads, decode_reads
from orchestrator.planning.options import (
    BuildOptions,
    CalibrateOptions,
    ConvertOptions,
    ExportOptions,
    MiniatureOptions,
    ReferenceOptions,
    VerifyOptions,
)
from orchestrator.planning.steps import Kind, Outcome, Resources, Step
from orchestrator.spec.build import BuildConfig, BuildSpec, ToleranceSpec

VERSIONS: dict[Kind, int] = {
    Kind.MINIATURE: 1,
    Kind.REFERENCE: 3,
    Kind.CALIBRATE: 3,
    Kind.CONVERT: 1,
    Kind.BUILD: 2,
    Kind.VERIFY: 4,
    Kind.EXPORT: 3,
}
"""Version of the code of each kind. Raise it when the code would give other outputs for the same options."""


@dataclass(frozen=True)
class Inputs:
    """Inputs of a plan besides the spec."""

    index: CheckpointIndex
    extra_files: tuple[SourceFile, ...]
    """Tokenizer and config files of the source."""
    source: str
    """Absolute path or URL of the source. No part of the build's identity."""
    config: ModelConfig
    weights: WeightMap
    tensorrt_version: str | None
    engine: BuildConfig
    """The spec's engine options, with all limits set for this model."""
    quantization: Quantization | None = None
    tolerance: ToleranceSpec = field(default_factory=ToleranceSpec)
    """Tolerance of the verification where the spec gives none."""
    family: str = field(kw_only=True)
    """Name of the family whose tables read the source."""
    ignored_keys: frozenset[str] = frozenset()
    """Keys of config.json that are ignored."""
    tokenizer: str | None = None
    """Absolute path or URL of the tokenizer's files; None: they are files of the source. No part of the build's identity."""

    @property
    def extra_place(self) -> str:
        """Path or URL of the folder of `extra_files`."""
        return self.tokenizer or self.source

    @property
    def extra_format(self) -> str:
        """Name of the format that names `extra_files`."""
        return "huggingface" if self.tokenizer else self.index.format

    def locations(self) -> dict[str, str]:
        """Return the places that a step reads which needs the source and its tokenizer."""
        return {"source": self.source, **({"tokenizer": self.tokenizer} if self.tokenizer else {})}

    @property
    def model_quantization(self) -> ModelQuantization | None:
        return self.quantization.model if self.quantization else None

    def network(self, topology: Topology, pp_rank: int) -> StageNetwork:
        """Return the networks of a stage, the same for build and verify steps."""
        return network_of(StageOptions.of(self.config, topology, pp_rank, self.model_quantization), self.engine)


@dataclass(frozen=True)
class Plan:
    """The steps of a build, each after the steps that it needs."""

    spec: BuildSpec
    inputs: Inputs
    steps: tuple[Step, ...]
    warnings: tuple[str, ...] = ()
    """Possible mistakes and causes of slowness, which do not stop the build."""
    notes: tuple[str, ...] = ()
    """Facts that do not follow from the spec, e.g. padding of the vocabulary."""
    published: frozenset[Kind] = frozenset({Kind.VERIFY})
    """Kinds of step that the release is made from although other steps need them: proofs, and shards where they are published."""

    @property
    def topology(self) -> Topology:
        return self.spec.topology.topology()

    @property
    def build_key(self) -> str:
        """Digest of the build's inputs. The same inputs give the same key on any machine."""
        files = sorted([file.name, file.identity] for file in self.inputs.extra_files)
        parts = {"include": sorted(self.spec.release.include)} if self.spec.release.has_weights else {}
        return digest_of({"steps": sorted(step.digest for step in self.sinks()), "files": files, **parts})

    def decode_reads(self) -> list[DecodeReads]:
        """Return the weights that a decode step reads on a rank of each stage; empty for a model without experts."""
        inputs = self.inputs
        if inputs.config.moe is None:
            return []
        stages = (inputs.network(self.topology, pp_rank).stage for pp_rank in range(self.topology.pp))
        return [decode_reads(stage, inputs.weights.stage(stage.pp_rank), inputs.engine) for stage in stages]

    @cached_property
    def _by_digest(self) -> dict[str, Step]:
        return {step.digest: step for step in self.steps}

    def step(self, digest: str) -> Step:
        return self._by_digest[digest]

    def of_kind(self, kind: Kind) -> Iterator[Step]:
        return (step for step in self.steps if step.kind is kind)

    def sinks(self) -> list[Step]:
        """Return the steps that the release is made from."""
        needed = {need for step in self.steps for need in step.needs}
        return [step for step in self.steps if step.digest not in needed or step.kind in self.published]

    def pending(self, committed: Mapping[str, Outcome]) -> list[Step]:
        """Return the steps to run, in plan order. Steps that only committed steps need are skipped."""
        wanted: set[str] = set()
        frontier = [step.digest for step in self.sinks()]
        while frontier:
            digest = frontier.pop()
            if digest in wanted or digest in committed:
                continue
            wanted.add(digest)
            frontier.extend(self.step(digest).needs)
        return [step for step in self.steps if step.digest in wanted]

    def order(self) -> dict[str, int]:
        """Return the priority of each step by digest, smallest first: the plan's order, stage by stage.

        So the first engine is built while later stages are still converted, and a network that TensorRT refuses fails early.
        """
        return {step.digest: number for number, step in enumerate(self.steps)}


def make_plan(spec: BuildSpec, inputs: Inputs) -> Plan:
    """Lay out the steps: miniature, reference, calibrate and convert per stage, build per rank, verify per stage."""
    topology = spec.topology.topology()
    steps: list[Step] = [_miniature(inputs)]
    reference = _reference(spec, inputs) if spec.verification.enabled else None
    if reference is not None:
        steps.append(reference)
    calibrates = calibrate_steps(inputs, topology)
    steps.extend(calibrates)
    previous: Step | None = None
    for pp_rank in range(topology.pp):
        network = inputs.network(topology, pp_rank)
        groups = inputs.weights.stage(pp_rank)
        converts = [_convert(group, inputs, topology, calibrates, spec.conversion.not_finite) for group in groups]
        rank_bytes = sum(group.shard_bytes for group in groups)
        steps.extend(converts)
        engines = [_build(inputs, network, tp_rank, converts, rank_bytes) for tp_rank in range(topology.tp)]
        proofs = [] if previous is None else [previous]
        if reference is None:
            steps.extend(engines)
        else:
            previous = _verify(spec, inputs, network, converts, reference, previous, rank_bytes)
            # A wrong rank is known before its stage's engines are built, unless the proof takes longer than they do.
            is_quick = previous.estimate.seconds < sum(engine.estimate.seconds for engine in engines)
            steps.extend([previous, *engines] if is_quick else [*engines, previous])
            proofs += [reference, previous]
        if "portable" in spec.release.include:
            steps.append(_export(spec, inputs, network, converts, proofs, rank_bytes))
    warnings = (
        *inputs.index.warnings,
        *gemm_warnings(inputs.config, topology, inputs.model_quantization),
        *kernel_warnings(inputs.config, spec.engine.backend),
    )
    repeated = (*repeated_reads(inputs.weights), *shared_chunks(inputs.weights))
    notes = (*padding_notes(inputs.config, topology), *repeated, *left_out_notes(inputs.weights))
    published = {Kind.VERIFY, *([Kind.CONVERT] if spec.release.has_weights else [])}
    return Plan(spec, inputs, tuple(steps), warnings, notes, frozenset(published))


def _miniature(inputs: Inputs) -> Step:
    """Return the miniature step. It comes first because it needs only the config and takes seconds."""
    config = inputs.config
    options = MiniatureOptions(
        config=dict(inputs.index.config),
        family=inputs.family,
        architecture=config.architecture,
        ignored_keys=tuple(sorted(inputs.ignored_keys)),
        use_parallel_embedding=config.use_parallel_embedding,
        embedding_sharding_dim=config.embedding_sharding_dim,
    )
    return Step(
        kind=Kind.MINIATURE,
        version=VERSIONS[Kind.MINIATURE],
        name="miniature",
        options=options.model_dump(mode="json"),
        resources=Resources(memory_bytes=MINIATURE_MEMORY_BYTES),
        estimate=estimate(Kind.MINIATURE, read_bytes=0, work_bytes=0),
    )


def _reference(spec: BuildSpec, inputs: Inputs) -> Step:
    verification = spec.verification
    options = ReferenceOptions(
        format=inputs.index.format,
        files=inputs.index.files + inputs.extra_files,
        dtype=inputs.config.dtype,
        vocab_size=inputs.config.vocab_size,
        exact_weights=inputs.weights.exact_sources(),
        decode_steps=verification.decode_steps if inputs.config.rotary_depends_on_length(verification.max_tokens) else None,
        prompts=verification.prompts,
        max_tokens=verification.max_tokens,
    )
    dense_bytes = sum(tensor.num_bytes for tensor in inputs.index.tensors.values())
    return Step(
        kind=Kind.REFERENCE,
        version=VERSIONS[Kind.REFERENCE],
        name="reference",
        options=options.model_dump(mode="json"),
        locations={**inputs.locations(), "device": verification.device},
        resources=Resources(
            gpus=_gpus(verification.device),
            memory_bytes=reference_memory(inputs.index, inputs.config.dtype, inputs.config.num_hidden_layers),
        ),
        estimate=estimate(Kind.REFERENCE, read_bytes=inputs.index.num_bytes, work_bytes=dense_bytes),
    )


def calibrate_steps(inputs: Inputs, topology: Topology) -> list[Step]:
    """Return the calibrations of the build, each after the calibration that it needs."""
    quantization = inputs.quantization
    if quantization is None:
        return []
    layers = inputs.config.num_hidden_layers
    parts = topology.stages(layers) if quantization.num_stages is None else Topology(1, quantization.num_stages).stages(layers)
    steps: list[Step] = []
    for chain in calibrations(quantization, inputs.index, inputs.extra_files, inputs.config, inputs.weights, parts):
        previous: Step | None = None
        for number, options in enumerate(chain):
            previous = _calibrate(inputs, options, number, previous)
            steps.append(previous)
    return steps


def _calibrate(inputs: Inputs, options: CalibrateOptions, number: int, previous: Step | None) -> Step:
    assert inputs.quantization is not None
    layers = range(options.first_layer, options.first_layer + options.num_layers)
    part = [tensor for name, tensor in inputs.index.tensors.items() if in_layers(name, layers)]
    part_bytes = sum(tensor.num_bytes for tensor in part)
    passes = {"max": 1, "smoothquant": 1, "awq_lite": 12}[options.method.method]
    data = options.data
    hidden_bytes = data.num_samples * data.max_length * options.config.hidden_size * 4
    searches = options.method.method == "awq_lite" and not options.layerwise
    memory = calibrate_memory(part_bytes, hidden_bytes, searches_whole_part=searches)
    return Step(
        kind=Kind.CALIBRATE,
        version=VERSIONS[Kind.CALIBRATE],
        name=f"calibrate/{options.method.method}/part{number}",
        options=options.model_dump(mode="json"),
        needs=(previous.digest,) if previous else (),
        locations={**inputs.locations(), "dataset": inputs.quantization.dataset, "device": inputs.quantization.device},
        resources=Resources(gpus=_gpus(inputs.quantization.device), memory_bytes=memory),
        estimate=estimate(
            Kind.CALIBRATE,
            read_bytes=sum(tensor.stored_bytes for tensor in part),
            write_bytes=0 if options.is_last else hidden_bytes,
            work_bytes=passes * part_bytes,
        ),
    )


def _convert(
    group: LayerGroup, inputs: Inputs, topology: Topology, calibrates: list[Step], not_finite: Literal["warn", "error"]
) -> Step:
    quantization = inputs.quantization
    scales = quantization.scales_sha256 if quantization and group.needs_scales else None
    options = ConvertOptions.of(group, inputs.index, topology, not_finite, scales)
    needs = [step.digest for step in calibrates if group.needs_scales and _overlap(step, group.layers)]
    sources = list(group.sources().values())
    read_bytes = sum(tensor.stored_bytes for tensor in sources)
    write_bytes = group.shard_bytes * topology.tp
    largest = max((tensor.num_bytes for tensor in sources), default=0)
    return Step(
        kind=Kind.CONVERT,
        version=VERSIONS[Kind.CONVERT],
        name=f"convert/stage{group.pp_rank}/group{group.index}",
        options=options.model_dump(mode="json"),
        needs=tuple(needs),
        locations={"source": inputs.source, **({"scales": quantization.scales} if quantization and quantization.scales else {})},
        resources=Resources(
            memory_bytes=convert_memory(largest, quantized=quantization is not None)
            + dequantization_memory(sources)
            + transposition_memory(sources)
            + rounding_memory(group.targets)
        ),
        estimate=estimate(Kind.CONVERT, read_bytes=read_bytes, write_bytes=write_bytes, work_bytes=write_bytes),
    )


def _overlap(calibrate: Step, layers: range) -> bool:
    first, count = calibrate.options["first_layer"], calibrate.options["num_layers"]
    return bool(first < layers.stop and layers.start < first + count)


def _has_int4(quantization: ModelQuantization | None) -> bool:
    formats = (quantization.linear, *quantization.layers.values()) if quantization else ()
    return any(fmt is not None and fmt.weight in (WeightFormat.INT4_BLOCK, WeightFormat.INT4_BLOCK_FP8) for fmt in formats)


def _build(inputs: Inputs, network: StageNetwork, tp_rank: int, converts: list[Step], rank_bytes: int) -> Step:
    options = BuildOptions(network=network, tp_rank=tp_rank, engine=inputs.engine, tensorrt_version=inputs.tensorrt_version)
    return Step(
        kind=Kind.BUILD,
        version=VERSIONS[Kind.BUILD],
        name=f"build/rank{options.rank}",
        options=options.model_dump(mode="json"),
        needs=tuple(step.digest for step in converts),
        resources=Resources(
            gpus=1 if inputs.engine.backend == "tensorrt" else 0,
            memory_bytes=build_memory(rank_bytes, network.stage.num_layers, repacked=_has_int4(inputs.model_quantization)),
            scratch_bytes=rank_bytes,
        ),
        estimate=estimate(Kind.BUILD, read_bytes=rank_bytes, write_bytes=rank_bytes, work_bytes=rank_bytes),
    )


def _verify(
    spec: BuildSpec,
    inputs: Inputs,
    network: StageNetwork,
    converts: list[Step],
    reference: Step,
    previous: Step | None,
    rank_bytes: int,
) -> Step:
    stage = network.stage
    options = VerifyOptions(
        network=network,
        decode_steps=spec.verification.decode_steps,
        tolerance=spec.verification.tolerance or inputs.tolerance,
    )
    needs = [step.digest for step in converts] + [reference.digest] + ([previous.digest] if previous else [])
    return Step(
        kind=Kind.VERIFY,
        version=VERSIONS[Kind.VERIFY],
        name=f"verify/stage{stage.pp_rank}",
        options=options.model_dump(mode="json"),
        needs=tuple(needs),
        locations={"device": spec.verification.device},
        resources=Resources(
            gpus=_gpus(spec.verification.device),
            memory_bytes=verify_memory(inputs.weights, stage.pp_rank),
            scratch_bytes=stage.tp * rank_bytes,
        ),
        estimate=estimate(Kind.VERIFY, read_bytes=rank_bytes * stage.tp, work_bytes=rank_bytes * stage.tp),
    )


def _export(
    spec: BuildSpec, inputs: Inputs, network: StageNetwork, converts: list[Step], proofs: list[Step], rank_bytes: int
) -> Step:
    """Return the export of a stage. `proofs`: the reference, the verification of the stage and of the one before; may be empty."""
    stage = network.stage
    options = ExportOptions(network=network, decode_steps=spec.verification.decode_steps if proofs else None)
    return Step(
        kind=Kind.EXPORT,
        version=VERSIONS[Kind.EXPORT],
        name=f"export/stage{stage.pp_rank}",
        options=options.model_dump(mode="json"),
        needs=tuple(step.digest for step in [*converts, *proofs]),
        resources=Resources(memory_bytes=export_memory(inputs.weights, stage.pp_rank), scratch_bytes=stage.tp * rank_bytes),
        estimate=estimate(Kind.EXPORT, read_bytes=rank_bytes * stage.tp, work_bytes=rank_bytes * stage.tp),
    )


def _gpus(device: str) -> int:
    return 1 if device == "cuda" else 0
