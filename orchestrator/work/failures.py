"""Tell a step's own error from a failure of the memory, disk, network or store under it."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from orchestrator.base.errors import StoreError
from orchestrator.base.extras import missing_extra
from orchestrator.planning.steps import Cause, Failure, FailureKind

_NETWORK = {
    errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN,
    errno.ENETRESET, errno.ENETUNREACH, errno.EPIPE, errno.ESTALE, errno.ETIMEDOUT,
}  # fmt: skip
_DISK = {errno.ENOSPC, errno.EDQUOT}
_TRANSIENT = {"TransientError", "EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "ConnectionClosedError"}
"""Error classes of stores and their libraries, by name, because the libraries may not be installed."""
_OUT_OF_MEMORY = {"OutOfMemoryError"}


def failure_of(error: BaseException, node: str, log_tail: str, traceback: str) -> Failure:
    """Return the record of an exception that a step raised. Failures below the step count as infrastructure and are retried."""
    cause = cause_of(error)
    kind = FailureKind.APPLICATION if cause is Cause.UNKNOWN else FailureKind.INFRASTRUCTURE
    return Failure.of(missing_extra(error) or error, node, log_tail).model_copy(
        update={"kind": kind, "cause": cause, "traceback": traceback}
    )


def cause_of(error: BaseException) -> Cause:
    """Return the cause of an error. UNKNOWN: the step's own error, which would happen again anywhere."""
    for each in _chain(error):
        names = {base.__name__ for base in type(each).__mro__}
        if isinstance(each, MemoryError) or names & _OUT_OF_MEMORY:
            return Cause.MEMORY
        if isinstance(each, OSError) and each.errno in _DISK:
            return Cause.DISK
        network = isinstance(each, OSError) and (each.errno in _NETWORK or isinstance(each, ConnectionError | TimeoutError))
        if names & _TRANSIENT or (network and isinstance(error, StoreError | OSError)):
            return Cause.STORE
    return Cause.UNKNOWN


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield the error and the chain of its causes."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__
