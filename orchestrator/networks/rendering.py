"""The two renderings of a rank's network: the graph that TensorRT compiles, and the one that ONNX Runtime executes."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.model.stage import StageNetwork


@dataclass(frozen=True, slots=True)
class Rendering:
    """The whole list of what may differ between the compiled and the executed graph of one network."""

    dtype: str
    """Weights, activations and KV cache: float16, bfloat16 or float32."""
    cache_slots: int | None
    """Fixed number of cache slots, which TensorRT demands; None: as many as a call brings."""
    portable: bool
    """Activations of NVFP4 and MXFP8 in standard operators instead of TensorRT's own."""

    @staticmethod
    def compiled(network: StageNetwork) -> Rendering:
        """The graph that becomes an engine."""
        return Rendering(network.stage.config.dtype, network.max_seq_len, portable=False)

    @staticmethod
    def executed() -> Rendering:
        """The graph that is verified: in float32, so that it is compared with the source and not with its rounding."""
        return Rendering("float32", None, portable=True)
