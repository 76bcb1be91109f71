"""Optional parts of the package: which extra brings which module, and the error when one is missing.

The base install serves the laptop and the serving node. What a command needs beyond it is checked before the command does
anything (`require`); an import that fails later is explained in the same words (`missing_extra`).
"""

from __future__ import annotations

import importlib.util

from orchestrator.base.errors import ToolError

EXTRAS: dict[str, tuple[str, ...]] = {
    "build": ("torch", "transformers", "modelopt", "onnx", "onnxruntime", "numpy", "ml_dtypes", "safetensors", "tensorrt_rtx"),
    "ray": ("ray",),
    "mpi": ("mpi4py",),
    "kubernetes": ("kubernetes",),
    "signing": ("model_signing", "cryptography"),
    "obstore": ("obstore",),
    "tensorrt": ("tensorrt",),
}
"""Modules of each extra of pyproject.toml."""


def require(*extras: str) -> None:
    """Raise ToolError with every one of `extras` that has a module which is not installed. Imports nothing."""
    missing = {extra: module for extra in extras for module in reversed(EXTRAS[extra]) if not _is_installed(module)}
    if missing:
        raise extra_error(",".join(missing), f"{', '.join(missing.values())} is not installed")


def extra_error(extra: str, reason: str) -> ToolError:
    """The error of a command that needs `extra`, or several joined by commas."""
    return ToolError(f"this needs the extra {extra}: {reason}", f"Run: pip install 'trt-orchestrator[{extra}]'")


def missing_extra(error: BaseException) -> ToolError | None:
    """The error of an import that failed for want of an extra; None for every other error."""
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
    except (ImportError, ValueError):  # a finder refuses it, or a half-made module stands in its place
        return False
