"""A calibration artifact out of thin air: convert steps can be tested without calibrating."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

_LINEAR = re.compile(r"model\.layers\.\d+\.(self_attn|mlp|block_sparse_moe)\..*(?<!gate)\.weight$")


def write_artifact(source: Path, folder: Path, seed: int = 3) -> Path:
    """Scales of every linear of the Hugging Face folder `source`: weights' own amax, random quantities for the rest.

    Input amax values are small enough that some activations are clipped. Smoothing is by powers of two, so that it rounds
    nothing; linears with a common input share it, as calibration leaves them.
    """
    generator = np.random.default_rng(seed)
    found: dict[str, torch.Tensor] = {}
    vectors: dict[str, torch.Tensor] = {}
    for name, weight in sorted(load_file(source / "model.safetensors").items()):
        if not _LINEAR.match(name) or weight.ndim != 2:
            continue
        module = name.removesuffix(".weight")
        shared = re.sub(r"\.(q|k|v)_proj$", ".qkv", re.sub(r"\.(gate_proj|up_proj|w1|w3)$", ".fc", module))
        shared = re.sub(r"\.(q_a_proj|kv_a_proj_with_mqa)$", ".fused_a", shared)
        shared = re.sub(r"experts\.\d+", "experts", shared)
        vector = vectors.setdefault(shared, torch.from_numpy(2.0 ** generator.integers(-1, 2, weight.shape[1])).float())
        found[f"{module}.input_amax"] = torch.tensor(generator.uniform(2.0, 3.0), dtype=torch.float32)
        found[f"{module}.weight_amax"] = weight.float().abs().max()
        found[f"{module}.smooth"] = 1 / vector
        for quantity in ("own_pre_quant_scale", "pre_quant_scale"):
            found[f"{module}.{quantity}"] = vector.clone()
        attention = module.rpartition(".")[0]
        if attention.endswith("self_attn"):
            found[f"{attention}.k_amax"], found[f"{attention}.v_amax"] = torch.tensor(4.0), torch.tensor(3.0)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(found, folder / "scales.safetensors")
    return folder
