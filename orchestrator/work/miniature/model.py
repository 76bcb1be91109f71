"""The miniature as transformers makes and runs it: the reference of the proof."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.work.as_hugging_face import causal_class

Floats = npt.NDArray[np.float32]
_SEED = 15
_GAIN = 1.7
"""Standard deviation of a linear's output for normed input: large enough that attention is selective and caps take effect."""
_NORMED_GAIN = 1.7
"""Same gain for queries and keys that are normed afterwards."""
_MAX_GAIN = 64.0
_MLPS = ("mlp", "block_sparse_moe", "feed_forward", "moe")
"""Names of the MLP, dense or of experts, within a layer of transformers."""


def loaded_config(config: Mapping[str, Any], folder: Path) -> Any:
    """Return transformers' config object, read from a config.json as for any model. Raises transformers' errors."""
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return transformers.AutoConfig.from_pretrained(folder, local_files_only=True)


def class_defaults(config_class: Any) -> dict[str, Any]:
    """Return the defaults of a config class for keys that config.json lacks, before anything is derived from them."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):
        if field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
    return found


def new_model(config: Any, seed: int = 0) -> Any:
    """Return the model of a loaded config in float32 with seeded weights, none at a neutral value that would hide its use."""
    import torch

    model = causal_class(config)._from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(_SEED + seed)
    gains = _query_gains(config, [name for name, _ in model.named_parameters()])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            gain = next((gain for part, gain in gains.items() if part in name), 1.0)
            if parameter.dim() > 1:
                parameter.copy_(noise * (gain * _GAIN / parameter.shape[-1] ** 0.5))
            elif "norm" in name or name.endswith("scale"):
                offset = 1.0 - parameter.mean()  # some norms are stored as weight - 1
                parameter.copy_(gain * (1.0 + 0.2 * noise) - offset)
            else:
                parameter.copy_(gain * 0.2 * noise)
        for name, buffer in model.named_buffers():
            if name in model.state_dict():  # the router's bias in some families, at zero; Gemma 4's factor of a layer, at one
                buffer.copy_(float(name.endswith("scalar")) + 0.2 * torch.randn(buffer.shape, generator=generator))
    return model


def _query_gains(config: Any, names: Sequence[str]) -> dict[str, float]:
    """Return gains by part of a parameter's name, so that scores are a few units wide: else windows, caps and rotary hardly matter.

    A score scale in config.json fits the model's own head size; with a smaller head the scores would vanish.
    """
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    scale = head_size**-0.5
    if (scalar := getattr(config, "query_pre_attn_scalar", None)) is not None:
        scale = float(scalar) ** -0.5
    scale = float(getattr(config, "attention_multiplier", scale))
    gain = min(max(head_size**-0.5 / scale, 1.0), _MAX_GAIN) if scale > 0 else 1.0
    if hasattr(config, "global_head_dim"):  # Gemma 4's scores are not scaled
        gain = head_size**-0.5
    for query, key in (("q_norm", "k_norm"), ("query_layernorm", "key_layernorm")):
        if any(query in name for name in names):
            return {query: _NORMED_GAIN * gain, key: _NORMED_GAIN}
    return {"q_proj": gain}


def save(model: Any, folder: Path) -> None:
    """Write config.json and safetensors, as on the Hugging Face hub."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # saving takes milliseconds, and the bar would go into the step's log
    model.save_pretrained(folder)


def logits_of(model: Any, calls: Sequence[Sequence[int]]) -> Floats:
    """Return the logits [tokens, vocabulary] of one text, fed in `calls` through a cache of transformers.

    The cache keeps every token and leaves windows to the model: the cache that transformers derives from the config drops tokens
    older than `sliding_window`, even in models without a window. The model is copied, because scalings that follow a text's length
    keep state in it.
    """
    import torch
    import transformers

    fresh, past, found = copy.deepcopy(model), transformers.DynamicCache(), []
    with torch.inference_mode():
        for tokens in calls:
            output = fresh(torch.tensor([list(tokens)]), past_key_values=past, use_cache=True)
            found.append(output.logits[0].float().numpy())
    return np.concatenate(found)


def parts_of(model: Any, calls: Sequence[Sequence[int]]) -> dict[tuple[int | None, str], Floats]:
    """Return the values [tokens, hidden] of the parts that `networks.Part` names, of one text fed in `calls`.

    A part that this class of model does not have as a module of its own is missing.
    """
    import torch

    seen: dict[tuple[int | None, str], list[Floats]] = {}
    fresh = copy.deepcopy(model)

    def keep(key: tuple[int | None, str], value: Any) -> None:
        tensor = value[0] if isinstance(value, tuple) else value
        if isinstance(tensor, torch.Tensor) and tensor.shape[-1] == fresh.config.hidden_size:
            seen.setdefault(key, []).append(tensor.detach().float().reshape(-1, tensor.shape[-1]).numpy())

    def watch(module: Any, before: tuple[int | None, str] | None, after: tuple[int | None, str] | None) -> None:
        if before is not None:
            module.register_forward_pre_hook(
                lambda _module, args, kwargs: keep(before, args[0] if args else kwargs.get("hidden_states")), with_kwargs=True
            )
        if after is not None:
            module.register_forward_hook(lambda _module, _args, output: keep(after, output))

    for number, layer in enumerate(fresh.model.layers):
        watch(layer, (None, "embedding") if number == 0 else None, (number, "end"))
        watch(layer.self_attn, (number, "attention's input"), (number, "attention"))
        for name in _MLPS:
            if hasattr(layer, name):
                is_all = not any(hasattr(layer, beside) for beside in ("experts", "shared_mlp"))
                watch(getattr(layer, name), (number, "MLP's input"), (number, "MLP") if is_all else None)
    logits_of(fresh, calls)
    return {key: np.concatenate(values) for key, values in seen.items()}
