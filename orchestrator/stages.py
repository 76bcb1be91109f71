"""Single stages of a build: convert a whole checkpoint, or compile engines from a checkpoint."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.base.errors import StoreError
from orchestrator.base.extras import require
from orchestrator.checkpoints.trtllm_files import shard_indexes, write_checkpoint_config, write_json
from orchestrator.clusters.local import LocalCluster
from orchestrator.engines.profiles import network_of
from orchestrator.events import Listener, Planned, silent
from orchestrator.model import topology as topologies
from orchestrator.model.compute_capability import check_target
from orchestrator.model.config_trtllm import to_trtllm
from orchestrator.model.stage import StageOptions
from orchestrator.planning.facts import Verification, VerifyFacts
from orchestrator.planning.options import BuildOptions
from orchestrator.planning.plan import Plan
from orchestrator.planning.preparation import plan_conversion
from orchestrator.planning.steps import Kind, Outcome
from orchestrator.scheduling import commits
from orchestrator.scheduling.driver import Result
from orchestrator.scheduling.execute import OpenCluster, execute
from orchestrator.scheduling.preflight import check_steps
from orchestrator.spec.build import BuildConfig, BuildSpec
from orchestrator.spec.cluster import ClusterSpec
from orchestrator.stores import open_store
from orchestrator.stores.store import Store, check_writable


@dataclass(frozen=True)
class Converted:
    """A converted checkpoint."""

    plan: Plan
    verification: Verification | None
    """None: it was not verified."""


_CONVERSION = (Kind.CALIBRATE, Kind.CONVERT)
_PROOF = (Kind.MINIATURE, Kind.REFERENCE, Kind.VERIFY)


def convert(spec: BuildSpec, output: Path, listener: Listener = silent, *, verify: bool = False) -> Converted:
    """Write a whole TensorRT-LLM checkpoint to the folder `output`, config.json last. Resumes after a kill.

    `verify`: execute every rank's graph and compare with the Hugging Face model first, as a build does; no engine is needed. Then
    VerificationError is raised for a wrong checkpoint, which is not put into `output`.

    `spec.topology.cp` may be above 1. Raises as `plan`, and StoreError when `output` holds a checkpoint or has too little space.
    """
    require("build")
    if (output / "config.json").exists():
        raise StoreError(f"{output} already holds a checkpoint", "Choose another --output, or remove it.")
    plan = plan_conversion(spec)
    staging = output / ".staging"
    store = open_store(staging.resolve().as_uri())
    check_writable(store)
    steps = only(plan, (*_CONVERSION, *(_PROOF if verify else ())))
    result = run_steps(store, steps, Kind.CONVERT, ClusterSpec(store=store.url), LocalCluster, listener)
    for step in steps.of_kind(Kind.CONVERT):
        for written in result.outcomes[step.digest].outputs:
            path = store.local_path(written.key)
            assert path is not None  # the staging store is a folder
            path.replace(output / written.name)
    for name, value in shard_indexes(plan.inputs.weights, plan.topology).items():
        write_json(output / name, value)
    write_checkpoint_config(output, plan.inputs.config, plan.topology, plan.inputs.model_quantization)
    shutil.rmtree(staging)
    verified = [result.outcomes[step.digest].facts_as(VerifyFacts).verification for step in steps.of_kind(Kind.VERIFY)]
    return Converted(plan, verified[-1] if verified else None)


def only(plan: Plan, kinds: tuple[Kind, ...]) -> Plan:
    """Return the plan with only the steps of some kinds."""
    return replace(plan, steps=tuple(step for step in plan.steps if step.kind in kinds))


def run_steps(
    store: Store, plan: Plan, kept: Kind, cluster_spec: ClusterSpec, open_cluster: OpenCluster, listener: Listener
) -> Result:
    """Run what `store` lacks of a plan whose steps of kind `kept` are its result. Raises their errors."""
    plan, committed = commits.agreeing(store, plan)
    pending = plan.pending(committed)
    check_steps(plan, pending, cluster_spec, store)
    listener(Planned.of(plan, pending))
    accept = functools.partial(_check_kept, store, kept, committed)
    result = execute(plan, committed, cluster_spec, open_cluster, listener, accept)
    result.raise_failures(plan)
    return result


def _check_kept(store: Store, kind: Kind, committed: Mapping[str, Outcome], outcomes: Mapping[str, Outcome]) -> None:
    """Verify the outputs of steps of `kind` that an earlier run committed. Raises DamagedOutputError."""
    from orchestrator.releases.placing import damaged

    kept = [outcome for digest, outcome in outcomes.items() if committed.get(digest) is outcome and outcome.kind is kind]
    damage = damaged(store, (output for outcome in kept for output in outcome.outputs))
    if damage is not None:
        raise damage


def build_engine(
    checkpoint: Path, ranks: Iterable[int] | None, output: Path, engine: BuildConfig, progress: Callable[[int, str, int, int], None]
) -> list[int]:
    """Compile ranks of a TensorRT-LLM checkpoint folder into rank{N}.engine files, with config.json beside them.

    `ranks` None: all. `progress` gets rank, phase, steps done, total steps. Returns the ranks. Raises SpecError, TopologyError,
    EngineBuildError, and QuantizationError for GPUs that lack a number format.
    """
    require("build")
    from orchestrator.engines.profiles import resolved
    from orchestrator.planning.quantization import read_checkpoint
    from orchestrator.work.build.compiling import compile_apart

    config, topology, quantization = read_checkpoint(checkpoint)
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
    write_json(output / "config.json", written)
    return wanted
