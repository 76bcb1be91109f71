"""TensorRT-LLM's engine directory: config.json and rank{N}.engine, and the tokenizer in a folder beside them.

config.json has the shape that TensorRT-LLM 0.16's `EngineConfig` reads: version, pretrained_config, build_config.
"""

from __future__ import annotations

import json
from typing import Any

from orchestrator.model.config_trtllm import to_trtllm
from orchestrator.model.topology import Topology
from orchestrator.releases.asked import asked_engine, model_quantization
from orchestrator.releases.layouts import Arrangement, Request, identity_files
from orchestrator.releases.manifest import Manifest

_VERSION = "0.16.0"
"""Version of TensorRT-LLM that reads this directory."""


def arrange(request: Request) -> Arrangement:
    """See Layout."""
    paths: dict[str, str] = {}
    for record in request.records():
        paths |= {file.path: f"rank{record.rank}.engine" for file in record.files if file.role == "engine"}
    paths |= {file.path: file.path for file in request.files if file.role == "tokenizer"}
    config = json.dumps(engine_config(request.manifest), indent=4).encode()
    return Arrangement(paths, {**identity_files(request), "config.json": config})


def engine_config(manifest: Manifest) -> dict[str, Any]:
    """Return the content of config.json. Raises DigestError for a manifest that lacks it."""
    layers = [next(r.num_layers for r in manifest.ranks if r.pp_rank == stage) for stage in range(manifest.pp)]
    topology = Topology(manifest.tp, manifest.pp, tuple(layers), manifest.moe_ep, manifest.cp)
    quantization = model_quantization(manifest)
    asked = asked_engine(manifest)
    return {
        "version": _VERSION,
        "pretrained_config": to_trtllm(manifest.model, topology, quantization),
        "build_config": {
            "max_batch_size": asked.max_batch_size,
            "opt_batch_size": asked.opt_batch_size,
            "max_input_len": asked.max_input_len,
            "max_seq_len": asked.max_seq_len or manifest.model.max_position_embeddings,
            "max_beam_width": 1,
            "gather_context_logits": asked.max_logits_per_sequence > 1,
            "strongly_typed": True,
            "weight_streaming": asked.weight_streaming,
        },
    }
