"""Compare the trees of orbax_checkpoints with those that MaxText's own conversion makes of the same Hugging Face folders.

MaxText wants Python 3.12 and a TPU's packages, its param_mapping.py numpy and JAX only. In the environment of orbax_checkpoints:

    pip download --no-deps --python-version 3.12 --only-binary=:all: maxtext==0.2.5 && unzip maxtext-*.whl -d maxtext-wheel
    python -m tests.support.maxtext_own maxtext-wheel/maxtext/checkpoint_conversion/utils/param_mapping.py /tmp/hf

It has no mapping for Llama 2, Mistral and Gemma 1.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.orbax_checkpoints import Array, to_maxtext

_MAPPINGS = {"llama3": "LLAMA31", "qwen2": "QWEN", "qwen3": "QWEN", "gemma2": "GEMMA2", "gemma3": "GEMMA3"}
_UNSCANNED = set(_MAPPINGS) - {"gemma2"}


def main(mapping_file: Path, originals: Path) -> int:
    """Print the number of arrays of each family that are equal. Exit code: 0 when all are."""
    spec = importlib.util.spec_from_file_location("param_mapping", mapping_file)
    assert spec is not None
    assert spec.loader is not None
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    wrong = 0
    for family, prefix in _MAPPINGS.items():
        for scanned in (True, False) if family in _UNSCANNED else (True,):
            equal, different = _compare(theirs, prefix, originals / family, scanned=scanned)
            wrong += len(different)
            print(f"{family}, {'stacked' if scanned else 'apart'}: {equal} arrays equal, different: {different or 'none'}")
    return int(wrong > 0)


def _compare(theirs: Any, prefix: str, folder: Path, *, scanned: bool) -> tuple[int, list[str]]:
    import jax.numpy as jnp
    from safetensors import safe_open

    config = json.loads((folder / "config.json").read_text())
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    with safe_open(str(folder / "model.safetensors"), "flax") as file:
        state = {name: np.asarray(file.get_tensor(name).astype(jnp.float32)) for name in file.keys()}  # noqa: SIM118
    whole = {"text_config": config, "vision_config": {"num_hidden_layers": 0}} if prefix == "GEMMA3" else config
    settings = types.SimpleNamespace(num_experts=1, head_dim=config["head_dim"], param_scan_axis=1)
    mapping = getattr(theirs, f"{prefix}_MAXTEXT_TO_HF_PARAM_MAPPING")(whole, settings, scanned)
    hooks = getattr(theirs, f"{prefix}_MAXTEXT_TO_HF_PARAM_HOOK_FN")(whole, settings, scanned, saving_to_hf=False)
    ours, seen, different = to_maxtext(state, config, scanned=scanned), set(), []
    for key, listed in mapping.items():
        names = [name.replace("language_model.", "") for name in (listed if isinstance(listed, list) else [listed])]
        path = key.removeprefix("params-").replace("-", "/")
        if path not in ours and not set(names) <= state.keys():
            continue  # of another part, or of another model of the same mapping
        seen.add(path)
        stacked = isinstance(listed, list)
        shape = ours[path].shape[:1] + ours[path].shape[2:] if stacked else ours[path].shape
        made = [_hooked(state[name], hooks.get(key), shape) for name in names]
        array = np.stack(made, 1) if stacked else made[0]
        if array.shape != ours[path].shape or not np.allclose(array, ours[path], rtol=2e-7, atol=0):
            different.append(path)
    return len(seen) - len(different), different + sorted(ours.keys() - seen)


def _hooked(array: Array, hooks: Any, shape: tuple[int, ...]) -> Array:
    for hook in hooks if isinstance(hooks, list) else [hooks] if hooks else []:
        array = np.asarray(hook(array, shape))
    return array


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
