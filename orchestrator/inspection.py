"""What lies at a URL: a release or a checkpoint, as tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from rich.table import Table

from orchestrator.checkpoints import read_source
from orchestrator.checkpoints.safetensors import read_header
from orchestrator.core.errors import OrchestratorError, SourceMissingError
from orchestrator.core.manifest import Manifest
from orchestrator.report import counted, format_bytes
from orchestrator.verbs import read_checkpoint_config, read_release


def inspect(url: str) -> tuple[dict[str, Any], list[Table]]:
    """Facts for machines and tables for people about the release, TensorRT-LLM or Hugging Face checkpoint at `url`.

    A bare path is a folder of this machine. Raises ReleaseMissingError, SourceMissingError, DigestError.
    """
    parts = urlsplit(url)
    if parts.scheme and parts.scheme != "file":
        return _release(read_release(url)[1])
    folder = Path(unquote(parts.path)).resolve()
    if folder.name == "manifest.json":
        folder = folder.parent
    if (folder / "manifest.json").is_file():
        return _release(read_release(folder.as_uri())[1])
    if not (folder / "config.json").is_file():
        raise SourceMissingError(
            f"{folder} is neither a release nor a checkpoint", "Give a folder with manifest.json or config.json."
        )
    if sorted(folder.glob("rank*.safetensors")):
        return _trtllm(folder)
    return _hugging_face(folder)


def _release(manifest: Manifest) -> tuple[dict[str, Any], list[Table]]:
    head = Table(box=None, show_header=False, pad_edge=False)
    head.add_row("release", f"{manifest.name} {manifest.version}")
    head.add_row("created", manifest.created_at)
    head.add_row("build key", manifest.build_key[:16])
    head.add_row("model", f"{manifest.model.architecture}, {manifest.model.num_hidden_layers} layers, {manifest.model.dtype}")
    head.add_row("topology", f"tp={manifest.tp} pp={manifest.pp}")
    head.add_row("size", format_bytes(manifest.num_bytes))
    head.add_row("tools", ", ".join(f"{name} {version}" for name, version in manifest.tools.items()))
    if manifest.verification is not None:
        found = manifest.verification
        head.add_row(
            "verified",
            f"{found.num_positions} positions: relative error {found.max_relative_error:.2e}, "
            f"KL {found.mean_kl:.2e}, top-1 {found.top1_agreement:.3f}",
        )
    ranks = Table("rank", "tp", "pp", "layers", "engine", "sha256", "built for", box=None, pad_edge=False)
    for record in manifest.ranks:
        for file in record.files:
            built_for = ", ".join(record.engine.compute_capabilities) or "library default"
            layers = f"{record.first_layer}-{record.first_layer + record.num_layers - 1}"
            ranks.add_row(
                str(record.rank), str(record.tp_rank), str(record.pp_rank), layers,
                f"{file.path} ({format_bytes(file.num_bytes)})", file.sha256[:16],
                f"{record.engine.backend} {record.engine.tensorrt_version}, {built_for}",
            )  # fmt: skip
    return manifest.model_dump(mode="json"), [head, ranks]


def _trtllm(folder: Path) -> tuple[dict[str, Any], list[Table]]:
    config, topology = read_checkpoint_config(folder)
    table = Table("file", "tensors", "bytes", "dtypes", box=None, pad_edge=False)
    files = []
    for path in sorted(folder.glob("rank*.safetensors"), key=lambda item: (len(item.name), item.name)):
        entries, _ = read_header(path)
        dtypes = counted(entry.dtype for entry in entries)
        size = sum(entry.num_bytes for entry in entries)
        shown = ", ".join(f"{name} x {count}" for name, count in dtypes.items())
        table.add_row(path.name, str(len(entries)), format_bytes(size), shown)
        files.append({"file": path.name, "tensors": len(entries), "bytes": size, "dtypes": dtypes})
    head = _head("TensorRT-LLM checkpoint", config.architecture, f"tp={topology.tp} pp={topology.pp}, {config.dtype}")
    return {"format": "trtllm", "config": config.model_dump(mode="json"), "files": files}, [head, table]


def _hugging_face(folder: Path) -> tuple[dict[str, Any], list[Table]]:
    try:
        index, _ = read_source(str(folder))
    except OrchestratorError as error:
        raise type(error)(f"{folder} is no readable checkpoint: {error.message}", error.advice) from None
    table = Table("file", "tensors", "bytes", "dtypes", box=None, pad_edge=False)
    files = []
    for number, file in enumerate(index.files):
        mine = [tensor for tensor in index.tensors.values() if tensor.file == number]
        dtypes = counted(tensor.dtype for tensor in mine)
        shown = ", ".join(f"{name} x {count}" for name, count in dtypes.items())
        table.add_row(file.name, str(len(mine)), format_bytes(file.num_bytes), shown)
        files.append({"file": file.name, "tensors": len(mine), "bytes": file.num_bytes, "dtypes": dtypes})
    architecture = ", ".join(index.config.get("architectures") or ["unknown"])
    head = _head("Hugging Face checkpoint", architecture, format_bytes(index.num_bytes))
    return {"format": "huggingface", "architecture": architecture, "files": files}, [head, table]


def _head(kind: str, architecture: str, note: str) -> Table:
    head = Table(box=None, show_header=False, pad_edge=False)
    head.add_row(kind, architecture, note)
    return head
