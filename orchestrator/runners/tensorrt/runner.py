"""One rank of a release that is being run. Every rank makes the same calls in the same order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from orchestrator.base.errors import EngineRunError, SpecError
from orchestrator.engines.memory import CACHE_PREFIX
from orchestrator.engines.profiles import PREFILL
from orchestrator.releases.manifest import MANIFEST, Manifest, parse_manifest
from orchestrator.runners import GREEDY, Sampling
from orchestrator.runners.tensorrt.calls import Chunk, chunks, part_of, rows_of
from orchestrator.runners.tensorrt.communicators import WORLD, Communicators, Rendezvous, groups_of, stage_name
from orchestrator.runners.tensorrt.engine import RankEngine
from orchestrator.runners.tensorrt.libraries import Libraries
from orchestrator.runners.tensorrt.sampling import Sampler
from orchestrator.work.verify.inputs import Call, Ints

Floats = npt.NDArray[np.float32]
Step = list[int | None]
"""New token id of every prompt; None: it ended earlier."""


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a pulled release. Raises EngineRunError, and what `parse_manifest` raises."""
    try:
        return parse_manifest((folder / MANIFEST).read_bytes(), str(folder))
    except OSError as error:
        raise EngineRunError(f"{folder} is no pulled release: {error}", "Give the folder that `orchestrator pull` wrote.") from None


class EngineRunner:
    """A rank, with its engine on its GPU. All ranks of the release must run, each in its own process or thread."""

    def __init__(self, folder: Path, rank: int, libraries: Libraries, rendezvous: Rendezvous | None = None) -> None:
        """Load the rank of the release that was pulled to `folder`. Blocks until all ranks have come.

        `rendezvous`: None: the release has one rank. Raises EngineRunError, DigestError, MachineError.
        """
        manifest = read_manifest(folder)
        _check(manifest, rank)
        tp, stage = manifest.tp, rank // manifest.tp
        self._rank, self._device, self._tp = rank, libraries.device, tp
        self._sampling_rank = tp * (manifest.pp - 1)
        self._is_first, self._is_last = stage == 0, stage == manifest.pp - 1
        self.limits = Limits.of(manifest)
        self._communicators = Communicators(libraries.nccl, groups_of(tp, manifest.pp), rank, rendezvous, self._device)
        try:
            capsule = self._communicators.capsule(stage_name(stage)) if tp > 1 else None
            self._engine = RankEngine(manifest.rank(rank), folder, libraries.trt, self._device, capsule)
            self._tokens_address = self._device.allocate(8 * self.limits.batch_size)
        except BaseException:
            self.close(failed=True)
            raise

    def close(self, *, failed: bool = False) -> None:
        """Free everything. After a failure without waiting for other ranks, which may be gone."""
        self._communicators.close(failed=failed)
        if not failed:  # a GPU that waits for a lost rank would be waited for
            self._device.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.close(failed=error is not None)

    @property
    def is_sampling(self) -> bool:
        """Whether this rank gets the logits: the first of the last stage."""
        return self._rank == self._sampling_rank

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        sampling: Sampling = GREEDY,
        stop_ids: Sequence[int] = (),
    ) -> Iterator[Step]:
        """Yield the new token ids of each step, on every rank. All ranks must be given the same, and read as far.

        A prompt ends with one of `stop_ids`, which is still yielded. Raises SpecError for prompts that the engines cannot hold,
        EngineRunError.
        """
        self.limits.check(prompts, max_new_tokens)
        sampler, stops = Sampler(sampling), set(stop_ids)
        return self._generated(prompts, max_new_tokens, sampler, stops)

    def _generated(self, prompts: Sequence[Sequence[int]], count: int, sampler: Sampler, stops: set[int]) -> Iterator[Step]:
        positions = np.array([len(prompt) for prompt in prompts], np.int64)
        tokens = self._shared(self._prefill(prompts), sampler)
        running = [True] * len(prompts)
        for step in range(count):
            yield [int(token) if goes_on else None for token, goes_on in zip(tokens, running, strict=True)]
            running = [goes_on and int(token) not in stops for token, goes_on in zip(tokens, running, strict=True)]
            if step == count - 1 or not any(running):
                return
            call = Call(tokens[:, None], positions[:, None], positions)
            tokens = self._shared(self._run(call, np.zeros((len(tokens), 1), np.int64))[:, 0], sampler)
            positions = positions + np.array(running)  # ended sequences write one slot again and again

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> Floats:
        """Run the prompts; returns the logits [B, vocabulary] after each one's last token."""
        last: Floats = np.zeros((len(prompts), self.limits.vocab_size if self.is_sampling else 0), np.float32)
        for chunk in chunks(prompts, [0] * len(prompts), self.limits.call_tokens):
            found = self._run(chunk.call, np.maximum(chunk.lengths - 1, 0)[:, None])[:, 0]
            ended = (chunk.lengths > 0) & (chunk.begin + chunk.lengths == [len(prompt) for prompt in prompts])
            last = np.where(ended[:, None], found, last)
        return last

    def _shared(self, logits: Floats, sampler: Sampler) -> Ints:
        """Sample on one rank, and give all ranks its token ids [B]."""
        tokens = sampler.next_tokens(logits) if self.is_sampling else np.zeros(len(logits), np.int64)
        if self._communicators.has(WORLD):
            if self.is_sampling:
                self._device.upload(self._tokens_address, tokens)
            self._communicators.broadcast(self._sampling_rank, self._tokens_address, tokens.nbytes)
            self._device.download(self._tokens_address, tokens)
        return tokens

    def logits(self, calls: Sequence[Call]) -> list[Floats]:
        """Run the calls of a verification; returns the logits [B, S, vocabulary] of each, empty arrays on other ranks.

        Calls that are larger than the profiles are split. Raises EngineRunError.
        """
        batch, width = len(calls[0].input_ids), self.limits.vocab_size if self.is_sampling else 0
        found: list[Floats] = [np.zeros((*call.input_ids.shape, width), np.float32) for call in calls]
        for begin in range(0, batch, self.limits.batch_size):
            rows = slice(begin, begin + self.limits.batch_size)
            for call, result in zip(calls, found, strict=True):
                for chunk in chunks(*rows_of(part_of(call, rows)), self.limits.call_tokens):
                    end = chunk.begin + chunk.call.input_ids.shape[1]
                    result[rows, chunk.begin : end] = self._every_token(chunk)
        self._device.wait()
        return found

    def _every_token(self, chunk: Chunk) -> Floats:
        """Return the logits of every token of a chunk. A call that is repeated writes the same values to the cache."""
        (batch, width), most = chunk.call.input_ids.shape, self.limits.call_logits
        parts = [np.arange(first, min(first + most, width)) for first in range(0, width, most)]
        return np.concatenate([self._run(chunk.call, np.tile(part, (batch, 1))) for part in parts], axis=1)

    def _run(self, call: Call, logit_indices: Ints) -> Floats:
        """Run one call; returns the logits [B, N, vocabulary] of the wanted tokens, without vocabulary on other ranks."""
        batch, tokens = call.input_ids.shape
        dims = {"batch": batch, "tokens": tokens, "logit_tokens": logit_indices.shape[1]}
        arrays = {
            "input_ids": call.input_ids, "position_ids": call.position_ids, "write_indices": call.write_indices,
            "logit_indices": logit_indices,
        }  # fmt: skip
        if not self._is_first:
            self._communicators.receive(self._rank - self._tp, *self._engine.memory("hidden_states", dims))
        self._engine.run(arrays, dims)
        if not self._is_last:
            self._communicators.send(self._rank, *self._engine.memory("hidden_states_out", dims))
        result: Floats = np.zeros((*logit_indices.shape, self.limits.vocab_size if self.is_sampling else 0), np.float32)
        if self.is_sampling:
            self._device.download(self._engine.memory("logits", dims)[0], result)
        return result


@dataclass(frozen=True, slots=True)
class Limits:
    """Largest sizes that the engines of a release take."""

    batch_size: int
    call_tokens: int
    """Tokens of each sequence in one call."""
    call_logits: int
    """Tokens of each sequence whose logits one call returns."""
    num_slots: int
    """Positions of a sequence."""
    vocab_size: int

    @staticmethod
    def of(manifest: Manifest) -> Limits:
        batch, tokens = _largest(manifest, 0, "position_ids")
        logits = _largest(manifest, len(manifest.ranks) - 1, "logit_indices")[1]
        return Limits(batch, tokens, logits, _largest(manifest, 0, f"{CACHE_PREFIX}0.key")[2], manifest.model.vocab_size)

    def check(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        """Check that the engines hold these prompts and that many new tokens. Raises SpecError."""
        if not 1 <= len(prompts) <= self.batch_size:
            raise SpecError(f"{len(prompts)} prompts at once", f"Give 1 to {self.batch_size}: no more fit into a call.")
        longest = max(len(prompt) for prompt in prompts) + max_new_tokens - 1
        if max_new_tokens < 1 or not all(prompts) or longest > self.num_slots:
            raise SpecError(
                f"prompts of {[len(prompt) for prompt in prompts]} tokens and {max_new_tokens} new ones",
                f"Give prompts of at least one token; with the new ones, {self.num_slots} are the most that the engines hold.",
            )
        unknown = [token for prompt in prompts for token in prompt if not 0 <= token < self.vocab_size]
        if unknown:
            raise SpecError(f"there is no token id {unknown[0]} below {self.vocab_size}", "Use the release's tokenizer.")


def _largest(manifest: Manifest, rank: int, name: str) -> tuple[int, ...]:
    """Return the largest shape of an input in the profile of prefill."""
    engine = manifest.rank(rank).engine
    return next(tensor.profiles[PREFILL]["max"] for tensor in engine.tensors if tensor.name == name)


def _check(manifest: Manifest, rank: int) -> None:
    """Check that the release can be run here. Raises EngineRunError."""
    if manifest.cp > 1:
        raise EngineRunError(f"{manifest.name} has context-parallel ranks", "Ranks of cp above 1 are not run: build with cp 1.")
    if rank >= len(manifest.ranks):
        raise EngineRunError(f"{manifest.name} has no rank {rank}", f"Start {len(manifest.ranks)} processes, one for each rank.")
    if manifest.tp > 1 and not manifest.engine_config.get("gather_logits", True):
        raise EngineRunError("no rank has the logits of the whole vocabulary", "Build with engine.gather_logits: true.")
