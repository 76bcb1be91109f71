"""Spec and cluster files: YAML in, frozen values out. Relative places count from the file that names them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from orchestrator.base.errors import SpecError, abbreviated
from orchestrator.base.urls import is_url, refuse_secret
from orchestrator.spec.build import DATA_SUFFIXES, BuildSpec, QuantizationSpec
from orchestrator.spec.cluster import ClusterSpec
from orchestrator.spec.decoding import Frozen, decode_yaml
from orchestrator.spec.rates import RatesSpec
from orchestrator.spec.yaml_text import MAX_BYTES

T = TypeVar("T", bound=Frozen)


def load_spec(path: Path) -> BuildSpec:
    """Read a build spec. Raises SpecError naming every wrong field."""
    spec = _load(BuildSpec, path)
    source = resolve_source(spec.source.path, path.parent)
    places = {"path": source}
    if spec.source.tokenizer is not None:
        places["tokenizer"] = resolve_source(spec.source.tokenizer, path.parent)
    found = {"source": spec.source.model_copy(update=places)}
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
    refuse_secret(source, "the URL of the source")
    if source.startswith("file://"):
        return unquote(urlsplit(source).path)
    return source if is_url(source) else str(_absolute(source, base))


def _absolute(path: str, base: Path) -> Path:
    """Raises SpecError for what no path can be: of a user that does not exist, with a NUL, in a circle of links."""
    try:
        return (base / Path(path).expanduser()).resolve()
    except (ValueError, RuntimeError, OSError) as error:
        raise SpecError(f"{abbreviated(path, 200)!r} is no path of this machine: {error}", "Correct the path.") from None


def load_cluster(path: Path) -> ClusterSpec:
    """Read a cluster file. Raises SpecError naming every wrong field."""
    spec = _load(ClusterSpec, path)
    return spec.model_copy(update={"store": resolve_store(spec.store, path.parent)})


def load_rates(path: Path) -> RatesSpec:
    """Read a rates file. Raises SpecError naming every wrong field."""
    return _load(RatesSpec, path)


def resolve_store(store: str, base: Path) -> str:
    """A URL as it is; a bare folder as the file:// URL of it, relative to `base`."""
    refuse_secret(store, "the URL of the store")
    if urlsplit(store).scheme:
        return store
    return _absolute(store, base).as_uri()


def _load(model: type[T], path: Path) -> T:
    """Raises SpecError."""
    try:
        with path.open("rb") as file:  # a pipe, too: plan <(program)
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise SpecError(f"cannot read {path}: {reason}", "Check the path.") from None
    return decode_yaml(model, data, str(path))
