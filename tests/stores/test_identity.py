"""How files of a source are known: touching one changes nothing where its content is written down; changing one always does."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator import building
from orchestrator.base.errors import ReleaseExistsError, SourceCorruptError
from orchestrator.planning import preparation
from orchestrator.spec.cluster import ClusterSpec
from orchestrator.stores import identity
from orchestrator.stores.remote import _identity
from orchestrator.stores.source import LocalFolder
from tests.support.releases import publish_tiny, release_spec, tiny_source

NAME = "model.safetensors"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny_source(tmp_path / "source")


def sha256(source: Path) -> str:
    return hashlib.sha256((source / NAME).read_bytes()).hexdigest()


def by_hub(source: Path) -> None:
    """As `hf download --local-dir` does, by its own code."""
    from huggingface_hub._local_folder import write_download_metadata

    write_download_metadata(source, NAME, "0" * 40, sha256(source))


def by_sums(source: Path) -> None:
    (source / "SHA256SUMS").write_text(f"{'0' * 64}  other.safetensors\n{sha256(source)}  {NAME}\n")


def by_sidecar(source: Path) -> None:
    (source / f"{NAME}.sha256").write_text(f"{sha256(source)}  {NAME}\n")


def found(source: Path) -> str:
    return LocalFolder(source).source_file(NAME).identity


def flip(source: Path) -> None:
    with (source / NAME).open("r+b") as file:
        file.seek(-9, os.SEEK_END)
        byte = file.read(1)
        file.seek(-9, os.SEEK_END)
        file.write(bytes([byte[0] ^ 4]))


claims = pytest.mark.parametrize("claim", [by_hub, by_sums, by_sidecar])


@claims
def test_build_key_touched_file_whose_content_is_written_down_is_the_same(source: Path, claim: Callable[[Path], None]) -> None:
    claim(source)
    before = preparation.plan(release_spec(source))
    assert found(source) == f"sha256:{sha256(source)}"
    (source / NAME).touch()
    assert preparation.plan(release_spec(source)).build_key == before.build_key


@claims
def test_build_key_changed_file_is_another_whatever_is_written_down(source: Path, claim: Callable[[Path], None]) -> None:
    claim(source)
    before, state = preparation.plan(release_spec(source)), (source / NAME).stat()
    flip(source)
    os.utime(source / NAME, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert preparation.plan(release_spec(source)).build_key != before.build_key
    assert found(source) == f"sha256:{sha256(source)}"


@claims
def test_identity_claim_that_is_older_than_the_file_is_not_believed_and_nothing_is_read(
    source: Path, claim: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that was copied over another one, with its own time: nobody knows what it holds, nobody reads 700 GB to find out."""
    claim(source)
    state = (source / NAME).stat()
    data = (source / NAME).read_bytes()
    (source / NAME).unlink()
    (source / NAME).write_bytes(data)
    os.utime(source / NAME, ns=(state.st_atime_ns, state.st_mtime_ns))
    monkeypatch.setattr(identity, "_hashed", None)
    assert found(source) == f"mtime:{state.st_mtime_ns}"


def test_identity_file_is_read_once_after_a_touch(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_sums(source)
    reads: list[Path] = []
    honest = identity._hashed

    def hashed(path: Path, state: os.stat_result) -> str | None:
        reads.append(path)
        return honest(path, state)

    monkeypatch.setattr(identity, "_hashed", hashed)
    found(source)
    assert reads == []
    (source / NAME).touch()
    assert {found(source) for _ in range(5)} == {f"sha256:{sha256(source)}"}
    assert reads == [source / NAME]


def test_identity_cache_that_others_may_write_is_not_believed(source: Path, cache: Path) -> None:
    by_sums(source)
    found(source)
    (source / NAME).touch()
    (cache / "trt-orchestrator" / "sources").chmod(0o777)
    assert found(source).startswith("mtime:")


@pytest.mark.parametrize("home", ["", "/proc/nothing"])
def test_identity_without_a_cache_folder_still_believes_what_is_written_down(
    source: Path, home: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nothing")
    monkeypatch.setenv("HOME", home)
    by_sums(source)
    assert found(source) == f"sha256:{sha256(source)}"


@claims
def test_open_on_a_node_that_knows_less_than_the_driver_takes_the_planned_file_alone(
    source: Path, claim: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim(source)
    found(source)
    (source / NAME).touch()
    planned = LocalFolder(source).source_file(NAME)
    assert planned.identity.startswith("sha256:")
    for node in ("one", "two"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / node))
        if node == "two":
            flip(source)
            with (
                LocalFolder(source).open((planned,)) as opened,
                pytest.raises(SourceCorruptError, match="is not the file that the plan"),
            ):
                opened.read_into(0, 0, memoryview(bytearray(8)))
            return
        with LocalFolder(source).open((planned,)) as opened:
            opened.read_into(0, 0, memoryview(bytearray(8)))


def test_open_on_a_node_that_knows_more_than_the_driver_goes_by_the_time(source: Path) -> None:
    planned = LocalFolder(source).source_file(NAME)
    assert planned.identity.startswith("mtime:")
    by_sums(source)
    with LocalFolder(source).open((planned,)) as opened:
        opened.read_into(0, 0, memoryview(bytearray(8)))


SHA = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({"size": 5, "ETag": '"5d41"', "ChecksumSHA256": "LPJNul+wow4m6DsqxbninhsWHlwfp0JecwQzYpOLmCQ="}, f"sha256:{SHA}"),
        ({"size": 5, "ETag": '"5d41-2"', "ChecksumSHA256": "LPJNul+wow4m6DsqxbninhsWHlwfp0JecwQzYpOLmCQ=-2"}, "etag:5d41-2"),
        (
            {
                "size": 5,
                "ETag": "5d41-2",
                "ChecksumSHA256": "LPJNul+wow4m6DsqxbninhsWHlwfp0JecwQzYpOLmCQ=",
                "ChecksumType": "COMPOSITE",
            },
            "etag:5d41-2",
        ),
        ({"size": 5, "lfs": {"sha256": SHA, "size": 5}, "blob_id": "ab"}, f"sha256:{SHA}"),
        ({"size": 5, "etag": "CJj=", "md5Hash": "XUFAKrxLKna5cZ2REBfFkg=="}, "md5:XUFAKrxLKna5cZ2REBfFkg=="),
        ({"size": 5, "mtime": 1}, "time:1"),
    ],
)
def test_identity_of_an_object_is_its_content_where_the_store_knows_it(info: dict[str, object], expected: str) -> None:
    assert _identity(info) == expected


def test_build_published_by_another_build_says_that_only_a_time_differs(tmp_path: Path) -> None:
    published = publish_tiny(tmp_path)
    os.utime(tmp_path / "source" / NAME, ns=(1, 1_700_000_001_000_000_000))
    with pytest.raises(ReleaseExistsError, match=r"model\.safetensors: only its time of modification differs") as caught:
        building.build(published.plan.spec, ClusterSpec(store=published.store.url))
    assert "touch --date=@1700000000.000000000" in caught.value.advice
    assert "SHA256SUMS" in caught.value.advice


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda source: (source / "tokenizer.json").write_text('{"version": "1.1"}'), r"tokenizer\.json: other content"),
        (lambda source: (source / "tokenizer.json").write_text('{"version": "1.10"}'), r"tokenizer\.json: 19 bytes, then 18"),
        (lambda source: (source / "merges.txt").write_text("a b"), r"merges\.txt: new"),
        (lambda source: (source / "tokenizer.json").unlink(), r"tokenizer\.json: gone"),
        (by_sums, r"model\.safetensors: known by its content now, by its time of modification then"),
    ],
)
def test_build_published_by_another_build_says_which_file_differs_and_how(
    tmp_path: Path, change: Callable[[Path], object], said: str
) -> None:
    published = publish_tiny(tmp_path)
    change(tmp_path / "source")
    with pytest.raises(ReleaseExistsError, match=said) as caught:
        building.build(published.plan.spec, ClusterSpec(store=published.store.url))
    assert "touch" not in caught.value.advice


def test_build_published_by_another_build_says_what_else_differs(tmp_path: Path) -> None:
    published = publish_tiny(tmp_path)
    spec = published.plan.spec
    other = spec.model_copy(update={"engine": spec.engine.model_copy(update={"max_batch_size": 1})})
    with pytest.raises(ReleaseExistsError, match=r"engine\.max_batch_size: 1, then 2"):
        building.build(other, ClusterSpec(store=published.store.url))
