"""s3://: AWS and servers that speak its protocol, through s3fs; large objects through obstore where it is installed.

Leans only on what such servers share (see check_writable): If-None-Match on single PUTs, but no If-Match (Ceph takes it only
unquoted), no conditional CompleteMultipartUpload, no ETag that is an MD5, no checksum that the server keeps.

Every object carries a random `write-id` in its metadata. When the answer to a PUT is lost, or a second try meets an object, the
id says whether the object is our own: nothing is published twice and no race is lost to oneself.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import os
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from orchestrator.base.errors import StoreError, StoreFullError
from orchestrator.spec.cluster import StoreOptions
from orchestrator.stores.obstore import ObstoreBulk, ObstoreWriter, Seats, open_bulk
from orchestrator.stores.retrying import Backoff, RefusedCredentialsError, TransientError
from orchestrator.stores.s3_client import BehindEndError, Fetched, NoSuchUploadError, S3Client, part_bytes
from orchestrator.stores.s3_writer import Slots, UploadWriter
from orchestrator.stores.store import (
    BLOCK_BYTES,
    Block,
    ObjectChangedError,
    ObjectExistsError,
    ObjectInfo,
    ObjectMissingError,
    Upload,
    Writer,
    check_key,
)

T = TypeVar("T")

WRITE_ID = "write-id"
PARALLEL = 4
"""Parts in flight."""
BLOCKS_AHEAD = 2
"""Blocks in flight of one reader; obstore holds each twice while it joins the pieces that came."""
COPY_BYTES = 2**30
"""Larger objects are copied in parts: S3 copies 5 GiB at once at most, and parts go side by side."""
COPY_PART_BYTES = 256 * 2**20


class S3Store:
    """Objects below s3://bucket/prefix. Threads may share it."""

    def __init__(self, url: str, options: StoreOptions, *, backoff: Backoff | None = None, client: S3Client | None = None) -> None:
        """Connects to nothing yet. `client` may be shared by stores in one bucket. Raises StoreError for a URL without a bucket."""
        parts = urlsplit(url)
        if not parts.netloc:
            raise StoreError(f"store {url!r} names no bucket", "Write s3://bucket/prefix.")
        self.url, self.options = url.rstrip("/"), options
        self._prefix = f"{parts.path.strip('/')}/".lstrip("/")
        self._client = client or S3Client(parts.netloc, options)
        self._backoff = backoff or Backoff(max_attempts=options.max_attempts)
        self._slots, self._seats = Slots(PARALLEL), Seats(PARALLEL)
        self._bulk: tuple[int, ObstoreBulk | None] = (0, None)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.url, self.options)

    def get(self, key: str) -> bytes:
        return bytes(self._fetch(key, 0, None).data)

    def get_range(self, key: str, begin: int, end: int) -> bytes:
        if begin >= end:
            if self.size(key) is None:
                raise ObjectMissingError(f"{self.url} has no object {key!r}")
            return b""
        return bytes(self._fetch(key, begin, end).data)

    def blocks(self, key: str) -> Iterator[Block]:
        found = self._fetch(key, 0, BLOCK_BYTES)
        version, num_bytes = (found.etag, found.num_bytes), found.num_bytes
        yield found.data
        del found  # a block is held no longer than until the next is asked for
        begins = iter(range(BLOCK_BYTES, num_bytes, BLOCK_BYTES))
        with ThreadPoolExecutor(BLOCKS_AHEAD, "fetch") as pool:
            jobs: deque[Future[Fetched]] = deque()
            try:
                while True:
                    for begin in itertools.islice(begins, BLOCKS_AHEAD - len(jobs)):
                        jobs.append(pool.submit(self._fetch, key, begin, min(begin + BLOCK_BYTES, num_bytes)))
                    if not jobs:
                        return
                    found = jobs.popleft().result()
                    if (found.etag, found.num_bytes) != version:
                        raise ObjectChangedError(f"{key!r} in {self.url} was replaced while it was read")
                    yield found.data
                    del found
            finally:
                for job in jobs:
                    job.cancel()

    def size(self, key: str) -> int | None:
        found = self._head(key)
        return None if found is None else int(found["ContentLength"])

    def put(self, key: str, data: bytes, *, create: bool = False) -> None:
        self.put_as(key, data, uuid.uuid4().hex, create=create)

    def put_as(self, key: str, data: bytes, write_id: str, *, create: bool = False) -> None:
        """`put` under an id of the caller's, with which `holds` answers."""
        condition = {"IfNoneMatch": "*"} if create else {}
        doubtful = False

        def attempt() -> None:
            nonlocal doubtful
            if doubtful and self.holds_once(key, write_id):
                return
            try:
                self.call("put_object", key, data, Metadata={WRITE_ID: write_id}, **condition)
            except (TransientError, ObjectExistsError) as error:
                doubtful = True
                if isinstance(error, TransientError) or not self.holds_once(key, write_id):
                    raise

        try:
            self.retried(f"write {key!r}", attempt)
        except ObjectExistsError:
            raise ObjectExistsError(f"{self.url} already has {key!r}") from None

    def writer(self, key: str, num_bytes: int | None = None) -> Writer:
        check_key(key)
        size = part_bytes(num_bytes)
        if (num_bytes is None or num_bytes > size) and self.bulk() is not None:
            return ObstoreWriter(self, key, num_bytes, size, self._seats)
        return UploadWriter(self, key, num_bytes, size, self._slots)

    def copy(self, source: str, target: str) -> None:
        check_key(target)
        found = self._head(source)
        if found is None:
            raise ObjectMissingError(f"{self.url} has no object {source!r}")
        if source == target:
            return
        where = {"Bucket": self._client.bucket, "Key": self.path(source)}
        if found["ContentLength"] <= COPY_BYTES:
            self.retried(f"copy {source!r}", lambda: self.call("copy_object", target, CopySource=where))
            return
        with UploadWriter(self, target, None, COPY_PART_BYTES, Slots(PARALLEL)) as writer:
            for begin in range(0, found["ContentLength"], COPY_PART_BYTES):
                writer.copy_part(where, begin, min(begin + COPY_PART_BYTES, found["ContentLength"]))
            writer.wait()
            now = self._head(source)
            if now is None or now["ETag"] != found["ETag"]:
                raise ObjectChangedError(f"{source!r} in {self.url} was replaced while it was copied")

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        token: dict[str, str] = {}
        while True:
            page = self._page(
                prefix, functools.partial(self._client.call, "list_objects_v2", Prefix=self._prefix + prefix, **token)
            )
            for entry in page.get("Contents", ()):
                if not entry["Key"].endswith("/"):  # a marker of a folder, which some servers and tools make
                    yield ObjectInfo(entry["Key"][len(self._prefix) :], int(entry["Size"]))
            if not page.get("IsTruncated"):
                return
            following = {"ContinuationToken": page.get("NextContinuationToken", "")}
            if following == token or not following["ContinuationToken"]:
                raise self._broken_off(prefix)
            token = following

    def delete(self, key: str) -> None:
        with contextlib.suppress(ObjectMissingError):
            self.retried(f"delete {key!r}", lambda: self.call("delete_object", key))

    def list_uploads(self, prefix: str) -> Iterator[Upload]:
        marker: dict[str, str] = {}
        while True:
            request = functools.partial(self._client.call, "list_multipart_uploads", Prefix=self._prefix + prefix, **marker)
            page = self._page(prefix, request)
            for entry in page.get("Uploads", ()):
                yield Upload(entry["Key"][len(self._prefix) :], entry["UploadId"], entry["Initiated"])
            if not page.get("IsTruncated"):
                return
            following = {"KeyMarker": page.get("NextKeyMarker", ""), "UploadIdMarker": page.get("NextUploadIdMarker", "")}
            if following == marker or not following["KeyMarker"]:
                raise self._broken_off(prefix)
            marker = following

    def abort_upload(self, upload: Upload) -> None:
        with contextlib.suppress(NoSuchUploadError, ObjectMissingError):
            self.retried(
                f"abort the upload of {upload.key!r}",
                lambda: self.call("abort_multipart_upload", upload.key, UploadId=upload.upload_id),
            )

    def check_uploads(self, key: str) -> None:
        data = b"an upload of one part"
        bulk = self.bulk()
        try:
            if bulk is not None:
                self.retried(f"write {key!r}", lambda: bulk.upload_one_part(self.path(key), data))
            else:
                with UploadWriter(self, key, len(data), len(data), self._slots) as writer:
                    writer.write(data)
        except StoreFullError:
            raise
        except StoreError as error:
            raise StoreError(
                f"multipart uploads fail where single ones do not: {error.message}",
                "If the server does not know CRC64NVME, set store_options.checksums: when_required in the cluster file; "
                "otherwise use a server that has multipart uploads, and see that the bucket's policy allows them.",
            ) from error

    def local_path(self, key: str) -> Path | None:
        return None

    # What the writers of this package use.

    def path(self, key: str) -> str:
        """The key within the bucket. Raises StoreError for what is no key."""
        check_key(key)
        return self._prefix + key

    def call(self, operation: str, key: str, body: bytes | None = None, **parameters: Any) -> dict[str, Any]:
        """One request about one object, made once, its body under a digest; raises as S3Client.call."""
        if body is not None:
            parameters |= {"Body": io.BytesIO(body), **self._client.digest_of(body)}
        return self._client.call(operation, Key=self.path(key), **parameters)

    def retried(self, doing: str, attempt: Callable[[], T]) -> T:
        """`attempt` until it returns, with backoff and one new connection; failures that last become StoreErrors."""
        seen = self._client.connection
        try:
            return self._backoff.run(attempt, lambda: self._renew(seen))
        except TransientError as error:
            raise StoreError(
                f"cannot {doing} in {self.url}, tried {self._backoff.max_attempts} times: {error}",
                "The server or the network fails: see that the endpoint answers, then run the same command again.",
            ) from error
        except RefusedCredentialsError as error:
            raise StoreError(
                f"cannot {doing} in {self.url}: credentials were refused: {error}",
                "Renew this machine's credentials; use a role or web identity, which renew themselves, for long builds.",
            ) from error
        except ObjectMissingError:
            raise ObjectMissingError(f"cannot {doing}: {self.url} has no such object") from None
        except (ObjectExistsError, ObjectChangedError, NoSuchUploadError):
            raise
        except StoreError as error:
            raise type(error)(f"cannot {doing} in {self.url}: {error.message}", error.advice) from error

    def holds_once(self, key: str, write_id: str) -> bool:
        """Whether the object is there and was written under this id. One request; raises as `call`."""
        try:
            return bool(self.call("head_object", key).get("Metadata", {}).get(WRITE_ID) == write_id)
        except ObjectMissingError:
            return False

    def holds(self, key: str, write_id: str) -> bool:
        """`holds_once`, retried."""
        return self.retried(f"look at {key!r}", lambda: self.holds_once(key, write_id))

    def resolved(self) -> tuple[str, str, str]:
        """Bucket, endpoint URL and region, as botocore finds them."""
        return (self._client.bucket, *self._client.resolved())

    def bulk(self) -> ObstoreBulk | None:
        """What carries large objects in this process; None: s3fs."""
        process_id, bulk = self._bulk
        if process_id != os.getpid():
            bulk = open_bulk(self, self._backoff)
            self._bulk = os.getpid(), bulk
        return bulk

    def _fetch(self, key: str, begin: int, end: int | None) -> Fetched:
        """A range, through what carries large objects when it has an end."""
        path = self.path(key)

        def attempt() -> Fetched:
            bulk = self.bulk() if end is not None else None
            try:
                return self._client.fetch(path, begin, end) if bulk is None or end is None else bulk.fetch(path, begin, end)
            except BehindEndError:
                found = self.call("head_object", key)
                if begin < found["ContentLength"]:
                    raise TransientError(f"{key!r} was replaced by a longer object just now") from None
                return Fetched(b"", found["ETag"].strip('"'), int(found["ContentLength"]))

        return self.retried(f"read {key!r}", attempt)

    def _renew(self, seen: Any) -> None:
        self._client.refuse(seen)
        self._bulk = (0, None)

    def _head(self, key: str) -> dict[str, Any] | None:
        try:
            return self.retried(f"look at {key!r}", lambda: self.call("head_object", key))
        except ObjectMissingError:
            return None

    def _broken_off(self, prefix: str) -> StoreError:
        return StoreError(
            f"cannot list {prefix!r} in {self.url}: the server breaks the listing off and does not say where to go on",
            "Use a server that lists more than a page of objects as S3 does.",
        )

    def _page(self, prefix: str, request: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        return self.retried(f"list {prefix!r}", request)
