"""Decision of a second submission about a first; patience with a silent place."""

from __future__ import annotations

import pytest

from orchestrator.base.errors import UnreachableError
from orchestrator.submit.protocol import Clock, Existing, Patience, decide


@pytest.mark.parametrize(
    ("existing", "decision"),
    [
        (None, "submit"),
        (Existing(failed=False), "attach"),
        (Existing(failed=True), "replace"),
        (Existing(failed=False, other_place=True), "replace"),
        (Existing(failed=True, being_deleted=True), "wait"),
        (Existing(failed=True, being_deleted=True, other_build=True), "refuse"),
    ],
)
def test_decide_joins_what_runs_and_replaces_what_failed(existing: Existing | None, decision: str) -> None:
    assert decide(existing) == decision


def test_patience_ends_when_there_was_no_answer_for_so_long() -> None:
    now = 0.0
    patience, error = Patience(Clock(lambda: now), 10), UnreachableError("away")
    patience.failed(error)
    now = 9.0
    patience.failed(error)
    patience.answered()
    now = 20.0
    patience.failed(error)
    now = 30.0
    with pytest.raises(UnreachableError, match="away, for 10 s"):
        patience.failed(error)
