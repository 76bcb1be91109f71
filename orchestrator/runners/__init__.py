"""Run a published release: a backend executes it, `Model` adds its tokenizer and chat template.

    import orchestrator

    model = orchestrator.run("s3://bucket/engines/releases/llama/1")
    print(model.generate("What is the capital of France?").text)

Backends: genai (the portable part, one process) and tensorrt (the engines, a process and a GPU per rank).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0
    """0: the most likely token; above, a random one, from probabilities that a higher value flattens."""
    top_p: float = 1.0
    """Choose among the most likely tokens that together have this probability."""
    seed: int | None = None
    """Seed of the choice; None: another one each time."""


GREEDY = Sampling()


class Backend(Protocol):
    """A release that is loaded and executes tokens."""

    max_length: int
    """Largest number of tokens of a sequence, prompt and answer together."""

    def stream(self, prompt: Sequence[int], max_new_tokens: int, sampling: Sampling = GREEDY) -> Iterator[int]:
        """Yield the tokens of the answer one by one, with the token that ends it."""
        ...

    def logits(self, tokens: Sequence[int]) -> Sequence[Any]:
        """Return the logits [vocabulary] after each token of a text, as numpy arrays."""
        ...
