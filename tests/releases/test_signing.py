"""Signatures: the public command line agrees with ours, and keys that cannot be used are refused before any work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator import building
from orchestrator.base.errors import SignatureError
from orchestrator.releases import pull, signing
from orchestrator.spec.cluster import ClusterSpec
from tests.support.releases import flip, make_keys, publish_tiny, release_spec, tiny_source

DIGESTS = {"rank0.engine": "ab" * 32, "tokenizer/é.json": "cd" * 32}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_keys(tmp_path_factory.mktemp("keys"))


def _stock(folder: Path, public: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "model_signing", "verify", "key", "--public_key", str(public)]
    command += ["--signature", str(folder / "model.sig"), str(folder)]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_whole_pulled_release_verifies_with_the_stock_command_line(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    published = publish_tiny(tmp_path, keys[0])
    folder = tmp_path / "pulled"
    pull(published.url, folder, public_key=keys[1], check=False)
    done = _stock(folder, keys[1])
    assert done.returncode == 0, done.stdout + done.stderr
    flip(folder / "manifest.json", 300)
    assert _stock(folder, keys[1]).returncode != 0


def test_signed_files_are_those_that_were_signed(keys: tuple[Path, Path]) -> None:
    signature = signing.sign(DIGESTS, "tiny", keys[0])
    assert signing.signed_files(signature, keys[1]) == DIGESTS
    assert signing.is_signed_by(signature, keys[0])


def test_signed_files_of_another_key_are_refused(keys: tuple[Path, Path], tmp_path: Path) -> None:
    private, public = make_keys(tmp_path)
    signature = signing.sign(DIGESTS, "tiny", keys[0])
    with pytest.raises(SignatureError) as caught:
        signing.signed_files(signature, public)
    assert caught.value.exit_code == 32
    assert not signing.is_signed_by(signature, private)


@pytest.mark.parametrize("signature", [b"", b"{}", b"[]", b"\xff", b'{"verificationMaterial": {}}'])
def test_signed_files_of_what_is_no_signature_are_refused(keys: tuple[Path, Path], signature: bytes) -> None:
    with pytest.raises(SignatureError):
        signing.signed_files(signature, keys[1])


def _wrong_keys(folder: Path) -> dict[str, Path]:
    found = {name: folder / name for name in ("p384", "ed25519", "text", "missing")}
    subprocess.run(["openssl", "ecparam", "-name", "secp384r1", "-genkey", "-noout", "-out", str(found["p384"])], check=True)
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", str(found["ed25519"])], check=True)
    found["text"].write_text("no key")
    return found


@pytest.mark.parametrize("kind", ["p384", "ed25519", "text", "missing"])
def test_build_with_a_key_that_cannot_sign_is_refused_before_any_work(tmp_path: Path, kind: str) -> None:
    key = _wrong_keys(tmp_path)[kind]
    spec = release_spec(tiny_source(tmp_path / "source"))
    with pytest.raises(SignatureError, match="key") as caught:
        building.build(spec, ClusterSpec(store=(tmp_path / "store").as_uri()), sign_key=key)
    assert "openssl ecparam -name prime256v1" in caught.value.advice
    assert not (tmp_path / "store").exists()


def test_build_again_with_the_same_key_is_done_and_with_another_refused(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    published = publish_tiny(tmp_path, keys[0])
    place = ClusterSpec(store=published.store.url)
    assert building.build(published.plan.spec, place, sign_key=keys[0]).manifest == published.manifest
    other, _ = make_keys(tmp_path / "other")
    with pytest.raises(SignatureError, match="not signed with"):
        building.build(published.plan.spec, place, sign_key=other)
