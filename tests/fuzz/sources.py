"""Checkpoints of every format, damaged and hostile: what `plan`, `inspect` and `convert` say to any folder."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from tests.fuzz.harness import apart
from tests.fuzz.mutate import SCALARS, corrupted, deep, hostile, mutated
from tests.support.synthetic import encode_safetensors, frame, hugging_face_config, model_config, random_arrays, write_source

_CONFIG = model_config(vocab_size=38)
_SPEC = """
source: {path: source}
topology: {tp: 2}
engine: {max_batch_size: 2, max_input_len: 16, max_seq_len: 64}
release: {name: tiny, version: "1"}
"""
_CONVERTED = 0.02
"""Share of the cases that are converted too: it takes seconds where the source is good."""
_KEYS = (
    "architectures", "model_type", "quantization_config", "rope_scaling", "rope_parameters", "layer_types", "sliding_window",
    "num_local_experts", "head_dim", "num_key_value_heads", "auto_map", "text_config", "vocab_size", "dtype", "mapping",
)  # fmt: skip
_ARCHITECTURES = (
    "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "GemmaForCausalLM",
    "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Phi3ForCausalLM", "GraniteForCausalLM", "Olmo2ForCausalLM", "MixtralForCausalLM",
)  # fmt: skip


class Sources:
    """See harness.Fuzzer."""

    def prepare(self, folder: Path) -> None:
        for module in ("checkpoints.trtllm", "cli.inspection", "quantizing", "cli"):
            importlib.import_module(f"orchestrator.{module}")  # what commands import, once for all children
        self._bases = folder
        apart(partial(_write_bases, folder))  # torch stays out of the process that is forked for each case

    def make(self, rng: random.Random, folder: Path) -> Sequence[Sequence[str]]:
        base = rng.choice(sorted(path.name for path in self._bases.iterdir()))
        source = Path(shutil.copytree(self._bases / base, folder / "source"))
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            with contextlib.suppress(_NotAFileError):  # an earlier change has put something else there
                rng.choices([change for change, _ in _CHANGES], [weight for _, weight in _CHANGES])[0](rng, source)
        (folder / "spec.yaml").write_text(_SPEC)
        commands = [rng.choice((["plan", "spec.yaml"], ["plan", "spec.yaml", "--json"], ["inspect", "source"]))]
        if rng.random() < _CONVERTED:
            commands.append(["convert", "--source", "source", "--output", "out", "--tp", "2"])
        return commands


class _NotAFileError(OSError):
    """A pipe, folder or link to nowhere in place of a file."""


def _content(path: Path) -> bytes:
    """Read a file; a pipe would be waited for without end."""
    if not path.is_file():
        raise _NotAFileError(path)
    return path.read_bytes()


def _write_bases(folder: Path) -> None:
    """One small model in every source format."""
    from orchestrator.base.errors import OrchestratorError
    from orchestrator.spec.build import BuildSpec
    from orchestrator.spec.decoding import decode
    from orchestrator.stages import convert
    from tests.support import keras_presets, orbax_checkpoints
    from tests.support.megatron_fixtures import unpack
    from tests.support.meta import write_bin, write_meta

    arrays = random_arrays(_CONFIG)
    plain = write_source(folder / "one", _CONFIG, arrays)
    (plain / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}, "merges": []}, "added_tokens": []}))
    (plain / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 64, "chat_template": "x"}))
    (plain / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    write_source(folder / "shards", _CONFIG, arrays, num_files=3)
    write_bin(folder / "bin", _CONFIG, arrays)
    write_bin(folder / "bin-shards", _CONFIG, arrays, num_files=2)
    write_meta(folder / "meta", _CONFIG, arrays, num_files=2)
    for name in ("llama-tp2-pp2", "qwen3_moe"):
        unpack(name, folder / f"megatron-{name}")
    keras_presets.unpack("qwen2", folder / "keras")
    keras_presets.unpack("llama3", folder / "keras-shards")
    orbax_checkpoints.unpack("llama-folders", folder / "orbax-folders")
    orbax_checkpoints.unpack("gemma2", folder / "orbax")
    spec = {"source": {"path": str(plain)}, "topology": {"tp": 2}, "engine": {"max_input_len": 1},
            "release": {"name": "checkpoint", "version": "0"}}  # fmt: skip
    try:
        convert(decode(BuildSpec, spec, "fuzz"), folder / "trtllm")
    except OrchestratorError as error:
        raise RuntimeError(error.message) from error


def _files(source: Path, *suffixes: str) -> list[Path]:
    return sorted(path for path in source.rglob("*") if path.is_file() and not path.is_symlink() and path.name.endswith(suffixes))


def _pick(rng: random.Random, source: Path, *suffixes: str) -> Path | None:
    found = _files(source, *suffixes)
    return rng.choice(found) if found else None


def _change_json(rng: random.Random, source: Path) -> None:
    """A config, an index, a tokenizer: a node of its tree."""
    path = _pick(rng, source, ".json")
    if path is None:
        return
    try:
        tree = json.loads(_content(path))
    except (ValueError, RecursionError, OSError):
        return
    for _ in range(rng.choice((1, 1, 2))):
        tree = mutated(rng, tree, _KEYS)
    _write_json(path, tree)


def _change_config(rng: random.Random, source: Path) -> None:
    """A key of config.json that decides much, or another family's architecture."""
    path = source / "config.json"
    try:
        tree = json.loads(_content(path))
        tree["architectures"] = rng.choice(([rng.choice(_ARCHITECTURES)], tree.get("architectures")))
    except (ValueError, TypeError, AttributeError, RecursionError, OSError):
        return
    tree[rng.choice((*_KEYS, *tree))] = rng.choice((hostile(rng), rng.choice((0, -1, 2**40, "4", 1.5, [4], {"a": 1}, None))))
    _write_json(path, tree)


def _write_json(path: Path, tree: Any) -> None:
    sys.set_int_max_str_digits(0)
    try:
        path.write_bytes(json.dumps(tree).encode(errors="surrogatepass"))
    except RecursionError:
        path.write_bytes(b"[" * 5000)
    finally:
        sys.set_int_max_str_digits(4300)


def _spoil_json(rng: random.Random, source: Path) -> None:
    """A JSON file that is no JSON, or of a kind that parsers stumble over."""
    path = _pick(rng, source, ".json")
    if path is None:
        return
    data = _content(path)
    path.write_bytes(
        rng.choice(
            (b"", b"[]", b"1", b"null", b"NaN", b'"x"', b"\xff\xfe" + data, data.decode(errors="replace").encode("utf-16"),
            b"{" * 100_000,
             b"[" * 100_000, b'{"a":' * 50_000, b"9" * 5000, b'{"hidden_size": ' + b"9" * 5000 + b"}", b"{}", data + data,
             b'{"x": 1e999, ' + data.lstrip(b"{ \n"), b'{"hidden_size": 1, ' + data.lstrip(b"{ \n"), b"\xef\xbb\xbf" + data,
             data.replace(b":", b"="), data[: len(data) // 2], b"\x00" * 100, b'{"a": "\xff"}',
             b"version https://git-lfs.github.com/spec/v1\n")
        )
    )  # fmt: skip


def _change_header(rng: random.Random, source: Path) -> None:
    """A safetensors header: its tree, its length, its text."""
    path = _pick(rng, source, ".safetensors")
    if path is None:
        return
    data = _content(path)
    length = int.from_bytes(data[:8], "little")
    text, body = data[8 : 8 + length], data[8 + length :]
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):
        return
    change = rng.random()
    if change < 0.5:
        path.write_bytes(_framed(mutated(rng, tree), body))
    elif change < 0.7:
        length = rng.choice((0, 1, 8, length - 1, length + 1, 2**31, 2**63, 2**64 - 1, 99_999_999, 100_000_001, len(data)))
        path.write_bytes(length.to_bytes(8, "little") + data[8:])
    elif change < 0.9 and isinstance(tree, dict):
        for name in rng.sample(sorted(tree), min(2, len(tree))):
            if isinstance(tree[name], dict):
                tree[name].update(rng.choice(_ENTRIES))
        path.write_bytes(_framed(tree, body))
    else:
        text = rng.choice(
            (text.replace(b"{", b"{" * 5000, 1), text[:-1] + b',"a":{"dtype":"BF16","shape":[0],"data_offsets":[0,0]}' * 2 + b"}",
             b"\xff" + text, text.replace(b'"', b"'"), text + b"\x00", b"[" * 100_000, b"null", b"9" * 5000, b" " * 100 + text,
             text.replace(b"model.", b"\xed\xa0\x80"), text.replace(b"[0,", b"[-0,"), text.replace(b"0", b"0e0"))
        )  # fmt: skip
        path.write_bytes(len(text).to_bytes(8, "little") + text + body)


_ENTRIES: tuple[dict[str, Any], ...] = (
    {"dtype": "F4"}, {"dtype": "bf16"}, {"dtype": ["BF16"]}, {"dtype": None}, {"dtype": 3}, {"dtype": "F64"}, {"dtype": "I64"},
    {"shape": []}, {"shape": [0]}, {"shape": [-1, -1]}, {"shape": [2**62, 4]}, {"shape": ["1"]}, {"shape": "ab"},
    {"shape": {"a": 1}},
    {"shape": [1.5]}, {"shape": [True]}, {"shape": [1] * 100_000}, {"shape": [10**400, 0]}, {"shape": None}, {"shape": [[1]]},
    {"data_offsets": [0, 0]}, {"data_offsets": [-8, 8]}, {"data_offsets": [0, 2**63]}, {"data_offsets": [1e9, 2e9]},
    {"data_offsets": [8, 0]}, {"data_offsets": []}, {"data_offsets": ["0", "8"]}, {"data_offsets": {"0": 1}},
    {"data_offsets": None},
    {"data_offsets": [0, 1, 2]}, {"data_offsets": [True, False]}, {"extra": 1},
)  # fmt: skip


def _framed(tree: Any, body: bytes) -> bytes:
    sys.set_int_max_str_digits(0)
    try:
        return frame(tree, body)
    except (UnicodeEncodeError, RecursionError):
        return frame(deep(100, "list"), body)
    finally:
        sys.set_int_max_str_digits(4300)


def _change_bytes(rng: random.Random, source: Path) -> None:
    """Any file, near its start or its end, where headers and directories lie."""
    path = _pick(rng, source, "")
    if path is None:
        return
    data = _content(path)
    size = min(len(data), rng.choice((64, 1024, 16_384)))
    if rng.random() < 0.5:
        path.write_bytes(corrupted(rng, data[:size]) + data[size:])
    else:
        path.write_bytes(data[: len(data) - size] + corrupted(rng, data[len(data) - size :]))


def _cut(rng: random.Random, source: Path) -> None:
    """A file of another size."""
    path = _pick(rng, source, "")
    if path is None:
        return
    data = _content(path)
    path.write_bytes(
        data[: rng.choice((0, 1, 7, 8, 9, len(data) // 2, max(len(data) - 1, 0)))] if rng.random() < 0.8 else data + b"\x00" * 9
    )


def _replace(rng: random.Random, source: Path) -> None:
    """Something that is no file in a file's place."""
    path = _pick(rng, source, "")
    if path is None:
        return
    kept = _content(path)
    path.unlink()
    kind = rng.choice(("gone", "folder", "fifo", "loop", "dangling", "device", "secret", "other", "outside"))
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "device":
        path.symlink_to(rng.choice(("/dev/zero", "/dev/null", "/dev/full", "/dev/tty")))
    elif kind == "secret":
        path.write_bytes(kept)
        path.chmod(0)
    elif kind == "other":
        path.write_bytes(
            rng.choice(
                (
                    b"<html>",
                    b"PK\x03\x04",
                    b"\x80\x02}q\x00.",
                    b"version https://git-lfs.github.com/spec/v1\n",
                )
            )
        )
    elif kind == "outside":
        path.symlink_to("/etc/hostname")


def _add(rng: random.Random, source: Path) -> None:
    """A file or folder beside those of the model."""
    name = rng.choice(
        ("model.safetensors", "config.json", "params.json", "model.gguf", "pytorch_model.bin", "rank0.safetensors", "x.safetensors",
         "model.safetensors.index.json", "adapter_config.json", "model_index.json", "quantize_config.json", "a" * 255,
         "consolidated.00.pth", "consolidated.99999999999999999999.pth", "tokenizer.model", "\udcff.safetensors",
         "x\ny.safetensors")
    )  # fmt: skip
    path = source / name
    if os.path.lexists(path):
        return
    kind = rng.random()
    if kind < 0.2:
        path.mkdir()
    elif kind < 0.4:
        path.symlink_to(rng.choice((".", "..", "/", "/proc/self", name)))
    else:
        path.write_bytes(
            rng.choice((b"", b"{}", b"[]", b"x" * 100, encode_safetensors({}), json.dumps(hugging_face_config(_CONFIG)).encode()))
        )


def _change_folder(rng: random.Random, source: Path) -> None:
    """The folder itself."""
    kind = rng.choice(("unreadable", "closed", "deep", "loop", "many"))
    if kind in ("unreadable", "closed"):
        source.chmod(0o300 if kind == "unreadable" else 0o600)
    elif kind == "deep":
        (source / "/".join(["d"] * rng.choice((10, 200)))).mkdir(parents=True, exist_ok=True)
    elif kind == "loop":
        (source / "again").symlink_to(source, target_is_directory=True)
    else:
        for number in range(300):
            (source / f"other-{number}-{'x' * 100}.safetensors").touch()


def _lie_in_index(rng: random.Random, source: Path) -> None:
    """Names in an index that lead elsewhere, or to what is not there."""
    found = _files(source, ".index.json")
    if not found:
        return
    path = rng.choice(found)
    try:
        tree = json.loads(_content(path))
        listed = tree["weight_map"]
        victim = rng.choice(sorted(listed))
        listed[victim] = rng.choice(
            ("../x.safetensors", "/etc/passwd", "missing.safetensors", "", ".safetensors", "a/b.safetensors", "..\\x.safetensors",
             "x" * 5000 + ".safetensors", *(value for value in SCALARS if not isinstance(value, str)), rng.choice(sorted(map(str,
             listed.values()))))
        )  # fmt: skip
        if rng.random() < 0.3:
            listed[rng.choice(("ghost", "", "x" * 100_000))] = rng.choice(sorted(map(str, listed.values())))
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        return
    _write_json(path, tree)


def _change_distributed(rng: random.Random, source: Path) -> None:
    """The pickle or the run's config of a distributed checkpoint."""
    metadata, config = source / ".metadata", source / "run_config.yaml"
    if rng.random() < 0.5 and metadata.is_file():
        metadata.write_bytes(corrupted(rng, _content(metadata)))
    elif config.is_file():
        try:
            tree = yaml.safe_load(_content(config))
            model = tree["model"]
            model[rng.choice(sorted(model))] = rng.choice((hostile(rng), 0, -1, 2, 2**70, 1.5, float("inf"), "4", [4], None, True))
        except (yaml.YAMLError, TypeError, KeyError, AttributeError, RecursionError, ValueError):
            return
        _write_json(config, tree)  # JSON is YAML


_CHANGES: tuple[tuple[Callable[[random.Random, Path], None], int], ...] = (
    (_change_json, 20), (_change_config, 20), (_spoil_json, 8), (_change_header, 20), (_change_bytes, 15), (_cut, 6), (_replace, 8),
    (_add, 6), (_change_folder, 2), (_lie_in_index, 5), (_change_distributed, 15),
)  # fmt: skip
