"""Model Optimizer used the plain way, on the whole model: the oracle of calibration and of quantized rank files."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from orchestrator.quantizers.calibration_data import CalibrationData, calibration_tokens

NUM_SAMPLES, MAX_LENGTH = 8, 24
KV_CACHES: dict[str, Any] = {
    "FP8": {"quantizer_name": "*[kv]_bmm_quantizer", "cfg": {"num_bits": (4, 3), "axis": None}},
    "INT8": {"quantizer_name": "*[kv]_bmm_quantizer", "cfg": {"num_bits": 8, "axis": None}},
}
PRESETS = {
    "FP8": "FP8_DEFAULT_CFG",
    "W8A8_SQ_PER_CHANNEL": "INT8_SMOOTHQUANT_CFG",
    "W4A16_AWQ": "INT4_AWQ_CFG",
    "W4A8_AWQ": "W4A8_AWQ_BETA_CFG",
    "NVFP4": "NVFP4_DEFAULT_CFG",
    "W4A16_NVFP4": "W4A16_NVFP4_CFG",
    "W8A16": "INT8_WEIGHT_ONLY_CFG",
    "W4A16": "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
    "FP8_PER_CHANNEL_PER_TOKEN": "FP8_PER_CHANNEL_PER_TOKEN_CFG",
}
"""Model Optimizer's name of each algorithm that its exporter can write for several ranks."""


def write_model(folder: Path, dtype: str = "bfloat16", seed: int = 3, **changes: Any) -> Path:
    """A seeded Llama of 3 key/value heads whose input channels differ in size, as those of real models do."""
    import transformers

    torch.manual_seed(seed)
    fields = {
        "vocab_size": 384, "hidden_size": 384, "intermediate_size": 768, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 3, "head_dim": 64, "max_position_embeddings": 64, "tie_word_embeddings": False,
    }  # fmt: skip
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**fields, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 3 * torch.rand(parameter.shape[-1:]))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def tokens(vocab_size: int = 384) -> torch.Tensor:
    """What a calibration of a model without a tokenizer reads."""
    data = CalibrationData(
        dataset="default", digest=None, num_samples=NUM_SAMPLES, max_length=MAX_LENGTH, batch_size=4, seed=1234
    )  # fmt: skip
    return torch.from_numpy(calibration_tokens(data, "", Path("/nonexistent"), vocab_size))


def calibrated(folder: Path, algorithm: str | None, kv_cache: str | None = None) -> Any:
    """The whole model, calibrated as Model Optimizer's own examples do it."""
    import modelopt.torch.quantization as mtq
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    config: Any = copy.deepcopy(getattr(mtq, PRESETS[algorithm])) if algorithm else {"quant_cfg": [], "algorithm": "max"}
    if algorithm == "W8A8_SQ_PER_CHANNEL":
        config["algorithm"] = {"method": "smoothquant", "alpha": 0.5}
        config["quant_cfg"].append({"quantizer_name": "*down_proj*", "enable": False})
    if algorithm is None:
        config["quant_cfg"].append({"quantizer_name": "*", "enable": False})
    if kv_cache:
        config["quant_cfg"].append(KV_CACHES[kv_cache])
    ids = tokens(model.config.vocab_size)

    def forward(quantized: Any) -> None:
        with torch.inference_mode():
            for begin in range(0, len(ids), 4):
                quantized(ids[begin : begin + 4], use_cache=False)

    with _quiet():
        mtq.quantize(model, config, forward)
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def export(model: Any, folder: Path, tp: int, pp: int) -> Path:
    """Rank files as Model Optimizer writes them."""
    import modelopt.torch.export as mte

    with _quiet():
        mte.export_tensorrt_llm_checkpoint(copy.deepcopy(model), "llama", model.dtype, folder, tp, pp)
    return folder


def export_unified(model: Any, folder: Path) -> Path:
    """A quantized Hugging Face folder as Model Optimizer publishes it."""
    import modelopt.torch.export as mte

    with _quiet(), torch.inference_mode():
        mte.export_hf_checkpoint(copy.deepcopy(model), export_dir=folder)
    return folder
