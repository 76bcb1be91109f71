"""S3 with bulk transfer by obstore: ranged reads and streaming uploads at a fraction of s3fs's CPU time; the rest as in s3.py.

The only module that knows obstore's settings and errors. Credentials come from botocore's chain through a provider that asks again
before they expire; endpoint and region are those that botocore found. obstore's threads do not survive a fork, so a forked child
transfers through s3fs.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import os
import re
import uuid
from collections.abc import Iterator
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit

from orchestrator.base.errors import StoreError
from orchestrator.spec.cluster import StoreOptions
from orchestrator.stores.retrying import Backoff, BehindEndError, TransientError, refusal
from orchestrator.stores.s3 import WRITE_ID, S3Store, S3Writer, part_bytes
from orchestrator.stores.store import Fetched, ObjectMissingError, Writer, check_key

_REQUEST_SECONDS = 300
"""Timeout of a whole request including its body: many uploads on few cores share the network."""
_CREDENTIAL_SECONDS = 300
"""Time for which obstore keeps credentials of botocore, which renews expiring ones."""
_RETRY_SECONDS = 600
_runtime_process_id = 0


def is_wanted(options: StoreOptions) -> bool:
    """Whether obstore transfers large objects. Raises StoreError when it is requested but not installed."""
    installed = importlib.util.find_spec("obstore") is not None
    if options.transfer == "obstore" and not installed:
        advice = "pip install 'trt-orchestrator[obstore]', or leave store_options.transfer out."
        raise StoreError("obstore is not installed", advice)
    return installed and options.transfer != "s3fs"


class BotocoreCredentials:
    """obstore's credential provider: botocore's credentials, read again every few minutes."""

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


class _Clients(NamedTuple):
    """obstore's clients of one bucket, and the s3fs client whose endpoint and credentials they share."""

    of: Any
    once: Any
    """Client without retries."""
    trying: Any
    """Client that retries the parts of an upload."""


class ObstoreStore(S3Store):
    """Objects below s3://bucket/prefix, with large ones transferred by obstore."""

    _made: _Clients | None = None

    def bulk(self) -> _Clients | None:
        """obstore's clients; None in a process forked from one that had any."""
        global _runtime_process_id
        _runtime_process_id = _runtime_process_id or os.getpid()
        if _runtime_process_id != os.getpid():
            return None
        if self._made is None or self._made.of is not self.fs:
            self._made = self._make_clients()
        return self._made

    def _make_clients(self) -> _Clients:
        from obstore.store import S3Store as Client

        async def look(client: Any) -> tuple[str, str]:
            return str(client.meta.endpoint_url), str(client.meta.region_name)

        endpoint, region = self.request(look)
        arguments: Any = _where(endpoint, self.bucket, self.options) | {
            "bucket": self.bucket,
            "region": region,
            "credential_provider": BotocoreCredentials(self.options.profile),
        }
        retries: Any = _retry_config(self._backoff)
        return _Clients(self.fs, Client(**arguments, retry_config={"max_retries": 0}), Client(**arguments, retry_config=retries))

    def _fetch(self, path: str, begin: int, end: int | None) -> Fetched:
        import obstore

        bulk = self.bulk() if end is not None else None
        if bulk is None or end is None:
            return super()._fetch(path, begin, end)
        with _told_apart():
            answer = obstore.get(bulk.once, path, options={"range": (begin, end)})
            return Fetched(memoryview(answer.bytes()), (answer.meta["e_tag"] or "").strip('"'), answer.meta["size"])

    def writer(self, key: str, num_bytes: int | None = None) -> Writer:
        size = part_bytes(num_bytes)
        bulk = self.bulk() if num_bytes is None or num_bytes > size else None
        return S3Writer(self, key, num_bytes, size) if bulk is None else ObstoreWriter(self, bulk.trying, key, num_bytes, size)

    def _upload_one_part(self, key: str, data: bytes) -> None:
        import obstore

        bulk = self.bulk()
        if bulk is None:
            super()._upload_one_part(key, data)
            return

        def attempt() -> None:
            with _told_apart():
                obstore.put(bulk.once, self.path(key), data, use_multipart=True)

        self.retried(f"write {key!r}", attempt)


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
    """Turn obstore's errors into those of retrying.py. HTTP status and S3 code are only in their text."""
    from obstore.exceptions import BaseError

    try:
        yield
    except FileNotFoundError as error:
        raise ObjectMissingError(_short(error)) from None
    except (BaseError, OSError, ValueError) as error:
        raise meaning(str(error)) from None


def meaning(text: str) -> Exception:
    """Return the meaning of an obstore error from its text; without an HTTP status the network failed."""
    status = re.search(r"[Ss]tatus(?: code)?: (\d{3})", text)
    code = re.search(r"<Code>(\w+)</Code>", text)
    if status is not None:
        return refusal(int(status.group(1)), code.group(1) if code else status.group(1), _short(text))
    if "expected" in text and "range" in text.lower() and "beyond" in text:
        return BehindEndError(text)
    return TransientError(_short(text))


def _short(error: object) -> str:
    """Return the first line of obstore's message: the rest is a dump of Rust values."""
    return str(error).partition("\n")[0][:500]


class ObstoreWriter(Writer):
    """A streaming upload by obstore, which retries each part and aborts the upload when its block raises.

    After a failed end, the write-id shows whether the object was completed all the same.
    """

    def __init__(self, store: ObstoreStore, client: Any, key: str, num_bytes: int | None, part_bytes: int) -> None:
        super().__init__(key, num_bytes)
        check_key(key)
        self._store, self._client, self._part_bytes = store, client, part_bytes
        self._write_id = uuid.uuid4().hex
        self._seats = 0
        self._upload: Any = None

    def __enter__(self) -> Self:
        import obstore

        self._seats = self._store.take_seats()
        options: Any = {"attributes": {WRITE_ID: self._write_id}, "buffer_size": self._part_bytes, "max_concurrency": self._seats}
        self._upload = obstore.open_writer(self._client, self._store.path(self._key), **options)
        self._upload.__enter__()
        return self

    def _write(self, view: memoryview) -> None:
        with self._errors():
            for begin in range(0, len(view) or 1, self._part_bytes):
                # obstore keeps a reference and sends it later; callers reuse their buffers.
                self._upload.write(bytes(view[begin : begin + self._part_bytes]))

    def _commit(self) -> None:
        try:
            self._end(None)
        except StoreError:
            look = f"look at {self._key!r}"
            if not self._store.retried(look, lambda: self._store.holds_once(self._key, self._write_id)):
                raise

    def _abort(self, cause: BaseException) -> None:
        try:
            self._end(cause)
        except StoreError as failure:
            cause.add_note(f"a multipart upload of {self._key!r} may have been left behind: {failure}")

    def _end(self, cause: BaseException | None) -> None:
        """End obstore's own upload, once."""
        upload, self._upload = self._upload, None
        if upload is None:
            return
        try:
            with self._errors():
                upload.__exit__(type(cause) if cause else None, cause, None)
        finally:
            self._store.give_back(self._seats)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        with self._store.errors(f"write {self._key!r}"), _told_apart():
            yield
