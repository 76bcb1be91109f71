"""Identify a file of weights: by its content where a digest is recorded, else by its time of modification.

No plan reads hundreds of gigabytes. Recorded digests are: the name of a hub cache's blob, the metadata that `hf download
--local-dir` keeps beside its files, SHA256SUMS or FILE.sha256 beside the file. A record counts if the file was not touched since:
its time of change, which cannot be set back, is no later than the record's time of modification. A digest found once is
remembered under the user's cache folder. When the times of such a file have changed but not its size, the file is read once to
compare its content: that is cheaper than to build everything again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import uuid
from pathlib import Path

_SHA256 = re.compile(r"[0-9a-f]{64}")
_HUB_METADATA = ".cache/huggingface/download/{name}.metadata"
_SUMS = "SHA256SUMS"
_MAX_CLAIM_BYTES = 2**20


def identity(folder: Path, name: str, found: os.stat_result) -> str:
    """Return sha256:... of the content where known, else mtime:...; `found` is the file's status."""
    path = folder / name
    known = _blob(path) or _remembered(path, found, read_again=True)
    if known is None:
        known = _claimed(folder, name, found)
        if known is not None:
            _remember(path, found, known)
    return f"sha256:{known}" if known else f"mtime:{found.st_mtime_ns}"


def matches(folder: Path, name: str, found: os.stat_result, planned: str) -> bool:
    """Whether the local file is the one that another process, perhaps of another node, identified as `planned`."""
    kind, _, value = planned.partition(":")
    if kind == "mtime":
        return value == str(found.st_mtime_ns)
    if identity(folder, name, found) == planned:
        return True
    path = folder / name
    if kind != "sha256" or _blob(path) or _remembered(path, found):
        return False
    return _hashed(path, found) == value  # its content was known there, but not here: its times have changed since


def _blob(path: Path) -> str | None:
    """Return the digest in the name of a hub cache's Git LFS blob."""
    blob = path.resolve().name
    return blob if _SHA256.fullmatch(blob) else None


def _claimed(folder: Path, name: str, found: os.stat_result) -> str | None:
    """Return a digest recorded after the file was last touched."""
    beside = (folder / name).parent
    for claim, line in (
        (folder / _HUB_METADATA.format(name=name), rf"\S+\n({_SHA256.pattern})\n"),
        (beside / f"{Path(name).name}.sha256", rf"\s*({_SHA256.pattern})\b"),
        (beside / _SUMS, rf"(?:.*\n)*?({_SHA256.pattern}) [ *](?:\./)?{re.escape(Path(name).name)}(?:\n|$)"),
    ):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            written = claim.stat()
            if written.st_mtime_ns < found.st_ctime_ns or written.st_size > _MAX_CLAIM_BYTES:
                continue
            match = re.match(line, claim.read_text())
            if match is not None:
                return match.group(1)
    return None


def _state(found: os.stat_result) -> list[int]:
    return [found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _record(path: Path) -> Path | None:
    """Return where a file's digest is remembered; None unless the folder is this user's alone, because records are trusted."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "trt-orchestrator" / "sources"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except (OSError, RuntimeError):
        return None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o022:
        return None
    return folder / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()}.json"


def _remembered(path: Path, found: os.stat_result, *, read_again: bool = False) -> str | None:
    """Return the digest of a file unchanged since it was remembered; with `read_again`, also of one that may be unchanged."""
    record = _record(path)
    try:
        plain = json.loads(record.read_bytes()) if record is not None else {}
        known, state = str(plain["sha256"]), list(plain["state"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if state == _state(found):
        return known
    if read_again and state[1:2] == [found.st_size]:
        return _hashed(path, found)
    return None


def _remember(path: Path, found: os.stat_result, known: str) -> None:
    record = _record(path)
    if record is None:
        return
    temporary = record.with_suffix(f".{uuid.uuid4().hex}")
    with contextlib.suppress(OSError):
        temporary.write_text(json.dumps({"path": str(path.resolve()), "sha256": known, "state": _state(found)}))
        temporary.replace(record)


def _hashed(path: Path, found: os.stat_result) -> str | None:
    """Return the digest of a file by reading it; None when it cannot be read or changes meanwhile."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        known = hashlib.file_digest(file, "sha256").hexdigest()
        if _state(os.fstat(file.fileno())) == _state(found):
            _remember(path, found, known)
            return known
    return None
