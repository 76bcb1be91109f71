"""The network of one rank: a per-rank ONNX graph without weights, in standard operators of opset 24.

One graph has two executions: TensorRT's ONNX parser compiles it, ONNX Runtime runs it. Weights are bound by name from the
rank's safetensors, without a copy. `DistCollective` (TensorRT's operator, in the default domain) stands where tensor
parallel ranks meet.
"""

from __future__ import annotations

from orchestrator.networks.decoder import Network, check_supported, decoder_network
from orchestrator.networks.rendering import Rendering

__all__ = ["Network", "Rendering", "check_supported", "decoder_network"]
