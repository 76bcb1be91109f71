"""The language model within a larger model (vision, speech), as a checkpoint of its own: its config, its tensors' names."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from orchestrator.base.errors import ArchitectureError
from orchestrator.checkpoints.fused_experts import single_experts
from orchestrator.families.wrappers import has_fused_experts, is_wrapper, language_config
from orchestrator.model.checkpoint import CheckpointIndex, TensorInfo

_PREFIXES = {
    "language_model.model.model.": "model.",
    "language_model.": "",
    "model.language_model.model.": "model.",
    "model.language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
    "model.text_model.": "model.",
}
"""Prefix of the language model's tensors -> what it is without the larger model. transformers 5.14 doubles `model.` where it saves
models of speech."""
_HEAD = "lm_head.weight"
_BARE = ("model.layers.", "model.embed_tokens.", "model.norm.", _HEAD)
"""Beginnings of names that the larger model shares with the language model."""
_REASON = "it belongs to another part of the model than its language model"


def language_model(index: CheckpointIndex) -> CheckpointIndex:
    """Return the index of the language model alone; unchanged if `index` is of one, or of a larger model that is not known.

    A warning names the other parts with the numbers of their tensors.
    """
    if not is_wrapper(index.config):
        return index
    tensors: dict[str, TensorInfo] = {}
    others: dict[str, str] = {}
    for name, tensor in index.tensors.items():
        own = _own_name(name)
        if own is None:
            others[name] = _REASON
        else:
            tensors[own] = replace(tensor, name=own)
    try:
        config = language_config(index.config, has_head=_HEAD in tensors)
    except ArchitectureError:
        return index
    if has_fused_experts(index.config):
        tensors = single_experts(tensors, config["hidden_size"])
    outer = index.config["architectures"][0]
    parts = ", ".join(f"{part} ({count})" for part, count in Counter(map(_part_of, others)).items()) or "none"
    warning = (
        f"only the language model of {outer} is built. Its other parts are left out, with the numbers of their tensors: {parts}"
    )
    return replace(
        index,
        tensors=tensors,
        config=config,
        part_of=outer,
        left_out={**index.left_out, **others},
        warnings=(*index.warnings, warning),
    )


def _own_name(name: str) -> str | None:
    """Return a tensor's name in the language model alone; None: it is of another part."""
    for prefix, own in _PREFIXES.items():
        if name.startswith(prefix):
            return own + name.removeprefix(prefix)
    return name if name.startswith(_BARE) else None


def _part_of(name: str) -> str:
    """Return the name of the part that a tensor belongs to, such as vision_tower or model.visual."""
    first, _, rest = name.partition(".")
    return f"model.{rest.partition('.')[0]}" if first == "model" else first
