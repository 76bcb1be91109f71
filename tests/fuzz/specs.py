"""Specs, cluster files and rates files: what `plan`, `plan --simulate` and the checks of `build` say to any text."""

from __future__ import annotations

import copy
import importlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.fuzz.mutate import corrupted, mutated
from tests.support.synthetic import model_config, random_arrays, write_source

_SPEC: dict[str, Any] = {
    "source": {"path": "model", "format": "auto", "family": "auto"},
    "dtype": "bfloat16",
    "topology": {"tp": 2, "pp": 3, "pp_partition": [1, 1, 1], "moe_ep": 1, "cp": 1},
    "conversion": {
        "max_shard_bytes": "5GB", "not_finite": "warn", "use_parallel_embedding": False, "embedding_sharding_dim": 0,
    },
    "quantization": {
        "algorithm": "FP8", "kv_cache": "FP8", "exclude": ["*attention*"],
        "calibration": {"dataset": "default", "num_samples": 4, "max_length": 8, "device": "cpu", "layerwise": False},
    },
    "engine": {
        "backend": "tensorrt_rtx", "max_batch_size": 2, "opt_batch_size": 1, "max_input_len": 16, "max_seq_len": 64,
        "compute_capabilities": ["8.9"], "workspace_bytes": "1GiB", "optimization_level": 3,
    },
    "verification": {
        "enabled": True, "prompts": ["a b c"], "max_tokens": 12, "decode_steps": 3,
        "tolerance": {"max_relative_error": 0.001, "max_mean_kl": 0.1, "min_top1_agreement": 1.0},
    },
    "release": {"name": "tiny", "version": "1"},
}  # fmt: skip
_SMALL: dict[str, Any] = {
    "source": {"path": "model"},
    "engine": {"max_input_len": 16, "max_seq_len": 64},
    "release": {"name": "tiny", "version": "1"},
}
_CLUSTER: dict[str, Any] = {
    "kind": "local",
    "store": "store",
    "store_options": {"region": "x", "max_attempts": 1},
    "scratch": "/tmp",
    "pools": {"small": {"nodes": 2, "cpus": 4, "gpus": 0, "memory": "1KB", "labels": {"a": "b"}, "scratch": "9GB",
                        "steps": ["convert", "build"]}},
    "retries": {"max_attempts": 2, "backoff_seconds": 0.1},
    "log_format": "json",
}  # fmt: skip
"""A place that no step fits into, so that `build` ends with its checks."""
_RATES: dict[str, Any] = {
    "start_seconds": 1.0, "store_read": "1GB", "steps": {"build": {"seconds": 1, "seconds_per_gb": 2}},
    "pools": {"small": {"network": "1GB", "disk": "1GB", "price_per_hour": 3, "speed": 2, "steps": {"convert": {"seconds": 1}}}},
}  # fmt: skip
_ROOM = {**_CLUSTER, "pools": {"small": {"nodes": 2, "cpus": 4, "memory": "64GB"}}}
_PLAUSIBLE: tuple[Any, ...] = (
    1, 2, 3, 4, 8, 16, 1000, 10**9, 10**18, 2**62, 0.5, 1e-9, 1e18, True, False, None, "1KB", "64GB", "float16", "float32", "auto",
    [1, 2], [1] * 500, [2, 1], ["8.9", "12.0"], ["a.b"], ["999.9"], ["-1"], "FP8", "INT8", "W8A16", "W4A16_AWQ",
    "W8A8_SQ_PER_CHANNEL",
    "NVFP4", "MXFP8", "FP8_PER_CHANNEL_PER_TOKEN", "MIXED_PRECISION", "spec.yaml", "model/config.json", "model", ".", "llama",
    "gemma",
    "huggingface", "trtllm", "meta", "bin", "tensorrt", "ray", "mpi", "local", "memory://x", "s3://bucket/x",
    "file:///proc/x",
    ["convert", "build", "verify", "reference", "calibrate"], ["", "a"], [], {}, "detailed", "default", "none", "error", "x.txt",
)  # fmt: skip
_LARGE = (1, 2, 3, 4, 7, 8, 16, 32, 64, 100, 128, 1000, 10**6, 10**9, 2**31 - 1, 2**31, 2**62, 10**30)
_SIZES = ("1", "1KB", "100KB", "5GB", "1TB", 1, 1000, 10**15, 2**62)
_LEGAL: dict[str, tuple[Any, ...]] = {
    "topology.tp": _LARGE, "topology.pp": _LARGE, "topology.pp_partition": (None, [3], [1, 2], [2, 1], [1, 1, 1], [0, 3], [-1,
    4], []),
    "topology.moe_ep": _LARGE, "topology.cp": (1, 2), "dtype": ("auto", "float16", "bfloat16", "float32"),
    "source.format": ("auto", "huggingface", "bin", "meta", "trtllm", "nothing"), "source.family": ("llama", "gemma2",
    "phi3"),
    "source.path": ("model", ".", "..", "model/config.json", "model/model.safetensors", "", "/", "~", "~nobody/x", "file://",
    "file:///x",
                    "memory://x", "x" * 300, "x/" * 2000, "a\0b", "s3:/x", "org/model", "model/"),
    "conversion.max_shard_bytes": _SIZES, "conversion.use_parallel_embedding": (True,), "conversion.embedding_sharding_dim": (0, 1),
    "quantization.algorithm": ("FP8", "W8A16", "W4A16", "W4A16_AWQ", "W4A8_AWQ", "W8A8_SQ_PER_CHANNEL", "NVFP4", "W4A16_NVFP4",
    "MXFP8",
                               "FP8_PER_CHANNEL_PER_TOKEN", "MIXED_PRECISION", None, "fp8"),
    "quantization.kv_cache": ("INT8", "FP8", None), "quantization.group_size": _LARGE, "quantization.alpha": (0, 0.5, 1),
    "quantization.meta_recipe": (True,), "quantization.exclude": ([], ["*"], ["["], ["*" * 50], ["a" * 5000]),
    "quantization.quant_cfg": ("spec.yaml", "model/config.json", "nothing", ".", "/dev/null", "model", "file:///x", "s3://x/y"),
    "quantization.scales": ("model", "nothing", ".", "/dev/null", "memory://x"),
    "quantization.calibration.dataset": ("x.txt", "spec.jsonl", "cnn_dailymail", "x.parquet"),
    "quantization.calibration.num_samples": _LARGE, "quantization.calibration.max_length": _LARGE,
    "quantization.calibration.num_stages": _LARGE,
    "engine.backend": ("tensorrt", "tensorrt_rtx"), "engine.max_batch_size": _LARGE, "engine.opt_batch_size": _LARGE,
    "engine.max_input_len": _LARGE, "engine.max_seq_len": _LARGE, "engine.opt_input_len": _LARGE,
    "engine.max_logits_per_sequence": _LARGE,
    "engine.compute_capabilities": ([], ["8.9"], ["12.0", "8.0"], ["1"], ["8.9"] * 999, ["x"], ["8.9a"], ["-8.9"], ["9" * 500]),
    "engine.workspace_bytes": _SIZES, "engine.gather_logits": (False,), "verification.enabled": (True, False),
    "verification.prompts": ([], [""], ["a"], ["a" * 100_000], ["a"] * 3000), "verification.max_tokens": _LARGE,
    "verification.decode_steps": _LARGE, "verification.tolerance.max_relative_error": (None, 1e-300, 1e300),
    "release.name": ("a", "a" * 128, "con", "a..b"), "release.version": ("1", "latest", "1.10", "a..b"),
    "pools.small.cpus": _LARGE, "pools.small.nodes": (1, 2, 100, 1000), "pools.small.memory": (*_SIZES, None),
    "pools.small.gpus": _LARGE,
    "pools.small.scratch": _SIZES, "pools.small.steps": (["convert", "build", "verify", "reference", "calibrate"], [], ["verify"]),
    "kind": ("local", "ray", "mpi"), "store": ("store", "memory://x", "/proc/x", "spec.yaml", "model", "s3x://b",
    "http://127.0.0.1:9/x"),
    "scratch": ("/nowhere", "spec.yaml", "/proc", ""), "retries.max_attempts": _LARGE, "retries.backoff_seconds": (0, 1e300),
    "start_seconds": (0, 1e300, 1e-300), "store_read": _SIZES, "store_write": _SIZES, "pools.small.network": _SIZES,
    "pools.small.disk": _SIZES, "pools.small.speed": (1e-300, 1e300), "pools.small.price_per_hour": (1e300,),
    "steps.build.seconds": (0, 1e300), "steps.convert.seconds_per_gb": (0, 1e300),
}  # fmt: skip
"""Values that decode, most of them: what is wrong with them is found further on."""
_SNIPPETS = (
    "x: !!int abc\n", "x: !!float z\n", "x: !!timestamp q\n", "x: !!binary é\n", "x: !!bool maybe\n",
    "x: !!python/name:os.system\n",
    "x: !!python/object/apply:os.system [ls]\n", "x: !!set {a, b}\n", "x: !!omap [a]\n", "x: !custom y\n",
    "x: " + "9" * 5000 + "\n",
    "x: " + "[" * 3000 + "\n", "x: " + "{a: " * 2000 + "\n", "x: " + "[" * 200 + "]" * 200 + "\n", "x: " + "- " * 3000 + "a\n",
    "x: &a [*a]\n", "x: &a {b: *a}\n", "x: *nowhere\n", "x: &a 1\ny: &a 2\n", "<<: {x: 1}\n", "<<: [1]\n", "<<: 3\n",
    "x: 1\nx: 2\n",
    "topology: {tp: 2}\ntopology: {tp: 4}\n", "topology: {tp: on}\n", "topology: {tp: 1:30}\n", "topology: {tp: 0o2}\n",
    "topology: {tp: 0x2}\n", "topology: {tp: 1_0}\n", "topology: {tp: 2.0}\n", "topology: {tp: 010}\n", "topology: {tp: '2'}\n",
    "dtype: no\n", "release: {name: tiny, version: 1}\n", "release: {name: tiny, version: 1.10}\n", "release: {name: 2024-01-01}\n",
    "---\n", "...\n", "--- a\n--- b\n", "%YAML 3.0\n", "%TAG ! x\n", "\tx: 1\n", "  x: 1\n", "? [a, b]\n: c\n", "? {a: b}\n: c\n",
    "1: 2\n", "true: 2\n", "null: 2\n", "1.5: 2\n", "x: |\n  a\n b\n", "x: 'a\n", 'x: "\\ud800"\n', 'x: "\\x00"\n', "x: @\n",
    "x: `\n",
    "\ufeff", "# " + "x" * 20_000 + "\n", "x: " + "ab " * 40_000 + "\n", "\r", "\u2028", "\x85", "\x00", "\x07", "a:b:c\n",
    ": \n", "- a\n",
)  # fmt: skip


def bomb(width: int, depth: int) -> str:
    """Aliases of aliases: a few hundred bytes that stand for width ** depth values."""
    lines = ["a0: &a0 [" + ", ".join(["x"] * width) + "]"]
    lines.extend(f"a{level}: &a{level} [" + ", ".join([f"*a{level - 1}"] * width) + "]" for level in range(1, depth))
    return "\n".join(lines) + "\n"


class Specs:
    """See harness.Fuzzer."""

    def prepare(self, folder: Path) -> None:
        for module in ("clusters.simulation", "quantizing", "cli"):
            importlib.import_module(f"orchestrator.{module}")  # what commands import, once for all children
        config = model_config()
        self._source = write_source(folder / "model", config, random_arrays(config))

    def make(self, rng: random.Random, folder: Path) -> Sequence[Sequence[str]]:
        victim = rng.choices(("spec", "cluster", "rates"), (6, 2, 1))[0]
        spec = rng.choice((_SPEC, _SMALL))
        command = {
            "spec": rng.choice((["plan"], ["plan", "--json"], ["build", "--cluster", "cluster.yaml"])),
            "cluster": rng.choice((["build", "--cluster", "cluster.yaml"], ["plan", "--simulate", "--cluster", "cluster.yaml"])),
            "rates": ["plan", "--simulate", "--cluster", "cluster.yaml", "--rates", "rates.yaml"],
        }[victim]
        cluster = _ROOM if "--simulate" in command else _CLUSTER
        trees = {"spec": spec, "cluster": cluster, "rates": _RATES}
        (folder / "model").symlink_to(self._source)
        for name, tree in trees.items():
            data = _spoiled(rng, tree) if name == victim else _text(tree)
            (folder / f"{name}.yaml").write_bytes(data)
        return [[command[0], "spec.yaml", *command[1:]]]


def _text(tree: Any) -> bytes:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).encode(errors="surrogatepass")


def _spoiled(rng: random.Random, tree: Any) -> bytes:
    kind = rng.random() - 0.4
    if kind < 0:
        for _ in range(rng.choice((1, 1, 2, 4))):
            tree = _set(rng, tree)
        return _dumped(tree)
    kind /= 0.6
    if kind < 0.5:
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            tree = mutated(rng, tree, list(_SPEC), _PLAUSIBLE)
        return _dumped(tree)
    text = _text(tree)
    if kind < 0.75:
        lines = text.decode().splitlines(keepends=True)
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(_SNIPPETS))
        return "".join(lines).encode(errors="surrogatepass")
    if kind < 0.8:
        alias = bomb(rng.choice((2, 9)), rng.choice((3, 8, 30)))
        use = rng.choice(("source: *a2\n", "release: *a2\n", "topology: {tp: *a2}\n", "engine: {zz: *a2}\n", ""))
        return (alias + use).encode() + text
    if kind < 0.85:
        return rng.choice(
            (b"", b"\n", text.replace(b"\n", b"\r\n"), text.decode().encode("utf-16"), text.decode().encode("utf-32"),
             text.replace(b"  ", b"\t"), b"\xff" + text, text + b"\xc3", b"\x00" * 100, text * 3, text.replace(b": ", b":"),
             b"[" * 100_000, b"a: " * 50_000, b"x" * 3_000_000, text.replace(b"\n", b"\r"))
        )  # fmt: skip
    return corrupted(rng, text)


def _set(rng: random.Random, tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with one of _LEGAL's values."""
    top = {"spec": set(_SPEC), "cluster": set(_CLUSTER), "rates": set(_RATES)}[
        "spec" if "source" in tree else "cluster" if "store" in tree else "rates"
    ]
    path = rng.choice([name for name in _LEGAL if name.partition(".")[0] in top])
    made = node = copy.deepcopy(tree)
    *parents, last = path.split(".")
    for name in parents:
        node = node.setdefault(name, {}) if isinstance(node, dict) else {}
    node[last] = rng.choice(_LEGAL[path])
    return made


def _dumped(tree: Any) -> bytes:
    """YAML, with what PyYAML refuses to write as JSON would."""
    import json

    try:
        return _text(tree)
    except (yaml.YAMLError, ValueError, RecursionError):
        try:
            return json.dumps(tree).encode(errors="surrogatepass")
        except (ValueError, RecursionError):
            return b"source: " + b"[" * 2000
