"""What a user can ask for of a build: plan, build, convert, build_engine. Each a short story. Releases: orchestrator/releases."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator import cache
from orchestrator.checkpoints import read_source
from orchestrator.checkpoints.hub import pinned
from orchestrator.clusters import Cluster, Probing
from orchestrator.core import topology as topologies
from orchestrator.core.checkpoint import CheckpointIndex
from orchestrator.core.compute_capability import check_target
from orchestrator.core.config_keys import config_warnings
from orchestrator.core.dtypes import MODEL_DTYPE_NAMES, MODEL_DTYPES
from orchestrator.core.errors import (
    ArchitectureError,
    DamagedOutputError,
    QuantizationError,
    SpecError,
    StoreError,
    TopologyError,
)
from orchestrator.core.manifest import MANIFEST, Manifest, release_prefix
from orchestrator.core.model_config import ModelConfig, from_hugging_face, from_trtllm, to_trtllm
from orchestrator.core.options import BuildOptions, StageOptions, network_of
from orchestrator.core.plan import Inputs, Plan, make_plan
from orchestrator.core.progress import StepFailed
from orchestrator.core.quantization import ModelQuantization, quant_cfg
from orchestrator.core.rules import Family
from orchestrator.core.schedule import MAX_REPEATS, Start, taken_back
from orchestrator.core.spec import BuildConfig, BuildSpec, ClusterSpec
from orchestrator.core.step import Failure, Kind, Outcome
from orchestrator.core.weight_map import weight_map
from orchestrator.core.weight_names import check_names
from orchestrator.driver import Result, drive
from orchestrator.families import architecture_of, check_kind, family_for, family_named
from orchestrator.node_checks import check_nodes, read_places
from orchestrator.preflight import check_build, check_steps
from orchestrator.recording import Recording, check_report, fetch_report
from orchestrator.report import Listener, Listeners, SilentListener
from orchestrator.stores import Store, check_writable, open_store


@dataclass(frozen=True)
class Build:
    """A finished build."""

    plan: Plan
    manifest: Manifest
    address: str
    """URL of the release."""
    result: Result | None
    """None: the release was there already."""


def plan(spec: BuildSpec) -> Plan:
    """Make the plan of a build from headers alone.

    Raises the source's errors, ArchitectureError, TopologyError with the legal topologies, WeightMapError, SpecError.
    """
    topologies.check_engines(spec.topology.topology())
    return _plan(spec)


def _plan(spec: BuildSpec) -> Plan:
    """The plan, whose conversion at least can be run. Raises as `plan` does."""
    from orchestrator.engines import installed_version
    from orchestrator.engines.profiles import resolved
    from orchestrator.quantizers import tolerance
    from orchestrator.quantizing import resolve as resolve_quantization

    spec = spec.model_copy(update={"source": spec.source.model_copy(update={"path": pinned(spec.source.path)})})
    index, extra_files = read_source(spec.source.path, spec.source.format)
    family, architecture, ignored = _family(spec, index)
    config = from_hugging_face(index.config, architecture, source_dtype(spec.dtype, index), family.config, ignored)
    index = replace(index, warnings=(*index.warnings, *config_warnings(index.config, architecture, family.config)))
    topology = spec.topology.topology()
    topologies.check(topology, config.limits())
    config = _with_layout(config, spec)
    check_names(family, config, topology)
    engine = resolved(config, spec.engine)
    quantization = resolve_quantization(spec.quantization, config.num_hidden_layers) if spec.quantization else None
    model = quantization.model if quantization else None
    weights = weight_map(index, family, config, topology, spec.conversion.max_shard_bytes, model)
    version = installed_version(spec.engine.backend)
    inputs = Inputs(
        index,
        extra_files,
        spec.source.path,
        config,
        weights,
        version,
        engine,
        quantization,
        tolerance(model),
        family=family.name,
        ignored_keys=ignored,
    )
    return make_plan(spec, inputs)


def _with_layout(config: ModelConfig, spec: BuildSpec) -> ModelConfig:
    """The config with the layout that the spec asks for. Raises TopologyError when the hidden size does not divide."""
    conversion = spec.conversion
    if conversion.use_parallel_embedding and conversion.embedding_sharding_dim == 1 and config.hidden_size % spec.topology.tp:
        legal = [tp for tp in topologies.legal_tp(config.limits(), spec.topology.moe_ep) if config.hidden_size % tp == 0]
        raise TopologyError(
            f"tp={spec.topology.tp} does not divide hidden_size {config.hidden_size}, by which the embedding is split",
            f"Use embedding_sharding_dim: 0, or tp in {topologies.as_set(legal)}.",
        )
    layout = {
        "use_parallel_embedding": conversion.use_parallel_embedding,
        "embedding_sharding_dim": conversion.embedding_sharding_dim,
    }
    return config.model_copy(update=layout)


def _family(spec: BuildSpec, index: CheckpointIndex) -> tuple[Family, str, frozenset[str]]:
    """The family, the architecture, and the keys of config.json that are not looked at."""
    ignored = frozenset(spec.source.ignored_keys)
    if spec.source.family != "auto":
        family = family_named(spec.source.family)
        check_kind(index.config, family, spec.source.path)
        listed = index.config.get("architectures")
        named = listed[0] if isinstance(listed, list) and listed and isinstance(listed[0], str) else None
        return family, named or family.architectures[0], ignored | {"model_type"}
    architecture = architecture_of(index.config, spec.source.path)
    if architecture is None:
        raise ArchitectureError(f"config.json of {spec.source.path} names no architecture", "Set source.family in the spec.")
    return family_for(architecture), architecture, ignored


def source_dtype(asked: str, index: CheckpointIndex) -> str:
    """The model's dtype: as asked, or for auto that of most bytes of the source, float32 becoming float16.

    Raises SpecError, and QuantizationError when most bytes are of no floating-point dtype of 16 bits or more.
    """
    if asked != "auto" and asked not in MODEL_DTYPES:
        raise SpecError(f"{asked!r} is no model dtype", f"Model dtypes: auto, {', '.join(MODEL_DTYPES)}.")
    sizes: dict[str, int] = {}
    for tensor in index.tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.num_bytes
    dominant = max(sizes, key=lambda name: sizes[name], default="")
    if dominant and dominant not in (*MODEL_DTYPE_NAMES, "F64"):
        raise QuantizationError(
            f"most of the source's bytes are {dominant}: it is quantized, although its config does not say so",
            "Build from the unquantized checkpoint.",
        )
    if asked != "auto":
        return asked
    if dominant not in MODEL_DTYPE_NAMES:
        raise SpecError(f"the source's dtype {dominant or 'none'} is no model dtype", "Set dtype: bfloat16 or float16 in the spec.")
    name = MODEL_DTYPE_NAMES[dominant]
    return "float16" if name == "float32" else name


_BUILD_ID_DIGITS = 8
OpenCluster = Callable[[ClusterSpec], Cluster]


def local_cluster(place: ClusterSpec) -> Cluster:
    """Processes of this machine."""
    from orchestrator.clusters.local import LocalCluster

    return LocalCluster(place)


def build(
    spec: BuildSpec,
    place: ClusterSpec,
    *,
    open_cluster: OpenCluster = local_cluster,
    listener: Listener | None = None,
    sign_key: Path | None = None,
    report: Path | None = None,
) -> Build:
    """Build, verify and publish `spec` at `place`, on the cluster that `open_cluster` opens there.

    The cluster is opened only when there is something to run, and closed afterwards. Committed steps are not repeated; a
    release that this very build has published already is returned as it is. With `sign_key`, a PEM file with a P-256 private
    key of this machine, the release is signed. The report of the build, of a failed one too, is written to `report`.
    Raises an OrchestratorError of the situation.
    """
    from orchestrator.signing import check_sign_key
    from orchestrator.work.publish import Engines, check_free, place_engines, publish

    reports = listener or SilentListener()
    if sign_key is not None:
        check_sign_key(sign_key)
    if report is not None:
        check_report(report)
    made = plan(spec)
    target = open_store(place.store, place.store_options)
    address = f"{target.url}/{release_prefix(spec.release.name, spec.release.version)}".rstrip("/")
    check_writable(target)
    existing = check_free(target, made, sign_key)
    if existing is not None:
        reports.on_plan(made, {}, already_published=True)
        if report is not None:
            fetch_report(target, release_prefix(spec.release.name, spec.release.version), existing, report)
        return Build(made, existing, address, None)
    prefix = release_prefix(spec.release.name, spec.release.version)
    with (
        cache.in_use(target, [step.digest for step in made.steps], prefix, made.build_key),
        Recording(target, made, report) as recording,
    ):
        reports = Listeners(reports, recording.listener)
        committed, again = cache.agreeing(target, made, cache.committed(target, (step.digest for step in made.steps)))
        made = replace(made, warnings=made.warnings + again + check_build(made, committed, place, target))
        reports.on_plan(made, committed, already_published=False)
        placed: list[Engines] = []
        result = run(
            made, committed, place, open_cluster, reports, lambda outcomes: placed.append(place_engines(target, made, outcomes))
        )
        recording.ended(result)
        result.raise_failures(made)
        manifest = publish(target, made, result.outcomes, placed[-1], sign_key, recording.page)
        recording.published(f"{address}/{MANIFEST}", manifest)
        return Build(made, manifest, address, result)


def run(
    made: Plan,
    committed: Mapping[str, Outcome],
    place: ClusterSpec,
    open_cluster: OpenCluster,
    listener: Listener,
    accept: Callable[[Mapping[str, Outcome]], object] = lambda outcomes: None,
) -> Result:
    """Drive the plan; a plan with nothing pending opens no cluster.

    `accept` looks at the outcomes of a plan that succeeded. For a DamagedOutputError of it, the step that wrote the object runs
    again, a few times at most; then the error is raised.
    """
    target = open_store(place.store, place.store_options)
    result = _run(made, committed, place, open_cluster, listener)
    for left in reversed(range(MAX_REPEATS + 1)):
        if result.failures:
            break
        try:
            accept(result.outcomes)
            break
        except DamagedOutputError as damage:
            taken = taken_back(result.outcomes, damage)
            cache.set_aside(target, taken)
            if not left:
                raise
            rest = {digest: outcome for digest, outcome in result.outcomes.items() if outcome is not taken.outcome}
            step = made.step(taken.outcome.digest)
            listener.on_event(StepFailed(digest=step.digest, failure=Failure.of(damage, taken.outcome.node)))
            listener.on_retry(Start(step, 2))
            again = _run(made, rest, place, open_cluster, listener)
            result = replace(again, ran=result.ran | again.ran)
    listener.on_finish(made, result)
    return result


def _run(made: Plan, committed: Mapping[str, Outcome], place: ClusterSpec, open_cluster: OpenCluster, listener: Listener) -> Result:
    if not made.pending(committed):
        return Result(committed, frozenset())
    from orchestrator.work.checking import forget

    build_id = uuid.uuid4().hex[:_BUILD_ID_DIGITS]
    target = open_store(place.store, place.store_options)
    with cache.nothing_left_begun(target, build_id):
        cluster = open_cluster(place)
        try:
            if isinstance(cluster, Probing):
                nodes = cluster.probe(read_places(made, committed))
                listener.on_nodes(nodes, check_nodes(made, committed, place, nodes))
            lookup, set_aside = functools.partial(cache.find, target), functools.partial(cache.set_aside, target)
            return drive(made, committed, cluster, place, listener, lookup, build_id, set_aside)
        finally:
            cluster.close()
            forget(place.scratch or tempfile.gettempdir(), build_id)


def convert(spec: BuildSpec, output: Path, listener: Listener | None = None) -> Plan:
    """Write a whole TensorRT-LLM checkpoint to the folder `output`: config.json last. Resumes after a kill.

    `spec.topology.cp` may be above 1. Raises StoreError when `output` already holds one or has too little room; else as `plan`.
    """
    if (output / "config.json").exists():
        raise StoreError(f"{output} already holds a checkpoint", "Choose another --output, or remove it.")
    made = _plan(spec)
    staging = output / ".staging"
    store = open_store(staging.resolve().as_uri())
    check_writable(store)
    only = replace(made, steps=tuple(step for step in made.steps if step.kind in (Kind.CALIBRATE, Kind.CONVERT)))
    committed, again = cache.agreeing(store, only, cache.committed(store, (step.digest for step in only.steps)))
    place = ClusterSpec(store=store.url)
    only = replace(only, warnings=only.warnings + again + check_steps(only, committed, place, store))
    reports = listener or SilentListener()
    reports.on_plan(only, committed, already_published=False)
    result = run(only, committed, place, local_cluster, reports, functools.partial(check_kept, store, Kind.CONVERT, committed))
    result.raise_failures(only)
    for step in only.of_kind(Kind.CONVERT):
        for written in result.outcomes[step.digest].outputs:
            path = store.local_path(written.key)
            assert path is not None  # the staging store is a folder
            path.replace(output / written.name)
    _write_indexes(made, output)
    write_checkpoint_config(output, made.inputs.config, made.topology, made.inputs.model_quantization)
    shutil.rmtree(staging)
    return made


def check_kept(store: Store, kind: Kind, committed: Mapping[str, Outcome], outcomes: Mapping[str, Outcome]) -> None:
    """Read the outputs of steps of `kind` that an earlier run has left. Raises DamagedOutputError."""
    from orchestrator.work.publish import damaged

    kept = [outcome for digest, outcome in outcomes.items() if committed.get(digest) is outcome and outcome.kind is kind]
    damage = damaged(store, (output for outcome in kept for output in outcome.outputs))
    if damage is not None:
        raise damage


def _write_indexes(made: Plan, output: Path) -> None:
    """rank{N}.safetensors.index.json for ranks of several shards, as Hugging Face writes them."""
    for number in range(made.topology.num_files):
        groups = made.inputs.weights.stage(number // made.topology.tp)
        if len(groups) == 1:
            continue
        listed = {target.name: group.shard_name(number) for group in groups for target in group.targets}
        index = {"metadata": {"total_size": sum(group.shard_bytes for group in groups)}, "weight_map": listed}
        _write_json(output / f"rank{number}.safetensors.index.json", index, indent=2)


def build_engine(
    checkpoint: Path, ranks: Iterable[int] | None, output: Path, engine: BuildConfig, progress: Callable[[int, str, int, int], None]
) -> list[int]:
    """Compile ranks of a TensorRT-LLM checkpoint folder into rank{N}.engine files, with config.json beside them.

    `ranks` None: all. `progress` gets rank, phase, done, total. Returns the ranks. Raises SpecError, TopologyError,
    QuantizationError for GPUs that lack a number format, EngineBuildError.
    """
    from orchestrator.engines.profiles import resolved
    from orchestrator.quantizing import read_checkpoint_quantization
    from orchestrator.work.compiling import compile_apart

    config, topology = read_checkpoint_config(checkpoint)
    quantization = read_checkpoint_quantization(checkpoint)
    topologies.check(topology, config.limits())
    topologies.check_engines(topology)
    check_target(quantization, engine.compute_capabilities)
    engine = resolved(config, engine)
    wanted = list(ranks) if ranks is not None else list(range(topology.world_size))
    places = [topology.coordinates(rank) for rank in wanted]
    options = {
        place.rank: BuildOptions(
            network=network_of(StageOptions.of(config, topology, place.pp_rank, quantization), engine),
            tp_rank=place.tp_rank,
            engine=engine,
            tensorrt_version=None,
        )
        for place in places
    }
    compile_apart(checkpoint, options, output, progress)
    written = {"pretrained_config": to_trtllm(config, topology, quantization), "build_config": engine.model_dump(mode="json")}
    _write_json(output / "config.json", written)
    return wanted


def write_checkpoint_config(
    folder: Path, config: ModelConfig, topology: topologies.Topology, quantization: ModelQuantization | None
) -> None:
    """config.json of a TensorRT-LLM checkpoint, last, and before it quant_cfg.json where linears differ in their format."""
    mixture = quant_cfg(quantization) if quantization else None
    if mixture is not None:
        _write_json(folder / "quant_cfg.json", mixture)
    _write_json(folder / "config.json", to_trtllm(config, topology, quantization))


def _write_json(path: Path, value: Any, indent: int = 4) -> None:
    from orchestrator.stores.file import write_whole

    write_whole(path, (json.dumps(value, indent=indent) + "\n").encode())


def read_checkpoint_config(folder: Path) -> tuple[ModelConfig, topologies.Topology]:
    """Model and topology of a TensorRT-LLM checkpoint folder. Raises SpecError when it is none."""
    try:
        plain: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
        return from_trtllm(plain)
    except (OSError, ValueError) as error:
        raise SpecError(f"{folder} is not a TensorRT-LLM checkpoint: {error}", "Make one with `orchestrator convert`.") from None
