"""Whose fault an exception in a step was."""

from __future__ import annotations

import errno

import pytest

from orchestrator.base.errors import DtypeError, SourceCorruptError, StoreError
from orchestrator.planning.steps import Cause, FailureKind
from orchestrator.work.failures import cause_of, failure_of


class TransientError(Exception):
    pass


class OutOfMemoryError(RuntimeError):
    pass


def raised_from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (MemoryError(), Cause.MEMORY),
        (OutOfMemoryError("CUDA"), Cause.MEMORY),
        (OSError(errno.ENOSPC, "full"), Cause.DISK),
        (raised_from(StoreError("cannot write"), OSError(errno.ENOSPC, "full")), Cause.DISK),
        (raised_from(StoreError("tried 10 times"), TransientError("503")), Cause.STORE),
        (raised_from(StoreError("cannot get"), ConnectionResetError()), Cause.STORE),
        (raised_from(StoreError("cannot get"), OSError(errno.EHOSTUNREACH, "no route")), Cause.STORE),
        (TimeoutError(), Cause.STORE),
        (StoreError("the bucket does not exist"), Cause.UNKNOWN),
        (raised_from(StoreError("cannot write"), PermissionError(errno.EACCES, "no")), Cause.UNKNOWN),
        (DtypeError("70000 does not fit"), Cause.UNKNOWN),
        (SourceCorruptError("truncated"), Cause.UNKNOWN),
        (raised_from(ValueError("a bug"), ConnectionResetError()), Cause.UNKNOWN),
        (SystemExit(1), Cause.UNKNOWN),
    ],
)
def test_cause_of_what_lies_under_the_step_is_told_from_its_own_error(error: BaseException, cause: Cause) -> None:
    assert cause_of(error) is cause
    failure = failure_of(error, "node", "log", "traceback")
    assert failure.kind is (FailureKind.APPLICATION if cause is Cause.UNKNOWN else FailureKind.INFRASTRUCTURE)
    assert (failure.cause, failure.node, failure.log_tail, failure.traceback) == (cause, "node", "log", "traceback")
