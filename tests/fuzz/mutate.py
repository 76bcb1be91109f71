"""Mutations that several kinds of input share: of trees as YAML and JSON hold them, and of bytes."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

SCALARS: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63), 10**30, 10**300, 10**5000,
    0.0, -0.0, 0.5, 1e-320, 1e308, float("inf"), float("-inf"), float("nan"),
    "", " ", "0", "1", "-1", "1e400", "nan", "inf", "true", "null", "auto", "..", "../..", "/", "/dev/zero", "/etc/passwd", "~",
    "a" * 100_000, "\x00", "a\x00b", "\ud800", "ﷺ" * 50, "\u202e", "\x1b[31m", "[red]x[/]", "[/]", "{0}", "%s%n", "é", "1.10",
    "5GB",
    "9" * 400 + "GB", "s3://u:p@h/b", "file://", "http://[", "memory://", "x://y", "hf://a/b", "\n", "\r\n\t",
)  # fmt: skip
"""Values that somebody did not think of."""

_DEPTH = 8


def hostile(rng: random.Random) -> Any:
    """A value of any type and size."""
    kind = rng.random()
    if kind < 0.75:
        return rng.choice(SCALARS)
    if kind < 0.85:
        return [rng.choice(SCALARS) for _ in range(rng.choice((0, 1, 2, 5)))]
    if kind < 0.95:
        return {_key(rng): rng.choice(SCALARS) for _ in range(rng.choice((0, 1, 3)))}
    if kind < 0.98:
        return deep(rng.choice((20, 150)), rng.choice(("list", "dict")))
    return list(range(rng.choice((1000, 20_000))))


def _key(rng: random.Random) -> str:
    return str(rng.choice([value for value in SCALARS if not isinstance(value, int) or abs(value) < 2**65]))[:50]


def deep(depth: int, kind: str) -> Any:
    """Lists or mappings in one another."""
    made: Any = 1
    for _ in range(depth):
        made = [made] if kind == "list" else {"a": made}
    return made


def paths(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The place of every node but the root, to some depth."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    if len(path) >= _DEPTH:
        return []
    found: list[tuple[Any, ...]] = []
    for key, value in items:
        found.append((*path, key))
        found.extend(paths(value, (*path, key)))
    return found


def mutated(rng: random.Random, tree: Any, words: Sequence[str] = (), values: Sequence[Any] = ()) -> Any:
    """A copy of a tree with one node replaced, removed, renamed, moved, or one added; `words` are names worth trying, `values` what
    is nearly right.
    """
    made = copy.deepcopy(tree)
    places = paths(made)
    if not places:
        return hostile(rng)
    path = rng.choice(places)
    node = made
    for key in path[:-1]:
        node = node[key]
    change = rng.random()
    if values and rng.random() < 0.5:
        node[path[-1]] = rng.choice(values)
    elif change < 0.65:
        node[path[-1]] = hostile(rng)
    elif change < 0.75:
        del node[path[-1]]
    elif change < 0.85:
        node[path[-1]] = rng.choice([value for value in _values(tree) if value is not node] or [None])
    elif isinstance(node, dict):
        name = rng.choice([*words, "x", typo(rng, str(path[-1])), "", "a.b", "\x00"])
        node[name] = node.pop(path[-1]) if change < 0.95 else hostile(rng)
    else:
        node.insert(0, hostile(rng))
    return made


def _values(tree: Any) -> list[Any]:
    found = []
    for path in paths(tree):
        node = tree
        for key in path:
            node = node[key]
        found.append(copy.deepcopy(node))
    return found


def typo(rng: random.Random, word: str) -> str:
    """A word with one letter missing, doubled or swapped."""
    if not word:
        return "x"
    place = rng.randrange(len(word))
    return rng.choice((word[:place] + word[place + 1 :], word[:place] + word[place] + word[place:], word[::-1], word.upper()))


def corrupted(rng: random.Random, data: bytes, most: int = 4) -> bytes:
    """Bytes with a few changed, inserted, cut out, repeated, or the end cut off."""
    made = bytearray(data)
    for _ in range(rng.randint(1, most)):
        place = rng.randrange(len(made) + 1)
        change = rng.random()
        if change < 0.3 and place < len(made):
            made[place] ^= 1 << rng.randrange(8)
        elif change < 0.5:
            made[place:place] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 8)))
        elif change < 0.7:
            del made[place : place + rng.choice((1, 2, 8, 64))]
        elif change < 0.85:
            made[place:place] = made[place : place + rng.choice((1, 16, 200))]
        elif change < 0.95:
            made[place : place + 8] = rng.choice((b"\x00" * 8, b"\xff" * 8, b"\xff\xff\xff\xff\xff\xff\xff\x7f"))
        else:
            del made[place:]
    return bytes(made)
