"""Tiny seeded models of KerasHub's families: Hugging Face folders, and the presets that KerasHub made from them.

tests/data/keras holds the presets. KerasHub 0.32 requires tensorflow-text, hundreds of megabytes, so it is no test dependency.
They were written in an environment of their own:

    pip install --no-deps keras-hub==0.32.0
    pip install torch transformers keras==3.15.1 tokenizers sentencepiece regex
    KERAS_BACKEND=torch python -m tests.support.keras_presets

KerasHub's own converters read the Hugging Face folder, `save_to_preset` wrote the preset, and the backbone computed the logits in
float32 that stand beside it.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

DATA = Path(__file__).parents[1] / "data" / "keras"
LOGITS = "logits.npy"
TOKENS = [[3, 17, 5, 29, 11, 2, 23, 8, 14, 30, 1, 19]]
_BASE = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
}  # fmt: skip
_GEMMA = {"head_dim": 8, "tie_word_embeddings": True}
_LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "llama3": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_theta": 500000.0, "rope_scaling": _LLAMA3,
        "tie_word_embeddings": True,
    },
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "head_dim": 8, "sliding_window": 5},
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False, "sliding_window": None,
        "tie_word_embeddings": False,
    },
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 8},
    "gemma": {**_GEMMA, "architectures": ["GemmaForCausalLM"], "model_type": "gemma"},
    "gemma2": {
        **_GEMMA, "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "query_pre_attn_scalar": 8, "sliding_window": 5,
    },
    "gemma3": {
        **_GEMMA, "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "query_pre_attn_scalar": 8,
        "sliding_window": 5, "num_hidden_layers": 7,
    },
}  # fmt: skip
"""Fields of config.json that differ from _BASE."""
SHARDED = "llama3"
"""Family whose preset is a task with a tokenizer, in shards under model.weights.json."""


def values(name: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Seeded numbers that bfloat16 and float16 both hold: Mistral's converter rounds to float16."""
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    return (generator.integers(-127, 128, shape) / 1024).astype(np.float32)


def write_hugging_face(family: str, folder: Path) -> Path:
    """The model as transformers writes it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**_BASE, **CONFIGS[family]}))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(values(name, tuple(parameter.shape))))
    model.to(torch.bfloat16).save_pretrained(folder)
    # KerasHub reads the keys of older versions.
    plain = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**plain, **{key: CONFIGS[family].get(key, plain.get(key)) for key in _OLDER}}))
    return folder


_OLDER = ("rope_scaling",)


def unpack(family: str, folder: Path) -> Path:
    """The preset of a family."""
    with zipfile.ZipFile(DATA / f"{family}.zip") as packed:
        packed.extractall(folder)
    return folder


def _as_task(backbone: Any) -> Any:
    """A Llama 3 that generates text, with a tokenizer."""
    import keras_hub

    special = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    vocabulary = {token: number for number, token in enumerate(("a", "b", "ab", *special))}
    tokenizer = keras_hub.models.Llama3Tokenizer(vocabulary=vocabulary, merges=["a b"])
    preprocessor = keras_hub.models.Llama3CausalLMPreprocessor(tokenizer, sequence_length=16)
    return keras_hub.models.Llama3CausalLM(backbone, preprocessor)


def _write_preset(family: str, folder: Path) -> None:
    import keras_hub
    import torch

    source, preset = write_hugging_face(family, folder / "hf"), folder / "preset"
    backbone = keras_hub.models.Backbone.from_preset(str(source), dtype="bfloat16")
    if family == SHARDED:
        _as_task(backbone).save_to_preset(str(preset), max_shard_size=4e-6)
    else:
        backbone.save_to_preset(str(preset))
    exact = keras_hub.models.Backbone.from_preset(str(source), dtype="float32")
    tokens = torch.tensor(TOKENS)
    hidden = exact({"token_ids": tokens, "padding_mask": torch.ones_like(tokens)})
    logits = exact.token_embedding(hidden, reverse=True)

    np.save(preset / LOGITS, logits.detach().numpy())
    DATA.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(DATA / f"{family}.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as packed:
        for path in sorted(path for path in preset.rglob("*") if path.is_file()):
            packed.write(path, path.relative_to(preset).as_posix())


if __name__ == "__main__":
    import sys
    import tempfile

    for family in sys.argv[1:] or CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            _write_preset(family, Path(folder))
