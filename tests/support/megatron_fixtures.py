"""Checkpoints that megatron-core wrote of tiny models, in tests/data/megatron, and the models.

    MEGATRON_PYTHON=python-with-megatron-core python -m tests.support.megatron_fixtures

writes them again. Beside an unsharded one lie the logits that megatron-core computes of TOKENS.
"""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from tests.support.families import write_tiny
from tests.support.megatron import Wanted, write_checkpoints

DATA = Path(__file__).parents[1] / "data" / "megatron"
_LLAMA_3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}  # fmt: skip
_SMALL = {"hidden_size": 32, "head_dim": 8, "intermediate_size": 48, "vocab_size": 67}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama31": ("llama", {"rope_parameters": _LLAMA_3, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3_moe": ("qwen3_moe", {"moe_intermediate_size": 16}),
    "qwen3_moe_plain": ("qwen3_moe", {"moe_intermediate_size": 16, "norm_topk_prob": False}),
    "mixtral": ("mixtral", {"intermediate_size": 16}),
}
"""Name -> family, and fields of its config that differ from those of write_tiny and _SMALL."""
SHARDED: dict[str, dict[str, Any]] = {
    "llama-tp2-pp2": {"tp": 2, "pp": 2},
    "llama-nemo": {"tp": 2, "nemo": True},
    "llama-per-layer": {"tp": 2, "pp": 2, "per_layer": True},
    "qwen2-tp2-pp2": {"tp": 2, "pp": 2},
    "qwen3-tp2-pp2": {"tp": 2, "pp": 2},
    "qwen3_moe-ep2-per-layer": {"pp": 2, "ep": 2, "per_layer": True},
    "mixtral-tp2-pp2": {"tp": 2, "pp": 2},
    "llama31-tp2-pp2": {"tp": 2, "pp": 2},
    "qwen3_moe-layer-keys": {"pp": 2, "ep": 2, "layer_keys": True},
    "mixtral-ep2": {"pp": 2, "ep": 2},
}
"""Name -> how it was cut. The model's name is what stands before the first -."""
NAMES = (*MODELS, *SHARDED)


def write_model(name: str, folder: Path) -> Path:
    """Write a model of MODELS as a Hugging Face folder, with the same weights on every machine: few values, which pack well."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import load_file, save_file

    family, changes = MODELS[name]
    write_tiny(family, folder, **{**_SMALL, **changes})
    file, random = folder / "model.safetensors", np.random.RandomState(7)
    arrays = load_file(file)
    for key in sorted(arrays):
        steps = random.randint(-8, 8, arrays[key].shape) / 32
        arrays[key] = (1 + steps if "norm" in key else steps).astype(ml_dtypes.bfloat16)
    save_file(arrays, file, {"format": "pt"})
    return folder


def unpack(name: str, folder: Path) -> Path:
    """Unpack a checkpoint of NAMES into `folder`."""
    with zipfile.ZipFile(DATA / f"{name}.zip") as archive:
        archive.extractall(folder)
    return folder


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        sources = {name: str(write_model(name, root / name)) for name in MODELS}
        wanted = {name: Wanted(sources[name], str(root / f"{name}-written"), logits=True) for name in MODELS}
        wanted |= {
            name: Wanted(sources[name.partition("-")[0]], str(root / f"{name}-written"), **cut) for name, cut in SHARDED.items()
        }
        write_checkpoints(list(wanted.values()), root / "job.json")
        shutil.rmtree(DATA, ignore_errors=True)
        DATA.mkdir()
        for name, one in wanted.items():
            with zipfile.ZipFile(DATA / f"{name}.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
                for path in sorted(Path(one.folder).rglob("*")):
                    if path.is_file():
                        archive.write(path, path.relative_to(one.folder).as_posix())


if __name__ == "__main__":
    main()
