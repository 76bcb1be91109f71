"""Make the manifest of a finished build from its plan and the outcomes of its steps. Writes nothing.

Only named facts of the outcomes get into the manifest, no logs. Paths and URLs get there without parts that may be secret.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import uuid
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

from orchestrator.engines.memory import memory_needed
from orchestrator.engines.record import EngineRecord
from orchestrator.planning.facts import BuildFacts, Miniature, MiniatureFacts, Verification, VerifyFacts, linear_errors
from orchestrator.planning.plan import Plan
from orchestrator.planning.steps import Kind, Outcome
from orchestrator.releases.manifest import (
    ArtifactRecord,
    FileRecord,
    Manifest,
    QuantizationRecord,
    RankRecord,
    Selectors,
    SourceFileRecord,
)
from orchestrator.releases.provenance import (
    BuildDefinition,
    Builder,
    BuildMetadata,
    Provenance,
    ResourceDescriptor,
    RunDetails,
    identified,
    public_uri,
)
from orchestrator.spec.build import BuildSpec

_WORST_LINEARS = 10
_PLACES = ("path", "tokenizer", "scales", "quant_cfg", "dataset")
"""Fields of a spec that hold a path or URL."""


def describe(
    plan: Plan, outcomes: Mapping[str, Outcome], ranks: tuple[RankRecord, ...], shared: tuple[FileRecord, ...]
) -> Manifest:
    """Return the manifest of a build whose files are in place."""
    release, topology = plan.spec.release, plan.topology
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    known = [outcomes[step.digest] for step in plan.steps if step.digest in outcomes]
    tools = _tools(known)
    quantization = _quantization(plan, known)
    return Manifest(
        name=release.name,
        version=release.version,
        build_key=plan.build_key,
        created_at=now,
        source=tuple(
            SourceFileRecord(path=file.name, num_bytes=file.num_bytes, identity=file.identity)
            for file in plan.inputs.index.files + plan.inputs.extra_files
        ),
        model=plan.inputs.config,
        part_of=plan.inputs.index.part_of,
        selectors=_selectors(plan, ranks[0].engine),
        tp=topology.tp,
        pp=topology.pp,
        cp=topology.cp,
        moe_ep=topology.moe_ep,
        ranks=ranks,
        shared=shared,
        engine_config=plan.inputs.engine.model_dump(mode="json"),
        quantization=quantization,
        verification=_verification(known),
        miniature=_miniature(plan, outcomes),
        tools=tools,
        steps={step.name: step.digest for step in plan.steps},
        provenance=_provenance(plan, known, quantization, tools, now),
    )


def describe_rank(plan: Plan, outcome: Outcome, file: FileRecord) -> RankRecord:
    """Return the record of a rank from the outcome of its build step and its published engine."""
    facts = outcome.facts_as(BuildFacts)
    options, engine = facts.options, facts.engine
    return RankRecord(
        rank=options.rank,
        tp_rank=options.tp_rank,
        pp_rank=options.stage.pp_rank,
        cp_rank=plan.topology.coordinates(options.rank).cp_rank,
        ep_rank=plan.topology.moe_ranks(options.tp_rank)[1],
        first_layer=options.stage.first_layer,
        num_layers=options.stage.num_layers,
        engine=engine,
        memory=memory_needed(engine, file.num_bytes),
        files=(file,),
    )


def _selectors(plan: Plan, engine: EngineRecord) -> Selectors:
    quantization = plan.inputs.model_quantization
    return Selectors(
        backend=engine.backend,
        precision=(quantization and quantization.algorithm) or plan.inputs.config.dtype,
        tp=plan.topology.tp,
        pp=plan.topology.pp,
        gpu=engine.gpu_name or ",".join(engine.compute_capabilities) or "any",
    )


def _quantization(plan: Plan, known: list[Outcome]) -> QuantizationRecord | None:
    spec, model = plan.spec.quantization, plan.inputs.model_quantization
    if spec is None or model is None:
        return None
    artifacts = []
    for outcome in known:
        if outcome.kind is Kind.CALIBRATE:
            artifacts += [
                ArtifactRecord(name=f"{outcome.name}/{output.name}", num_bytes=output.num_bytes, sha256=output.sha256)
                for output in outcome.outputs
            ]
    brought = plan.inputs.quantization.scales_sha256 if plan.inputs.quantization else None
    if brought is not None:
        artifacts.append(ArtifactRecord(name="scales", sha256=brought))
    return QuantizationRecord(
        spec=_public(spec.model_dump(mode="json")),
        model=model.model_dump(mode="json"),
        calibration=tuple(artifacts),
        worst_errors=dict(list(linear_errors(outcome.facts for outcome in known).items())[:_WORST_LINEARS]),
    )


def public_spec(spec: BuildSpec) -> dict[str, Any]:
    """Return a spec as a manifest holds it: paths and URLs reduced to names."""
    return _public(spec.model_dump(mode="json"))


def _public(plain: dict[str, Any]) -> dict[str, Any]:
    """Return a spec without local folders, users, passwords and signatures in its paths and URLs."""
    found: dict[str, Any] = {}
    for name, value in plain.items():
        if isinstance(value, dict):
            found[name] = _public(value)
        elif name in _PLACES and isinstance(value, str):
            found[name] = public_uri(value) if "://" in value else PurePosixPath(value).name
        else:
            found[name] = value
    return found


def _provenance(
    plan: Plan, known: list[Outcome], quantization: QuantizationRecord | None, tools: dict[str, str], now: str
) -> Provenance:
    source = ResourceDescriptor(uri=public_uri(plan.inputs.source), name="source")
    files = [identified(file.name, file.identity) for file in plan.inputs.index.files + plan.inputs.extra_files]
    artifacts = [
        ResourceDescriptor(name=artifact.name, digest={"sha256": artifact.sha256})
        for artifact in (quantization.calibration if quantization else ())
    ]
    backend = plan.spec.engine.backend
    compiler = ResourceDescriptor(name=backend, annotations={"version": tools.get(backend, "")})
    return Provenance(
        buildDefinition=BuildDefinition(
            externalParameters=public_spec(plan.spec),
            internalParameters={"build_key": plan.build_key},
            resolvedDependencies=(source, *files, *artifacts, compiler),
        ),
        runDetails=RunDetails(
            builder=Builder(version=tools),
            metadata=BuildMetadata(
                invocationId=uuid.uuid4().hex,
                startedOn=min((outcome.started_at for outcome in known if outcome.started_at), default=None),
                finishedOn=now,
            ),
        ),
    )


def _miniature(plan: Plan, outcomes: Mapping[str, Outcome]) -> Miniature:
    (step,) = plan.of_kind(Kind.MINIATURE)
    return outcomes[step.digest].facts_as(MiniatureFacts).miniature


def _verification(known: Iterable[Outcome]) -> Verification | None:
    for outcome in known:
        if isinstance(outcome.facts, VerifyFacts) and outcome.facts.verification is not None:
            return outcome.facts.verification
    return None


def _tools(known: Iterable[Outcome]) -> dict[str, str]:
    tools = {"trt-orchestrator": own_version()}
    for outcome in known:
        tools.update(outcome.tools)
    return dict(sorted(tools.items()))


def own_version() -> str:
    """Return the version of this package."""
    try:
        return importlib.metadata.version("trt-orchestrator")
    except importlib.metadata.PackageNotFoundError:
        return "uninstalled"
