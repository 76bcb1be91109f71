"""Decode the parts of a manifest that hold plain data, for layouts that need them."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from orchestrator.base.errors import DigestError
from orchestrator.model.quantization import ModelQuantization
from orchestrator.releases.manifest import Manifest

T = TypeVar("T", bound=BaseModel)


class AskedEngine(BaseModel):
    """TensorRT build options: the fields of BuildConfig that runtimes read."""

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)

    max_batch_size: int
    opt_batch_size: int
    max_input_len: int
    max_seq_len: int | None = None
    max_logits_per_sequence: int = 1
    weight_streaming: bool = False
    gather_logits: bool = True


def asked_engine(manifest: Manifest) -> AskedEngine:
    """Decode engine_config. Raises DigestError."""
    return _decoded(AskedEngine, manifest.engine_config, "engine_config")


def model_quantization(manifest: Manifest) -> ModelQuantization | None:
    """Decode the formats by linear; None for a model that is not quantized. Raises DigestError."""
    return _decoded(ModelQuantization, manifest.quantization.model, "quantization") if manifest.quantization else None


def _decoded(model: type[T], plain: Any, what: str) -> T:
    """Decode plain data as `model`. Raises DigestError."""
    try:
        return model.model_validate(plain)
    except ValidationError as error:
        raise DigestError(f"the manifest's {what} cannot be read: {error.error_count()} fields are wrong") from None
