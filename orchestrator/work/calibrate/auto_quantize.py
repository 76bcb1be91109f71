"""Choose a format for every linear within a budget of bits, by Model Optimizer's search over per-layer sensitivities.

Unlike calibration, the search needs the whole model and its gradients on one machine. The result is a quant_cfg.json for
`algorithm: MIXED_PRECISION`; the scales are then calibrated as for any other algorithm.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from orchestrator.base.errors import BUG, QuantizationError
from orchestrator.model.quantization import LinearFormat, WeightFormat
from orchestrator.model.quantized_targets import is_of_expert
from orchestrator.quantizers.calibration_data import CalibrationData, calibration_tokens
from orchestrator.quantizers.modelopt import search_config

_NEEDS_CUDA = (WeightFormat.NVFP4, WeightFormat.MXFP8)


def choose_formats(
    folder: Path,
    dtype: str,
    linears: dict[str, tuple[str, ...]],
    formats: Sequence[LinearFormat],
    effective_bits: float,
    data: CalibrationData,
    dataset: str,
) -> dict[str, LinearFormat | None]:
    """Return a format for every linear (None: unquantized) such that weights take `effective_bits` on average.

    `folder`: a Hugging Face checkpoint; `linears`: source modules by the TensorRT-LLM linear they are joined into. Raises
    QuantizationError for a budget that cannot be met, formats that this machine cannot execute, experts.
    """
    import modelopt.torch.quantization as mtq
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    _check(linears, formats, device)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), local_files_only=True)
    model = model.to(device).eval()
    tokens = torch.from_numpy(calibration_tokens(data, dataset, folder, model.config.vocab_size))
    batches = [tokens[begin : begin + data.batch_size] for begin in range(0, len(tokens), data.batch_size)]
    said = io.StringIO()  # of Model Optimizer, for nobody
    with _budget_refused(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, _ = mtq.auto_quantize(
            model,
            constraints={"effective_bits": effective_bits},
            quantization_formats=[search_config(fmt) for fmt in formats],
            data_loader=batches,
            forward_step=lambda module, batch: module(batch.to(device), labels=batch.to(device), use_cache=False),
            loss_func=lambda output, _batch: output.loss,
            disabled_layers=["*lm_head*"],
            num_calib_steps=len(batches),
            num_score_steps=len(batches),
        )
    modules = dict(model.named_modules())
    return {linear: _format_of(modules[sources[0]], formats) for linear, sources in linears.items()}


@contextlib.contextmanager
def _budget_refused() -> Iterator[None]:
    """Turn Model Optimizer's error for a budget that no mixture meets into QuantizationError."""
    try:
        yield
    except (ValueError, AssertionError) as error:
        if not any(word in str(error) for word in ("infeasible", "cannot be lower")):
            raise
        raise QuantizationError(
            f"no mixture of these formats meets the budget: {error}",
            "Allow more bits, or give --formats with fewer; linears that no format fits keep the model's precision.",
        ) from None


def _check(linears: dict[str, tuple[str, ...]], formats: Sequence[LinearFormat], device: str) -> None:
    experts = next((source for sources in linears.values() for source in sources if is_of_expert(source)), None)
    if experts is not None:
        raise QuantizationError(
            f"the search does not support experts ({experts})", "Write quant_cfg.json by hand, or choose one algorithm."
        )
    unexecutable = [fmt.algorithm for fmt in formats if fmt.weight in _NEEDS_CUDA]
    if device == "cpu" and unexecutable:
        raise QuantizationError(
            f"the search executes every format; {', '.join(unexecutable)} needs a GPU", "Leave it out, or search on a GPU."
        )


def _format_of(module: Any, formats: Sequence[LinearFormat]) -> LinearFormat | None:
    """Return the candidate format that the search left on a linear."""
    weight = module.weight_quantizer
    first = weight[0] if hasattr(weight, "__len__") else weight
    if not first.is_enabled:
        return None
    for fmt in formats:
        entries = {entry["quantizer_name"]: entry.get("cfg") for entry in search_config(fmt)["quant_cfg"]}
        wanted = entries["*weight_quantizer"]
        sequential = isinstance(wanted, list)
        bits = (wanted[0] if sequential else wanted)["num_bits"]
        if first.num_bits == bits and sequential == hasattr(weight, "__len__") and module.input_quantizer.is_enabled == (
            "*input_quantizer" in entries
        ):  # fmt: skip
            return fmt
    raise QuantizationError(f"the search left a format that was not among its candidates ({first.num_bits} bits)", BUG)
