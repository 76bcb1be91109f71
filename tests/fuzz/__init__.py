"""Hostile input for the command line: seeded, structure-aware mutations of specs, sources and the like.

    python -m tests.fuzz specs --count 2000 --seed 1
    python -m tests.fuzz specs --seed 1 --case 17 --keep /tmp/case     # one case again, its files kept

To add a kind, write `tests/fuzz/<kind>.py` with a class that is a `harness.Fuzzer`, and name it here.
"""

from __future__ import annotations

FUZZERS: dict[str, tuple[str, str]] = {
    "manifests": ("tests.fuzz.manifests", "Manifests"),
    "specs": ("tests.fuzz.specs", "Specs"),
    "sources": ("tests.fuzz.sources", "Sources"),
}
"""Kind -> module and class."""
