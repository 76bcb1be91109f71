"""Tiny seeded Llama-like models as Hugging Face folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TINY_LLAMA: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 131,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write_tiny_llama(
    folder: Path, *, seed: int = 7, dtype: str = "bfloat16", shard: str = "5GB", mistral: bool = False, **changes: Any
) -> Path:
    """Write a seeded model (no tokenizer) to `folder`; `changes` are config fields. Weights are large enough to matter."""
    import torch
    import transformers

    torch.manual_seed(seed)
    fields = {**TINY_LLAMA, **changes}
    if mistral:
        fields.setdefault("sliding_window", None)
        model: Any = transformers.MistralForCausalLM(transformers.MistralConfig(**fields))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            elif parameter.dim() == 1:
                parameter.copy_(0.2 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.15)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard)
    return folder
