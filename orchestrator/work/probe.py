"""Probe of a node, run on the node: devices, tools, free space, and whether the store answers."""

from __future__ import annotations

import contextlib
import platform
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from orchestrator.base.errors import OrchestratorError
from orchestrator.engines.device import all_gpus, open_nvml
from orchestrator.events.nodes import GpuFacts, NodeFacts
from orchestrator.spec.cluster import StoreOptions
from orchestrator.work.process import scratch_root
from orchestrator.work.scratch import remove_dead

_PACKAGES = {
    "trt-orchestrator": "trt-orchestrator", "ray": "ray", "torch": "torch", "onnxruntime": "onnxruntime",
    "nvidia-modelopt": "nvidia-modelopt", "mpi4py": "mpi4py",
}  # fmt: skip


def probe_here(store: str, options_json: str, scratch: str | None, paths: Iterable[str]) -> str:
    """Return the NodeFacts of this machine as JSON. The cluster adds the node's name, labels and resources."""
    folder = scratch or tempfile.gettempdir()
    error, seconds = _try_store(store, StoreOptions.model_validate_json(options_json))
    facts = NodeFacts(
        node=platform.node(),
        devices=tuple(
            GpuFacts(name=g.name, memory_bytes=g.memory_bytes, compute_capability=g.compute_capability) for g in all_gpus()
        ),
        driver=_driver(),
        scratch=folder,
        scratch_free_bytes=_scratch_free(scratch),
        store_error=error,
        store_seconds=round(seconds, 3),
        paths={path: Path(path).exists() for path in paths},
        versions=_versions(),
    )
    return facts.model_dump_json()


def _driver() -> str:
    """Return the version of the GPU driver; empty without one."""
    with open_nvml() as nvml:
        return str(nvml.nvmlSystemGetDriverVersion()) if nvml is not None else ""


def _try_store(url: str, options: StoreOptions) -> tuple[str, float]:
    """Write, read and remove a tiny object; returns the error message (empty: no error) and the seconds taken."""
    from orchestrator.stores import open_store

    began = time.monotonic()
    key, data = f"probe/{uuid.uuid4().hex}", b"probe"
    try:
        store = open_store(url, options)
        store.put(key, data)
        same = store.get(key) == data
        store.delete(key)
    except OrchestratorError as error:
        return error.message, time.monotonic() - began
    except Exception as error:  # libraries under a store raise errors of their own
        return f"{type(error).__name__}: {error}", time.monotonic() - began
    return "" if same else "the store returned other bytes than were written", time.monotonic() - began


def _versions() -> dict[str, str]:
    from orchestrator.engines import installed_version

    found = {"python": platform.python_version()}
    for name, package in _PACKAGES.items():
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(package)
    for backend in ("tensorrt", "tensorrt_rtx"):
        with contextlib.suppress(Exception):
            version = installed_version(backend)
            if version is not None:
                found[backend] = version
    return found


def _scratch_free(scratch: str | None) -> int:
    """Return the free bytes of the scratch folder, after removing what killed steps left; 0: the folder cannot be used."""
    try:
        root = scratch_root(scratch)
        remove_dead(root)
        return shutil.disk_usage(root).free
    except OSError:
        return 0
