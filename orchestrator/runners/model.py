"""A release as a model that answers: `run` opens it, `Model` generates."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.base.errors import DigestError, SpecError
from orchestrator.base.extras import require
from orchestrator.releases.asked import asked_engine
from orchestrator.releases.genai import GENAI_CONFIG
from orchestrator.releases.pulling import fetch
from orchestrator.releases.reading import Release, open_release
from orchestrator.releases.reference_numbers import Agreement, ReferenceNumbers
from orchestrator.releases.transfers import Listener
from orchestrator.runners import GREEDY, Backend, Sampling
from orchestrator.runners.genai import Device, GenaiBackend
from orchestrator.runners.tokenizer import Message, Tokenizer
from orchestrator.spec.cluster import StoreOptions
from orchestrator.stores.store import ObjectMissingError

MAX_NEW_TOKENS = 256


@dataclass
class Answer:
    """An answer, complete once all of its text was read."""

    text: str = ""
    num_prompt_tokens: int = 0
    tokens: list[int] = field(default_factory=list)
    """Generated tokens, with the one that ended the answer."""
    first_seconds: float = 0.0
    """Time until the first token: the prompt's execution."""
    seconds: float = 0.0
    """Time of all tokens after the first."""

    @property
    def tokens_per_second(self) -> float:
        """Speed after the first token; 0 for fewer than two tokens."""
        return (len(self.tokens) - 1) / self.seconds if len(self.tokens) > 1 and self.seconds > 0 else 0.0


class Model:
    """A loaded release with its tokenizer."""

    def __init__(self, backend: Backend, tokenizer: Tokenizer) -> None:
        self._backend, self._tokenizer = backend, tokenizer

    def generate(
        self, prompt: str | Sequence[Message], max_new_tokens: int | None = None, sampling: Sampling = GREEDY, *, raw: bool = False
    ) -> Answer:
        """Answer a prompt or a chat. Raises as `stream`."""
        answer = Answer()
        for _ in self.stream(prompt, max_new_tokens, sampling, raw=raw, answer=answer):
            pass
        return answer

    def stream(
        self,
        prompt: str | Sequence[Message],
        max_new_tokens: int | None = None,
        sampling: Sampling = GREEDY,
        *,
        raw: bool = False,
        answer: Answer | None = None,
    ) -> Iterator[str]:
        """Yield the text of an answer as it is generated, and fill `answer`.

        A prompt is put into the model's chat template; `raw`, or a model without one, continues its text. `max_new_tokens`: None
        for 256, or what the sequence has room for. Raises SpecError for a prompt that leaves no room for these tokens.
        """
        answer = answer if answer is not None else Answer()
        tokens = self.tokens(prompt, raw=raw)
        room = self._backend.max_length - len(tokens)
        wanted = min(MAX_NEW_TOKENS, room) if max_new_tokens is None else max_new_tokens
        if not 0 < wanted <= room:
            raise SpecError(
                f"{len(tokens)} tokens of the prompt and {max(wanted, 1)} new ones are more than the {self._backend.max_length} "
                "positions of the release",
                "Give a shorter prompt or fewer tokens, or build with a larger engine.max_seq_len.",
            )
        answer.num_prompt_tokens = len(tokens)
        for piece in self._tokenizer.decode(self._timed(tokens, wanted, sampling, answer)):
            answer.text += piece
            yield piece

    def check(self, numbers: ReferenceNumbers) -> Agreement:
        """Compare the release, as it runs here in float32, with its reference numbers. Raises VerificationError."""
        texts, found = numbers.texts(), dict[int, Sequence[Any]]()

        def logits_of(sequence: int, position: int) -> Any:
            if sequence not in found:
                found.clear()
                found[sequence] = self._backend.logits(texts[sequence])
            return found[sequence][position]

        return numbers.check(logits_of, "float32")

    def tokens(self, prompt: str | Sequence[Message], *, raw: bool = False) -> list[int]:
        """Return the tokens that the model reads for a prompt or a chat. Raises SpecError for an empty prompt."""
        if isinstance(prompt, str) and (raw or not self._tokenizer.has_template):
            found = self._tokenizer.encode(prompt)
        elif not self._tokenizer.has_template:
            raise SpecError("the model has no chat template, so it cannot read a chat", "Give a text, which it continues.")
        else:
            found = self._tokenizer.encode_chat([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)
        if not found:
            raise SpecError("the prompt is empty", "Give a text.")
        return found

    def _timed(self, tokens: Sequence[int], wanted: int, sampling: Sampling, answer: Answer) -> Iterator[int]:
        began = time.perf_counter()
        for token in self._backend.stream(tokens, wanted, sampling):
            now = time.perf_counter()
            if answer.tokens:
                answer.seconds = now - began - answer.first_seconds
            else:
                answer.first_seconds = now - began
            answer.tokens.append(token)
            yield token


def run(
    url: str,
    *,
    folder: Path | None = None,
    device: Device = "auto",
    public_key: Path | None = None,
    options: StoreOptions | None = None,
    listener: Listener | None = None,
) -> Model:
    """Pull the portable part of the release or tag at `url`, every byte verified, and load it.

    `folder`: where to keep the files; None: a folder of this release in the user's cache. Files that are right are not fetched
    again. Raises ReleaseMissingError for a release without a portable part, and as `pull`.
    """
    require("run")
    release = open_release(url, public_key, options)
    return load(release, folder or folder_of(release), device, listener)


def load(release: Release, folder: Path, device: Device = "auto", listener: Listener | None = None) -> Model:
    """Do what `run` does for a release that is already open."""
    try:
        fetch(release, folder, layout="genai", listener=listener)
    except ObjectMissingError as error:
        if release.store.local_path(GENAI_CONFIG) == folder / GENAI_CONFIG:
            advice = "Pull the release again, or run it from its store."
            raise DigestError(f"a file of {folder} was changed after it was pulled: {error.message}", advice) from None
        raise
    tokenizer = Tokenizer(folder)
    asked = asked_engine(release.manifest)
    return Model(GenaiBackend(folder, asked.max_seq_len or release.manifest.model.max_position_embeddings, device), tokenizer)


def folder_of(release: Release) -> Path:
    """Return the folder for a release's files: where it was pulled with layout genai, else one in the user's cache.

    The latter is $XDG_CACHE_HOME or ~/.cache, then the manifest's digest.
    """
    pulled = release.store.local_path(GENAI_CONFIG)
    if pulled is not None and pulled.is_file():
        return pulled.parent
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "trt-orchestrator" / "releases" / release.digest[:16]
