"""List the releases of a store with their tags."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.base.errors import DigestError, SchemaVersionError, SpecError
from orchestrator.releases.manifest import MANIFEST, Manifest
from orchestrator.releases.reading import open_release
from orchestrator.releases.tags import current_tags
from orchestrator.spec.cluster import StoreOptions
from orchestrator.stores import open_store
from orchestrator.stores.store import Store, check_present

RELEASES = "releases/"
SELECTORS = ("backend", "precision", "tp", "pp", "gpu")


@dataclass(frozen=True, slots=True)
class Listed:
    """One release of a store."""

    folder: str
    """Folder in the store, e.g. releases/llama/1."""
    manifest: Manifest | None
    """The manifest. None: it cannot be read."""
    problem: str = ""
    """Reason why the manifest cannot be read; empty: it can."""
    is_signed: bool = False
    tags: tuple[str, ...] = ()


def list_releases(url: str, selectors: Mapping[str, str] | None = None, options: StoreOptions | None = None) -> list[Listed]:
    """Return the releases of the store at `url`, by name and version; with `selectors`, only those with these values.

    An unreadable release is listed with the reason, unless selectors are given.
    Raises SpecError for an unknown selector, DigestError for a damaged tag, StoreError.
    """
    wanted = dict(selectors or {})
    unknown = sorted(set(wanted) - set(SELECTORS))
    if unknown:
        raise SpecError(f"there is no selector {unknown[0]!r}", f"Selectors: {', '.join(SELECTORS)}.")
    store = open_store(url, options)
    check_present(store)
    tags: dict[str, list[str]] = {}
    for tag in current_tags(store):
        tags.setdefault(tag.release, []).append(tag.name)
    found = [_listed(store, folder, tuple(tags.get(folder, ())), options) for folder in release_folders(store)]
    return [item for item in found if _matches(item, wanted)]


def release_folders(store: Store) -> list[str]:
    """Return releases/<name>/<version> of every manifest in the store."""
    keys = (info.key for info in store.list(RELEASES))
    return sorted(key.removesuffix("/" + MANIFEST) for key in keys if key.count("/") == 3 and key.endswith("/" + MANIFEST))


def _listed(store: Store, folder: str, tags: tuple[str, ...], options: StoreOptions | None) -> Listed:
    try:
        release = open_release(f"{store.url}/{folder}", options=options)
    except (DigestError, SchemaVersionError) as error:
        return Listed(folder, None, error.message, tags=tags)
    return Listed(folder, release.manifest, is_signed=release.signature() is not None, tags=tags)


def _matches(item: Listed, wanted: Mapping[str, str]) -> bool:
    if not wanted:
        return True
    return item.manifest is not None and all(str(getattr(item.manifest.selectors, name)) == value for name, value in wanted.items())
