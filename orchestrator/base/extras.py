"""Extras of the package, their modules, and the error when an extra is missing.

The base install serves laptops and serving nodes. A command checks the extras that it needs before any work (`require`); an
import that fails later gets the same error (`missing_extra`).
"""

from __future__ import annotations

import importlib.util

from orchestrator.base.errors import ToolError

EXTRAS: dict[str, tuple[str, ...]] = {
    "build": ("torch", "transformers", "modelopt", "onnx", "onnxruntime", "numpy", "ml_dtypes", "safetensors", "tensorrt_rtx"),
    "ray": ("ray",),
    "run": ("onnxruntime_genai", "tokenizers", "jinja2"),
    "mpi": ("mpi4py",),
    "kubernetes": ("kubernetes",),
    "signing": ("model_signing", "cryptography"),
    "obstore": ("obstore",),
    "keras": ("h5py",),
    "orbax": ("tensorstore", "zstandard"),
    "tensorrt": ("tensorrt",),
    "gpu": ("nccl", "cuda", "numpy", "safetensors"),
}
"""Extra of pyproject.toml -> its modules."""


def require(*extras: str) -> None:
    """Check that the modules of `extras` are installed, without importing them. Raises ToolError, which names the missing ones."""
    missing = {extra: module for extra in extras for module in reversed(EXTRAS[extra]) if not _is_installed(module)}
    if missing:
        raise extra_error(",".join(missing), f"{', '.join(missing.values())} is not installed")


def extra_error(extra: str, reason: str) -> ToolError:
    """Return the error of a command that needs `extra`, or several joined by commas."""
    return ToolError(f"this needs the extra {extra}: {reason}", f"Run: pip install 'trt-orchestrator[{extra}]'")


def missing_extra(error: BaseException) -> ToolError | None:
    """Return the error of an import that failed because an extra is missing; None: another error."""
    if not isinstance(error, ModuleNotFoundError):
        return None
    module = (error.name or "").partition(".")[0]
    extra = next((name for name, modules in EXTRAS.items() if module in modules), None)
    if extra is None or _is_installed(module):
        return None
    made = extra_error(extra, f"{module} is not installed")
    made.__cause__ = error
    return made


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # refused by a finder, or a module without a spec
        return False
