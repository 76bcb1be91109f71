from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from orchestrator.base.errors import TopologyError
from orchestrator.families import FAMILIES
from orchestrator.model.config import ModelConfig
from orchestrator.model.rules import COLUMN, HEADS, HEADS_IN, KV_HEADS, ROW, VOCAB, Cut, Ignored, Part, Rule, Span, spans
from orchestrator.model.topology import Topology
from tests.support.synthetic import model_config

tp_sizes = st.integers(1, 9)


def spans_at(cut: Cut, size: int, config: ModelConfig, tp: int) -> tuple[Span, ...]:
    return spans(cut, size, config, Topology(tp, 1))


@given(tp=tp_sizes, width=st.integers(1, 50))
def test_spans_of_elements_tile_the_axis_evenly(tp: int, width: int) -> None:
    found = spans_at(COLUMN, tp * width, model_config(), tp)
    assert found == spans_at(ROW, tp * width, model_config(), tp)
    assert [index for span in found for index in range(span.begin, span.end)] == list(range(tp * width))
    assert {span.length for span in found} == {width}


@given(tp=tp_sizes, heads_per_rank=st.integers(1, 6), head_size=st.integers(1, 8))
def test_spans_of_heads_keep_heads_whole(tp: int, heads_per_rank: int, head_size: int) -> None:
    config = model_config(num_attention_heads=tp * heads_per_rank, num_key_value_heads=tp * heads_per_rank, head_size=head_size)
    size = tp * heads_per_rank * head_size
    expected = tuple(Span(rank * heads_per_rank * head_size, (rank + 1) * heads_per_rank * head_size) for rank in range(tp))
    for cut in (HEADS, HEADS_IN, KV_HEADS):
        assert spans_at(cut, size, config, tp) == expected


@given(kv_heads=st.integers(1, 6), copies=st.integers(2, 6), head_size=st.integers(1, 8))
def test_spans_of_fewer_kv_heads_than_ranks_repeat_each_head(kv_heads: int, copies: int, head_size: int) -> None:
    tp = kv_heads * copies
    config = model_config(num_attention_heads=tp, num_key_value_heads=kv_heads, head_size=head_size)
    found = spans_at(KV_HEADS, kv_heads * head_size, config, tp)
    heads = [rank // copies for rank in range(tp)]
    assert found == tuple(Span(head * head_size, (head + 1) * head_size) for head in heads)


def test_spans_two_kv_heads_on_four_ranks_are_held_twice() -> None:
    config = model_config(num_attention_heads=4, num_key_value_heads=2, head_size=8)
    assert [(span.begin, span.end) for span in spans_at(KV_HEADS, 16, config, 4)] == [(0, 8), (0, 8), (8, 16), (8, 16)]


@given(vocab=st.integers(1, 300), tp=tp_sizes)
def test_spans_of_vocabulary_tile_it_and_pad_at_the_end_only(vocab: int, tp: int) -> None:
    config = model_config(vocab_size=vocab)
    found = spans_at(VOCAB, vocab, config, tp)
    assert [index for span in found for index in range(span.begin, span.end)] == list(range(vocab))
    assert {span.length for span in found} == {config.padded_vocab_size(tp) // tp}
    layout = [kind for span in found for kind in "v" * (span.end - span.begin) + "p" * span.pad]
    assert "".join(layout) == "v" * vocab + "p" * (config.padded_vocab_size(tp) - vocab)
    assert config.padded_vocab_size(tp) - vocab < tp


def test_spans_vocabulary_smaller_than_the_ranks_leaves_some_with_padding_only() -> None:
    assert spans_at(VOCAB, 5, model_config(vocab_size=5), 4) == (Span(0, 2), Span(2, 4), Span(4, 5, 1), Span(5, 5, 2))


@given(tp=tp_sizes, size=st.integers(1, 100), cut=st.sampled_from([COLUMN, ROW]))
def test_spans_elements_that_do_not_divide_are_refused(tp: int, size: int, cut: Cut) -> None:
    assume(size % tp)
    with pytest.raises(TopologyError, match=f"tp={tp} does not divide {size}"):
        spans_at(cut, size, model_config(), tp)


@pytest.mark.parametrize(("cut", "kv_heads", "tp"), [(HEADS, 6, 4), (KV_HEADS, 6, 4), (KV_HEADS, 3, 4), (KV_HEADS, 2, 3)])
def test_spans_heads_that_do_not_divide_are_refused(cut: Cut, kv_heads: int, tp: int) -> None:
    config = model_config(num_attention_heads=6, num_key_value_heads=kv_heads, head_size=4)
    with pytest.raises(TopologyError, match="head"):
        spans_at(cut, 6 * 4 if cut is HEADS else kv_heads * 4, config, tp)


def test_rule_with_conditions_applies_only_when_all_hold() -> None:
    rule = Rule("t", (Part("s", ("hidden",)),), when={"attn_bias": True, "tie_word_embeddings": False})
    assert rule.applies(model_config(attn_bias=True))
    assert not rule.applies(model_config(attn_bias=False))
    assert not rule.applies(model_config(attn_bias=True, tie_word_embeddings=True))


def test_ignored_with_conditions_applies_only_when_all_hold() -> None:
    entry = Ignored("lm_head.weight", "tied", when={"tie_word_embeddings": True})
    assert entry.applies(model_config(tie_word_embeddings=True))
    assert not entry.applies(model_config())


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_family_parts_name_dimensions_that_configs_have(name: str) -> None:
    known = set(model_config().dims())
    for rule in FAMILIES[name].rules:
        for part in rule.parts:
            assert set(part.shape) <= known
            assert part.cut is None or part.cut.axis < len(part.shape)
