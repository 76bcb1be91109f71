"""Optimization profiles of a rank: one for prefill, one for decode."""

from __future__ import annotations

from orchestrator.core.errors import SpecError
from orchestrator.core.model_config import ModelConfig
from orchestrator.core.options import StageOptions
from orchestrator.core.spec import BuildConfig
from orchestrator.engines import Profile

PREFILL, DECODE = "prefill", "decode"
Shape = tuple[int, ...]


def max_seq_len(config: ModelConfig, engine: BuildConfig) -> int:
    """Cache slots. Raises SpecError when the model has not that many positions."""
    wanted = engine.max_seq_len or config.max_position_embeddings
    if wanted > config.max_position_embeddings:
        raise SpecError(
            f"engine.max_seq_len {wanted} is greater than the model's {config.max_position_embeddings} positions",
            "Lower engine.max_seq_len.",
        )
    if engine.max_input_len > wanted:
        raise SpecError(
            f"engine.max_input_len {engine.max_input_len} is greater than the {wanted} positions of the cache",
            "Lower engine.max_input_len, or raise engine.max_seq_len.",
        )
    return wanted


def rank_profiles(stage: StageOptions, engine: BuildConfig) -> tuple[Profile, Profile]:
    """(prefill, decode): batch 1..max_batch_size; tokens 1..max_input_len, or exactly 1."""
    opt_tokens = engine.opt_input_len or max(engine.max_input_len // 2, 1)
    prefill = (1, opt_tokens, engine.max_input_len)
    return _profile(PREFILL, prefill, stage, engine), _profile(DECODE, (1, 1, 1), stage, engine)


def _profile(name: str, tokens: tuple[int, int, int], stage: StageOptions, engine: BuildConfig) -> Profile:
    config = stage.config
    batches = (1, engine.opt_batch_size, engine.max_batch_size)
    slots = max_seq_len(config, engine)
    wanted = min(engine.max_logits_per_sequence, tokens[2])

    def ranges(*dims: tuple[int, int, int]) -> tuple[Shape, Shape, Shape]:
        lowest, usual, highest = zip(*dims, strict=True)
        return lowest, usual, highest

    def fixed(size: int) -> tuple[int, int, int]:
        return size, size, size

    shapes = {"position_ids": ranges(batches, tokens), "write_indices": ranges(batches)}
    if stage.is_first:
        shapes["input_ids"] = ranges(batches, tokens)
    else:
        shapes["hidden_states"] = ranges(batches, tokens, fixed(config.hidden_size))
    if stage.is_last:
        shapes["logit_indices"] = ranges(batches, (1, 1, wanted))
    cache = ranges(batches, fixed(config.kv_heads_per_rank(stage.tp)), fixed(slots), fixed(config.head_size))
    for layer in range(stage.num_layers):
        for what in ("key", "value"):
            shapes[f"past_key_values.{layer}.{what}"] = cache
    return Profile(name, shapes)
