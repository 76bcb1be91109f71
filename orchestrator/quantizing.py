"""Comparison of quantization algorithms, calibration alone, and the search of per-layer formats. No engines are built.

Steps are shared by content: a sweep computes the reference once, and calibrates once for all algorithms that need only amax.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.base.errors import QuantizationError, StoreError, VerificationError
from orchestrator.base.extras import require
from orchestrator.clusters.local import LocalCluster
from orchestrator.events import Listener, silent
from orchestrator.model.quantization import MIXED_PRECISION, LinearFormat, ModelQuantization, global_name, quant_cfg
from orchestrator.planning import preparation
from orchestrator.planning.calibration import layer_of
from orchestrator.planning.facts import Verification, VerifyFacts, linear_errors
from orchestrator.planning.plan import Plan
from orchestrator.planning.quantization import resolve_data
from orchestrator.planning.steps import Kind, Outcome
from orchestrator.quantizers import QUANTIZERS
from orchestrator.quantizers.resolve import quantizer_named
from orchestrator.scheduling import commits
from orchestrator.scheduling.driver import Result
from orchestrator.scheduling.execute import OpenCluster
from orchestrator.scheduling.preflight import check_extras
from orchestrator.spec.build import BuildSpec, QuantizationSpec, ToleranceSpec
from orchestrator.spec.cluster import ClusterSpec
from orchestrator.stages import only, run_steps
from orchestrator.stores import open_store
from orchestrator.stores.file import write_whole
from orchestrator.stores.store import check_writable

UNQUANTIZED = "none"
_ANY = ToleranceSpec(max_relative_error=None, max_mean_kl=1e9, min_top1_agreement=0.0)
"""Tolerance of a sweep, which accepts any error, because a sweep only measures."""


@dataclass(frozen=True, slots=True)
class SweepRow:
    """Result of one algorithm of a sweep."""

    algorithm: str
    checkpoint_bytes: int
    """Size of the checkpoint, all ranks together."""
    verification: Verification
    worst_linear: str
    """Linear with the largest weight error; empty: no linear is quantized."""
    worst_error: float
    num_steps_run: int
    """Number of steps that ran. A step that several algorithms share counts for the first."""

    def facts(self) -> dict[str, Any]:
        """Return the row as plain data."""
        return {**asdict(self), "verification": self.verification.model_dump()}


def sweep(
    spec: BuildSpec,
    algorithms: Sequence[str],
    cluster_spec: ClusterSpec,
    *,
    open_cluster: OpenCluster = LocalCluster,
    listener: Listener = silent,
) -> list[SweepRow]:
    """Calibrate, convert and verify `spec` with every algorithm (`none`: unquantized), in one run.

    Steps that algorithms share run once. Raises QuantizationError before any work.
    """
    check_extras(cluster_spec)
    specs = [_under(spec, algorithm) for algorithm in algorithms]
    plans = [only(preparation.plan(wanted), (Kind.REFERENCE, Kind.CALIBRATE, Kind.CONVERT, Kind.VERIFY)) for wanted in specs]
    result = _run(union(plans, algorithms), cluster_spec, open_cluster, listener)
    rows, counted = [], set[str]()
    for algorithm, made in zip(algorithms, plans, strict=True):
        own = {step.digest for step in made.steps} - counted
        counted |= own
        rows.append(_row(algorithm, made, result, len(own & result.ran)))
    return rows


def union(plans: Sequence[Plan], labels: Sequence[str]) -> Plan:
    """Return one plan with the steps of all plans. The name of a step that only some plans need shows their labels."""
    owners: dict[str, list[str]] = {}
    for label, made in zip(labels, plans, strict=True):
        for step in made.steps:
            owners.setdefault(step.digest, []).append(label)
    steps = {step.digest: step for made in plans for step in made.steps}
    named = [
        step
        if len(owners[digest]) == len(plans)
        else step.model_copy(update={"name": f"{step.name} ({', '.join(owners[digest])})"})
        for digest, step in steps.items()
    ]
    return replace(plans[0], steps=tuple(named))


def calibrate(
    spec: BuildSpec,
    output: Path,
    cluster_spec: ClusterSpec,
    *,
    open_cluster: OpenCluster = LocalCluster,
    listener: Listener = silent,
) -> list[Path]:
    """Write the calibration artifact of `spec` to the folder `output`, for `quantization.scales` of other specs.

    Returns the files. Raises QuantizationError when the spec needs no calibration, StoreError when `output` holds an artifact.
    """
    check_extras(cluster_spec)
    if (output / "scales.safetensors").exists():
        raise StoreError(f"{output} already holds a calibration artifact", "Choose another --output, or remove it.")
    plan = only(preparation.plan(spec), (Kind.CALIBRATE,))
    if not plan.steps:
        raise QuantizationError("this spec calibrates nothing", "Choose a calibrated algorithm or a kv_cache format.")
    result = _run(plan, cluster_spec, open_cluster, listener)
    outcomes = [result.outcomes[step.digest] for step in plan.steps]
    return _write_artifact([(step.name, outcome) for step, outcome in zip(plan.steps, outcomes, strict=True)], cluster_spec, output)


def choose(spec: BuildSpec, algorithms: Sequence[str], effective_bits: float, output: Path) -> dict[str, LinearFormat | None]:
    """Search per-layer formats among `algorithms` within `effective_bits` per weight, and write them as quant_cfg.json to `output`.

    Runs in this process, on the whole model. Raises QuantizationError, and StoreError when `output` exists.
    """
    require("build")
    from orchestrator.stores import open_source
    from orchestrator.stores.source import LocalFolder
    from orchestrator.work.calibrate.auto_quantize import choose_formats

    if output.exists():
        raise StoreError(f"{output} already exists", "Choose another --output, or remove it.")
    plan = preparation.plan(spec.model_copy(update={"quantization": QuantizationSpec(algorithm="FP8")}))
    folder = open_source(plan.inputs.source)
    if plan.inputs.index.format != "huggingface" or not isinstance(folder, LocalFolder):
        raise QuantizationError("the search needs a Hugging Face folder on this machine", "Copy or convert the source first.")
    asked = spec.quantization or QuantizationSpec(algorithm="FP8")
    formats = [_sized(quantizer_named(name).linear, asked.group_size) for name in algorithms]
    data, dataset = resolve_data(asked.calibration)
    dtype = plan.inputs.config.dtype
    chosen = choose_formats(folder.folder, dtype, _linears(plan), formats, effective_bits, data, dataset)
    mixture = quant_cfg(ModelQuantization(algorithm=MIXED_PRECISION, layers=chosen))
    write_whole(output, (json.dumps(mixture, indent=1) + "\n").encode())
    return chosen


def _sized(fmt: LinearFormat, group_size: int | None) -> LinearFormat:
    is_int4 = fmt.weight.value.startswith("int4")
    return fmt.model_copy(update={"block_size": group_size}) if group_size and is_int4 else fmt


def _linears(plan: Plan) -> dict[str, tuple[str, ...]]:
    """Return every quantizable linear by its global name -> source modules that it is joined from."""
    found: dict[str, tuple[str, ...]] = {}
    for group in plan.inputs.weights.groups:
        for target in group.targets:
            if target.quantized is not None:
                modules = tuple(dict.fromkeys(target.quantized.modules))
                local = int(target.name.split(".", 3)[2])
                found[global_name(target.name.removesuffix(".weight"), local, layer_of(modules[0]))] = modules
    return found


def _under(spec: BuildSpec, algorithm: str) -> BuildSpec:
    """Return `spec` with another algorithm, without options that the algorithm does not have."""
    verification = spec.verification.model_copy(update={"enabled": True, "tolerance": _ANY})
    if algorithm == UNQUANTIZED:
        return spec.model_copy(update={"quantization": None, "verification": verification})
    quantizer = quantizer_named(algorithm)
    asked = spec.quantization.model_dump() if spec.quantization else {}
    fits = {
        "group_size": quantizer.linear.weight.value.startswith("int4"),
        "alpha": quantizer.calibration is not None and quantizer.calibration.alpha is not None,
        "meta_recipe": algorithm == "FP8_PER_CHANNEL_PER_TOKEN",
        "quant_cfg": False,
        "scales": False,
    }
    kept = {name: value for name, value in asked.items() if fits.get(name, True)}
    quantization = QuantizationSpec.model_validate({**kept, "algorithm": algorithm})
    return spec.model_copy(update={"quantization": quantization, "verification": verification})


def _run(plan: Plan, cluster_spec: ClusterSpec, open_cluster: OpenCluster, listener: Listener) -> Result:
    store = open_store(cluster_spec.store, cluster_spec.store_options)
    check_writable(store)
    with commits.in_use(store, [step.digest for step in plan.steps]):
        return run_steps(store, plan, Kind.CALIBRATE, cluster_spec, open_cluster, listener)


def _row(algorithm: str, plan: Plan, result: Result, num_steps_run: int) -> SweepRow:
    converts = [result.outcomes[step.digest] for step in plan.of_kind(Kind.CONVERT)]
    worst, error = next(iter(linear_errors(outcome.facts for outcome in converts).items()), ("", 0.0))
    numbers = [result.outcomes[step.digest].facts_as(VerifyFacts).verification for step in plan.of_kind(Kind.VERIFY)]
    found = next((item for item in numbers if item), None)
    if found is None:
        raise VerificationError(f"the verification of {algorithm} recorded no numbers")
    return SweepRow(
        algorithm=algorithm,
        checkpoint_bytes=sum(output.num_bytes for outcome in converts for output in outcome.outputs),
        verification=found,
        worst_linear=worst,
        worst_error=error,
        num_steps_run=num_steps_run,
    )


def _write_artifact(named: Sequence[tuple[str, Outcome]], cluster_spec: ClusterSpec, output: Path) -> list[Path]:
    """Write one scales file with all parts, and the recipe of each part."""
    from safetensors.numpy import load, save

    store = open_store(cluster_spec.store, cluster_spec.store_options)
    output.mkdir(parents=True, exist_ok=True)
    merged, written = {}, []
    for name, outcome in named:
        merged.update(load(store.get(outcome.output("scales.safetensors").key)))
        recipe = output / f"{name.replace('/', '-')}.recipe.json"
        write_whole(recipe, store.get(outcome.output("recipe.json").key))
        written.append(recipe)
    write_whole(output / "scales.safetensors", save(merged))
    return [output / "scales.safetensors", *written]


def all_algorithms() -> list[str]:
    """Return every algorithm, after `none` for the unquantized model."""
    return [UNQUANTIZED, *QUANTIZERS]
