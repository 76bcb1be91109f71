"""A model folder of ONNX Runtime GenAI: `onnxruntime_genai.Model(folder)` opens it. Graphs, weights and tokenizer side by side."""

from __future__ import annotations

from pathlib import PurePosixPath

from orchestrator.releases.layouts import Arrangement, Request, identity_files


def arrange(request: Request) -> Arrangement:
    """See Layout."""
    portable = set(request.manifest.portable)
    files = [file for file in request.files if file in portable or file.role in ("weights", "tokenizer", "reference")]
    return Arrangement({file.path: PurePosixPath(file.path).name for file in files}, identity_files(request))
