"""Rules that manifests must meet before they go to a cluster, and the check, which needs no cluster.

One small rule per condition, with a stable id: needs of a build (`build`), and agreement of its files with the cluster (`bundle`).
"""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.base.errors import ManifestError
from orchestrator.submit.kubernetes.manifests import Fields, subjects
from orchestrator.submit.kubernetes.rules import build, bundle
from orchestrator.submit.kubernetes.rules.rule import TYPES, AnyRule, Problem

RULES: tuple[AnyRule, ...] = (*build.RULES, *bundle.RULES)


def problems(objects: Sequence[Fields]) -> list[Problem]:
    """Return the broken rules, in the objects' order. Raises ManifestError for objects of another shape than Kubernetes'."""
    try:
        parts = list(subjects(objects))
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ManifestError(f"a field is of another type than Kubernetes has there: {error}", TYPES) from None
    return [problem for part in parts for checked in RULES for problem in checked.problems(part)]


def validate(objects: Sequence[Fields]) -> None:
    """Check all rules. Raises ManifestError that names every broken rule with its advice."""
    found = problems(objects)
    if found:
        lines = [f"{problem}\n    {problem.advice}" for problem in found]
        raise ManifestError(f"{len(found)} broken rules\n  " + "\n  ".join(lines), "`orchestrator k8s rules` lists every rule.")
