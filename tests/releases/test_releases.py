"""Pull, verify, tag and list: what comes out, what is refused, and what a break leaves."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from orchestrator.base.digest import digest_bytes
from orchestrator.base.errors import DigestError, MachineError, ReleaseMissingError, SignatureError, SpecError, StoreError
from orchestrator.cli.commands import app
from orchestrator.engines.device import Gpu
from orchestrator.releases import list_releases, open_release, pull, reading, tag, verify
from orchestrator.releases.machine import Machine, check_machine, problems
from orchestrator.releases.manifest import MANIFEST
from orchestrator.releases.signing import fingerprint
from orchestrator.stores import open_store
from tests.support.releases import Published, copy_release, cut_small, files_below, flip, make_keys, publish_tiny


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def _signed(tmp_path_factory: pytest.TempPathFactory, keys: tuple[Path, Path]) -> Published:
    return publish_tiny(tmp_path_factory.mktemp("signed"), keys[0])


@pytest.fixture
def signed(_signed: Published, tmp_path: Path) -> Published:
    """A copy to spoil."""
    root = Path(shutil.copytree(_signed.store.url.removeprefix("file://"), tmp_path / "store"))
    folder = root / "releases" / "tiny" / "1"
    return Published(folder.as_uri(), _signed.manifest, open_store(root.as_uri()), folder, _signed.plan)


def test_pull_of_all_ranks_brings_every_file_and_the_manifest(signed: Published, tmp_path: Path) -> None:
    pull(signed.url, tmp_path / "out", check=False)
    found = files_below(tmp_path / "out")
    assert set(found) == {file.path for file in signed.manifest.all_files()} | {MANIFEST, "model.sig"}
    assert all(digest_bytes(found[file.path]) == file.sha256 for file in signed.manifest.all_files())


def test_pull_of_a_node_brings_its_ranks_alone(signed: Published, tmp_path: Path) -> None:
    pull(signed.url, tmp_path / "out", node=1, gpus_per_node=2, check=False)
    engines = {name for name in files_below(tmp_path / "out") if name.endswith(".engine")}
    assert engines == {"rank2.engine", "rank3.engine"}


def test_pull_of_a_node_that_is_not_there_says_which_are(signed: Published, tmp_path: Path) -> None:
    with pytest.raises(ReleaseMissingError, match="nothing for node 2") as caught:
        pull(signed.url, tmp_path, node=2, gpus_per_node=2, check=False)
    assert "nodes 0 to 1" in caught.value.advice


def test_pull_of_ranks_and_a_node_at_once_is_refused(signed: Published, tmp_path: Path) -> None:
    with pytest.raises(SpecError):
        pull(signed.url, tmp_path, ranks=[0], node=0)


class _Counting:
    """A store that counts the bytes it gives and breaks after some reads."""

    def __init__(self, store: Any, reads: int) -> None:
        self._store, self._reads, self.keys = store, reads, []
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def get_range(self, key: str, begin: int, end: int) -> bytes:
        with self._lock:
            self._reads -= 1
            if self._reads < 0:
                raise StoreError("the network is gone")
            self.keys.append((key, begin))
        return self._store.get_range(key, begin, end)


def _through(monkeypatch: pytest.MonkeyPatch, reads: int) -> list[_Counting]:
    made: list[_Counting] = []

    def opened(url: str, options: Any = None) -> Any:
        made.append(_Counting(open_store(url, options), reads))
        return made[-1]

    monkeypatch.setattr(reading, "open_store", opened)
    return made


@pytest.mark.parametrize("reads", [0, 1, 5, 9])
def test_pull_after_a_break_fetches_only_the_chunks_that_are_missing(
    signed: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: int
) -> None:
    cut_small(signed)
    first = _through(monkeypatch, reads)
    with pytest.raises(StoreError, match="network is gone"):
        pull(signed.url, tmp_path / "out", check=False)
    second = _through(monkeypatch, 1000)
    pull(signed.url, tmp_path / "out", check=False)
    assert not set(first[0].keys) & set(second[0].keys)
    assert len(second[0].keys) == 4 * 4 + len(signed.manifest.shared) + len(signed.manifest.documents) - reads
    assert not list((tmp_path / "out").rglob("*.part"))
    verify_folder(signed, tmp_path / "out")


def verify_folder(published: Published, folder: Path) -> None:
    for file in published.manifest.all_files():
        assert digest_bytes((folder / file.path).read_bytes()) == file.sha256


def test_pull_again_reads_nothing(signed: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pull(signed.url, tmp_path / "out", check=False)
    stores = _through(monkeypatch, 0)
    pull(signed.url, tmp_path / "out", check=False)
    assert stores[0].keys == []


def test_pull_over_a_wrong_file_replaces_it(signed: Published, tmp_path: Path) -> None:
    pull(signed.url, tmp_path / "out", check=False)
    flip(tmp_path / "out" / "rank1.engine", 77)
    pull(signed.url, tmp_path / "out", check=False)
    verify_folder(signed, tmp_path / "out")


def test_pull_of_two_at_once_into_one_folder_is_right(signed: Published, tmp_path: Path) -> None:
    cut_small(signed)
    errors: list[BaseException] = []

    def run() -> None:
        try:
            pull(signed.url, tmp_path / "out", check=False)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    verify_folder(signed, tmp_path / "out")


@pytest.mark.parametrize("place", [0, 1700, 3499])
def test_verify_and_pull_a_flipped_bit_in_an_engine_is_found(signed: Published, tmp_path: Path, place: int) -> None:
    flip(signed.path(1), place)
    with pytest.raises(DigestError, match=r"rank1\.engine has sha256"):
        verify(signed.url)
    with pytest.raises(DigestError, match=r"bytes 0 to 3500 of rank1\.engine"):
        pull(signed.url, tmp_path / "out", check=False)
    assert not list((tmp_path / "out").rglob("*rank1*"))


@pytest.mark.parametrize("place", [1, 500, 2000, -2])
def test_verify_and_pull_a_flipped_bit_in_the_manifest_is_found(signed: Published, tmp_path: Path, place: int) -> None:
    flip(signed.folder / MANIFEST, place)
    for action in (lambda: verify(signed.url), lambda: pull(signed.url, tmp_path / "out", check=False)):
        with pytest.raises(DigestError, match="is not a release manifest"):
            action()
    assert not (tmp_path / "out").exists()


def test_verify_and_pull_a_flipped_bit_anywhere_in_the_signature_is_found(
    signed: Published, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    (path,) = (signed.folder / "signatures").iterdir()
    whole = path.read_bytes()
    for place in range(0, len(whole), len(whole) // 40):
        flip(path, place)
        for action in (lambda: verify(signed.url, keys[1]), lambda: pull(signed.url, tmp_path / "out", public_key=keys[1])):
            with pytest.raises(SignatureError):
                action()
        path.write_bytes(whole)
    assert not (tmp_path / "out").exists()


def test_verify_a_whole_signed_release_is_passed(signed: Published, keys: tuple[Path, Path]) -> None:
    found = verify(signed.url, keys[1])
    assert (found.num_files, found.is_signed) == (len(signed.manifest.all_files()), True)


def test_verify_a_pulled_folder_finds_damage_of_the_disk(signed: Published, keys: tuple[Path, Path], tmp_path: Path) -> None:
    pull(signed.url, tmp_path / "out", check=False)
    assert verify((tmp_path / "out").as_uri(), keys[1]).is_signed
    flip(tmp_path / "out" / "rank2.engine", 1000)
    with pytest.raises(DigestError, match=r"rank2\.engine has sha256"):
        verify((tmp_path / "out").as_uri())


def test_verify_names_every_damaged_file(signed: Published) -> None:
    flip(signed.path(0), 9)
    signed.path(3).unlink()
    with pytest.raises(DigestError, match=r"rank0\.engine has sha256.*rank3\.engine is missing"):
        verify(signed.url)


def test_pull_with_the_key_of_another_is_refused(signed: Published, tmp_path: Path) -> None:
    _, other = make_keys(tmp_path / "other")
    with pytest.raises(SignatureError, match="not made with the key of"):
        pull(signed.url, tmp_path / "out", public_key=other, check=False)


def test_pull_with_a_key_of_an_unsigned_release_is_refused(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    published = publish_tiny(tmp_path)
    with pytest.raises(SignatureError, match="no signature"):
        pull(published.url, tmp_path / "out", public_key=keys[1], check=False)


def test_pull_of_a_resealed_manifest_is_refused_with_a_key(signed: Published, tmp_path: Path, keys: tuple[Path, Path]) -> None:
    changed = signed.manifest.model_copy(update={"build_key": "00" * 32})
    (signed.folder / MANIFEST).write_bytes(changed.to_json())
    (path,) = (signed.folder / "signatures").iterdir()
    path.rename(path.with_name(f"{digest_bytes(changed.to_json())}.sig"))
    assert verify(signed.url).is_signed
    with pytest.raises(SignatureError, match=r"covers other files: manifest\.json"):
        pull(signed.url, tmp_path / "out", public_key=keys[1], check=False)


def test_pull_of_a_manifest_that_names_a_file_outside_is_refused(signed: Published, tmp_path: Path) -> None:
    shared = signed.manifest.shared[0].model_copy(update={"path": "../outside.json"})
    (signed.folder / MANIFEST).write_bytes(signed.manifest.model_copy(update={"shared": (shared,)}).to_json())
    with pytest.raises(DigestError, match="not the path of a file"):
        pull(signed.url, tmp_path / "out", check=False)
    assert not (tmp_path / "outside.json").exists()


_GPU = Gpu("NVIDIA L4", "8.9", 24 * 2**30)
_RTX = {"tensorrt_rtx": "1.7.1.116"}


def test_check_machine_that_fits_is_passed(signed: Published) -> None:
    check_machine(signed.manifest, [0, 1], Machine((_GPU, _GPU), _RTX))


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        (Machine((_GPU, _GPU), {}), "tensorrt_rtx 1.7.1.116 is not installed"),
        (Machine((_GPU, _GPU), {"tensorrt_rtx": "2.0"}), "it has tensorrt_rtx 2.0"),
        (Machine((), _RTX), "no NVIDIA GPU"),
        (Machine((_GPU,), _RTX), "it has 1 GPUs, but 2 ranks"),
        (Machine((_GPU, Gpu("NVIDIA T4", "7.5", 2**34)), _RTX), "rank 1 was built for compute capability 8.9, NVIDIA T4 has 7.5"),
        (Machine((Gpu("tiny", "8.9", 100), _GPU), _RTX), "rank 0 needs"),
    ],
)
def test_check_machine_that_does_not_fit_says_why(signed: Published, machine: Machine, reason: str) -> None:
    assert any(reason in problem for problem in problems(signed.manifest, [0, 1], machine))
    with pytest.raises(MachineError, match="cannot run tiny 1"):
        check_machine(signed.manifest, [0, 1], machine)


@pytest.mark.parametrize(
    ("installed", "reason"),
    [
        ({"tensorrt": "11.4.0.106"}, None),
        ({"tensorrt": "11.5.1"}, None),
        ({"tensorrt_lean": "11.5.1"}, None),
        ({"tensorrt": "10.16.1", "tensorrt_lean": "11.4.0.106"}, None),
        ({"tensorrt": "11.3.9"}, "it has tensorrt 11.3.9, the engines load from 11.4.0.106 on, within version 11"),
        ({"tensorrt_lean": "12.0"}, "it has tensorrt_lean 12.0, the engines load from 11.4.0.106 on, within version 11"),
        ({}, "tensorrt or tensorrt_lean 11.4.0.106 is not installed"),
    ],
)
def test_check_machine_of_version_compatible_engines_takes_later_versions_and_the_lean_runtime(
    signed: Published, installed: dict[str, str], reason: str | None
) -> None:
    made = {"backend": "tensorrt", "tensorrt_version": "11.4.0.106", "version_compatible": True}
    ranks = tuple(record.model_copy(update={"engine": record.engine.model_copy(update=made)}) for record in signed.manifest.ranks)
    manifest = signed.manifest.model_copy(update={"ranks": ranks})
    assert problems(manifest, [0], Machine((_GPU,), installed)) == ([reason] if reason else [])


def test_tag_moves_and_keeps_its_history(signed: Published, tmp_path: Path) -> None:
    assert tag(signed.url, "prod").number == 1
    assert tag(signed.url, "prod").number == 1
    url = copy_release(signed, "tiny", "2").url
    assert tag(url, "prod").number == 2
    assert open_release(f"{signed.store.url}/tags/prod").store.url == url
    assert len(list(signed.store.list("tags/prod/"))) == 2
    pull(f"{signed.store.url}/tags/prod", tmp_path / "out", check=False)
    assert (tmp_path / "out" / "rank0.engine").is_file()


def test_tag_by_many_at_once_loses_none(signed: Published) -> None:
    urls = [copy_release(signed, "tiny", f"c{number}").url for number in range(8)]
    threads = [threading.Thread(target=tag, args=(url, "race")) for url in urls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(info.key for info in signed.store.list("tags/race/")) == [f"tags/race/{n:08d}.json" for n in range(1, 9)]


def test_pull_of_a_tag_whose_release_was_replaced_is_refused(signed: Published, tmp_path: Path) -> None:
    tag(signed.url, "prod")
    (signed.folder / MANIFEST).write_bytes(signed.manifest.model_copy(update={"created_at": "later"}).to_json())
    with pytest.raises(DigestError, match="another manifest"):
        pull(f"{signed.store.url}/tags/prod", tmp_path / "out", check=False)


def test_list_releases_shows_signatures_tags_and_damage(signed: Published) -> None:
    tag(signed.url, "prod")
    broken = Path(shutil.copytree(signed.folder, signed.folder.with_name("broken")))
    flip(broken / MANIFEST, 400)
    first, second = list_releases(signed.store.url)
    assert (first.folder, first.is_signed, first.tags) == ("releases/tiny/1", True, ("prod",))
    assert (second.manifest, "is not a release manifest" in second.problem) == (None, True)
    assert [item.folder for item in list_releases(signed.store.url, {"tp": "2", "gpu": "8.9"})] == ["releases/tiny/1"]
    assert list_releases(signed.store.url, {"tp": "4"}) == []


def test_commands_pull_verify_tag_releases_inspect_speak_and_end_with_their_codes(
    signed: Published, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    def run(*words: str) -> Any:
        return CliRunner().invoke(app, [*words])

    key = ["--public-key", str(keys[1])]
    out = str(tmp_path / "out")
    assert run("tag", signed.url, "prod", "--sign-key", str(keys[0])).exit_code == 0
    done = run("pull", f"{signed.store.url}/tags/prod", "--rank", "1", "--no-check", "--output", out, *key)
    assert done.exit_code == 0, done.output
    assert f"tiny 1, manifest sha256:{open_release(signed.url).digest}" in done.stdout
    assert f"signed by the key {fingerprint(keys[1])}" in done.stdout
    assert json.loads(run("verify", signed.url, *key, "--json").stdout)["files"] == len(signed.manifest.all_files())
    assert json.loads(run("releases", signed.store.url, "--json").stdout)["releases"][0]["tags"] == ["prod"]
    assert "tiny 1" in run("inspect", f"{signed.store.url}/tags/prod").stdout
    assert fingerprint(keys[1]) in run("inspect", signed.url, *key).stdout
    flip(signed.path(0), 5)
    assert run("verify", signed.url).exit_code == DigestError.exit_code
    (path,) = (signed.folder / "signatures").iterdir()
    flip(path, 300)
    assert run("inspect", signed.url, *key).exit_code == SignatureError.exit_code
    assert run("pull", signed.url, "--output", out, *key).exit_code == SignatureError.exit_code
    assert run("collect", signed.store.url).exit_code == 0


_PROBE = """
import sys
from pathlib import Path
from orchestrator.releases import pull
pull(sys.argv[1], Path(sys.argv[2]), ranks=[0], check=False)
print([name for name in ("ray", "torch", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "transformers") if name in sys.modules])
"""


def test_pull_as_a_library_imports_nothing_heavy(signed: Published, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _PROBE, signed.url, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
    assert (tmp_path / "rank0.engine").is_file()


@pytest.fixture(autouse=True)
def _no_parts(tmp_path: Path) -> Iterator[None]:
    """No test leaves a file with a temporary name of `write_whole`."""
    yield
    assert not list(tmp_path.rglob(".manifest.json.*"))
