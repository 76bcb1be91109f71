"""Tags, names that move between releases: tags/<name>/<number>.json, append-only, the highest number counts.

Each version is written put-if-absent, so two people who tag at once get two versions and none is lost. This needs no conditional
overwrite, which some object stores lack, and keeps the history.

A signed version vouches for the tag's release. Without a signature, anyone who may write to the store can set a tag to any other
signed release, such as an old one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from orchestrator.base.digest import digest_of
from orchestrator.base.errors import DigestError, SignatureError
from orchestrator.releases import signing
from orchestrator.releases.manifest import RELEASES
from orchestrator.stores.store import Store

TAGS = "tags/"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}(/[a-z0-9][a-z0-9._-]{0,63})*")
_NUMBER_DIGITS = 8
_LIMIT_BYTES = 2**20
_SIGNATURE = "signature"


class Tag(BaseModel):
    """One version of a tag."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str
    number: int
    """Version of the tag from 1 on; the highest counts."""
    release: Annotated[str, Field(pattern=rf"^{RELEASES}/[a-z0-9][a-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Folder of the release in the store, e.g. releases/llama/1."""
    manifest_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """Digest of the tagged manifest: another manifest at the same address is refused."""
    created_at: str
    signature: str | None = None
    """Signature of the other fields, made by signing.py; None: not signed."""

    def signed_digests(self) -> dict[str, str]:
        """Return the digests that a signature of the tag covers: all other fields, under the tag's own key."""
        return {tag_key(self.name, self.number): digest_of(self.model_dump(mode="json", exclude={_SIGNATURE}))}


def check_signature(tag: Tag, public_key: Path) -> None:
    """Check that the owner of `public_key` set this tag to this release. Raises SignatureError."""
    advice = "Give the URL of the release, or have its publisher tag it with --sign-key."
    if tag.signature is None:
        raise SignatureError(f"tag {tag.name} (version {tag.number}) is not signed: anyone may have set it", advice)
    if signing.signed_files(tag.signature.encode(), public_key) != tag.signed_digests():
        raise SignatureError(f"the signature of tag {tag.name} (version {tag.number}) belongs to another version", advice)


def is_name(name: str) -> bool:
    """Whether `name` is a valid tag name."""
    return _NAME.fullmatch(name) is not None


def current(store: Store, name: str) -> Tag | None:
    """Return the version that counts; None when the tag is missing. Raises DigestError when it cannot be read."""
    prefix = f"{TAGS}{name}/"
    numbers = [number for info in store.list(prefix) if (number := _number(info.key[len(prefix) :])) is not None]
    return _load(store, name, max(numbers)) if numbers else None


def current_tags(store: Store) -> list[Tag]:
    """Return every tag of a store, by name."""
    highest: dict[str, int] = {}
    for info in store.list(TAGS):
        name, _, last = info.key[len(TAGS) :].rpartition("/")
        number = _number(last)
        if name and number is not None:
            highest[name] = max(number, highest.get(name, 0))
    return [_load(store, name, number) for name, number in sorted(highest.items())]


def _load(store: Store, name: str, number: int) -> Tag:
    key = tag_key(name, number)
    try:
        if (store.size(key) or 0) > _LIMIT_BYTES:
            raise DigestError(f"{store.url}/{key} is too large for a version of a tag", "Set the tag again.")
        found = Tag.model_validate_json(store.get(key), strict=True)
    except ValidationError:
        raise DigestError(f"{store.url}/{key} is not a version of a tag", "Set the tag again.") from None
    if (found.name, found.number) != (name, number):
        raise DigestError(f"{store.url}/{key} is version {found.number} of tag {found.name}", "Set the tag again.")
    return found


def tag_key(name: str, number: int) -> str:
    """Return the key of one version of a tag."""
    return f"{TAGS}{name}/{number:0{_NUMBER_DIGITS}d}.json"


def _number(last: str) -> int | None:
    match = re.fullmatch(rf"(\d{{{_NUMBER_DIGITS}}})\.json", last)
    return int(match.group(1)) if match else None
