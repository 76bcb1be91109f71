"""The two renderings of a rank's network: the graph that TensorRT compiles, and the graph that ONNX Runtime executes."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.model.stage import StageNetwork


@dataclass(frozen=True, slots=True)
class Rendering:
    """The properties in which the compiled and the executed graph of a network may differ. There are no others."""

    dtype: str
    """Dtype of weights, activations and KV cache: float16, bfloat16 or float32."""
    cache_slots: int | None
    """Fixed number of KV cache slots, which TensorRT requires; None: dynamic."""
    portable: bool
    """Whether NVFP4 and MXFP8 activations use standard operators instead of TensorRT's own."""

    halved: bool = False
    """Whether the one cache tensor of a latent attention is two halves, because the executor knows keys and values (GenAI)."""
    in_place: bool = True
    """Whether a KV cache in the graph's dtype is updated in place; False: read and written as a whole, as a quantized one is."""
    runtime_layers: bool = False
    """Whether layers of ONNX Runtime's own compute chosen experts."""

    @staticmethod
    def compiled(network: StageNetwork, in_place: bool = True) -> Rendering:
        """Return the rendering that becomes an engine."""
        return Rendering(network.stage.config.dtype, network.cache_slots, portable=False, in_place=in_place)

    @staticmethod
    def executed() -> Rendering:
        """Return the rendering that is verified, in float32, so that rounding does not count as an error."""
        return Rendering("float32", None, portable=True)

    @staticmethod
    def for_genai() -> Rendering:
        """Return the verified rendering with ONNX Runtime's layers, and the caches that GenAI keeps: equal keys and values."""
        return Rendering("float32", None, portable=True, halved=True, runtime_layers=True)
