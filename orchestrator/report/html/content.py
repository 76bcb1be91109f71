"""Content of the page as plain values: numbers are formatted, pictures drawn. The template only lays it out."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.planning.facts import VerifyFacts, linear_errors
from orchestrator.planning.plan import Plan
from orchestrator.planning.steps import Failure, Kind, Outcome, Step
from orchestrator.releases.manifest import Manifest
from orchestrator.report.html.errors_plot import by_layer, errors_picture
from orchestrator.report.html.graph import plan_picture
from orchestrator.report.html.timeline import timeline_picture
from orchestrator.report.story import Story
from orchestrator.report.tables import format_bytes, format_seconds

_MOST_STEPS, _MOST_RANKS, _WORST = 400, 32, 10
_MOST_MANIFEST = 400_000
"""Most characters of the manifest to show. A larger manifest is shown without the tensors and chunks of its engines."""


@dataclass(frozen=True)
class Told:
    """Input of a report."""

    plan: Plan
    outcomes: Mapping[str, Outcome]
    ran: frozenset[str]
    story: Story
    manifest: Manifest | None
    """Manifest to publish, without the report's own entry. None: the build failed."""
    failures: Mapping[str, Failure] = field(default_factory=dict)
    lost: Mapping[str, Sequence[Failure]] = field(default_factory=dict)
    problem: str = ""
    """Reason for the missing manifest; empty: the build succeeded."""

    def state(self, digest: str) -> str:
        if digest in self.failures:
            return "failed"
        if digest in self.ran:
            return "run"
        return "cached" if digest in self.outcomes else "waiting"


def content_of(told: Told) -> dict[str, Any]:
    """Return the values of the template."""
    attempts, began = told.story.attempts(), told.story.began or 0.0
    seconds = {digest: outcome.seconds for digest, outcome in told.outcomes.items()}
    cached = sum(told.state(step.digest) == "cached" for step in told.plan.steps)
    return {
        "release": told.plan.spec.release,
        "published": told.manifest is not None,
        "problem": told.problem,
        "cards": _cards(told, cached),
        "kinds": [kind.value for kind in Kind if any(step.kind is kind for step in told.plan.steps)],
        "plan": plan_picture(told.plan, told.state, seconds),
        "timeline": timeline_picture(attempts, began, told.story.last),
        "attempts": attempts,
        "cached": cached,
        "retries": sum(attempt.number > 1 for attempt in attempts),
        "rates": _rates(told),
        "steps": _steps(told),
        "steps_left_out": max(len(told.plan.steps) - _MOST_STEPS, 0),
        "engines": _engines(told.manifest) if told.manifest else None,
        "quantization": _quantization(told),
        "miniature": told.manifest.miniature.line() if told.manifest and told.manifest.miniature else "",
        "verification": _verification(told),
        "nodes": _nodes(told),
        "warnings": list(dict.fromkeys([*told.plan.warnings, *told.story.warnings])),
        "notes": list(told.plan.notes),
        "failures": [_failure(told.plan.step(digest), failure) for digest, failure in told.failures.items()],
        "lost": [_failure(told.plan.step(digest), failure) for digest, many in told.lost.items() for failure in many],
        "manifest": _manifest(told.manifest) if told.manifest else None,
        "build_key": told.plan.build_key,
    }


def _cards(told: Told, cached: int) -> list[tuple[str, str, str]]:
    """Return the cards: name, value and a short note."""
    topology, story = told.plan.topology, told.story
    architecture = told.plan.inputs.config.architecture
    took = story.last - story.began if story.began is not None else 0.0
    found = [
        (
            "Model",
            architecture.removesuffix("ForCausalLM"),
            f"{architecture}, {told.plan.inputs.config.dtype}, tp {topology.tp}, pp {topology.pp}",
        ),
        ("Steps", f"{len(told.ran)} run", f"{cached} cached of {len(told.plan.steps)}"),
        ("Time", format_seconds(took), f"{format_seconds(sum(told.outcomes[digest].seconds for digest in told.ran))} of work"),
    ]
    if told.manifest is not None:
        sizes = [file.num_bytes for rank in told.manifest.ranks for file in rank.files]
        engine = told.manifest.ranks[0].engine
        found.append(("Engines", f"{len(sizes)}", f"{format_bytes(sum(sizes))}, {engine.backend} {engine.tensorrt_version}"))
        numbers = told.manifest.verification
        value = f"{numbers.max_relative_error:.1e}" if numbers else "off"
        found.append(("Verified", value, "largest relative error" if numbers else "off in the spec"))
    return found


def _rates(told: Told) -> list[dict[str, Any]]:
    """Return a row per kind of step: number, seconds, bytes, rates and peaks of the steps with a known outcome."""
    rows = []
    for kind in Kind:
        known = [(step, told.outcomes[step.digest]) for step in told.plan.of_kind(kind) if step.digest in told.outcomes]
        if not known:
            continue
        seconds = sum(outcome.seconds for _, outcome in known)
        read = sum(step.estimate.read_bytes for step, _ in known)
        written = sum(output.num_bytes for _, outcome in known for output in outcome.outputs)
        peaks = [peak for _, outcome in known if (peak := _peak(outcome))]
        rows.append({
            "kind": kind.value, "steps": len(known), "seconds": format_seconds(seconds),
            "slowest": format_seconds(max(outcome.seconds for _, outcome in known)),
            "read": format_bytes(read), "written": format_bytes(written),
            "rate": f"{format_bytes((read + written) / seconds)}/s" if seconds else "",
            "memory": format_bytes(max(peaks)) if peaks else "",
            "cpu": _cpu([outcome for _, outcome in known]), "gpu": _gpu([outcome for _, outcome in known]),
        })  # fmt: skip
    return rows


def _peak(outcome: Outcome) -> int:
    if outcome.usage is not None:
        return outcome.usage.peak_memory_bytes
    return outcome.facts.peak_memory_bytes


def _gpu(outcomes: Sequence[Outcome]) -> str:
    peak = max((outcome.usage.peak_gpu_memory_bytes or 0 for outcome in outcomes if outcome.usage), default=0)
    busy = [outcome.usage.gpu_utilization for outcome in outcomes if outcome.usage and outcome.usage.gpu_utilization is not None]
    return format_bytes(peak) + (f", {statistics.mean(busy):.0%} busy" if busy else "") if peak else ""


def _cpu(outcomes: Sequence[Outcome]) -> str:
    spent = [outcome.usage.cpu_seconds for outcome in outcomes if outcome.usage]
    return format_seconds(sum(spent)) if spent else ""


def _steps(told: Told) -> list[dict[str, Any]]:
    """Return the slowest steps, in plan order."""

    def took(step: Step) -> float:
        return told.outcomes[step.digest].seconds if step.digest in told.outcomes else float("inf")

    kept = {step.digest for step in sorted(told.plan.steps, key=took, reverse=True)[:_MOST_STEPS]}
    return [_step(told, step) for step in told.plan.steps if step.digest in kept]


def _step(told: Told, step: Step) -> dict[str, Any]:
    outcome = told.outcomes.get(step.digest)
    row = {"name": step.name, "kind": step.kind.value, "state": told.state(step.digest), "digest": step.digest[:12]}
    row |= dict.fromkeys(("node", "seconds", "written", "memory"), "")
    if outcome is not None:
        written = sum(output.num_bytes for output in outcome.outputs)
        row |= {"node": outcome.node, "seconds": format_seconds(outcome.seconds), "written": format_bytes(written)}
        row["memory"] = format_bytes(_peak(outcome)) if _peak(outcome) else ""
    return row


def _engines(manifest: Manifest) -> dict[str, Any]:
    """Return the GPU memory of each rank, or of the largest ranks; shares in percent of the largest rank."""
    needs = [(rank, rank.memory) for rank in manifest.ranks]
    most = max(need.total_bytes for _, need in needs)
    shown = sorted(sorted(needs, key=lambda item: -item[1].total_bytes)[:_MOST_RANKS], key=lambda item: item[0].rank)
    rows = [
        {
            "rank": rank.rank, "layers": f"{rank.first_layer} to {rank.first_layer + rank.num_layers - 1}",
            "engine": format_bytes(need.engine_bytes), "total": format_bytes(need.total_bytes),
            "context": format_bytes(need.context_bytes or 0), "cache": format_bytes(need.kv_cache_bytes),
            "io": format_bytes(need.io_bytes),
            "parts": [
                (name, round(100 * part / most, 2), format_bytes(part))
                for name, part in (
                    ("weights", need.engine_bytes), ("cache", need.kv_cache_bytes), ("context", need.context_bytes or 0),
                    ("io", need.io_bytes),
                )
            ],
        }
        for rank, need in shown
    ]  # fmt: skip
    sizes = [need.engine_bytes for _, need in needs]
    return {
        "rows": rows, "left_out": len(needs) - len(shown), "total": format_bytes(sum(sizes)),
        "smallest": format_bytes(min(sizes)), "median": format_bytes(statistics.median(sizes)), "largest": format_bytes(max(sizes)),
    }  # fmt: skip


def _quantization(told: Told) -> dict[str, Any] | None:
    model = told.plan.inputs.model_quantization
    if model is None:
        return None
    errors = linear_errors(outcome.facts for outcome in told.outcomes.values())
    series, worst = by_layer(errors), list(errors.items())[:_WORST]
    return {
        "algorithm": model.algorithm or "none", "kv_cache": told.plan.spec.quantization and told.plan.spec.quantization.kv_cache,
        "plot": errors_picture(series, "Quantization error by layer", "linears"), "series": list(series), "linears": len(errors),
        "worst": [(name, f"{error:.3g}", round(100 * error / worst[0][1], 1) if worst[0][1] else 0) for name, error in worst],
    }  # fmt: skip


def _verification(told: Told) -> dict[str, Any] | None:
    numbers = told.manifest.verification if told.manifest else None
    if numbers is None:
        return None
    tolerance = told.plan.spec.verification.tolerance or told.plan.inputs.tolerance
    limit = tolerance.max_relative_error
    rows = [
        ("Positions compared", f"{numbers.num_positions}", ""),
        ("Largest relative error", numbers.relative_errors(), f"at most {limit:.0e}" if limit is not None else "any"),
        ("Largest absolute error", f"{numbers.max_absolute_error:.2e}", ""),
        ("Mean KL divergence", f"{numbers.mean_kl:.2e}", f"at most {tolerance.max_mean_kl:.0e}"),
        ("Top-1 agreement", f"{numbers.top1_agreement:.3f}", f"at least {tolerance.min_top1_agreement:g}"),
    ]
    if numbers.perplexity_ratio is not None:
        rows.append(("Perplexity", f"{numbers.perplexity_ratio:.4f}", "times the reference's"))
    facts = (outcome.facts for outcome in told.outcomes.values())
    layers = {layer: error for each in facts if isinstance(each, VerifyFacts) for layer, error in each.layer_errors.items()}
    series = {"hidden states": dict(sorted(layers.items()))} if layers else {}
    return {
        "rows": rows, "reference": "the unquantized model" if told.plan.inputs.model_quantization else "transformers",
        "plot": errors_picture(series, "Verification error by layer", "hidden states"),
    }  # fmt: skip


def _nodes(told: Told) -> list[dict[str, Any]]:
    """Return the nodes as probed, or else the nodes of the steps."""
    work: dict[str, list[float]] = {}
    for digest in told.ran:
        work.setdefault(told.outcomes[digest].node, []).append(told.outcomes[digest].seconds)
    facts = {node.node: node for node in told.story.nodes}
    rows = []
    for name in dict.fromkeys([*facts, *sorted(work)]):
        node, times = facts.get(name), work.get(name, [])
        devices = ", ".join(device.name for device in node.devices) if node else ""
        rows.append({
            "name": name, "cpus": f"{node.cpus:g}" if node else "", "gpus": devices or ("none" if node else ""),
            "memory": format_bytes(node.memory_bytes) if node else "", "driver": node.driver if node else "",
            "problem": (node.error or node.store_error) if node else "",
            "steps": len(times), "busy": format_seconds(sum(times)) if times else "",
        })  # fmt: skip
    return rows


def _failure(step: Step, failure: Failure) -> dict[str, Any]:
    texts = {
        "Traceback": failure.traceback, "End of the step's log": failure.log_tail, "End of the worker's output": failure.worker_log,
        "The kernel": failure.kernel,
    }  # fmt: skip
    return {
        "step": step.name, "message": failure.message, "advice": failure.advice, "node": failure.node,
        "rank": step.rank if failure.rank is None else failure.rank, "attempt": failure.attempt,
        "cause": failure.cause.value, "kind": failure.kind.value.replace("_", " "),
        "texts": [(name, text) for name, text in texts.items() if text],
    }  # fmt: skip


def _manifest(manifest: Manifest) -> dict[str, Any]:
    """Return the manifest by field as indented JSON; of a large manifest, without the bulk of its engines."""
    plain = manifest.model_dump(mode="json")
    shortened = False
    if len(json.dumps(plain, indent=1)) > _MOST_MANIFEST:
        shortened = True
        for rank in plain["ranks"]:
            rank["engine"].pop("tensors", None)
            for file in rank["files"]:
                file.pop("chunks", None)
        plain["ranks"] = plain["ranks"][:_MOST_RANKS]
        plain["steps"] = dict(list(plain["steps"].items())[:_MOST_STEPS])
    simple = {name: value for name, value in plain.items() if not isinstance(value, dict | list)}
    parts = [(name, json.dumps(value, indent=1, ensure_ascii=False)) for name, value in plain.items() if name not in simple]
    return {"simple": simple, "parts": parts, "shortened": shortened}
