"""Requests to one S3 bucket over s3fs's connection: each made once, its failures told apart.

Knows botocore's errors and refuses to know keys, retries and commits. s3fs brings session, event loop and credentials as
botocore finds them; its own retries are off, for two loops inside each other would multiply.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import threading
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from orchestrator.base.errors import StoreError, StoreFullError
from orchestrator.spec.cluster import StoreOptions
from orchestrator.stores.retrying import RefusedCredentialsError, TransientError
from orchestrator.stores.store import BLOCK_BYTES, Block, ObjectExistsError, ObjectMissingError

T = TypeVar("T")

_CONNECT_TIMEOUT_SECONDS = 10
_CONNECTIONS = 32
_EXPIRED = frozenset({"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired", "InvalidToken"})
_DAMAGED = frozenset({"BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch", "RequestTimeout"})
"""Refusals (400) of a body that was cut or damaged on its way."""
_BUSY = frozenset({"SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "InternalError", "ServiceUnavailable"})
_BUSY_STATUSES = frozenset({408, 409, 425, 429})
"""409 is a conflict with a request under way: try again. A condition that was lost is 412."""
_NETWORK_ERRORS = frozenset(
    {"ConnectionError", "HTTPClientError", "MetadataRetrievalError", "CredentialRetrievalError", "IncompleteReadError"}
)
"""Of botocore, with what is derived from them."""
_INHERITED: list[Any] = []
"""Connections of a parent process: kept from the garbage collector, whose finalizer would wait for the parent's threads."""


class NoSuchUploadError(StoreError):
    """The multipart upload is not there (any more)."""

    default_advice = "Something aborted it: raise the age at which a lifecycle rule or a collector does so."


class BehindEndError(Exception):
    """A range begins behind the end of its object."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """A range of an object, with what tells versions of it apart."""

    data: Block
    etag: str
    num_bytes: int
    """Of the whole object."""


class S3Client:
    """Requests to one bucket. Threads may share it; a forked child connects anew."""

    def __init__(self, bucket: str, options: StoreOptions) -> None:
        self.bucket, self._options = bucket, options
        self._lock = threading.Lock()
        self._connection: Any = None
        self._process_id = 0

    def call(self, operation: str, **parameters: Any) -> dict[str, Any]:
        """One request of botocore's S3 client, by the name of its method.

        Raises ObjectMissingError (404), ObjectExistsError (412), NoSuchUploadError, TransientError,
        RefusedCredentialsError, and StoreError for what no second attempt can mend.
        """

        async def request(client: Any) -> dict[str, Any]:
            response: dict[str, Any] = await getattr(client, operation)(Bucket=self.bucket, **parameters)
            return response

        return self._run(request)

    def fetch(self, key: str, begin: int, end: int | None) -> Fetched:
        """Bytes [begin, end) of an object, or all from `begin`. Raises BehindEndError, and as `call`."""
        wanted = {} if end is None and begin == 0 else {"Range": f"bytes={begin}-{'' if end is None else end - 1}"}

        async def request(client: Any) -> Fetched:
            response = await client.get_object(Bucket=self.bucket, Key=key, **wanted)
            async with response["Body"] as body:
                data = await body.read()
            total = int(response.get("ContentRange", "").rpartition("/")[2] or response["ContentLength"])
            expected = max(0, (total if end is None else min(end, total)) - begin)
            if len(data) != expected:
                raise TransientError(f"the body of {key!r} ended after {len(data)} of {expected} bytes")
            return Fetched(data, response.get("ETag", "").strip('"'), total)

        return self._run(request)

    def refuse(self, seen: Any) -> None:
        """Drop the connection that `seen` was, so that the next request finds credentials anew."""
        with self._lock:
            if self._connection is seen:
                self._connection = None

    @property
    def connection(self) -> Any:
        """The s3fs file system of this process, made by the first request."""
        with self._lock:
            if self._process_id != os.getpid():
                _INHERITED.append(self._connection)
                self._connection, self._process_id = None, os.getpid()
            if self._connection is None:
                self._connection = _connect(self._options)
            return self._connection

    def digest_of(self, body: bytes) -> dict[str, str]:
        """What to send with a body so that the server finds it damaged: nothing where botocore sends a checksum itself.

        Content-MD5 is the one digest that every server verifies; not all compare the one in the signature with the body.
        """
        config = self.connection.config_kwargs
        if config.get("request_checksum_calculation") != "when_required":
            return {}
        return {"ContentMD5": base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()}

    def resolved(self) -> tuple[str, str]:
        """Endpoint URL and region that botocore has found."""

        async def request(client: Any) -> tuple[str, str]:
            return str(client.meta.endpoint_url), str(client.meta.region_name)

        return self._run(request)

    def _run(self, request: Callable[[Any], Coroutine[Any, Any, T]]) -> T:
        from fsspec.asyn import sync

        connection = self.connection

        async def run() -> T:
            return await request(await connection.set_session())

        try:
            result: T = sync(connection.loop, run)
            return result
        except (StoreError, TransientError):
            raise
        except Exception as error:
            raise told_apart(error) from error


def _connect(options: StoreOptions) -> Any:
    import s3fs

    named = {"profile": options.profile, "endpoint_url": options.endpoint_url}
    client = {"region_name": options.region} if options.region else {}
    other = options.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    style, checksums = options.addressing_style, options.checksums
    config: dict[str, Any] = {
        "retries": {"mode": "standard", "total_max_attempts": 1},
        "connect_timeout": _CONNECT_TIMEOUT_SECONDS,
        "read_timeout": options.read_timeout_seconds,
        "max_pool_connections": _CONNECTIONS,
        "tcp_keepalive": True,
        "s3": {"addressing_style": ("path" if other else "auto") if style == "auto" else style},
    }
    if checksums != "auto" or other:
        mode = "when_required" if checksums == "auto" else checksums
        config |= {"request_checksum_calculation": mode, "response_checksum_validation": mode}
    return s3fs.S3FileSystem(
        **{name: value for name, value in named.items() if value},
        client_kwargs=client,
        config_kwargs=config,
        skip_instance_cache=True,
        use_listings_cache=False,
    )


def told_apart(error: Exception) -> Exception:
    """What a failed request means, as one of the errors that `S3Client.call` names."""
    response: Mapping[str, Any] | None = getattr(error, "response", None)
    if isinstance(response, Mapping) and "Error" in response:
        status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        return refusal(status, str(response["Error"].get("Code", "")), str(response["Error"].get("Message", "")))
    wrong_certificate = "CERTIFICATE_VERIFY_FAILED" in str(error)
    if not wrong_certificate and (isinstance(error, asyncio.TimeoutError | OSError) or _is_of_the_network(type(error))):
        return TransientError(f"{type(error).__name__}: {error}")
    return StoreError(
        f"cannot reach the store: {type(error).__name__}: {error}",
        "Check store_options and AWS_CA_BUNDLE, and that this machine has credentials: environment, profile, web identity or role.",
    )


def _is_of_the_network(kind: type[BaseException]) -> bool:
    names = {base.__name__ for base in kind.__mro__}
    return kind.__module__.partition(".")[0] == "aiohttp" or not names.isdisjoint(_NETWORK_ERRORS)


def refusal(status: int, code: str, message: str) -> Exception:
    """The meaning of an answer that is no success. A HEAD has no body, hence no code but the number."""
    said = f"{code} ({status}): {message}"
    if code == "NoSuchUpload":
        return NoSuchUploadError(said)
    if code == "NoSuchBucket":
        return StoreError(f"the bucket does not exist: {said}", "Create the bucket, or correct the store's URL.")
    if status == 404:
        return ObjectMissingError(said)
    if status == 416:
        return BehindEndError(said)
    if status == 412:
        return ObjectExistsError(said)
    if code in _EXPIRED or (status in {400, 403} and code in {"400", "403"}):
        return RefusedCredentialsError(said)
    if status == 501:
        return StoreError(f"the server does not implement this: {said}", "Use a server that has conditional and multipart writes.")
    if code in _FULL or status == 507:
        return StoreFullError(said, _FULL_ADVICE)
    if code in _DAMAGED or code in _BUSY or status in _BUSY_STATUSES or status >= 500:
        return TransientError(said)
    return StoreError(said, _ADVICE.get(code, ""))


_FULL = {"QuotaExceeded", "InsufficientCapacity", "InsufficientStorage", "XMinioStorageFull"}
_FULL_ADVICE = "Raise the quota or free space (`orchestrator collect`), and run the same command again."
_ADVICE = {
    "RequestTimeTooSkewed": "Set this machine's clock: the server refuses requests signed at another time.",
    "MissingContentLength": "Set store_options.checksums: when_required: this server does not know trailing checksums.",
    "MissingContentMD5": "Set store_options.checksums: when_required: this server does not know the newer checksums.",
    "AccessDenied": "Give this machine's role or profile read, write, list and delete on the bucket.",
    "SignatureDoesNotMatch": "The secret key is wrong, or a proxy changes the requests.",
    "InvalidAccessKeyId": "The server does not know this access key: check the environment or the profile.",
}


def part_bytes(num_bytes: int | None) -> int:
    """Size of the parts of an upload: S3 takes 10,000 parts at most, and 5 MiB at least but for the last.

    Of unknown size (None): parts for 156 GiB, which no engine of one GPU reaches.
    """
    if num_bytes is None:
        return 2 * BLOCK_BYTES
    return max(BLOCK_BYTES, -(-num_bytes // (9_000 * 2**20)) * 2**20)
