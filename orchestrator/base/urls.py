"""Refusal of URLs that hold a password, key or signature, which would end in logs, manifests, events and error messages."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated
from urllib.parse import unquote

from pydantic import AfterValidator

from orchestrator.base.errors import SpecError

ADVICE = "Give credentials by each machine's environment, profile or role, never in a URL."
_URL = re.compile(r"((?:[A-Za-z][A-Za-z0-9+.-]*::)*)([A-Za-z][A-Za-z0-9+.-]*):(/*)(.*)", re.DOTALL)
_IN_WORD = re.compile(r"[A-Za-z][A-Za-z0-9+.:-]*:/.*|^s3a?:.*", re.DOTALL | re.IGNORECASE)
_S3 = {"s3", "s3a"}
_HTTP = {"http", "https"}
_WITHOUT_QUERY = {"file", "local", "memory", "hf"}


def holds_secret(url: str) -> bool:
    """Whether a URL holds what may be a password, key or signature."""
    match = _URL.fullmatch(url)
    if match is None:
        return False
    scheme, slashes, rest = match.group(2).lower(), match.group(3), match.group(4)
    if scheme in ("file", "local") and slashes != "//":
        return False
    raw, _, path = rest.partition("/")
    user, at, server = unquote(raw).rpartition("@")
    if ":" in user or (at and scheme in _S3 | _HTTP):
        return True
    # A secret with a slash in it ends the host too early: KEY:abc/def@bucket.
    colon, port = server.rpartition(":")[1:]
    if colon and not server.endswith("]") and (scheme in _S3 or (not port.isdigit() and "@" in path)):
        return True
    return ("?" in rest and scheme not in _WITHOUT_QUERY) or ("#" in rest and scheme in _HTTP)


def refuse_secret(url: str, what: str = "the URL") -> None:
    """Refuse a URL that holds a secret. Raises SpecError, whose message leaves the secret out."""
    if holds_secret(url):
        raise SpecError(f"{what} holds a user, password or query", ADVICE)


def refuse_secrets(words: Sequence[str]) -> None:
    """Refuse a command line with a URL that holds a secret, before anything prints it. Raises SpecError."""
    before = ""
    for word in words:
        for found in _IN_WORD.finditer(word):
            name = word.partition("=")[0] if word.startswith("--") and "=" in word else before
            refuse_secret(found.group(), f"the value of {name}" if name.startswith("-") and name.strip("-") else "the URL")
        before = word if not _IN_WORD.search(word) else ""


def _without_secret(value: str) -> str:
    if holds_secret(value):
        raise ValueError("the URL holds a user, password or query: credentials belong in each node's environment, profile or role")
    return value


PlaceText = Annotated[str, AfterValidator(_without_secret)]
"""Path or URL given by a user."""


def is_url(source: str) -> bool:
    """Whether a source is a URL. Anything else is a path of this machine."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.:-]*://", source) is not None
