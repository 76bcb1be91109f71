"""Bulk transfer on S3 by obstore: ranged reads and streaming uploads at a fraction of s3fs's CPU time.

Knows how obstore is told where to go and what its errors mean; refuses to know keys' semantics, which S3Store decides. Credentials
come from botocore's chain through a provider that asks again before they expire; endpoint and region are those that botocore
has found. obstore's threads do not survive a fork: a forked child gets no bulk transfer.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import os
import re
import threading
import uuid
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

from orchestrator.base.errors import BUG, StoreError
from orchestrator.spec.cluster import StoreOptions
from orchestrator.stores.retrying import Backoff, RefusedCredentialsError, TransientError
from orchestrator.stores.s3_client import BehindEndError, Fetched, refusal
from orchestrator.stores.store import ObjectMissingError

if TYPE_CHECKING:
    from orchestrator.stores.s3 import S3Store

_REQUEST_SECONDS = 300
"""Of a whole request, its body too: many uploads on few cores share the network."""
_CREDENTIAL_SECONDS = 300
"""How long obstore keeps what botocore gave; botocore itself renews what expires."""
_RETRY_SECONDS = 600
_runtime_process_id = 0


class BotocoreCredentials:
    """obstore's credential provider: whatever botocore finds, asked anew every few minutes."""

    def __init__(self, profile: str | None) -> None:
        """Raises StoreError when there are no credentials."""
        import botocore.session

        found = botocore.session.Session(profile=profile).get_credentials()
        if found is None:
            raise StoreError(
                "there are no credentials for the store",
                "Give this machine credentials: environment, profile, web identity or instance role.",
            )
        self._credentials = found

    def __call__(self) -> dict[str, Any]:
        now = self._credentials.get_frozen_credentials()
        until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=_CREDENTIAL_SECONDS)
        return {"access_key_id": now.access_key, "secret_access_key": now.secret_key, "token": now.token, "expires_at": until}


def open_bulk(store: S3Store, backoff: Backoff) -> ObstoreBulk | None:
    """Bulk transfer for a store; None where obstore is not installed, not wanted, or belongs to a parent process.

    Raises StoreError when it is asked for by name and not installed.
    """
    global _runtime_process_id
    wanted = store.options.transfer
    if wanted == "s3fs":
        return None
    if importlib.util.find_spec("obstore") is None:
        if wanted == "obstore":
            raise StoreError(
                "obstore is not installed", "pip install 'trt-orchestrator[obstore]', or leave store_options.transfer out."
            )
        return None
    _runtime_process_id = _runtime_process_id or os.getpid()
    return ObstoreBulk(store, backoff) if _runtime_process_id == os.getpid() else None


class ObstoreBulk:
    """Clients of one bucket: one that makes each request once, one that tries the parts of an upload again by itself."""

    def __init__(self, store: S3Store, backoff: Backoff) -> None:
        from obstore.store import S3Store as Client

        bucket, endpoint, region = store.resolved()
        arguments: Any = _where(endpoint, bucket, store.options) | {
            "bucket": bucket,
            "region": region,
            "credential_provider": BotocoreCredentials(store.options.profile),
        }
        retries: Any = _retry_config(backoff)
        self._once: Any = Client(**arguments, retry_config={"max_retries": 0})
        self._trying: Any = Client(**arguments, retry_config=retries)

    def fetch(self, path: str, begin: int, end: int) -> Fetched:
        """A range of an object. Raises as S3Client.fetch."""
        import obstore

        with _told_apart():
            answer = obstore.get(self._once, path, options={"range": (begin, end)})
            found = Fetched(memoryview(answer.bytes()), (answer.meta["e_tag"] or "").strip('"'), answer.meta["size"])
        expected = min(end, found.num_bytes) - begin
        if len(found.data) != expected:
            raise TransientError(f"the body of {path!r} ended after {len(found.data)} of {expected} bytes")
        return found

    def upload_one_part(self, path: str, data: bytes) -> None:
        """A multipart upload whose only part is `data`. Raises as S3Client.call."""
        import obstore

        with _told_apart():
            obstore.put(self._once, path, data, use_multipart=True)

    def open_upload(self, path: str, part_bytes: int, parallel: int, metadata: dict[str, str]) -> Any:
        """obstore's own multipart upload: a context manager with `write`, which aborts when its block raises."""
        import obstore

        return obstore.open_writer(self._trying, path, attributes=metadata, buffer_size=part_bytes, max_concurrency=parallel)


def _where(endpoint: str, bucket: str, options: StoreOptions) -> dict[str, Any]:
    parts = urlsplit(endpoint)
    host = parts.hostname or ""
    on_aws = host.endswith((".amazonaws.com", ".amazonaws.com.cn"))
    virtual = options.addressing_style == "virtual" or (options.addressing_style == "auto" and on_aws and "." not in bucket)
    checked = options.checksums != "when_required"
    where: dict[str, Any] = {
        "virtual_hosted_style_request": virtual,
        # The signature covers the checksum's header, and through it the body: hashing the body too would cost three times as much.
        "unsigned_payload": checked or parts.scheme == "https",
        "client_options": {
            "allow_http": parts.scheme == "http",
            "timeout": datetime.timedelta(seconds=_REQUEST_SECONDS),
            "read_timeout": datetime.timedelta(seconds=options.read_timeout_seconds),
            "connect_timeout": datetime.timedelta(seconds=10),
        },
    }
    if checked:
        where["checksum_algorithm"] = "crc64nvme"
    if not on_aws:
        where["endpoint"] = f"{parts.scheme}://{bucket}.{parts.netloc}" if virtual else endpoint
    bundle = os.environ.get("AWS_CA_BUNDLE")
    if bundle:
        with open(bundle, "rb") as file:
            where["client_options"]["root_certificate"] = file.read()
    return where


def _retry_config(backoff: Backoff) -> dict[str, Any]:
    return {
        "max_retries": backoff.max_attempts - 1,
        "retry_timeout": datetime.timedelta(seconds=_RETRY_SECONDS),
        "backoff": {
            "init_backoff": datetime.timedelta(seconds=backoff.first_seconds),
            "max_backoff": datetime.timedelta(seconds=backoff.max_seconds),
            "base": 2,
        },
    }


@contextlib.contextmanager
def _told_apart() -> Iterator[None]:
    """obstore's errors as those of S3Client; it says HTTP status and S3 code in its text only."""
    from obstore.exceptions import BaseError

    try:
        yield
    except FileNotFoundError as error:
        raise ObjectMissingError(_short(error)) from None
    except (BaseError, OSError, ValueError) as error:
        raise meaning(str(error)) from None


def meaning(text: str) -> Exception:
    """What an error of obstore means, by its text; without an HTTP status the network failed."""
    status = re.search(r"status code: (\d{3})|Status: (\d{3})|status: (\d{3})", text)
    code = re.search(r"<Code>(\w+)</Code>", text)
    if status is None:
        if "expected" in text and "range" in text.lower() and "beyond" in text:
            return BehindEndError(text)
        return TransientError(_short(text))
    number = int(next(group for group in status.groups() if group))
    return refusal(number, code.group(1) if code else str(number), _short(text))


def _short(error: object) -> str:
    """The first line of what obstore says: the rest is Rust's picture of its own values."""
    return str(error).partition("\n")[0][:500]


class ObstoreWriter:
    """A streaming upload by obstore; appears under its key when the block ends well.

    obstore retries each part and aborts the upload when the block raises. A failed end is looked at again: the write-id says
    whether the object was completed all the same.
    """

    def __init__(self, store: S3Store, key: str, num_bytes: int | None, part_bytes: int, seats: Seats) -> None:
        self._store, self._key, self._num_bytes, self._part_bytes = store, key, num_bytes, part_bytes
        self._path = store.path(key)
        self._write_id = uuid.uuid4().hex
        self._written = 0
        self._seats, self._taken = seats, 0
        self._upload: Any = None

    def __enter__(self) -> Self:
        bulk = self._store.bulk()
        assert bulk is not None  # the store chose this writer
        self._taken = self._seats.take()
        self._upload = bulk.open_upload(self._path, self._part_bytes, self._taken, {"write-id": self._write_id})
        self._upload.__enter__()
        return self

    def write(self, data: bytes | bytearray | memoryview) -> int:
        view = memoryview(data).cast("B")
        with self._errors():
            for begin in range(0, len(view) or 1, self._part_bytes):
                # obstore keeps a reference to what it is given and sends it later; callers use their buffers again.
                self._upload.write(bytes(view[begin : begin + self._part_bytes]))
        self._written += len(view)
        return len(view)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        try:
            if error is not None:
                self._abort(error)
            elif self._num_bytes is not None and self._written != self._num_bytes:
                wrong = StoreError(f"{self._key!r}: {self._written} bytes were written, {self._num_bytes} announced", BUG)
                self._abort(wrong)
                raise wrong
            else:
                self._commit()
        finally:
            self._seats.give_back(self._taken)

    def _commit(self) -> None:
        try:
            with self._errors():
                self._upload.__exit__(None, None, None)
        except StoreError:
            if not self._store.holds(self._key, self._write_id):
                raise

    def _abort(self, cause: BaseException) -> None:
        try:
            with self._errors():
                self._upload.__exit__(type(cause), cause, None)
        except StoreError as failure:
            cause.add_note(f"a multipart upload of {self._key!r} may have been left behind: {failure}")

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            with _told_apart():
                yield
        except (TransientError, RefusedCredentialsError) as error:
            raise StoreError(
                f"cannot write {self._key!r} to {self._store.url}: {_short(error)}",
                "See that the endpoint answers and that this machine's credentials are valid, then run the same command again.",
            ) from error


class Seats:
    """Shares the parts in flight among a store's open writers: all to one that is alone, one to each that comes beside it."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._lock = threading.Lock()

    def take(self) -> int:
        """Seats of a new writer, 1 at least."""
        with self._lock:
            taken = max(self._free, 1)
            self._free -= taken
            return taken

    def give_back(self, taken: int) -> None:
        """When the writer has ended."""
        with self._lock:
            self._free += taken
