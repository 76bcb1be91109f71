"""Networks of the ranks: one ONNX graph per rank, without weights, in standard operators of opset 24.

TensorRT's ONNX parser compiles the graph, and ONNX Runtime runs it. Weights are bound by name from the rank's safetensors,
without a copy. Tensor-parallel ranks communicate by `DistCollective` (TensorRT's operator, in the default domain).
"""

from __future__ import annotations

from orchestrator.networks.decoder import Network, Part, check_supported, decoder_network
from orchestrator.networks.rendering import Rendering

__all__ = ["Network", "Part", "Rendering", "check_supported", "decoder_network"]
