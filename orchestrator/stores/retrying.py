"""Meaning of failed requests, and when to repeat them, for every store and source."""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from orchestrator.base.errors import OrchestratorError, StoreError, StoreFullError, store_error
from orchestrator.stores.store import NoSuchUploadError, ObjectExistsError, ObjectMissingError

T = TypeVar("T")

_EXPIRED = frozenset({"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired", "InvalidToken"})
_TRANSIENT_CODES = frozenset(
    {"BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch", "RequestTimeout"}
    | {"SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "InternalError", "ServiceUnavailable"}
)
"""S3 codes for a body cut or damaged on the way, and for a busy server."""
_TRANSIENT_STATUSES = frozenset({408, 409, 425, 429})
"""HTTP statuses to retry. 409 is a conflict with a concurrent request; a lost condition is 412."""
_TRANSIENT_PACKAGES = frozenset({"aiohttp", "requests", "urllib3", "httpx", "httpcore", "gcsfs", "azure", "ssl"})
_TRANSIENT_ERRORS = frozenset(
    {"ConnectionError", "HTTPClientError", "MetadataRetrievalError", "CredentialRetrievalError", "IncompleteReadError"}
)
"""Names of botocore's exception classes that are retried, with their subclasses."""
_LASTING_OS_ERRORS = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)
_LASTING_ERRNOS = frozenset(
    {errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.ENAMETOOLONG, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}
)
_FULL = frozenset({"QuotaExceeded", "InsufficientCapacity", "InsufficientStorage", "XMinioStorageFull"})
_FULL_ADVICE = "Raise the quota or free space (`orchestrator collect`), and run the same command again."
_ADVICE = {
    "RequestTimeTooSkewed": "Set this machine's clock: the server refuses requests signed at another time.",
    "MissingContentLength": "Set store_options.checksums: when_required: this server does not know trailing checksums.",
    "MissingContentMD5": "Set store_options.checksums: when_required: this server does not know the newer checksums.",
    "AccessDenied": "Give this machine's role or profile read, write, list and delete on the bucket.",
    "SignatureDoesNotMatch": "The secret key is wrong, or a proxy changes the requests.",
    "InvalidAccessKeyId": "The server does not know this access key: check the environment or the profile.",
}


class TransientError(Exception):
    """The same request may succeed a moment later, or has already succeeded without an answer."""


class TruncatedError(TransientError):
    """A body ended before its range."""


class RefusedCredentialsError(Exception):
    """The server refuses these credentials; new ones may work."""


class BehindEndError(Exception):
    """A range begins behind the end of its object."""


@dataclass(frozen=True, slots=True)
class Backoff:
    """Attempts of a request and the waits between: doubling, each drawn from its upper half."""

    max_attempts: int = 10
    first_seconds: float = 0.5
    max_seconds: float = 30.0
    sleep: Callable[[float], None] = time.sleep
    draw: Callable[[], float] = random.random
    """Draws a number of [0, 1)."""

    def delays(self) -> Iterator[float]:
        """Yield the seconds before the second, third, ... attempt."""
        for number in range(self.max_attempts - 1):
            yield min(self.first_seconds * 2**number, self.max_seconds) * (1 + self.draw()) / 2

    def run(self, attempt: Callable[[], T], renew: Callable[[], None] | None = None) -> T:
        """Call `attempt` until it returns. When credentials are refused, call `renew` once.

        Raises as `told_apart` says: the last TransientError, a second RefusedCredentialsError, any other error at once.
        """
        delays = self.delays()
        while True:
            try:
                return attempt()
            except Exception as error:
                failure = told_apart(error)
                delay = next(delays, None) if isinstance(failure, TransientError) else None
                if delay is not None:
                    self.sleep(delay)
                elif renew is not None and isinstance(failure, RefusedCredentialsError):
                    renew()
                    renew = None
                elif failure is error:
                    raise
                else:
                    raise failure from error


def told_apart(error: Exception) -> Exception:
    """Return the meaning of any client's failure: an error of this module or store.py, or a StoreError that no retry can fix."""
    if isinstance(error, OrchestratorError | TransientError | RefusedCredentialsError | BehindEndError):
        return error
    response = getattr(error, "response", None)
    if isinstance(response, Mapping) and "Error" in response:  # an error of botocore
        status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        return refusal(status, str(response["Error"].get("Code", "")), str(response["Error"].get("Message", "")))
    if isinstance(error, FileExistsError):
        return ObjectExistsError(str(error))
    if isinstance(error, FileNotFoundError):
        return ObjectMissingError(str(error))
    said = f"{type(error).__name__}: {error}"
    if _is_transient(error):
        return TransientError(said)
    if isinstance(error, OSError):
        return store_error(type(error).__name__, error)
    return StoreError(
        f"cannot reach the store: {said}",
        "Check store_options and AWS_CA_BUNDLE, and that this machine has credentials: environment, profile, web identity or role.",
    )


def _is_transient(error: Exception) -> bool:
    """Whether the error's class is typical of networks and busy servers. gcsfs has a plain OSError for a 403."""
    if "CERTIFICATE_VERIFY_FAILED" in str(error) or str(error).startswith("Forbidden"):
        return False
    kind = type(error)
    if kind.__module__.partition(".")[0] in _TRANSIENT_PACKAGES or {base.__name__ for base in kind.__mro__} & _TRANSIENT_ERRORS:
        return True
    return isinstance(error, OSError) and not isinstance(error, _LASTING_OS_ERRORS) and error.errno not in _LASTING_ERRNOS


def refusal(status: int, code: str, message: str) -> Exception:
    """Return the meaning of an unsuccessful answer of S3. A HEAD has no body, so only the status is its code."""
    said = f"{code} ({status}): {message}"
    if code == "NoSuchUpload":
        return NoSuchUploadError(said)
    if code == "NoSuchBucket":
        return StoreError(f"the bucket does not exist: {said}", "Create the bucket, or correct the store's URL.")
    if status in _MEANINGS:
        return _MEANINGS[status](said)
    if code in _EXPIRED or (status in {400, 403} and code in {"400", "403"}):
        return RefusedCredentialsError(said)
    if status == 501:
        return StoreError(f"the server does not implement this: {said}", "Use a server that has conditional and multipart writes.")
    if code in _FULL or status == 507:
        return StoreFullError(said, _FULL_ADVICE)
    if code in _TRANSIENT_CODES or status in _TRANSIENT_STATUSES or status >= 500:
        return TransientError(said)
    return StoreError(said, _ADVICE.get(code, ""))


_MEANINGS: dict[int, type[Exception]] = {404: ObjectMissingError, 412: ObjectExistsError, 416: BehindEndError}
