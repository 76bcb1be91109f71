"""The public function `build`: plan, run, verify and publish."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from orchestrator.clusters.local import LocalCluster
from orchestrator.events import Event, Listener, Planned, Published, silent, to_all
from orchestrator.planning import preparation
from orchestrator.planning.plan import Plan
from orchestrator.releases.manifest import MANIFEST, Manifest, release_prefix
from orchestrator.report.recording import check_report, fetch_report, recorded
from orchestrator.scheduling import commits
from orchestrator.scheduling.driver import Result
from orchestrator.scheduling.execute import OpenCluster, execute
from orchestrator.scheduling.preflight import check_build, check_extras
from orchestrator.spec.build import BuildSpec
from orchestrator.spec.cluster import ClusterSpec
from orchestrator.stores import open_store
from orchestrator.stores.store import check_writable


@dataclass(frozen=True)
class Build:
    """A finished build."""

    plan: Plan
    manifest: Manifest
    address: str
    """URL of the release."""
    result: Result | None
    """Result of the run; None: the release was already published."""


def build(
    spec: BuildSpec,
    cluster_spec: ClusterSpec,
    *,
    open_cluster: OpenCluster = LocalCluster,
    listener: Listener = silent,
    sign_key: Path | None = None,
    report: Path | None = None,
) -> Build:
    """Build, verify and publish `spec` on the cluster that `open_cluster` opens for `cluster_spec`.

    The cluster is opened only if there are steps to run, and closed afterwards. Committed steps are not repeated. A release that
    the same build has already published is returned unchanged. `sign_key`: PEM file with a P-256 private key, to sign the release.
    `report`: file for the report, also of a failed build. Raises the OrchestratorError of the situation.
    """
    from orchestrator.releases.placing import Placed, place
    from orchestrator.releases.publish import check_free, publish
    from orchestrator.releases.signing import check_sign_key

    check_extras(cluster_spec)
    if sign_key is not None:
        check_sign_key(sign_key)
    if report is not None:
        check_report(report)
    plan = preparation.plan(spec)
    target = open_store(cluster_spec.store, cluster_spec.store_options)
    address = f"{target.url}/{release_prefix(spec.release.name, spec.release.version)}".rstrip("/")
    check_writable(target)
    existing = check_free(target, plan, sign_key)
    if existing is not None:
        listener(Planned.of(plan, (), already_published=True))
        if report is not None:
            fetch_report(target, release_prefix(spec.release.name, spec.release.version), existing, report)
        listener(_published(address, 0, existing))
        return Build(plan, existing, address, None)
    prefix = release_prefix(spec.release.name, spec.release.version)
    with (
        commits.in_use(target, [step.digest for step in plan.steps], prefix, plan.build_key),
        recorded(target, plan, report) as recording,
    ):
        listener = to_all(listener, recording.tell)
        plan, committed = commits.agreeing(target, plan)
        pending = plan.pending(committed)
        check_build(plan, pending, cluster_spec, target)
        listener(Planned.of(plan, pending))
        placed: list[Placed] = []
        result = execute(
            plan,
            committed,
            cluster_spec,
            open_cluster,
            listener,
            lambda outcomes: placed.append(place(target, plan, outcomes)),
        )
        recording.result = result
        result.raise_failures(plan)
        manifest = publish(target, plan, result.outcomes, placed[-1], sign_key, recording.page)
        listener(_published(address, len(result.ran), manifest))
        return Build(plan, manifest, address, result)


def _published(address: str, steps_run: int, manifest: Manifest) -> Event:
    numbers = manifest.verification.model_dump() if manifest.verification else None
    return Published(manifest=f"{address}/{MANIFEST}", steps_run=steps_run, verification=numbers)
