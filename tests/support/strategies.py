"""Random small models with a topology that they can be split over."""

from __future__ import annotations

import itertools
import math

from hypothesis import strategies as st

from orchestrator.model.config import ModelConfig
from orchestrator.model.topology import Topology
from tests.support.synthetic import model_config


@st.composite
def parallel_models(draw: st.DrawFn, max_tp: int = 6, max_layers: int = 5) -> tuple[ModelConfig, Topology]:
    """Key/value heads may be fewer than the ranks, the vocabulary any size, and any layers may be left over."""
    tp = draw(st.integers(1, max_tp))
    kv_heads = draw(st.sampled_from([size for size in range(1, 2 * tp + 1) if size % tp == 0 or tp % size == 0]))
    layers = draw(st.integers(1, max_layers))
    pp = draw(st.integers(1, layers))
    bias = draw(st.booleans())
    heads = math.lcm(tp, kv_heads) * draw(st.integers(1, 2))
    config = model_config(
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_size=draw(st.integers(1, 4)),
        hidden_size=heads * draw(st.integers(1, 3)),  # transformers wants a multiple of the heads, whatever their size
        intermediate_size=tp * draw(st.integers(1, 5)),
        vocab_size=draw(st.integers(1, 40)),
        num_hidden_layers=layers,
        tie_word_embeddings=draw(st.booleans()),
        attn_bias=bias,
        attn_dense_bias=bias,
        mlp_bias=draw(st.booleans()),
    )
    return config, Topology(tp, pp, draw(st.none() | _partitions(layers, pp)))


@st.composite
def _partitions(draw: st.DrawFn, layers: int, pp: int) -> tuple[int, ...]:
    cuts = draw(st.lists(st.integers(1, max(layers - 1, 1)), min_size=pp - 1, max_size=pp - 1, unique=True))
    bounds = [0, *sorted(cuts), layers]
    return tuple(end - begin for begin, end in itertools.pairwise(bounds))
