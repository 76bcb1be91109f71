"""Backend `genai`: the portable part of a release in ONNX Runtime GenAI, on the CPU or with CUDA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from orchestrator.base.errors import MachineError
from orchestrator.runners import GREEDY, Sampling

Device = Literal["auto", "cpu", "cuda"]


class GenaiBackend:
    """A model folder (`pull --layout genai`), opened."""

    def __init__(self, folder: Path, max_length: int, device: Device = "auto") -> None:
        """Raises MachineError for device cuda without onnxruntime-genai-cuda or without a GPU."""
        import onnxruntime_genai

        self.max_length = max_length
        has_cuda = bool(onnxruntime_genai.is_cuda_available())
        if device == "cuda" and not has_cuda:
            raise MachineError(
                "device cuda was asked for, and ONNX Runtime GenAI finds no CUDA here",
                "Install onnxruntime-genai-cuda in place of onnxruntime-genai on a machine with a GPU, or use device cpu.",
            )
        config = onnxruntime_genai.Config(str(folder))
        config.clear_providers()
        if has_cuda and device != "cpu":
            config.append_provider("cuda")
            config.set_provider_option("cuda", "use_tf32", "0")
        self._model = onnxruntime_genai.Model(config)

    def stream(self, prompt: Sequence[int], max_new_tokens: int, sampling: Sampling = GREEDY) -> Iterator[int]:
        """See Backend."""
        import onnxruntime_genai

        params = onnxruntime_genai.GeneratorParams(self._model)
        params.set_search_options(**_options(len(prompt) + max_new_tokens, sampling))
        generator = onnxruntime_genai.Generator(self._model, params)
        generator.append_tokens(list(prompt))
        while not generator.is_done():
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])

    def logits(self, tokens: Sequence[int]) -> list[Any]:
        """See Backend. The graph returns the logits of a call's last token only, so each token is a call."""
        import onnxruntime_genai

        params = onnxruntime_genai.GeneratorParams(self._model)
        params.set_search_options(**_options(len(tokens) + 1, GREEDY))
        generator = onnxruntime_genai.Generator(self._model, params)
        found = []
        for token in tokens:
            generator.append_tokens([token])
            found.append(generator.get_logits().reshape(-1).copy())
        return found


def _options(max_length: int, sampling: Sampling) -> dict[str, Any]:
    options: dict[str, Any] = {"max_length": max_length, "do_sample": sampling.temperature > 0}
    if sampling.temperature > 0:
        options |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
    if sampling.seed is not None:
        options["random_seed"] = sampling.seed
    return options
