"""Spec and cluster files: YAML in, frozen values out. Relative places count from the file that names them."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from orchestrator.checkpoints.places import is_url
from orchestrator.core.calibration import DATA_SUFFIXES
from orchestrator.core.errors import SpecError
from orchestrator.core.rates import RatesSpec
from orchestrator.core.spec import BuildSpec, ClusterSpec, QuantizationSpec, decode


def load_spec(path: Path) -> BuildSpec:
    """Read a build spec. Raises SpecError naming every wrong field."""
    spec = decode(BuildSpec, _read(path), str(path))
    source = resolve_source(spec.source.path, path.parent)
    found = {"source": spec.source.model_copy(update={"path": source})}
    return spec.model_copy(update={**found, "quantization": _resolve_files(spec.quantization, path.parent)})


def _resolve_files(asked: QuantizationSpec | None, base: Path) -> QuantizationSpec | None:
    if asked is None:
        return None
    found: dict[str, Any] = {
        name: resolve_source(value, base) for name in ("quant_cfg", "scales") if (value := getattr(asked, name)) is not None
    }
    dataset = asked.calibration.dataset
    if dataset.endswith(DATA_SUFFIXES):
        found["calibration"] = asked.calibration.model_copy(update={"dataset": resolve_source(dataset, base)})
    return asked.model_copy(update=found)


def resolve_source(source: str, base: Path) -> str:
    """A URL as it is; a folder, bare or as file:// URL, as the absolute path of it, relative to `base`."""
    if source.startswith("file://"):
        return unquote(urlsplit(source).path)
    return source if is_url(source) else str((base / Path(source).expanduser()).resolve())


def load_cluster(path: Path) -> ClusterSpec:
    """Read a cluster file. Raises SpecError naming every wrong field."""
    spec = decode(ClusterSpec, _read(path), str(path))
    return spec.model_copy(update={"store": resolve_store(spec.store, path.parent)})


def load_rates(path: Path) -> RatesSpec:
    """Read a rates file. Raises SpecError naming every wrong field."""
    return decode(RatesSpec, _read(path), str(path))


def resolve_store(store: str, base: Path) -> str:
    """A URL as it is; a bare folder as the file:// URL of it, relative to `base`."""
    if urlsplit(store).scheme:
        return store
    return (base / Path(store).expanduser()).resolve().as_uri()


def _read(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(path.read_text())
    except OSError as error:
        raise SpecError(f"cannot read {path}: {error.strerror}", "Check the path.") from None
    except yaml.YAMLError as error:
        raise SpecError(f"{path} is not YAML: {error}") from None
