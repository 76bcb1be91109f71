"""s3://: AWS and compatible servers, through s3fs: its session, event loop and credentials, and botocore's requests.

Uses only features that such servers share (see check_writable): If-None-Match on single PUTs, but no If-Match (Ceph accepts it only
unquoted), no conditional CompleteMultipartUpload, no ETag as an MD5, no checksum kept by the server. s3fs's own reads, copies and
files are not used: they send parts one by one, retry on their own, and hide the server's error code.

Every object has a random `write-id` in its metadata. When an answer is lost, or a second attempt meets an object, the id shows
whether the object is our own: nothing is published twice and no race is lost to oneself.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import functools
import hashlib
import io
import itertools
import os
import uuid
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import urlsplit

from orchestrator.base.errors import BUG, StoreError, StoreFullError
from orchestrator.spec.cluster import StoreOptions
from orchestrator.stores.fsspec import FsspecStore
from orchestrator.stores.retrying import Backoff, BehindEndError, TransientError, TruncatedError, told_apart
from orchestrator.stores.store import (
    BLOCK_BYTES,
    Block,
    Fetched,
    NoSuchUploadError,
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
"""Blocks in flight of one reader. obstore holds each twice while it joins the received pieces."""
COPY_BYTES = 2**30
"""Larger objects are copied in parts: S3 copies at most 5 GiB at once, and parts run in parallel."""
COPY_PART_BYTES = 256 * 2**20
MAX_PARTS = 10_000
CONNECTIONS = 32
_CONNECT_TIMEOUT_SECONDS = 10


def part_bytes(num_bytes: int | None) -> int:
    """Return the size of an upload's parts. S3 accepts at most 10,000 parts, each except the last of at least 5 MiB.

    For an unknown size (None): parts for 156 GiB, which no engine of one GPU reaches.
    """
    if num_bytes is None:
        return 2 * BLOCK_BYTES
    return max(BLOCK_BYTES, -(-num_bytes // (9_000 * 2**20)) * 2**20)


class S3Store(FsspecStore):
    """Objects below s3://bucket/prefix. Threads may share the store; a forked child opens its own connections."""

    def __init__(self, url: str, options: StoreOptions, *, fs: Any = None, backoff: Backoff | None = None) -> None:
        """See FsspecStore. Raises StoreError for a URL without a bucket."""
        super().__init__(url, fs=fs, backoff=backoff or Backoff(max_attempts=options.max_attempts))
        parts = urlsplit(url)
        if not parts.netloc:
            raise StoreError(f"store {url!r} names no bucket", "Write s3://bucket/prefix.")
        self.options, self.bucket = options, parts.netloc
        self._prefix = f"{parts.path.strip('/')}/".lstrip("/")
        self._free_seats = PARALLEL

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.url, self.options)

    def _connect(self) -> Any:
        """Return s3fs's file system with session, event loop and credentials of botocore. It never retries."""
        import s3fs

        named = {"profile": self.options.profile, "endpoint_url": self.options.endpoint_url}
        config = {
            "retries": {"mode": "standard", "total_max_attempts": 1},
            "connect_timeout": _CONNECT_TIMEOUT_SECONDS,
            "read_timeout": self.options.read_timeout_seconds,
            "max_pool_connections": CONNECTIONS,
            "tcp_keepalive": True,
        }
        return s3fs.S3FileSystem(
            **{name: value for name, value in named.items() if value},
            client_kwargs={"region_name": self.options.region} if self.options.region else {},
            config_kwargs=config | self._config(),
            skip_instance_cache=True,
            use_listings_cache=False,
        )

    def _config(self) -> dict[str, Any]:
        """Return botocore's settings that depend on whether the server is AWS."""
        other = self.options.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        style, mode = self.options.addressing_style, self.options.checksums
        config: dict[str, Any] = {"s3": {"addressing_style": ("path" if other else "auto") if style == "auto" else style}}
        if mode != "auto" or other:
            mode = "when_required" if mode == "auto" else mode
            config |= {"request_checksum_calculation": mode, "response_checksum_validation": mode}
        return config

    def path(self, key: str) -> str:
        check_key(key)
        return self._prefix + key

    # Requests without retries. They raise errors for `told_apart`.

    def request(self, make: Callable[[Any], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine function with botocore's client."""
        from fsspec.asyn import sync

        fs = self.fs

        async def run() -> T:
            return await make(await fs.set_session())

        try:
            result: T = sync(fs.loop, run)
            return result
        except Exception as error:
            failure = told_apart(error)
            if failure is error:
                raise
            raise failure from error

    def call(self, operation: str, key: str | None = None, body: bytes | None = None, **parameters: Any) -> dict[str, Any]:
        """Call a method of botocore's S3 client for an object or the bucket; a body gets a digest."""
        if key is not None:
            parameters["Key"] = self.path(key)
        if body is not None:
            parameters |= {"Body": io.BytesIO(body), **self._digest_of(body)}
        answer: dict[str, Any] = self.request(lambda client: getattr(client, operation)(Bucket=self.bucket, **parameters))
        return answer

    def _digest_of(self, body: bytes) -> dict[str, str]:
        """Return parameters by which the server detects a damaged body; empty where botocore sends a checksum.

        Content-MD5 is the one digest that every server verifies; not all compare the signature's digest with the body.
        """
        if self.fs.config_kwargs.get("request_checksum_calculation") != "when_required":
            return {}
        return {"ContentMD5": base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()}

    def fetch_once(self, key: str, begin: int, end: int | None) -> Fetched:
        try:
            found = self._fetch(self.path(key), begin, end)
        except BehindEndError:
            head = self.call("head_object", key)
            if begin < head["ContentLength"]:
                raise TransientError(f"{key!r} was replaced by a longer object just now") from None
            return Fetched(b"", head["ETag"].strip('"'), int(head["ContentLength"]))
        expected = (found.num_bytes if end is None else min(end, found.num_bytes)) - begin
        if len(found.data) != expected:
            raise TruncatedError(f"the body of {key!r} ended after {len(found.data)} of {expected} bytes")
        return found

    def _fetch(self, path: str, begin: int, end: int | None) -> Fetched:
        wanted = {} if end is None and begin == 0 else {"Range": f"bytes={begin}-{'' if end is None else end - 1}"}

        async def get(client: Any) -> Fetched:
            response = await client.get_object(Bucket=self.bucket, Key=path, **wanted)
            async with response["Body"] as body:
                data = await body.read()
            total = int(response.get("ContentRange", "").rpartition("/")[2] or response["ContentLength"])
            return Fetched(data, response.get("ETag", "").strip('"'), total)

        return self.request(get)

    def holds_once(self, key: str, write_id: str) -> bool:
        """Whether the object exists and was written under this id."""
        try:
            return bool(self.call("head_object", key).get("Metadata", {}).get(WRITE_ID) == write_id)
        except ObjectMissingError:
            return False

    # The protocol.

    def blocks(self, key: str) -> Iterator[Block]:
        def fetch(begin: int) -> Fetched:
            return self.fetch(key, begin, begin + BLOCK_BYTES)

        found = fetch(0)
        version, num_bytes = (found.etag, found.num_bytes), found.num_bytes
        yield found.data
        del found  # a block is held no longer than until the next is requested
        begins = iter(range(BLOCK_BYTES, num_bytes, BLOCK_BYTES))
        with ThreadPoolExecutor(BLOCKS_AHEAD, "fetch") as pool:
            jobs = deque(pool.submit(fetch, begin) for begin in itertools.islice(begins, BLOCKS_AHEAD))
            try:
                while jobs:
                    found = jobs.popleft().result()
                    if (found.etag, found.num_bytes) != version:
                        raise ObjectChangedError(f"{key!r} in {self.url} was replaced while it was read")
                    yield found.data
                    del found
                    jobs.extend(pool.submit(fetch, begin) for begin in itertools.islice(begins, 1))
            finally:
                for job in jobs:
                    job.cancel()

    def look(self, key: str) -> dict[str, Any] | None:
        """See FsspecStore. Adds a checksum where the server keeps one."""
        try:
            found = self.retried(f"look at {key!r}", lambda: self.call("head_object", key, ChecksumMode="ENABLED"))
        except ObjectMissingError:
            return None
        return {**found, "size": int(found["ContentLength"])}

    def put(self, key: str, data: bytes, *, create: bool = False) -> None:
        write_id, condition = uuid.uuid4().hex, {"IfNoneMatch": "*"} if create else {}
        self.publish(key, write_id, lambda: self.call("put_object", key, data, Metadata={WRITE_ID: write_id}, **condition))

    def publish(self, key: str, write_id: str, request: Callable[[], Any]) -> None:
        """Repeat the request that creates an object until it has done so: an attempt that seems to fail may have succeeded."""
        doubtful = False

        def attempt() -> None:
            nonlocal doubtful
            if doubtful and self.holds_once(key, write_id):
                return
            try:
                request()
            except (TransientError, ObjectExistsError, NoSuchUploadError) as error:
                doubtful = True
                if isinstance(error, TransientError) or not self.holds_once(key, write_id):
                    raise

        self.retried(f"write {key!r}", attempt)

    def writer(self, key: str, num_bytes: int | None = None) -> Writer:
        return S3Writer(self, key, num_bytes, part_bytes(num_bytes))

    def take_seats(self) -> int:
        """Return how many parts a new writer may have in flight: all for the only writer, one for each further one."""
        with self._lock:
            taken = max(self._free_seats, 1)
            self._free_seats -= taken
            return taken

    def give_back(self, taken: int) -> None:
        """Return the seats of a writer that has ended."""
        with self._lock:
            self._free_seats += taken

    def copy(self, source: str, target: str) -> None:
        check_key(target)
        found = self.look(source)
        if found is None:
            raise ObjectMissingError(f"{self.url} has no object {source!r}")
        if source == target:
            return
        where = {"Bucket": self.bucket, "Key": self.path(source)}
        if found["size"] <= COPY_BYTES:
            self.retried(f"copy {source!r}", lambda: self.call("copy_object", target, CopySource=where))
            return
        with S3Writer(self, target, None, COPY_PART_BYTES) as writer:
            for begin in range(0, found["size"], COPY_PART_BYTES):
                writer.copy_part(where, begin, min(begin + COPY_PART_BYTES, found["size"]))
            writer.wait()
            now = self.look(source)
            if now is None or now["ETag"] != found["ETag"]:
                raise ObjectChangedError(f"{source!r} in {self.url} was replaced while it was copied")

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        for page in self._pages("list_objects_v2", prefix, ContinuationToken="NextContinuationToken"):
            for entry in page.get("Contents", ()):
                if not entry["Key"].endswith("/"):  # a folder marker, which some servers and tools create
                    yield ObjectInfo(entry["Key"][len(self._prefix) :], int(entry["Size"]))

    def list_uploads(self, prefix: str) -> Iterator[Upload]:
        marks = {"KeyMarker": "NextKeyMarker", "UploadIdMarker": "NextUploadIdMarker"}
        for page in self._pages("list_multipart_uploads", prefix, **marks):
            for entry in page.get("Uploads", ()):
                yield Upload(entry["Key"][len(self._prefix) :], entry["UploadId"], entry["Initiated"])

    def _pages(self, operation: str, prefix: str, **marks: str) -> Iterator[dict[str, Any]]:
        """Yield every page of a listing. `marks`: parameters of the next request, by field of the page.

        Raises StoreError for an incomplete listing, which botocore's paginators take for complete.
        """
        place: dict[str, Any] = {}
        while True:
            request = functools.partial(self.call, operation, Prefix=self._prefix + prefix, **place)
            page = self.retried(f"list {prefix!r}", request)
            yield page
            if not page.get("IsTruncated"):
                return
            following = {parameter: page.get(field, "") for parameter, field in marks.items()}
            if following == place or not next(iter(following.values())):
                raise StoreError(
                    f"cannot list {prefix!r} in {self.url}: the server ends the listing without naming the next page",
                    "Use a server that lists more than a page of objects as S3 does.",
                )
            place = following

    def delete(self, key: str) -> None:
        with contextlib.suppress(ObjectMissingError):
            self.retried(f"delete {key!r}", lambda: self.call("delete_object", key))

    def abort_upload(self, upload: Upload) -> None:
        request = functools.partial(self.call, "abort_multipart_upload", upload.key, UploadId=upload.upload_id)
        with contextlib.suppress(NoSuchUploadError, ObjectMissingError):
            self.retried(f"abort the upload of {upload.key!r}", request)

    def check_uploads(self, key: str) -> None:
        try:
            self._upload_one_part(key, b"an upload of one part")
        except StoreFullError:
            raise
        except StoreError as error:
            raise StoreError(
                f"multipart uploads fail where single ones do not: {error.message}",
                "If the server does not know CRC64NVME, set store_options.checksums: when_required in the cluster file; "
                "otherwise use a server that has multipart uploads, and see that the bucket's policy allows them.",
            ) from error

    def _upload_one_part(self, key: str, data: bytes) -> None:
        with S3Writer(self, key, len(data), len(data)) as writer:
            writer.write(data)


class S3Writer(Writer):
    """A streaming multipart upload: parallel parts, bounded memory, nothing left when it fails.

    An object of less than one part is a single PUT. On any exception, also KeyboardInterrupt, running parts are waited for before
    the upload is aborted: S3 may keep a part that arrives after the abort.
    """

    def __init__(self, store: S3Store, key: str, num_bytes: int | None, part_bytes: int) -> None:
        super().__init__(key, num_bytes)
        check_key(key)
        self._store, self._part_bytes = store, part_bytes
        self._write_id = uuid.uuid4().hex
        self._buffer = io.BytesIO()
        self._upload_id = ""
        self._seats = 0
        self._pool: ThreadPoolExecutor | None = None
        self._parts: list[Future[str]] = []
        self._ended = False

    def _write(self, view: memoryview) -> None:
        done = 0
        while done < len(view):
            done += self._buffer.write(view[done : done + self._part_bytes - self._buffer.tell()])
            if self._buffer.tell() == self._part_bytes:
                self._send()

    def _send(self) -> None:
        body, self._buffer = self._buffer.getvalue(), io.BytesIO()
        self._add(lambda number: str(self._request("upload_part", number, body)["ETag"]))

    def copy_part(self, source: dict[str, str], begin: int, end: int) -> None:
        """Append bytes [begin, end) of another object of the store, copied by the server."""

        def copy(number: int) -> str:
            answer = self._request("upload_part_copy", number, None, CopySource=source, CopySourceRange=f"bytes={begin}-{end - 1}")
            return str(answer["CopyPartResult"]["ETag"])

        self._add(copy)

    def wait(self) -> None:
        """Wait until every part has arrived. Raises the first StoreError among them."""
        for part in self._parts:
            part.result()

    def _add(self, transfer: Callable[[int], str]) -> None:
        number = len(self._parts) + 1
        if number > MAX_PARTS:
            raise StoreError(
                f"{self._key!r} is larger than {MAX_PARTS} parts of {self._part_bytes:,} bytes", "Announce its size to the writer."
            )
        if self._pool is None:
            self._seats = self._store.take_seats()
            self._pool = ThreadPoolExecutor(self._seats, "upload")
            begin = functools.partial(self._store.call, "create_multipart_upload", self._key, Metadata={WRITE_ID: self._write_id})
            self._upload_id = str(self._store.retried(f"write {self._key!r}", begin)["UploadId"])
        if number > self._seats:
            self._parts[number - 1 - self._seats].result()  # bounds the parts in memory, and reports a failure now, not after hours
        self._parts.append(self._pool.submit(transfer, number))

    def _request(self, operation: str, number: int, body: bytes | None, **parameters: Any) -> dict[str, Any]:
        def attempt() -> dict[str, Any]:
            if self._ended:
                raise StoreError("its writer has ended", BUG)
            return self._store.call(operation, self._key, body, UploadId=self._upload_id, PartNumber=number, **parameters)

        return self._store.retried(f"write part {number} of {self._key!r}", attempt)

    def _commit(self) -> None:
        if not self._parts:
            self._store.put(self._key, self._buffer.getvalue())
            return
        if self._buffer.tell():
            self._send()
        self.wait()
        parts = {"Parts": [{"PartNumber": number, "ETag": part.result()} for number, part in enumerate(self._parts, 1)]}
        complete = functools.partial(self._store.call, "complete_multipart_upload", self._key)
        self._store.publish(self._key, self._write_id, lambda: complete(UploadId=self._upload_id, MultipartUpload=parts))
        self._end()

    def _abort(self, cause: BaseException) -> None:
        self._end()
        if not self._upload_id:
            return
        try:
            self._store.abort_upload(Upload(self._key, self._upload_id, datetime.datetime.now(datetime.UTC)))
        except StoreError as failure:
            cause.add_note(f"the multipart upload of {self._key!r} was left behind: {failure}")

    def _end(self) -> None:
        """Wait until no part is in flight."""
        self._ended = True
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._store.give_back(self._seats)
            self._seats = 0


class S3Source(S3Store):
    """Objects to read only, with botocore's own settings: the store's options do not apply to sources."""

    def __init__(self, url: str, *, backoff: Backoff | None = None) -> None:
        super().__init__(url, StoreOptions(), backoff=backoff)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.url,)

    def _config(self) -> dict[str, Any]:
        return {}
