"""Names that move: tags/<name>/<number>.json, append-only, the highest number counts.

Each version is written put-if-absent, so two people who tag at once get two versions and none is lost. It needs no
conditional overwrite, which some object stores have not, and the history stays.
"""

from __future__ import annotations

import datetime
import re

from pydantic import BaseModel, ConfigDict, ValidationError

from orchestrator.core.errors import DigestError, SpecError, StoreError
from orchestrator.core.spec import StoreOptions
from orchestrator.stores import ObjectExistsError, Store, open_store

TAGS = "tags/"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}(/[a-z0-9][a-z0-9._-]{0,63})*")
_NUMBER_DIGITS = 8
_RACES = 100


class Tag(BaseModel):
    """One version of a tag."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str
    number: int
    """From 1; the highest counts."""
    release: str
    """Folder of the release in the store, e.g. releases/llama/1."""
    manifest_sha256: str
    """Of the manifest that was tagged: another one under the same address is refused."""
    created_at: str


def tag(url: str, name: str, options: StoreOptions | None = None) -> Tag:
    """Let `name` stand for the release at `url` from now on; nothing is written when it does already.

    Raises SpecError for what is no name, ReleaseMissingError, DigestError, StoreError.
    """
    from orchestrator.releases.reading import open_release

    if not is_name(name):
        raise SpecError(
            f"{name!r} is no name of a tag", "Use lower-case letters, digits, '.', '_' and '-', e.g. prod or llama/prod."
        )
    release = open_release(url, options=options)
    root, marked, folder = release.store.url.rpartition("/releases/")
    if not marked:
        raise SpecError(f"{url} is not in a store", "Give the URL of a release: <store>/releases/<name>/<version>.")
    store = open_store(root, options)
    for _ in range(_RACES):
        last = current(store, name)
        if last is not None and (last.release, last.manifest_sha256) == (f"releases/{folder}", release.digest):
            return last
        made = Tag(
            name=name,
            number=last.number + 1 if last else 1,
            release=f"releases/{folder}",
            manifest_sha256=release.digest,
            created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        try:
            store.put(_key(name, made.number), made.model_dump_json(indent=1).encode(), create=True)
        except ObjectExistsError:
            continue  # someone else was faster: ours comes after his
        return made
    raise StoreError(f"tag {name} in {root} is being set by too many others", "Try again.")


def is_name(name: str) -> bool:
    """Whether a tag can be called so."""
    return _NAME.fullmatch(name) is not None


def current(store: Store, name: str) -> Tag | None:
    """The version that counts; None when there is no such tag. Raises DigestError when it cannot be read."""
    prefix = f"{TAGS}{name}/"
    numbers = [number for info in store.list(prefix) if (number := _number(info.key[len(prefix) :])) is not None]
    return _load(store, name, max(numbers)) if numbers else None


def current_tags(store: Store) -> list[Tag]:
    """Every tag of a store, by name."""
    highest: dict[str, int] = {}
    for info in store.list(TAGS):
        name, _, last = info.key[len(TAGS) :].rpartition("/")
        number = _number(last)
        if name and number is not None:
            highest[name] = max(number, highest.get(name, 0))
    return [_load(store, name, number) for name, number in sorted(highest.items())]


def _load(store: Store, name: str, number: int) -> Tag:
    key = _key(name, number)
    try:
        found = Tag.model_validate_json(store.get(key))
    except ValidationError:
        raise DigestError(f"{store.url}/{key} is no version of a tag", "Set the tag anew.") from None
    if (found.name, found.number) != (name, number):
        raise DigestError(f"{store.url}/{key} is version {found.number} of tag {found.name}", "Set the tag anew.")
    return found


def _key(name: str, number: int) -> str:
    return f"{TAGS}{name}/{number:0{_NUMBER_DIGITS}d}.json"


def _number(last: str) -> int | None:
    match = re.fullmatch(rf"(\d{{{_NUMBER_DIGITS}}})\.json", last)
    return int(match.group(1)) if match else None
