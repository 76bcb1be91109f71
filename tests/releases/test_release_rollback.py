"""What a signature does not cover: addresses, tags, copies. Each is planted in a store and must be refused by every reader."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from orchestrator.base.errors import DigestError, ReleaseAddressError, SignatureError
from orchestrator.cli.commands import app
from orchestrator.events import Planned, Published, encode_line
from orchestrator.releases import list_releases, open_release, pull, tag, verify
from orchestrator.releases.manifest import MANIFEST, Chunks, address_parts
from orchestrator.releases.signing import fingerprint
from orchestrator.report.journal import segment_key
from orchestrator.stores import open_store
from orchestrator.submit.watching import Watch, find_run
from tests.support.releases import Published as Release
from tests.support.releases import copy_release, make_keys, publish_tiny, reseal


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def _signed(tmp_path_factory: pytest.TempPathFactory, keys: tuple[Path, Path]) -> Release:
    return publish_tiny(tmp_path_factory.mktemp("signed"), keys[0])


@pytest.fixture
def signed(_signed: Release, tmp_path: Path) -> Release:
    """A copy to spoil."""
    root = Path(shutil.copytree(_signed.store.url.removeprefix("file://"), tmp_path / "store"))
    folder = root / "releases" / "tiny" / "1"
    return Release(folder.as_uri(), _signed.manifest, open_store(root.as_uri()), folder, _signed.plan)


def _run(*words: str) -> Any:
    return CliRunner().invoke(app, [*words])


@pytest.fixture(params=[("tiny", "2"), ("other", "1")], ids=["version", "name"])
def misplaced(signed: Release, request: pytest.FixtureRequest) -> str:
    """URL of a signed release, copied byte for byte to another name or version."""
    name, version = request.param
    return Path(shutil.copytree(signed.folder, signed.folder.parents[1] / name / version)).as_uri()


@pytest.mark.parametrize("command", ["pull", "verify", "inspect", "tag"])
@pytest.mark.parametrize("with_key", [True, False], ids=["key", "no-key"])
def test_signed_release_copied_to_another_address_is_refused_by_every_command(
    misplaced: str, keys: tuple[Path, Path], tmp_path: Path, command: str, with_key: bool
) -> None:
    words = {
        "pull": ["pull", misplaced, "--output", str(tmp_path / "out"), "--no-check"],
        "verify": ["verify", misplaced],
        "inspect": ["inspect", misplaced],
        "tag": ["tag", misplaced, "prod"],
    }[command]
    done = _run(*words, *(["--public-key", str(keys[1])] if with_key and command != "tag" else []))
    assert done.exit_code == ReleaseAddressError.exit_code, done.output
    assert "but holds the manifest of tiny 1" in " ".join(done.output.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("way", ["{}/", "{}/manifest.json", "{}/.", "{}//", "{}/../{last}"])
def test_misplaced_release_is_refused_however_its_address_is_written(misplaced: str, way: str) -> None:
    with pytest.raises(ReleaseAddressError):
        open_release(way.format(misplaced, last=misplaced.rpartition("/")[2]))


def test_misplaced_release_is_listed_with_its_problem(misplaced: str, signed: Release) -> None:
    problems = {item.folder: item.problem for item in list_releases(signed.store.url)}
    assert problems.pop("releases/tiny/1") == ""
    assert all("but holds the manifest of tiny 1" in problem for problem in problems.values())


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("s3://b/e/releases/llama/1", ("llama", "1")),
        ("s3://b/releases/llama/1/manifest.json", ("llama", "1")),
        ("memory://releases/llama/1", ("llama", "1")),
        ("releases/llama/1/manifest.json", ("llama", "1")),
        ("file:///s/releases/llama/%31", ("llama", "1")),
        ("file:///s/releases/x/../llama/./1/", ("llama", "1")),
        ("file:///models/pulled", None),
        ("s3://b/releases/llama/1/more", None),
    ],
)
def test_address_parts_are_the_name_and_version_that_it_states(address: str, parts: tuple[str, str] | None) -> None:
    assert address_parts(address) == parts


def test_pulled_folder_has_no_address_and_verifies_anywhere(signed: Release, keys: tuple[Path, Path], tmp_path: Path) -> None:
    pull(signed.url, tmp_path / "pulled", check=False)
    assert verify((tmp_path / "pulled").as_uri(), keys[1]).release.signer == fingerprint(keys[1])


def test_unsigned_copy_is_refused_with_a_key(signed: Release, keys: tuple[Path, Path]) -> None:
    copy = copy_release(signed, "tiny", "2")
    with pytest.raises(SignatureError, match="no signature"):
        verify(copy.url, keys[1])


def test_signature_of_another_version_beside_a_manifest_is_refused(signed: Release, keys: tuple[Path, Path]) -> None:
    copy = copy_release(signed, "tiny", "2")
    (signature,) = (signed.folder / "signatures").iterdir()
    (copy.folder / "signatures").mkdir()
    shutil.copy(signature, copy.folder / "signatures" / f"{open_release(copy.url).digest}.sig")
    with pytest.raises(SignatureError, match=r"covers other files: manifest\.json"):
        verify(copy.url, keys[1])


def test_signed_manifest_with_another_schema_version_is_refused(signed: Release, keys: tuple[Path, Path]) -> None:
    reseal(signed, schema_version=1, media_type="application/other")
    with pytest.raises(SignatureError):
        open_release(signed.url, keys[1])


def _tag_file(signed: Release, number: int) -> Path:
    return Path(signed.store.url.removeprefix("file://")) / "tags" / "prod" / f"{number:08d}.json"


def test_tag_signed_with_the_key_is_followed_and_names_its_signer(signed: Release, keys: tuple[Path, Path]) -> None:
    made = tag(signed.url, "prod", sign_key=keys[0])
    found = open_release(f"{signed.store.url}/tags/prod", keys[1])
    assert (found.tag, found.signer) == (made, fingerprint(keys[1]))
    assert tag(signed.url, "prod", sign_key=keys[0]) == made


def test_unsigned_tag_is_refused_with_a_key_and_followed_without(signed: Release, keys: tuple[Path, Path]) -> None:
    tag(signed.url, "prod")
    assert open_release(f"{signed.store.url}/tags/prod").title == "tiny 1"
    with pytest.raises(SignatureError, match="is not signed"):
        open_release(f"{signed.store.url}/tags/prod", keys[1])
    assert tag(signed.url, "prod", sign_key=keys[0]).number == 2


def test_tag_set_back_to_an_older_signed_release_is_refused(signed: Release, keys: tuple[Path, Path]) -> None:
    newer = copy_release(signed, "tiny", "2", keys[0])
    tag(newer.url, "prod", sign_key=keys[0])
    tag(signed.url, "prod")  # by somebody who may write to the store and has no key
    with pytest.raises(SignatureError, match="is not signed"):
        pull(f"{signed.store.url}/tags/prod", Path("out"), public_key=keys[1])


def test_tag_with_the_signature_of_another_version_is_refused(signed: Release, keys: tuple[Path, Path]) -> None:
    newer = copy_release(signed, "tiny", "2", keys[0])
    tag(signed.url, "prod", sign_key=keys[0])
    tag(newer.url, "prod", sign_key=keys[0])
    old = json.loads(_tag_file(signed, 1).read_text())
    _tag_file(signed, 3).write_text(json.dumps({**old, "number": 3}))
    with pytest.raises(SignatureError, match="belongs to another version"):
        open_release(f"{signed.store.url}/tags/prod", keys[1])


def test_tag_signed_with_another_key_is_refused(signed: Release, keys: tuple[Path, Path], tmp_path: Path) -> None:
    tag(signed.url, "prod", sign_key=make_keys(tmp_path / "other")[0])
    with pytest.raises(SignatureError):
        open_release(f"{signed.store.url}/tags/prod", keys[1])


@pytest.mark.parametrize("release", ["releases/tiny/1/../2", "steps/ab/1", "../store/releases/tiny/1", "releases/tiny", "/etc"])
def test_tag_that_stands_for_no_release_of_its_store_is_refused(signed: Release, release: str) -> None:
    tag(signed.url, "prod")
    plain = json.loads(_tag_file(signed, 1).read_text())
    _tag_file(signed, 1).write_text(json.dumps({**plain, "release": release}))
    with pytest.raises(DigestError, match="not a version of a tag"):
        open_release(f"{signed.store.url}/tags/prod")


def test_tag_of_a_release_that_was_replaced_by_another_is_refused(signed: Release) -> None:
    newer = copy_release(signed, "tiny", "2")
    tag(newer.url, "prod")
    shutil.copy(signed.folder / MANIFEST, newer.folder / MANIFEST)
    with pytest.raises(ReleaseAddressError):
        open_release(f"{signed.store.url}/tags/prod")


def test_verify_two_records_of_one_object_are_both_checked(signed: Release) -> None:
    (first, *rest) = signed.manifest.shared
    other = first.model_copy(update={"path": "other.json", "sha256": "ab" * 32})
    reseal(signed, shared=(other, first, *rest))
    with pytest.raises(DigestError, match=r"other\.json has sha256"):
        verify(signed.url)


def test_verify_a_pulled_folder_with_a_file_that_the_manifest_does_not_name_is_refused(signed: Release, tmp_path: Path) -> None:
    pull(signed.url, tmp_path / "out", check=False)
    (tmp_path / "out" / "tokenizer" / "chat_template.jinja").write_text("planted")
    with pytest.raises(DigestError, match=r"tokenizer/chat_template\.jinja is not one of its files"):
        verify((tmp_path / "out").as_uri())


def test_verify_and_pull_chunks_that_contradict_the_whole_are_refused(signed: Release, tmp_path: Path) -> None:
    file = signed.manifest.ranks[0].files[0]
    wrong = file.model_copy(update={"sha256": "ab" * 32})
    record = signed.manifest.ranks[0].model_copy(update={"files": (wrong,)})
    reseal(signed, ranks=(record, *signed.manifest.ranks[1:]))
    for action in (lambda: verify(signed.url), lambda: pull(signed.url, tmp_path / "out", check=False)):
        with pytest.raises(DigestError, match=rf"rank0\.engine.* has sha256 {file.sha256}, published was abab"):
            action()
    assert not list((tmp_path / "out").glob("*rank0*"))


@pytest.mark.parametrize("change", [-1, 1])
def test_pull_of_an_object_of_another_length_is_refused(signed: Release, tmp_path: Path, change: int) -> None:
    path = signed.path(0)
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data + b"x" if change > 0 else data[:-1])
    with pytest.raises(DigestError, match=r"rank0\.engine.* has 3,[45]\d\d bytes, published were 3,500"):
        pull(signed.url, tmp_path / "out", check=False)


def test_pull_over_a_file_with_right_chunks_and_a_wrong_whole_is_refused(signed: Release, tmp_path: Path) -> None:
    pull(signed.url, tmp_path / "out", check=False)
    file = signed.manifest.ranks[0].files[0].model_copy(update={"sha256": "ab" * 32, "chunks": Chunks(sha256=("ab" * 32,))})
    record = signed.manifest.ranks[0].model_copy(update={"files": (file,)})
    reseal(signed, ranks=(record, *signed.manifest.ranks[1:]))
    with pytest.raises(DigestError):
        pull(signed.url, tmp_path / "out", check=False)


def test_fingerprint_is_that_of_the_key_as_openssl_writes_it(keys: tuple[Path, Path]) -> None:
    der = subprocess.run(["openssl", "pkey", "-pubin", "-in", str(keys[1]), "-outform", "DER"], capture_output=True, check=True)
    assert fingerprint(keys[1]) == f"sha256:{hashlib.sha256(der.stdout).hexdigest()}"


def test_verify_as_json_states_name_version_manifest_and_signer(signed: Release, keys: tuple[Path, Path]) -> None:
    facts = json.loads(_run("verify", signed.url, "--public-key", str(keys[1]), "--json").stdout)
    assert {name: facts[name] for name in ("name", "version", "manifest", "signer")} == {
        "name": "tiny", "version": "1", "manifest": open_release(signed.url).digest, "signer": fingerprint(keys[1]),
    }  # fmt: skip


def planned(build_key: str, release: str) -> Planned:
    return Planned(steps=1, pending=(), build_key=build_key, already_published=False, release=release)


def _write_events(signed: Release, folder: str, planned: Planned, published: str) -> None:
    text = "".join(encode_line(event) + "\n" for event in (planned, Published(manifest=published)))
    signed.store.put(segment_key(f"events/{folder}/9/", 0), text.encode())


def _watched(signed: Release) -> Watch:
    return Watch(signed.store, find_run(signed.store))


def test_watch_events_copied_to_another_build_are_refused(signed: Release) -> None:
    key = signed.manifest.build_key
    _write_events(
        signed,
        "0" * 64,
        planned(key, "tiny/1"),
        f"{signed.url}/manifest.json",
    )
    with pytest.raises(ReleaseAddressError, match="holds the events of build"):
        list(_watched(signed).events())


def test_watch_events_that_publish_another_release_than_planned_are_refused(signed: Release) -> None:
    key = signed.manifest.build_key
    _write_events(
        signed,
        key,
        planned(key, "tiny/2"),
        f"{signed.url}/manifest.json",
    )
    with pytest.raises(ReleaseAddressError, match="planned was tiny/2"):
        list(_watched(signed).events())


def test_watch_a_build_whose_release_was_replaced_ends_with_an_error(signed: Release) -> None:
    key = signed.manifest.build_key
    _write_events(
        signed,
        key,
        planned(key, "tiny/1"),
        f"{signed.url}/manifest.json",
    )
    watched = _watched(signed)
    assert len(list(watched.events())) == 2
    assert watched.result().manifest.endswith("releases/tiny/1/manifest.json")
    reseal(signed, build_key="ab" * 32)
    with pytest.raises(ReleaseAddressError, match="that of build abababababab now"):
        watched.result()
