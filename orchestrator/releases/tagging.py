"""Set a tag to a release."""

from __future__ import annotations

import datetime
from pathlib import Path

from orchestrator.base.errors import SpecError, StoreError
from orchestrator.releases import signing, tags
from orchestrator.releases.manifest import RELEASES, address_parts
from orchestrator.releases.reading import open_release
from orchestrator.releases.tags import Tag, tag_key
from orchestrator.spec.cluster import StoreOptions
from orchestrator.stores import open_store
from orchestrator.stores.store import ObjectExistsError

_RACES = 100


def tag(url: str, name: str, options: StoreOptions | None = None, *, sign_key: Path | None = None) -> Tag:
    """Set tag `name` to the release at `url`, signed with `sign_key` (PEM). Writes nothing when the tag is already so.

    Raises SpecError for an invalid name, ReleaseMissingError, DigestError, SignatureError for a key that cannot sign, StoreError.
    """
    if not tags.is_name(name):
        raise SpecError(
            f"{name!r} is not a valid tag name", "Use lower-case letters, digits, '.', '_' and '-', e.g. prod or llama/prod."
        )
    release = open_release(url, options=options)
    if sign_key is not None:
        signing.check_sign_key(sign_key)
    root, _, _ = release.store.url.rpartition(f"/{RELEASES}/")
    parts = address_parts(release.store.url)
    if parts is None:
        raise SpecError(f"{url} is not in a store", "Give the URL of a release: <store>/releases/<name>/<version>.")
    folder = "/".join((RELEASES, *parts))
    store = open_store(root, options)
    for _ in range(_RACES):
        last = tags.current(store, name)
        is_same = last is not None and (last.release, last.manifest_sha256) == (folder, release.digest)
        if last is not None and is_same and (sign_key is None or _is_signed(last, sign_key)):
            return last
        made = Tag(
            name=name,
            number=last.number + 1 if last else 1,
            release=folder,
            manifest_sha256=release.digest,
            created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        if sign_key is not None:
            signature = signing.sign(made.signed_digests(), name, sign_key).decode()
            made = made.model_copy(update={"signature": signature})
        try:
            store.put(tag_key(name, made.number), made.model_dump_json(indent=1).encode(), create=True)
        except ObjectExistsError:
            continue  # another process was faster: ours comes after
        return made
    raise StoreError(f"tag {name} in {root} is being set by too many processes", "Try again.")


def _is_signed(tag: Tag, key: Path) -> bool:
    return tag.signature is not None and signing.is_signed_by(tag.signature.encode(), key)
