"""Manifests and tags as anyone can write them who may write to a store, sealed with a digest that fits or not."""

from __future__ import annotations

import hashlib
import importlib
import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.fuzz.mutate import corrupted, deep, mutated, paths

FOLDER = "store/releases/tiny/1"
_URL = "store/releases/tiny/1"
_BIG, _DEEP, _DEEPEST = "\ue000big", "\ue000deep", "\ue000deepest"
"""Stand for what the writer of JSON refuses to write."""
_SHA = "ab" * 32
_NEARLY: tuple[Any, ...] = (
    0, 1, 2, 3, -1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 10**300,
    10**4500, True, False, None, 0.5, 1.0, 1e308, float("nan"), float("inf"),
    "", ".", "..", "../1", "../../tiny/1/manifest.json", "/etc/passwd", "/", "a/../b", "a//b", "./a", "a/", "manifest.json",
    "model.sig", "config.json", "rank0.engine", "RANK0.engine", "rank0.engine/x", "tokenizer", "tokenizer/tokenizer.json", "a\\b",
    "a\x00b", "x" * 300, "d/" * 400 + "x", "é" * 120, ".rank0.engine.part", "signatures/x.sig", "objects/rank0.engine",
    _SHA, "AB" * 32, "ab", "../" * 20 + "ab", "tensorrt", "tensorrt_rtx", "engine", "config", "tokenizer", "report", "input",
    "output",
    "tiny", "1", "2", "[/red]", "[red]x", "\\[/x]", "\x1b[2J\x1b]0;t\x07",
    "\ud800", "\u202e", "9" * 500, '"', 'a" }\n{', "float", "fp8",
    "2026-01-01", [], {}, [[]], [{}], ["a"], [1], ["8.9"] * 3, {"a": {"min": [1], "opt": [1], "max": [1]}}, {"min": "x"},
)  # fmt: skip
"""Values that decode somewhere, most of them."""
_WORDS = (
    "schema_version", "digest", "name", "version", "path", "key", "sha256", "num_bytes", "chunks", "ranks", "shared", "documents",
    "quantization", "verification", "moe_ep", "cp", "rank", "tp_rank", "pp_rank", "model", "selectors", "engine_config",
    "signature",
)  # fmt: skip
COMMANDS: tuple[tuple[str, ...], ...] = (
    ("pull", _URL, "--no-check", "--output", "out"),
    ("pull", _URL, "--output", "out", "--rank", "0"),
    ("pull", _URL, "--no-check", "--output", "out", "--layout", "trtllm"),
    ("pull", _URL, "--no-check", "--output", "out", "--layout", "triton"),
    ("pull", _URL, "--no-check", "--output", "out", "--layout", "oci", "--node", "0", "--gpus-per-node", "2"),
    ("verify", _URL),
    ("verify", _URL, "--json"),
    ("inspect", _URL),
    ("inspect", _URL, "--json"),
    ("releases", "store"),
    ("releases", "store", "--json"),
    ("releases", "store", "--select", "tp=2", "--select", "gpu=8.9"),
    ("tag", _URL, "prod"),
    ("collect", "store", "--grace-days", "0"),
    ("collect", "store", "--delete", "--json"),
    ("watch", _URL),
    ("watch", "store", "--json"),
    ("pull", "store/tags/prod", "--no-check", "--output", "out"),
    ("inspect", "store/tags/prod"),
)
_IMPORTED = (
    "cli.commands", "releases", "cli.inspection", "submit.watching", "report", "releases.layouts.flat", "releases.layouts.oci",
    "releases.layouts.triton", "releases.layouts.trtllm", "stores.file", "engines.device", "checkpoints.trtllm", "releases.machine",
    "spec.loading", "spec.yaml_text",
)  # fmt: skip
"""What commands import, once for all children."""
_KEYED = ("verify", _URL, "--public-key", "pub.pem")
"""Rare: it takes a second to load what checks signatures."""


class Manifests:
    """See harness.Fuzzer."""

    def prepare(self, folder: Path) -> None:
        from tests.support.releases import make_keys, publish_tiny

        for module in _IMPORTED:
            importlib.import_module(f"orchestrator.{module}")
        importlib.import_module("rich.table")
        _, self._public = make_keys(folder / "keys")
        published = publish_tiny(folder)
        self._store = folder / "store"
        self._objects = published.folder
        self._plain = _settled(published.folder)
        self._tag = {
            "name": "prod", "number": 1, "release": "releases/tiny/1", "created_at": "2026-01-01T00:00:00+00:00", "signature": None,
            "manifest_sha256": hashlib.sha256(sealed(self._plain)).hexdigest(),
        }  # fmt: skip
        for part in ("steps", "outcomes"):
            shutil.rmtree(self._store / part)

    def make(self, rng: random.Random, folder: Path) -> Sequence[Sequence[str]]:
        if rng.random() < 0.1:
            tag = mutated(rng, self._tag, ("name", "release"), _NEARLY)
            self.write(folder, None, corrupted(rng, _text(tag)) if rng.random() < 0.2 else _text(tag))
            return [rng.choice(COMMANDS[-2:]), rng.choice(COMMANDS[9:13])]
        self.write(folder, self._manifest(rng))
        return rng.sample(COMMANDS, 2) + ([_KEYED] if rng.random() < 0.01 else [])

    def write(self, folder: Path, manifest: bytes | None, tag: bytes | None = None) -> None:
        """A store with this manifest and this tag; None: as they were published."""
        shutil.copytree(self._store, folder / "store")
        shutil.copy(self._public, folder / "pub.pem")
        (folder / FOLDER / "manifest.json").write_bytes(sealed(self._plain) if manifest is None else manifest)
        tags = folder / "store" / "tags" / "prod"
        tags.mkdir(parents=True)
        (tags / "00000001.json").write_bytes(_text(self._tag) if tag is None else tag)

    def special(self, rng: random.Random, number: int) -> bytes:
        """A manifest of one kind, first of SPECIALS, then of TEXTS."""
        if number < len(SPECIALS):
            return sealed(SPECIALS[number](rng, json.loads(json.dumps(self._plain))))
        return TEXTS[number - len(SPECIALS)](rng, sealed(self._plain))

    def _manifest(self, rng: random.Random) -> bytes:
        kind = rng.random()
        if kind < 0.7:
            plain = self._plain
            for _ in range(rng.choice((1, 1, 1, 2, 4))):
                plain = mutated(rng, plain, _WORDS, _NEARLY)
                plain = plain if isinstance(plain, dict) else {**self._plain, "x": plain}
            return sealed(plain)
        if kind < 0.9:
            return self.special(rng, rng.randrange(len(SPECIALS)))
        return self.special(rng, len(SPECIALS) + rng.randrange(len(TEXTS)))


def _settled(folder: Path) -> dict[str, Any]:
    """The fields of the manifest of a published release, the same in every run: its objects get names without random parts."""
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_bytes())
    del found["digest"]
    (old,) = {file["key"].partition("/")[0] for file in found["shared"]}
    (folder / old).rename(folder / "objects")
    report = folder / "objects" / "report.html"
    report.write_bytes(b"report")
    digest = hashlib.sha256(b"report").hexdigest()
    found["documents"][0] |= {"num_bytes": 6, "sha256": digest, "chunks": {**found["documents"][0]["chunks"], "sha256": [digest]}}
    found = json.loads(json.dumps(found).replace(f"{old}/", "objects/"))
    found |= {"created_at": "2026-01-01T00:00:00+00:00", "tools": {"tensorrt_rtx": "1.7.1.116"}}
    for part in ("source", "provenance"):
        found[part] = json.loads(json.dumps(found[part]).replace(str(folder), ""))
    found["provenance"]["runDetails"] |= {"metadata": {"invocationId": "1", "startedOn": None, "finishedOn": "2026-01-01"}}
    for file in found["source"]:
        file["identity"] = "sha256:" + _SHA
    found["provenance"]["buildDefinition"]["resolvedDependencies"] = []
    found["provenance"]["buildDefinition"]["externalParameters"] = {"dtype": "auto"}
    return found


def _text(value: Any) -> bytes:
    """JSON as an attacker writes it: NaN, lone surrogates and numbers of thousands of digits too."""
    try:
        text = _dumped(value)
    except (ValueError, TypeError):  # too many digits for Python, or keys of several types
        text = _dumped(_bounded(value))
    for name, written in ((_BIG, "1" + "0" * 5000), (_DEEP, "[" * 900 + "]" * 900), (_DEEPEST, "[" * 50_000 + "]" * 50_000)):
        text = text.replace(f'"{name}"', written)
    return text.encode("utf-8", "surrogatepass")


def _dumped(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _bounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _bounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_bounded(item) for item in value]
    return _BIG if type(value) is int and abs(value) > 10**4000 else value


def sealed(plain: dict[str, Any]) -> bytes:
    """With a digest that fits, as canonical as what it holds allows."""
    rest = {name: value for name, value in plain.items() if name != "digest"}
    return _text({**rest, "digest": hashlib.sha256(_text(rest)).hexdigest()})


def _file(plain: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = plain["ranks"][0]["files"][0]
    return found


def _many_files(rng: random.Random, plain: dict[str, Any]) -> dict[str, Any]:
    count = rng.choice((1000, 20_000, 100_000))
    first = plain["shared"][0]
    return {**plain, "shared": [{**first, "path": f"many/{number}"} for number in range(count)]}


def _many_chunks(rng: random.Random, plain: dict[str, Any]) -> dict[str, Any]:
    count = rng.choice((10_000, 100_000))
    size = rng.choice((1, 2**40))
    _file(plain).update(num_bytes=count * size, chunks={"num_bytes": size, "sha256": [_SHA] * count})
    return plain


def _many_ranks(rng: random.Random, plain: dict[str, Any]) -> dict[str, Any]:
    first = plain["ranks"][0]
    count = rng.choice((0, 1, 5, 2000))
    ranks = [{**first, "rank": number, "tp_rank": number, "pp_rank": 0, "files": []} for number in range(count)]
    return {**plain, "tp": rng.choice((count, 2, 10**9)), "pp": 1, "ranks": ranks}


def _many_texts(rng: random.Random, plain: dict[str, Any]) -> dict[str, Any]:
    wrong = rng.choice((1, "x", None))
    return {**plain, rng.choice(("steps", "tools", "engine_config")): dict.fromkeys(map(str, range(100_000)), wrong)}


def _same_key(rng: random.Random, plain: dict[str, Any]) -> dict[str, Any]:
    for record in plain["ranks"]:
        record["files"][0][rng.choice(("key", "path"))] = rng.choice(
            ("manifest.json", plain["shared"][0]["key"], "objects/rank0.engine")
        )
    return plain


def _huge_numbers(rng: random.Random, plain: dict[str, Any]) -> dict[str, Any]:
    for path in paths(plain):
        node = plain
        for key in path[:-1]:
            node = node[key]
        if type(node[path[-1]]) is int and rng.random() < 0.3:
            node[path[-1]] = rng.choice((2**62, 2**63 - 1, 2**64, -1, 10**400))
    return plain


def _bool_for_int(rng: random.Random, plain: dict[str, Any]) -> dict[str, Any]:
    for name in rng.sample(("tp", "pp", "cp", "moe_ep", "schema_version"), 2):
        plain[name] = rng.choice((True, False, "1", 1.0))
    return plain


def _other_kind(rng: random.Random, plain: dict[str, Any]) -> dict[str, Any]:
    model = plain["model"]
    model |= rng.choice((
        {"moe": {"num_experts": 8, "top_k": 2}}, {"moe": {"num_experts": 10**9, "top_k": 1}, "moe_intermediate_size": 1},
        {"dtype": "float32"},
        {"num_hidden_layers": 1}, {"num_hidden_layers": 10**9}, {"rotary_scaling": {"rope_type": []}}, {"window_layers": []},
    ))  # fmt: skip
    quantization = {"spec": {}, "model": rng.choice(({}, {"algorithm": "FP8"}, {"linears": []}, {"algorithm": 1, "formats": {}}))}
    plain["quantization"] = rng.choice((None, {**quantization, "calibration": [], "worst_errors": {"a": 1e308}}))
    plain["engine_config"] = rng.choice(
        ({}, {"max_batch_size": "x"}, plain["engine_config"], {**plain["engine_config"], "max_seq_len": []})
    )
    return plain


def _schema(rng: random.Random, plain: dict[str, Any]) -> dict[str, Any]:
    return {**plain, "schema_version": rng.choice((0, -1, 2, 10**30, 10**4500, 1.0, True, "1", None, [], float("nan")))}


SPECIALS: tuple[Callable[[random.Random, dict[str, Any]], dict[str, Any]], ...] = (
    _many_files, _many_chunks, _many_ranks, _many_texts, _same_key, _huge_numbers, _bool_for_int, _other_kind, _other_kind, _schema,
    lambda rng, plain: {**plain, "x": rng.choice((deep(150, "dict"), _DEEP, _DEEPEST))},
    lambda rng, plain: {**plain, rng.choice(("created_at", "build_key", "media_type")): "x" * 3_000_000},
    lambda rng, plain: {**plain, "x" * 1_000_000: 1},
    lambda rng, plain: {name: plain[name] for name in rng.sample(sorted(plain), len(plain) // 2)},
)  # fmt: skip
TEXTS: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    corrupted,
    lambda rng, data: data.decode().encode(rng.choice(("utf-16", "utf-32", "utf-8-sig"))),
    lambda rng, data: data.replace(b'"tiny"', b'"t\xffny"'),
    lambda rng, data: b'{"name":"tiny",' + data[1:],
    lambda rng, data: data[:-1] + b"," + data[1:],
    lambda rng, data: json.dumps(json.loads(data), indent=1).encode(),
    lambda rng, data: rng.choice((b"[", b'{"a":')) * rng.choice((900, 100_000)),
    lambda rng, data: b"[" + b"[]," * rng.choice((100_000, 5_000_000)) + b"[]]",
    lambda rng, data: rng.choice((b"", b"null", b"[]", b"{}", b"1" * 6000, b'"x"', b"\x00" * 99, b"NaN", b'{"schema_version": 1}')),
    lambda rng, data: b" " * rng.choice((10, 40_000_000)) + data,
    lambda rng, data: data[: rng.randrange(len(data))],
)  # fmt: skip
