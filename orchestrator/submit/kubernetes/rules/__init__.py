"""What must hold of manifests before they go to a cluster, and the check of it, which needs no cluster.

One small rule per thing, with a stable id: what a build needs (`build`), and what its files say of the cluster (`bundle`).
"""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.base.errors import ManifestError
from orchestrator.submit.kubernetes.manifests import Fields, subjects
from orchestrator.submit.kubernetes.rules import build, bundle
from orchestrator.submit.kubernetes.rules.rule import TYPES, AnyRule, Problem

RULES: tuple[AnyRule, ...] = (*build.RULES, *bundle.RULES)


def problems(objects: Sequence[Fields]) -> list[Problem]:
    """Every rule that an object breaks, in the objects' order. Raises ManifestError for what has no shape of Kubernetes' at all."""
    try:
        parts = list(subjects(objects))
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ManifestError(f"a field is of another type than Kubernetes has there: {error}", TYPES) from None
    return [problem for part in parts for checked in RULES for problem in checked.problems(part)]


def validate(objects: Sequence[Fields]) -> None:
    """Raises ManifestError that names every broken rule with its advice."""
    found = problems(objects)
    if found:
        lines = [f"{problem}\n    {problem.advice}" for problem in found]
        raise ManifestError(f"{len(found)} broken rules\n  " + "\n  ".join(lines), "`orchestrator k8s rules` lists every rule.")
