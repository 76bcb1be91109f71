"""The miniature as transformers makes and runs it: the side that is right."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
_SEED = 15
_GAIN = 1.7
"""Standard deviation of what a linear makes of normed input: large enough that attention chooses and caps bend."""
_NORMED_GAIN = 1.7
"""The same of queries and keys that are normed after."""
_MAX_GAIN = 64.0


def loaded_config(config: Mapping[str, Any], folder: Path) -> Any:
    """transformers' config object, read from a config.json as any model's is. Raises whatever transformers does."""
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return transformers.AutoConfig.from_pretrained(folder, local_files_only=True)


def class_defaults(loaded: Any) -> dict[str, Any]:
    """Values that the config's class assumes for keys that config.json lacks, before anything is derived from them."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(type(loaded)):
        if field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
    return found


def new_model(config: Any, seed: int = 0) -> Any:
    """The model of a loaded config in float32 with seeded weights, none of them at a value that would hide it."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(_SEED + seed)
    gains = _query_gains(config, [name for name, _ in model.named_parameters()])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            gain = next((gain for part, gain in gains.items() if part in name), 1.0)
            if parameter.dim() > 1:
                parameter.copy_(noise * (gain * _GAIN / parameter.shape[-1] ** 0.5))
            elif "norm" in name:
                offset = 1.0 - parameter.mean()  # some norms are stored as weight - 1
                parameter.copy_(gain * (1.0 + 0.2 * noise) - offset)
            else:
                parameter.copy_(gain * 0.2 * noise)
    return model


def _query_gains(config: Any, names: Sequence[str]) -> dict[str, float]:
    """By part of a parameter's name. Scores are to be a few units wide, or windows, caps and rotary embedding hardly matter.

    A scale on the scores that config.json gives fits the model's own head size, and would make a smaller one's scores vanish.
    """
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    scale = head_size**-0.5
    if (scalar := getattr(config, "query_pre_attn_scalar", None)) is not None:
        scale = float(scalar) ** -0.5
    scale = float(getattr(config, "attention_multiplier", scale))
    gain = min(max(head_size**-0.5 / scale, 1.0), _MAX_GAIN) if scale > 0 else 1.0
    if any("q_norm" in name for name in names):
        return {"q_norm": _NORMED_GAIN * gain, "k_norm": _NORMED_GAIN}
    return {"q_proj": gain}


def save(model: Any, folder: Path) -> None:
    """Write config.json and safetensors, as the hub holds them."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # of a model that takes milliseconds, into the step's log
    model.save_pretrained(folder)


def logits_of(model: Any, calls: Sequence[Sequence[int]]) -> Floats:
    """[tokens, vocabulary] of one text, fed in `calls` through a cache of transformers.

    The cache keeps every token: what a layer attends to is the model's to say. The one that transformers makes from the config
    drops what is older than `sliding_window`, in models without a window too. Scalings that follow a text's length keep state
    in the model: a copy forgets it.
    """
    import torch
    import transformers

    fresh, past, found = copy.deepcopy(model), transformers.DynamicCache(), []
    with torch.inference_mode():
        for tokens in calls:
            output = fresh(torch.tensor([list(tokens)]), past_key_values=past, use_cache=True)
            found.append(output.logits[0].float().numpy())
    return np.concatenate(found)
