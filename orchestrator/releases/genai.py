"""genai_config.json: how ONNX Runtime GenAI runs the portable graphs of a release.

Format: onnxruntime-genai 0.18, src/config.h. Every tensor-parallel rank of a layer counts as a layer of its own, as its cache does
in the graphs (networks/portable.py): num_hidden_layers is layers times tp, num_key_value_heads is that of one rank.
"""

from __future__ import annotations

import json
from typing import Any

from orchestrator.checkpoints import published_names
from orchestrator.model.stage import StageOptions
from orchestrator.planning.plan import Plan
from orchestrator.stores import open_source
from orchestrator.stores.confined import read_companion

GENAI_CONFIG = "genai_config.json"
_PAST, _PRESENT = "past_key_values.%d.{}", "present_key_values.%d.{}"
_CACHES = ("key", "value")
"""Cache tensors of a layer, which GenAI takes to be of one shape. Of a latent attention, they are halves of its one tensor."""
_GENERATION = "generation_config.json"
SESSION_ENTRIES = {
    # Otherwise a weight-only MatMul is fused into a kernel that rounds its input to int8.
    "session.disable_quant_qdq": "1",
    # Otherwise weights above 1 GiB in float32, such as a head's or all experts' of a layer, are widened anew by every call.
    "optimization.constant_folding_max_output_size_in_bytes": "0",
}
"""Entries of the configuration of an ONNX Runtime session that runs a portable graph."""


def genai_config(plan: Plan) -> dict[str, Any]:
    """Return the content of genai_config.json."""
    config, topology = plan.inputs.config, plan.topology
    tokens = _special_tokens(plan)
    decoder: dict[str, Any] = {
        "session_options": {**SESSION_ENTRIES, "provider_options": []},
        "head_size": config.cache_head_size // len(_CACHES) if config.is_latent else config.head_size,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers * topology.tp,
        "num_key_value_heads": config.kv_heads_per_rank(topology.tp),
        "inputs": {
            "input_ids": "input_ids",
            "position_ids": "position_ids",
            "past_key_names": _PAST.format("key"),
            "past_value_names": _PAST.format("value"),
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": _PRESENT.format("key"),
            "present_value_names": _PRESENT.format("value"),
        },
    }
    if topology.pp == 1:
        decoder["filename"] = "stage0.onnx"
    else:
        stages = [StageOptions.of(config, topology, pp_rank) for pp_rank in range(topology.pp)]
        decoder["pipeline"] = [{f"stage{stage.pp_rank}": _stage(stage)} for stage in stages]
    return {
        "model": {
            "type": "decoder" if topology.pp == 1 else "decoder-pipeline",
            "context_length": plan.inputs.engine.max_seq_len,
            "vocab_size": config.vocab_size,
            **tokens,
            "decoder": decoder,
        },
        "search": {
            "do_sample": False,
            "max_length": plan.inputs.engine.max_seq_len,
            "num_beams": 1,
            # The cache is updated in place, so one buffer holds all its slots.
            "past_present_share_buffer": True,
        },
    }


def _stage(stage: StageOptions) -> dict[str, Any]:
    """Return a stage of the pipeline: its file, the names of its inputs and outputs, and the next stage's name of its result."""
    numbers = range(stage.first_layer * stage.tp, (stage.first_layer + stage.num_layers) * stage.tp)
    caches = [(number, what) for number in numbers for what in _CACHES]
    found: dict[str, Any] = {
        "filename": f"stage{stage.pp_rank}.onnx",
        "inputs": [
            "input_ids" if stage.is_first else "hidden_states",
            "position_ids",
            *(_PAST.format(what) % number for number, what in caches),
        ],
        "outputs": [
            "logits" if stage.is_last else "hidden_states_out",
            *(_PRESENT.format(what) % number for number, what in caches),
        ],
    }
    if not stage.is_last:
        found["output_names_forwarder"] = {"hidden_states_out": "hidden_states"}
    return found


def _special_tokens(plan: Plan) -> dict[str, Any]:
    """Return the ids of the tokens that begin, end and pad a text, from generation_config.json, else config.json."""
    found: dict[str, Any] = {name: plan.inputs.index.config.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    names = published_names(plan.inputs.extra_format)
    for name in (file.name for file in plan.inputs.extra_files if names[file.name] == _GENERATION):
        plain = json.loads(read_companion(open_source(plan.inputs.extra_place), name))
        found |= {name: plain[name] for name in found if plain.get(name) is not None}
    ends = found["eos_token_id"]
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    pad = found["pad_token_id"] if found["pad_token_id"] is not None else next(iter(ends), 0)
    begin = found["bos_token_id"] if found["bos_token_id"] is not None else pad
    return {"bos_token_id": begin, "eos_token_id": ends, "pad_token_id": pad}
