"""Run a plan to its end: probe the nodes, drive the steps, check the outcomes."""

from __future__ import annotations

import functools
import tempfile
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace

from orchestrator.base.errors import DamagedOutputError
from orchestrator.events import Listener, NodesProbed, StepFailed, StepsFinished
from orchestrator.planning.places import with_offered_gpus
from orchestrator.planning.plan import Plan
from orchestrator.planning.steps import Failure, Outcome
from orchestrator.scheduling import commits
from orchestrator.scheduling.checking import forget
from orchestrator.scheduling.cluster import Cluster, Probing
from orchestrator.scheduling.driver import Result, drive, retried
from orchestrator.scheduling.node_checks import check_nodes, read_locations
from orchestrator.scheduling.schedule import MAX_REPEATS, Start, taken_back
from orchestrator.spec.cluster import ClusterSpec
from orchestrator.stores import open_store

_BUILD_ID_DIGITS = 8


OpenCluster = Callable[[ClusterSpec], Cluster]


def execute(
    plan: Plan,
    committed: Mapping[str, Outcome],
    cluster_spec: ClusterSpec,
    open_cluster: OpenCluster,
    listener: Listener,
    accept: Callable[[Mapping[str, Outcome]], object] = lambda outcomes: None,
) -> Result:
    """Drive the plan, with GPUs where the pools offer some. A plan without pending steps opens no cluster.

    `accept` checks the outcomes of a plan that succeeded. When it raises DamagedOutputError, the step that wrote the object runs
    again, at most MAX_REPEATS times; then the error is raised.
    """
    plan = with_offered_gpus(plan, cluster_spec)
    target = open_store(cluster_spec.store, cluster_spec.store_options)
    result = _drive(plan, committed, cluster_spec, open_cluster, listener)
    for left in reversed(range(MAX_REPEATS + 1)):
        if result.failures:
            break
        try:
            accept(result.outcomes)
            break
        except DamagedOutputError as damage:
            taken = taken_back(result.outcomes, damage)
            commits.set_aside(target, taken)
            if not left:
                raise
            rest = {digest: outcome for digest, outcome in result.outcomes.items() if outcome is not taken.outcome}
            step = plan.step(taken.outcome.digest)
            failure, node = Failure.of(damage, taken.outcome.node), taken.outcome.node
            listener(StepFailed(digest=step.digest, step=step.name, node=node, attempt=1, failure=failure))
            listener(retried(Start(step, 2)))
            again = _drive(plan, rest, cluster_spec, open_cluster, listener)
            result = replace(again, ran=result.ran | again.ran)
    names = sorted(plan.step(digest).name for digest in result.ran)
    listener(StepsFinished(ran=tuple(names), steps=tuple((step, result.outcomes.get(step.digest)) for step in plan.steps)))
    return result


def _drive(
    plan: Plan, committed: Mapping[str, Outcome], cluster_spec: ClusterSpec, open_cluster: OpenCluster, listener: Listener
) -> Result:
    pending = plan.pending(committed)
    if not pending:
        return Result(committed, frozenset())
    build_id = uuid.uuid4().hex[:_BUILD_ID_DIGITS]
    target = open_store(cluster_spec.store, cluster_spec.store_options)
    with commits.nothing_left_begun(target, build_id):
        cluster = open_cluster(cluster_spec)
        try:
            if isinstance(cluster, Probing):
                nodes = cluster.probe(read_locations(pending))
                listener(NodesProbed(nodes=tuple(nodes), warnings=check_nodes(plan, pending, cluster_spec, nodes)))
            lookup, set_aside = functools.partial(commits.find, target), functools.partial(commits.set_aside, target)
            return drive(plan, committed, cluster, cluster_spec, listener, lookup, build_id, set_aside)
        finally:
            cluster.close()
            forget(cluster_spec.scratch or tempfile.gettempdir(), build_id)
