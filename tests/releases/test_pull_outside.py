"""Pull writes below its folder alone: hostile paths in manifests, and hostile things that stand in the folder already."""

from __future__ import annotations

import os
import resource
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.base.errors import DigestError, StoreError
from orchestrator.base.paths import check_disjoint, check_path
from orchestrator.releases import pull, verify
from orchestrator.releases.manifest import MANIFEST, seal
from orchestrator.stores import open_store
from tests.support.releases import FOR_TRITON, Published, publish_tiny, reseal

VICTIM = b"not to be touched"


@pytest.fixture(scope="module")
def _release(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return publish_tiny(tmp_path_factory.mktemp("release"))


@pytest.fixture
def release(_release: Published, tmp_path: Path) -> Published:
    root = Path(shutil.copytree(_release.store.url.removeprefix("file://"), tmp_path / "store"))
    folder = root / "releases" / "tiny" / "1"
    return Published(folder.as_uri(), _release.manifest, open_store(root.as_uri()), folder, _release.plan)


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "victim"
    path.write_bytes(VICTIM)
    return path


def _with_paths(release: Published, *paths: str, field: str = "path") -> None:
    """Rewrite the manifest so that its shared files have these paths or keys, whatever our own code would refuse to make."""
    plain = release.manifest.model_dump(mode="json")
    first = plain["shared"][0]
    plain["shared"] = [{**first, field: path} for path in paths]
    (release.folder / MANIFEST).write_bytes(seal(plain))


@pytest.mark.parametrize(
    "path",
    [
        "", ".", "..", "./x", "x/.", "x/./y", "x/", "x//y", "/etc/x", "//x", "../x", "x/../../y", "x/..", "a\\b", "..\\x", "C:\\x",
        "x\0y", "x\ny", "x\x1b[31m", "n" * 201, "é" * 101, "d/" * 600 + "x", ".x.0123456789abcdef.part", "d/.y.part/z",
        "manifest.json", "Manifest.JSON", "model.sig",
    ],
    ids=lambda path: repr(path[:12]),
)  # fmt: skip
@pytest.mark.parametrize("layout", ["flat", "oci"])
def test_pull_and_verify_a_path_that_is_none_below_the_folder_are_refused(
    release: Published, tmp_path: Path, path: str, layout: str
) -> None:
    _with_paths(release, path)
    before = sorted(tmp_path.rglob("*"))
    for action in (lambda: verify(release.url), lambda: pull(release.url, tmp_path / "out", layout=layout, check=False)):
        with pytest.raises(DigestError) as caught:
            action()
        assert len(str(caught.value)) < 1000
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("key", ["", ".", "../1/x", "/etc/passwd", "x\0y", "n" * 5000, "a//b"], ids=lambda key: repr(key[:8]))
def test_pull_and_verify_a_key_that_is_none_below_the_release_are_refused(release: Published, tmp_path: Path, key: str) -> None:
    _with_paths(release, key, field="key")
    for action in (lambda: verify(release.url), lambda: pull(release.url, tmp_path / "out", check=False)):
        with pytest.raises(DigestError):
            action()


@pytest.mark.parametrize(
    "paths",
    [("a", "a/b"), ("a/b", "a"), ("x/y/z", "x/y"), ("A", "a"), ("d/X", "D/x"), ("D/x", "d"), ("stra\u00dfe", "STRASSE"),
     ("e\u0301", "\u00e9")],
)  # fmt: skip
def test_pull_of_paths_that_collide_is_refused(release: Published, tmp_path: Path, paths: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="cannot stand in one folder"):
        check_disjoint(paths)
    _with_paths(release, *paths)
    with pytest.raises(DigestError, match="cannot stand in one folder"):
        pull(release.url, tmp_path / "out", check=False)
    assert not (tmp_path / "out").exists()


def test_pull_of_one_path_with_two_digests_is_refused(release: Published, tmp_path: Path) -> None:
    plain = release.manifest.model_dump(mode="json")
    plain["shared"] = [plain["shared"][0], {**plain["shared"][0], "sha256": "ab" * 32}]
    (release.folder / MANIFEST).write_bytes(seal(plain))
    with pytest.raises(DigestError, match="listed twice"):
        pull(release.url, tmp_path / "out", check=False)


@pytest.mark.parametrize("path", ["rank0.engine", "tokenizer/tokenizer.json", "a b/é.bin", "..x", "x..", "d/.hidden", "c:d", "-rf"])
def test_check_path_of_an_ordinary_file_is_passed(path: str) -> None:
    check_path(path)


def _part(release: Published, out: Path) -> Path:
    file = release.manifest.ranks[0].files[0]
    return out / f".{file.path}.{file.sha256[:16]}.part"


def _symlink(path: Path, victim: Path) -> None:
    path.symlink_to(victim)


def _hard_link(path: Path, victim: Path) -> None:
    os.link(victim, path)


def _dangling(path: Path, victim: Path) -> None:
    path.symlink_to(victim.with_name("made-by-pull"))


def _pipe(path: Path, victim: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path, victim: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # an address of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


PLANTS = [_symlink, _hard_link, _dangling, _pipe, _socket]


@pytest.mark.parametrize("plant", PLANTS)
@pytest.mark.parametrize("at", ["part", "target"])
def test_pull_over_what_somebody_put_at_its_names_replaces_it(
    release: Published, tmp_path: Path, victim: Path, plant: Callable[[Path, Path], None], at: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    plant(_part(release, out) if at == "part" else out / "rank0.engine", victim)
    pull(release.url, out, check=False)
    assert victim.read_bytes() == VICTIM
    assert not (tmp_path / "made-by-pull").exists()
    assert (out / "rank0.engine").read_bytes() == release.path(0).read_bytes()
    assert not (out / "rank0.engine").is_symlink()
    assert not list(out.rglob("*.part"))


def test_pull_over_a_link_to_the_right_bytes_makes_a_file(release: Published, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    copy = tmp_path / "copy"
    copy.write_bytes(release.path(0).read_bytes())
    (out / "rank0.engine").symlink_to(copy)
    pull(release.url, out, check=False)
    assert not (out / "rank0.engine").is_symlink()
    assert (out / "rank0.engine").is_file()


def test_pull_over_a_link_at_the_manifest_replaces_it(release: Published, tmp_path: Path, victim: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / MANIFEST).symlink_to(victim)
    pull(release.url, out, check=False)
    assert victim.read_bytes() == VICTIM
    assert (out / MANIFEST).read_bytes() == (release.folder / MANIFEST).read_bytes()


@pytest.mark.parametrize(("layout", "folder"), [("flat", "tokenizer"), ("oci", "blobs"), ("oci", "blobs/sha256")])
def test_pull_through_a_linked_folder_is_refused(release: Published, tmp_path: Path, layout: str, folder: str) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (out / folder).parent.mkdir(parents=True)
    (out / folder).symlink_to(elsewhere)
    with pytest.raises(StoreError, match="is a symbolic link"):
        pull(release.url, out, layout=layout, check=False)
    assert list(elsewhere.rglob("*")) == []


@pytest.mark.parametrize("name", ["tiny-stage0", "tiny-stage0/.1.part", "tiny-stage0/release"])
def test_pull_triton_through_a_linked_model_folder_is_refused(tmp_path: Path, name: str) -> None:
    release = publish_tiny(tmp_path / "published", engine=FOR_TRITON)
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (out / name).parent.mkdir(parents=True)
    (out / name).symlink_to(elsewhere)
    with pytest.raises(StoreError, match="is a symbolic link"):
        pull(release.url, out, layout="triton", check=False)
    assert list(elsewhere.rglob("*")) == []


def test_pull_into_a_folder_that_the_user_named_by_a_link_works(release: Published, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    pull(release.url, tmp_path / "out", check=False)
    assert (tmp_path / "real" / "rank0.engine").is_file()


@pytest.mark.parametrize("at", ["rank0.engine", "part", "tokenizer"])
def test_pull_where_something_else_has_the_name_is_an_error_of_the_folder(release: Published, tmp_path: Path, at: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    path = _part(release, out) if at == "part" else out / at
    if at == "tokenizer":
        path.write_text("a file")
    else:
        (path / "full").mkdir(parents=True)
    with pytest.raises(StoreError, match="cannot write"):
        pull(release.url, out, check=False)


def test_pull_into_what_is_no_folder_is_an_error_of_the_folder(release: Published, tmp_path: Path, victim: Path) -> None:
    with pytest.raises(StoreError, match="cannot write"):
        pull(release.url, victim, check=False)
    assert victim.read_bytes() == VICTIM


@pytest.mark.parametrize("path", ["config.json", "rank0.engine", "config.json/x"])
def test_pull_of_a_tokenizer_file_that_a_layout_writes_itself_is_refused(release: Published, tmp_path: Path, path: str) -> None:
    plain = release.manifest.model_dump(mode="json")
    plain["shared"] = [{**plain["shared"][0], "path": path, "role": "tokenizer"}]
    (release.folder / MANIFEST).write_bytes(seal(plain))
    with pytest.raises(DigestError):
        pull(release.url, tmp_path / "out", layout="trtllm", check=False)


def test_pull_of_many_files_opens_few_at_a_time(release: Published, tmp_path: Path) -> None:
    first = release.manifest.shared[0]
    reseal(release, shared=tuple(first.model_copy(update={"path": f"many/{number}"}) for number in range(1500)))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 60, hard))
    try:
        pull(release.url, tmp_path / "out", check=False)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(list((tmp_path / "out" / "many").iterdir())) == 1500
