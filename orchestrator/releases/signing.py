"""Signatures of releases in OpenSSF Model Signing's format (a sigstore bundle over an in-toto statement), with a P-256 key.

The only module that knows the `model_signing` package (1.1.1; pinned, because its manifest and signer modules are private). It
signs digests that the build has already computed, and returns digests that a signature covers; callers compare those with bytes.
A whole pulled release also verifies with that package's own command line.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from orchestrator.base.digest import digest_bytes
from orchestrator.base.errors import SignatureError
from orchestrator.base.extras import extra_error, missing_extra
from orchestrator.releases.manifest import SIGNATURE

_CURVE = "secp256r1"
_SERIALIZATION = {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": [SIGNATURE]}


def check_sign_key(key: Path) -> None:
    """Check a key before any long work. Raises SignatureError when `key` cannot sign, ToolError when the package is missing."""
    with _explained(key, "private"):
        _private_key(key)
        _modules()


def sign(digests: Mapping[str, str], name: str, key: Path) -> bytes:
    """Sign files by path and hexadecimal sha256 with the PEM private key `key`; returns the signature file's bytes.

    `name` is informative. Raises SignatureError, ToolError.
    """
    with _explained(key, "private"):
        modules = _modules()
        _private_key(key)
        items = [
            modules.manifest.FileManifestItem(
                path=PurePosixPath(path), digest=modules.hashing.Digest("sha256", bytes.fromhex(digest))
            )
            for path, digest in digests.items()
        ]
        kind = modules.manifest.SerializationType.from_args(_SERIALIZATION)
        payload = modules.signing.Payload(modules.manifest.Manifest(name, items, kind))
        return str(modules.ec_key.Signer(key).sign(payload).bundle.to_json()).encode()


def signed_files(signature: bytes, public_key: Path) -> dict[str, str]:
    """Return the hexadecimal sha256 by path of the files that the owner of `public_key` signed.

    Raises SignatureError when the signature is damaged, unreadable or of another key; ToolError.
    """
    with _explained(public_key, "public"):
        modules = _modules()
        verifier = modules.ec_key.Verifier(public_key)
        found = _verified(modules, verifier, signature, public_key)
        return {item.identifier: item.digest.digest_hex for item in found.resource_descriptors()}


def fingerprint(public_key: Path) -> str:
    """Return the name of a public key: sha256 of its DER form (openssl pkey -pubin -in pub.pem -outform DER | sha256sum).

    Raises SignatureError, ToolError.
    """
    with _explained(public_key, "public"):
        serialization = _serialization()
        key = serialization.load_pem_public_key(public_key.read_bytes())
        der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return f"sha256:{digest_bytes(der)}"


def is_signed_by(signature: bytes, key: Path) -> bool:
    """Whether a signature was made with the private key `key`. Raises SignatureError for an unusable `key`, ToolError."""
    with _explained(key, "private"):
        serialization = _serialization()
        public = _private_key(key).public_key()
        pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    with tempfile.TemporaryDirectory(prefix="signing-") as folder:
        path = Path(folder, "public.pem")
        path.write_bytes(pem)
        try:
            signed_files(signature, path)
        except SignatureError:
            return False
    return True


def _verified(modules: _Modules, verifier: Any, signature: bytes, public_key: Path) -> Any:
    """Return the signed manifest. Any error of the package on untrusted bytes becomes SignatureError."""
    with tempfile.TemporaryDirectory(prefix="signing-") as folder:
        path = Path(folder, SIGNATURE)
        path.write_bytes(signature)
        try:
            read = modules.bundle.Signature.read(path)
            if str(read.bundle.to_json()).encode() != signature:
                raise ValueError("its text was changed")
            return verifier.verify(read)
        except Exception as error:
            reason = str(error).strip() or type(error).__name__
            raise SignatureError(f"the signature was not made with the key of {public_key}, or was changed: {reason}") from None


class _Modules:
    """The used parts of the package, imported here because that takes a second."""

    def __init__(self) -> None:
        from model_signing import manifest
        from model_signing._hashing import hashing
        from model_signing._signing import sign_ec_key, sign_sigstore_pb, signing

        self.manifest: Any = manifest
        self.hashing: Any = hashing
        self.signing: Any = signing
        self.ec_key: Any = sign_ec_key
        self.bundle: Any = sign_sigstore_pb


def _modules() -> _Modules:
    try:
        return _Modules()
    except ImportError as error:
        raise missing_extra(error) or extra_error("signing", f"model_signing does not load: {error}") from None


def _serialization() -> Any:
    """Return the module of `cryptography` that reads keys. Raises ToolError."""
    try:
        from cryptography.hazmat.primitives import serialization
    except ImportError:
        _modules()
        raise
    return serialization


def _private_key(path: Path) -> Any:
    """Read a private key. Raises ValueError for another curve than P-256."""
    key: Any = _serialization().load_pem_private_key(path.read_bytes(), None)
    curve = getattr(getattr(key, "curve", None), "name", None)
    if curve != _CURVE:
        raise ValueError(f"its type is {curve or 'another kind'}, expected the curve P-256")
    return key


@contextmanager
def _explained(key: Path, kind: str) -> Iterator[None]:
    """Turn any error of an unusable key into SignatureError. The key's content is never shown."""
    advice = (
        "Make a pair: openssl ecparam -name prime256v1 -genkey -noout -out key.pem; openssl ec -in key.pem -pubout -out pub.pem."
    )
    try:
        yield
    except OSError as error:
        raise SignatureError(f"cannot read the {kind} key {key}: {error.strerror}", advice) from None
    except (ValueError, TypeError, AttributeError) as error:
        raise SignatureError(f"{key} is not a usable {kind} key: {' '.join(str(error).split())}", advice) from None
