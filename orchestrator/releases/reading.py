"""Find a release by its URL or by a tag, and check its manifest.

    <store>/releases/<name>/<version>        a release (the URL that `build` prints; /manifest.json may follow)
    <store>/tags/<name>                      the release that the tag names now
    a pulled folder                          with files under their paths

A changed manifest, or one of another release than the address names, is refused here, before its content is used. With a public
key, everything that led to the release must be signed with it: the manifest, and the tag.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from orchestrator.base.digest import digest_bytes
from orchestrator.base.errors import DigestError, ReleaseMissingError, SignatureError
from orchestrator.releases import tags
from orchestrator.releases.manifest import (
    LIMIT_BYTES,
    MANIFEST,
    SIGNATURE,
    FileRecord,
    Manifest,
    Part,
    parse_manifest,
    signature_key,
)
from orchestrator.spec.cluster import StoreOptions
from orchestrator.stores import open_store
from orchestrator.stores.store import Store

_SIGNATURE_LIMIT_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Release:
    """A release whose manifest was read. `store` is rooted in the release's folder."""

    store: Store
    data: bytes
    """Stored bytes of the manifest, which the signature covers, with fields of newer programs."""
    manifest: Manifest = field(repr=False)
    tag: tags.Tag | None = None
    """Tag by which the release was found."""
    signer: str = ""
    """Fingerprint of the signing key; empty: no key was given to check the signature."""

    @cached_property
    def digest(self) -> str:
        return digest_bytes(self.data)

    @property
    def title(self) -> str:
        return f"{self.manifest.name} {self.manifest.version}"

    def signature(self) -> bytes | None:
        """The signature of this very manifest; None when it is not signed."""
        for key in (signature_key(self.digest), SIGNATURE):
            size = self.store.size(key)
            if size is not None and size <= _SIGNATURE_LIMIT_BYTES:
                return self.store.get(key)
        return None

    def signed_digests(self) -> dict[str, str]:
        """Digests that a signature covers: every file of a whole pulled release by path, and the manifest."""
        return {**{file.path: file.sha256 for file in self.manifest.all_files()}, MANIFEST: self.digest}

    def files_of(self, ranks: set[int], parts: Collection[Part]) -> list[FileRecord]:
        """Return the files of some parts that these ranks need, each path once. Raises ReleaseMissingError for a missing part."""
        missing = [part for part in parts if part not in self.manifest.parts]
        if missing:
            raise ReleaseMissingError(
                f"{self.title} has no {missing[0]} part, it has: {', '.join(self.manifest.parts)}",
                f"Build a version with release.include: [engines, {missing[0]}] in the spec; steps are not repeated.",
            )
        return list({file.path: file for file in self.manifest.files_of(ranks, parts)}.values())


def open_release(url: str, public_key: Path | None = None, options: StoreOptions | None = None) -> Release:
    """Read the release at `url`, which may be a tag's URL.

    With `public_key` (PEM, P-256) its signature and that of the tag are checked. Raises ReleaseMissingError, SchemaVersionError,
    ReleaseAddressError for the manifest of another release, DigestError for a damaged one, SignatureError when it is not signed
    with that key, StoreError.
    """
    address = url.removesuffix("/" + MANIFEST).rstrip("/")
    release = _read(address, options) or _tagged(address, options)
    if release is None:
        raise ReleaseMissingError(
            f"there is no release at {address}", "Give the URL that `orchestrator build` printed, or the URL of a tag."
        )
    if public_key is None:
        return release
    from orchestrator.releases.signing import fingerprint

    if release.tag is not None:
        tags.check_signature(release.tag, public_key)
    check_signature(release, public_key)
    return replace(release, signer=fingerprint(public_key))


def read_release(url: str) -> tuple[Store, Manifest]:
    """Return the store and the manifest of the release at `url`. Raises as `open_release`."""
    release = open_release(url)
    return release.store, release.manifest


def check_signature(release: Release, public_key: Path) -> None:
    """Check that the owner of `public_key` signed this very manifest and every file that it names. Raises SignatureError."""
    from orchestrator.releases.signing import signed_files

    signature = release.signature()
    if signature is None:
        raise SignatureError(f"{release.title} at {release.store.url} has no signature for its manifest")
    signed, stated = signed_files(signature, public_key), release.signed_digests()
    wrong = sorted(path for path in signed.keys() | stated.keys() if signed.get(path) != stated.get(path))
    if wrong:
        raise SignatureError(f"the signature of {release.title} at {release.store.url} covers other files: {', '.join(wrong[:5])}")


def _read(address: str, options: StoreOptions | None) -> Release | None:
    store = open_store(address, options)
    size = store.size(MANIFEST)
    if size is None:
        return None
    if size > LIMIT_BYTES:
        raise DigestError(f"{address}/{MANIFEST} has {size:,} bytes, more than a manifest can have")
    data = store.get(MANIFEST)
    return Release(store, data, parse_manifest(data, f"{address}/{MANIFEST}"))


def _tagged(address: str, options: StoreOptions | None) -> Release | None:
    """Return the release of a tag if `address` is a tag's. Raises DigestError when the release is not the one that was tagged."""
    root, marked, name = address.rpartition("/" + tags.TAGS)
    found = tags.current(open_store(root, options), name) if marked and tags.is_name(name) else None
    if found is None:
        return None
    release = _read(f"{root}/{found.release}", options)
    if release is None:
        raise ReleaseMissingError(f"tag {name} names {found.release}, which is gone from {root}", "Set the tag again.")
    if release.digest != found.manifest_sha256:
        raise DigestError(f"tag {name} names another manifest than the one at {root}/{found.release} now")
    return replace(release, tag=found)
