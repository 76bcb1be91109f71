"""A streaming multipart upload over s3fs's connection: parts side by side, memory bounded, nothing left when it fails.

An object of less than one part is a single PUT. The upload is completed only when its block ended well and as many bytes came
as were announced; on any exception, KeyboardInterrupt too, the parts under way are waited for and the upload is aborted: S3
may keep a part that arrives after its upload was aborted.
"""

from __future__ import annotations

import datetime
import io
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from orchestrator.base.errors import BUG, StoreError
from orchestrator.stores.retrying import TransientError
from orchestrator.stores.s3_client import NoSuchUploadError
from orchestrator.stores.store import Upload

if TYPE_CHECKING:
    from orchestrator.stores.s3 import S3Store

MAX_PARTS = 10_000


class Slots:
    """How many parts are in memory and on their way at once, over all writers of a store."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = threading.BoundedSemaphore(count)

    def submit(self, pool: ThreadPoolExecutor, job: Callable[[], Any]) -> Future[Any]:
        """Run `job` in the pool; waits until there is a slot for it."""
        self._free.acquire()
        try:
            future = pool.submit(job)
        except BaseException:
            self._free.release()
            raise
        future.add_done_callback(lambda _: self._free.release())
        return future


class UploadWriter:
    """Appears under its key when the block ends well."""

    def __init__(self, store: S3Store, key: str, num_bytes: int | None, part_bytes: int, slots: Slots) -> None:
        self._store, self._key, self._num_bytes = store, key, num_bytes
        self._part_bytes, self._slots = part_bytes, slots
        self._write_id = uuid.uuid4().hex
        self._buffer = io.BytesIO()
        self._written = 0
        self._upload_id = ""
        self._parts: list[Future[str]] = []
        self._arrived = 0
        self._ended = False
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def write(self, data: bytes | bytearray | memoryview) -> int:
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            done += self._buffer.write(view[done : done + self._part_bytes - self._buffer.tell()])
            if self._buffer.tell() == self._part_bytes:
                self._send()
        self._written += len(view)
        return len(view)

    def copy_part(self, source: dict[str, str], begin: int, end: int) -> None:
        """Append bytes [begin, end) of another object of the store, which the server copies."""

        def copy(number: int) -> str:
            answer = self._request("upload_part_copy", number, None, CopySource=source, CopySourceRange=f"bytes={begin}-{end - 1}")
            return str(answer["CopyPartResult"]["ETag"])

        self._add(copy)

    def wait(self) -> None:
        """Until every part has arrived. Raises the first StoreError among them."""
        for part in self._parts:
            part.result()

    def _send(self) -> None:
        body, self._buffer = self._buffer.getvalue(), io.BytesIO()
        self._add(lambda number: str(self._request("upload_part", number, body)["ETag"]))

    def _add(self, transfer: Callable[[int], str]) -> None:
        number = len(self._parts) + 1
        if number > MAX_PARTS:
            raise StoreError(
                f"{self._key!r} is larger than {MAX_PARTS} parts of {self._part_bytes:,} bytes", "Announce its size to the writer."
            )
        while self._arrived < len(self._parts) and self._parts[self._arrived].done():
            self._parts[self._arrived].result()  # fails at the next write, not after hours
            self._arrived += 1
        if self._pool is None:
            self._begin()
        assert self._pool is not None
        self._parts.append(self._slots.submit(self._pool, lambda: transfer(number)))

    def _begin(self) -> None:
        metadata = {"write-id": self._write_id}
        self._pool = ThreadPoolExecutor(self._slots.count, "upload")
        answer = self._store.retried(
            f"write {self._key!r}", lambda: self._store.call("create_multipart_upload", self._key, Metadata=metadata)
        )
        self._upload_id = str(answer["UploadId"])

    def _request(self, operation: str, number: int, body: bytes | None, **parameters: Any) -> dict[str, Any]:
        def attempt() -> dict[str, Any]:
            if self._ended:
                raise StoreError("its writer has ended", BUG)
            return self._store.call(operation, self._key, body, UploadId=self._upload_id, PartNumber=number, **parameters)

        return self._store.retried(f"write part {number} of {self._key!r}", attempt)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        try:
            if kind is None:
                self._commit()
        except BaseException as failure:
            self._abort(failure)
            raise
        else:
            if error is not None:
                self._abort(error)
        finally:
            if self._pool is not None:
                self._pool.shutdown()

    def _commit(self) -> None:
        if self._num_bytes is not None and self._written != self._num_bytes:
            raise StoreError(f"{self._key!r}: {self._written} bytes were written, {self._num_bytes} announced", BUG)
        if not self._parts:
            self._store.put_as(self._key, self._buffer.getvalue(), self._write_id)
            return
        if self._buffer.tell():
            self._send()
        self.wait()
        parts = [{"PartNumber": number, "ETag": part.result()} for number, part in enumerate(self._parts, 1)]
        self._complete(parts)

    def _complete(self, parts: list[dict[str, Any]]) -> None:
        doubtful = False

        def attempt() -> None:
            nonlocal doubtful
            if doubtful and self._store.holds_once(self._key, self._write_id):
                return
            try:
                self._store.call("complete_multipart_upload", self._key, UploadId=self._upload_id, MultipartUpload={"Parts": parts})
            except TransientError:
                doubtful = True
                raise
            except NoSuchUploadError:  # completed by a request whose answer was lost, or aborted by others
                if not self._store.holds_once(self._key, self._write_id):
                    raise

        self._store.retried(f"write {self._key!r}", attempt)

    def _abort(self, cause: BaseException) -> None:
        self._ended = True
        if self._pool is None:
            return
        self._pool.shutdown(wait=True, cancel_futures=True)
        if not self._upload_id:
            return
        try:
            self._store.abort_upload(Upload(self._key, self._upload_id, datetime.datetime.now(datetime.UTC)))
        except StoreError as failure:
            cause.add_note(f"the multipart upload of {self._key!r} was left behind: {failure}")
