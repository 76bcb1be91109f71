"""A plan's portable part as a model folder, without its engines, and what ONNX Runtime GenAI makes of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.planning.plan import Plan
from orchestrator.planning.steps import Kind, Outcome
from orchestrator.releases.genai import GENAI_CONFIG, genai_config
from orchestrator.work.as_hugging_face import causal_class
from tests.integration.steps import run_steps

WITHOUT_ENGINES = (Kind.REFERENCE, Kind.CALIBRATE, Kind.CONVERT, Kind.VERIFY, Kind.EXPORT)


def portable_folder(plan: Plan, store: Path, folder: Path) -> dict[str, Outcome]:
    """Run a plan's steps but the engines, and lay out its portable part in `folder`. Returns the outcomes by step name."""
    outcomes = run_steps(plan, store.as_uri(), WITHOUT_ENGINES)
    folder.mkdir(parents=True)
    for outcome in outcomes.values():
        if outcome.kind in (Kind.CONVERT, Kind.EXPORT):
            for output in outcome.outputs:
                shutil.copy(store / output.key, folder / output.name)
    (folder / GENAI_CONFIG).write_text(json.dumps(genai_config(plan)))
    return outcomes


def greedy(folder: Path, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
    """The tokens that ONNX Runtime GenAI alone generates after each prompt, most likely ones."""
    import onnxruntime_genai

    model = onnxruntime_genai.Model(str(folder))
    found: list[list[int]] = []
    for prompt in prompts:
        params = onnxruntime_genai.GeneratorParams(model)
        params.set_search_options(max_length=len(prompt) + num_tokens)
        generator = onnxruntime_genai.Generator(model, params)
        generator.append_tokens(list(prompt))
        found.append([])
        while not generator.is_done():
            generator.generate_next_token()
            found[-1].append(int(generator.get_next_tokens()[0]))
    return found


def next_logits(folder: Path, prompt: Sequence[int]) -> Any:
    """The logits [vocabulary] that ONNX Runtime GenAI computes after a prompt."""
    import onnxruntime_genai

    model = onnxruntime_genai.Model(str(folder))
    params = onnxruntime_genai.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + 1)
    generator = onnxruntime_genai.Generator(model, params)
    generator.append_tokens(list(prompt))
    return np.array(generator.get_logits()).reshape(-1)


def expected_tokens(source: Path, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
    """The tokens that transformers' `generate` gives after each prompt, in float32."""
    import torch

    model, found = _transformers_model(source), []
    for prompt in prompts:
        tokens = model.generate(torch.tensor([list(prompt)]), max_new_tokens=num_tokens, do_sample=False)
        found.append(tokens[0, len(prompt) :].tolist())
    return found


def likeliest_tokens(source: Path, prompts: Sequence[Sequence[int]], found: Sequence[Sequence[int]]) -> list[list[int]]:
    """The tokens that transformers finds likeliest after each prompt and every beginning of what was `found` after it.

    They equal `found` if and only if it is what greedy decoding gives; one call for each prompt shows it, not one for each token.
    """
    import torch

    model, likeliest = _transformers_model(source), []
    for prompt, answer in zip(prompts, found, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *answer[:-1]]])).logits
        likeliest.append(logits[0, len(prompt) - 1 :].argmax(-1).tolist())
    return likeliest


def _transformers_model(source: Path) -> Any:
    """The model in float32."""
    import torch
    import transformers

    known = causal_class(transformers.AutoConfig.from_pretrained(source))
    return known.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval()


def random_prompts(count: int, vocabulary: int, longest: int = 12) -> list[list[int]]:
    """Seeded prompts of different lengths, without special tokens."""
    random = np.random.default_rng(5)
    return [random.integers(3, vocabulary, size=1 + number * longest // count).tolist() for number in range(1, count + 1)]
