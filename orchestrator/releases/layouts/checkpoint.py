"""A TensorRT-LLM checkpoint, as `orchestrator convert` writes it, with the tokenizer in a folder beside it."""

from __future__ import annotations

from orchestrator.releases.layouts import Arrangement, Request, identity_files


def arrange(request: Request) -> Arrangement:
    """See Layout."""
    paths = {file.path: file.path.removeprefix("checkpoint/") for file in request.files if file.path.startswith("checkpoint/")}
    paths |= {file.path: file.path for file in request.files if file.role == "tokenizer"}
    return Arrangement(paths, identity_files(request))
