"""Tables about a release or a checkpoint at a URL."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from orchestrator.base.errors import OrchestratorError, SourceCorruptError, SourceMissingError
from orchestrator.checkpoints import FORMATS, format_named, read_source, refuse_archive
from orchestrator.checkpoints.huggingface import read_json
from orchestrator.checkpoints.safetensors import HeaderEntry, read_header_at
from orchestrator.model.checkpoint import TensorInfo
from orchestrator.model.config_trtllm import from_trtllm
from orchestrator.releases import Release, open_release
from orchestrator.releases.tags import TAGS
from orchestrator.report import format_bytes
from orchestrator.stores import open_source
from orchestrator.stores.source import LocalFolder, SourceFolder

_MANIFEST = "manifest.json"
_MOST_FOLDERS = 100
_TITLES = {
    "huggingface": "Hugging Face checkpoint", "bin": "Hugging Face checkpoint (pytorch_model.bin)", "meta": "Meta checkpoint",
    "megatron": "Megatron-Core checkpoint (torch_dist)", "keras": "KerasHub preset",
    "orbax": "Orbax checkpoint",
}  # fmt: skip


def inspect(url: str, public_key: Path | None = None) -> tuple[dict[str, Any], list[Table]]:
    """Return facts for machines and tables for people about the release or checkpoint, of any source format, at `url`.

    A bare path is a local folder. With `public_key` it must be a release signed with that key. Raises ReleaseMissingError,
    SignatureError, SourceMissingError, DigestError, StoreError, and the errors of the source's format.
    """
    address = url.removesuffix("/" + _MANIFEST)
    folder = open_source(address)
    if isinstance(folder, LocalFolder):
        folder = LocalFolder(folder.folder.resolve())
        address = folder.folder.as_uri()
    if public_key is not None:
        return _release(open_release(address, public_key), public_key)
    names = _top_names(folder, address)
    if _MANIFEST in names:
        return _release(open_release(address))
    known = _format_of(names) or _format_of(names + _names_below(folder))
    if known is None and f"/{TAGS}" in address:
        return _release(open_release(address))
    if known is None:
        refuse_archive(url)
        raise SourceMissingError(
            f"{folder.url} is neither a release nor a checkpoint",
            f"Give a folder with {_MANIFEST}, or with a checkpoint: {', '.join(FORMATS)}.",
        )
    return _ranks(folder, names) if known == "trtllm" else _source(folder)


def _format_of(names: list[str]) -> str | None:
    return next((name for name in FORMATS if format_named(name).matches(names)), None)


def _names_below(folder: SourceFolder) -> list[str]:
    """Return the names of the files in the folder's folders, not further below: formats that keep weights there need no more."""
    if not isinstance(folder, LocalFolder):
        return [name for name in folder.names() if name.count("/") == 1]
    try:
        inner = sorted(path for path in folder.folder.iterdir() if path.is_dir())
    except OSError:
        return []
    return [f"{path.name}/{name}" for path in inner[:_MOST_FOLDERS] for name in LocalFolder(path).top_names()]


def _top_names(folder: SourceFolder, address: str) -> list[str]:
    """Return the names of the files directly in the folder; a local folder may hold a whole disk below."""
    if isinstance(folder, LocalFolder):
        return folder.top_names()
    try:
        return [name for name in folder.names() if "/" not in name]
    except SourceMissingError as error:
        raise SourceMissingError(error.message, f"Check the URL {address}.") from None


def _release(release: Release, public_key: Path | None = None) -> tuple[dict[str, Any], list[Table]]:
    manifest = release.manifest
    head = Table(box=None, show_header=False, pad_edge=False)
    head.add_row("release", f"{manifest.name} {manifest.version}")
    head.add_row("created", manifest.created_at)
    head.add_row("build key", manifest.build_key[:16])
    head.add_row("model", f"{manifest.model.architecture}, {manifest.model.num_hidden_layers} layers, {manifest.model.dtype}")
    head.add_row("topology", f"tp={manifest.tp} pp={manifest.pp}")
    head.add_row("size", format_bytes(manifest.num_bytes))
    head.add_row("selectors", ", ".join(f"{name}={value}" for name, value in manifest.selectors.model_dump().items()))
    head.add_row("manifest", f"sha256:{release.digest}")
    signer = f"of {release.signer} ({public_key})" if release.signer else "not checked (--public-key)"
    head.add_row("signature", "none" if release.signature() is None else signer)
    head.add_row("tools", ", ".join(f"{name} {version}" for name, version in manifest.tools.items()))
    if manifest.verification is not None:
        head.add_row("verified", manifest.verification.line())
    ranks = Table("rank", "tp", "pp", "layers", "engine", "sha256", "GPU memory", "built for", box=None, pad_edge=False)
    for record in manifest.ranks:
        for file in record.files:
            built_for = ", ".join(record.engine.compute_capabilities) or "library default"
            layers = f"{record.first_layer}-{record.first_layer + record.num_layers - 1}"
            ranks.add_row(
                str(record.rank), str(record.tp_rank), str(record.pp_rank), layers,
                f"{file.path} ({format_bytes(file.num_bytes)})", file.sha256[:16],
                format_bytes(record.memory.total_bytes),
                f"{record.engine.backend} {record.engine.tensorrt_version}, {built_for}",
            )  # fmt: skip
    return manifest.model_dump(mode="json"), [head, ranks]


def _ranks(folder: SourceFolder, names: list[str]) -> tuple[dict[str, Any], list[Table]]:
    """Describe a TensorRT-LLM checkpoint from its rank files, quantized or not."""
    try:
        config, topology = from_trtllm(read_json(folder, "config.json"))
    except ValueError as error:
        raise SourceCorruptError(f"{folder.url}/config.json is not of a TensorRT-LLM checkpoint: {error}") from None
    shards = [name for name in names if name.startswith("rank") and name.endswith(".safetensors")]
    entries = {name: read_header_at(folder, name)[0] for name in sorted(shards, key=lambda name: (len(name), name))}
    files, table = _files(entries, {name: sum(entry.num_bytes for entry in found) for name, found in entries.items()})
    sizes = f"tp={topology.tp} pp={topology.pp}" + (f" cp={topology.cp}" if topology.cp > 1 else "")
    head = _head("TensorRT-LLM checkpoint", config.architecture, f"{sizes}, {config.dtype}")
    return {"format": "trtllm", "config": config.model_dump(mode="json"), "files": files}, [head, table]


def _source(folder: SourceFolder) -> tuple[dict[str, Any], list[Table]]:
    try:
        index, _ = read_source(folder.url)
    except OrchestratorError as error:
        raise type(error)(f"{folder.url} is not a readable checkpoint: {error.message}", error.advice) from None
    entries: dict[str, list[TensorInfo]] = {file.name: [] for file in index.files}
    for tensor in index.tensors.values():
        entries[index.files[tensor.file].name].append(tensor)
    files, table = _files(entries, {file.name: file.num_bytes for file in index.files})
    architecture = ", ".join(index.config.get("architectures") or ["unknown"])
    head = _head(_TITLES[index.format], architecture, format_bytes(index.num_bytes))
    if index.algorithm:
        head.add_row("quantized", index.algorithm, "dtypes below are those that it is dequantized to")
    for warning in index.warnings:
        head.add_row("warning", escape(warning), "")
    facts = {"format": index.format, "architecture": architecture, "files": files, "warnings": list(index.warnings)}
    if index.algorithm:
        facts["quantized"] = index.algorithm
    return facts, [head, table]


def _files(
    entries: Mapping[str, Sequence[HeaderEntry | TensorInfo]], num_bytes: Mapping[str, int]
) -> tuple[list[dict[str, Any]], Table]:
    """Return tensors, bytes and dtypes of each file."""
    table = Table("file", "tensors", "bytes", "dtypes", box=None, pad_edge=False)
    files = []
    for name, found in entries.items():
        dtypes = dict(Counter(entry.dtype for entry in found))
        shown = ", ".join(f"{dtype} x {count}" for dtype, count in dtypes.items())
        table.add_row(name, str(len(found)), format_bytes(num_bytes[name]), shown)
        files.append({"file": name, "tensors": len(found), "bytes": num_bytes[name], "dtypes": dtypes})
    return files, table


def _head(kind: str, architecture: str, note: str) -> Table:
    head = Table(box=None, show_header=False, pad_edge=False)
    head.add_row(kind, architecture, note)
    return head
