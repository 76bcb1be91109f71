"""Optimization profiles of a rank: one for prefill, one for decode."""

from __future__ import annotations

from orchestrator.base.errors import SpecError
from orchestrator.engines import Profile
from orchestrator.engines.experts import expert_choice
from orchestrator.model.config import ModelConfig
from orchestrator.model.stage import StageNetwork, StageOptions
from orchestrator.spec.build import BuildConfig

PREFILL, DECODE = "prefill", "decode"
Shape = tuple[int, ...]


def resolved(config: ModelConfig, engine: BuildConfig) -> BuildConfig:
    """Return the engine's config with max_seq_len, max_input_len and opt_input_len set for this model.

    Raises SpecError if a limit exceeds the model's positions, as scaled by its rotary embedding.
    """
    slots, most = engine.max_seq_len or config.max_position_embeddings, config.max_positions
    if slots > most:
        raise SpecError(
            f"engine.max_seq_len {slots} is greater than the model's {most} positions",
            f"Set it to {most} or less. For more, give the source's config.json a rotary scaling (rope_scaling).",
        )
    tokens = engine.max_input_len
    if "max_input_len" not in engine.model_fields_set:
        tokens = min(tokens, slots)
    if tokens > slots:
        raise SpecError(
            f"engine.max_input_len {tokens} is greater than the {slots} positions of the cache",
            "Lower engine.max_input_len, or raise engine.max_seq_len.",
        )
    usual = min(engine.opt_input_len or max(tokens // 2, 1), tokens)
    return engine.model_copy(update={"max_seq_len": slots, "max_input_len": tokens, "opt_input_len": usual})


def network_of(stage: StageOptions, engine: BuildConfig) -> StageNetwork:
    """Return the networks of a stage for an engine whose limits are set (`resolved`). Raises SpecError as `expert_choice`."""
    assert engine.max_seq_len is not None
    return StageNetwork(
        stage=stage,
        max_seq_len=engine.max_seq_len,
        gather_logits=engine.gather_logits,
        experts=expert_choice(stage, engine).form,
    )


def rank_profiles(network: StageNetwork, engine: BuildConfig) -> tuple[Profile, ...]:
    """Return the profiles of prefill and decode: batch 1..max_batch_size, tokens 1..max_input_len or 1.

    Where one sequence is all, decode admits two tokens: of a product with exactly one row TensorRT-RTX 1.7.1 stores the weights
    twice, for the two profiles (1.6 times the bytes of a Llama's engine). An engine for Triton has the first profile only, which
    admits one token too.
    """
    assert engine.opt_input_len is not None  # set by `resolved`
    prefill = _profile(PREFILL, (1, engine.opt_input_len, engine.max_input_len), network, engine)
    if engine.for_triton:
        return (prefill,)
    return prefill, _profile(DECODE, (1, 1, 1 if engine.max_batch_size > 1 else 2), network, engine)


def _profile(name: str, tokens: tuple[int, int, int], network: StageNetwork, engine: BuildConfig) -> Profile:
    stage, config = network.stage, network.stage.config
    batches = (1, engine.opt_batch_size, engine.max_batch_size)
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
    for layer in range(stage.num_layers):
        own = config.of_layer(stage.first_layer + layer)
        sizes = (own.kv_heads_per_rank(stage.tp), network.cache_slots, own.cache_head_size)
        cache = ranges(batches, *map(fixed, sizes))
        for what in config.caches:
            shapes[f"past_key_values.{layer}.{what}"] = cache
    return Profile(name, shapes)
