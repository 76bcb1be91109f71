"""Stores, where bytes are written, and sources, where a checkpoint is read. The scheme of a URL chooses the class."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from orchestrator.base.errors import StoreError
from orchestrator.base.urls import ADVICE, holds_secret, is_url, refuse_secret
from orchestrator.spec.cluster import StoreOptions
from orchestrator.stores.file import FileStore
from orchestrator.stores.fsspec import FsspecStore, check_scheme
from orchestrator.stores.hub import HubStore, is_hub
from orchestrator.stores.obstore import ObstoreStore, is_wanted
from orchestrator.stores.remote import RemoteFolder
from orchestrator.stores.s3 import S3Source, S3Store
from orchestrator.stores.source import LocalFolder, SourceFolder
from orchestrator.stores.store import Store

_S3 = frozenset({"s3", "s3a"})


def open_store(url: str, options: StoreOptions | None = None) -> Store:
    """Open the store at `url`: file:///folder, memory://name, s3://bucket/prefix, or any URL that fsspec knows.

    Nothing is connected yet. Raises StoreError.
    """
    scheme = urlsplit(url).scheme
    if holds_secret(url):
        raise StoreError("the URL of the store holds a user, password or query", ADVICE)
    if not scheme:
        raise StoreError(f"store {url!r} has no scheme", "Write file:///absolute/folder, s3://bucket/prefix, ...")
    if scheme == "file":
        return FileStore(url)
    if scheme in _S3:
        options = options or StoreOptions()
        return ObstoreStore(url, options) if is_wanted(options) else S3Store(url, options)
    check_scheme(url, "store")
    return FsspecStore(url)


def open_source(url: str) -> SourceFolder:
    """Open the source at `url`: a local path, a file:// URL, or any URL that fsspec knows.

    Raises StoreError for a scheme that fsspec does not know, SpecError for a URL with a password.
    """
    if not is_url(url):
        return LocalFolder(Path(url))
    if url.startswith("file://"):
        return LocalFolder(Path(unquote(urlsplit(url).path)))
    refuse_secret(url, "source.path")
    if is_hub(url):
        return RemoteFolder(HubStore(url))
    if urlsplit(url).scheme in _S3:
        return RemoteFolder(S3Source(url))
    check_scheme(url, "source")
    return RemoteFolder(FsspecStore(url))
