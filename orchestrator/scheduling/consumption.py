"""Find outcomes that do not belong together: the bytes a step read must be the bytes that its needs hold.

A step that runs again may write other bytes than the first time: its source was damaged since, or TensorRT timed its kernels again.
Whatever was made from the first bytes then belongs to another build, although its digest is the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from orchestrator.planning.plan import Plan
from orchestrator.planning.steps import Kind, Outcome

_TRACED = (Kind.BUILD, Kind.VERIFY, Kind.EXPORT)
"""Kinds whose outcomes must name the bytes they were made from, even when the outcomes of their needs are gone."""


def outdated(plan: Plan, outcomes: Mapping[str, Outcome], among: Iterable[str] | None = None) -> dict[str, str]:
    """Return, by digest, why an outcome does not belong to the others: its step must run again, or the release be refused.

    `among`: digests of the outcomes to check; None: all steps.
    """
    digests = [digest for digest in (among or [step.digest for step in plan.steps]) if digest in outcomes]
    read: dict[tuple[str, str], set[str]] = {}
    for digest in digests:
        for item in outcomes[digest].consumed:
            read.setdefault((item.step, item.name), set()).add(item.sha256)
    found = {}
    for digest in digests:
        reason = next(_reasons(plan, outcomes, digest, read), None)
        if reason is not None:
            found[digest] = reason
    return found


def _reasons(plan: Plan, outcomes: Mapping[str, Outcome], digest: str, read: Mapping[tuple[str, str], set[str]]) -> Iterator[str]:
    outcome = outcomes[digest]
    for need in plan.step(digest).needs:
        mine = [item for item in outcome.consumed if item.step == need]
        known = outcomes.get(need)
        maker = known.name if known is not None else next((step.name for step in plan.steps if step.digest == need), need)
        if not mine and (known.outputs if known is not None else outcome.kind in _TRACED):
            yield f"{outcome.name} does not record which bytes of {maker} it was made from"
        held = {output.name: output.sha256 for output in known.outputs} if known is not None else {}
        for item in mine:
            if item.sha256 != held.get(item.name, item.sha256):
                yield f"{outcome.name} was made from another {item.name} than {maker} holds now"
            elif known is None and len(read[need, item.name]) > 1:
                yield f"{outcome.name} and another step were made from different bytes of {item.name} of {maker}"
