from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.work.verify.inputs import Call, Ints, make_calls, positions_of

lengths_of = st.lists(st.integers(1, 12), min_size=1, max_size=5)
steps_of = st.integers(1, 6)


def batch(lengths: list[int]) -> tuple[Ints, Ints]:
    """Right-padded sequences in which every token is another number."""
    tokens = np.zeros((len(lengths), max(lengths)), np.int64)
    for row, length in enumerate(lengths):
        tokens[row, :length] = 1000 * (row + 1) + np.arange(length)
    return tokens, np.array(lengths, np.int64)


def test_make_calls_prefill_then_one_token_at_a_time() -> None:
    tokens, lengths = batch([5, 4])
    prefill, first, second = make_calls(tokens, lengths, 2)
    assert prefill.input_ids.tolist() == [[1000, 1001, 1002], [2000, 2001, 0]]
    assert prefill.position_ids.tolist() == [[0, 1, 2], [0, 1, 0]]  # padding does not make a text longer
    assert prefill.write_indices.tolist() == [0, 0]
    assert first.input_ids.tolist() == [[1003], [2002]]
    assert first.position_ids.tolist() == [[3], [2]]
    assert first.write_indices.tolist() == [3, 2]
    assert second.input_ids.tolist() == [[1004], [2003]]
    assert second.write_indices.tolist() == [4, 3]


def test_make_calls_short_sequence_keeps_one_token_for_the_prefill() -> None:
    tokens, lengths = batch([6, 1, 2])
    calls = make_calls(tokens, lengths, 3)
    assert calls[0].input_ids[:, 0].tolist() == [1000, 2000, 3000]
    assert calls[0].input_ids[1:, 1:].tolist() == [[0, 0], [0, 0]]
    assert calls[1].input_ids.tolist() == [[1003], [2000], [3001]]


@given(lengths=lengths_of, decode_steps=steps_of)
def test_make_calls_shapes_and_dtypes_are_those_of_the_graph(lengths: list[int], decode_steps: int) -> None:
    tokens, sizes = batch(lengths)
    calls = make_calls(tokens, sizes, decode_steps)
    assert len(calls) == 1 + decode_steps
    for number, call in enumerate(calls):
        assert call.input_ids.shape == call.position_ids.shape == call.logit_indices.shape
        assert call.input_ids.shape[0] == len(lengths)
        assert number == 0 or call.input_ids.shape[1] == 1
        assert call.write_indices.shape == (len(lengths),)
        assert {array.dtype for array in (call.input_ids, call.position_ids, call.write_indices, call.logit_indices)} == {
            np.dtype(np.int64)
        }


@given(lengths=lengths_of, decode_steps=steps_of)
def test_positions_of_names_every_position_once(lengths: list[int], decode_steps: int) -> None:
    found = [(sequence, position) for sequence, position, _, _ in positions_of(np.array(lengths), decode_steps)]
    assert sorted(found) == [(sequence, position) for sequence, length in enumerate(lengths) for position in range(length)]


@given(lengths=lengths_of, decode_steps=steps_of)
def test_positions_of_each_call_sees_exactly_the_tokens_before_it(lengths: list[int], decode_steps: int) -> None:
    """Replays the cache as the graph keeps it: slots are written from write_indices on, a token sees its slot and those before."""
    tokens, sizes = batch(lengths)
    calls = make_calls(tokens, sizes, decode_steps)
    places = {(call, sequence, row): position for sequence, position, call, row in positions_of(sizes, decode_steps)}
    cache = np.full((len(lengths), max(lengths)), -1, np.int64)
    for number, call in enumerate(calls):
        _write(cache, call)
        for sequence in range(len(lengths)):
            for row in range(call.input_ids.shape[1]):
                position = places.get((number, sequence, row))
                if position is not None:
                    assert call.position_ids[sequence, row] == position
                    assert cache[sequence, : position + 1].tolist() == tokens[sequence, : position + 1].tolist()


def _write(cache: Ints, call: Call) -> None:
    for sequence, start in enumerate(call.write_indices):
        width = call.input_ids.shape[1]
        assert start + width <= cache.shape[1]
        cache[sequence, start : start + width] = call.input_ids[sequence]


@given(lengths=lengths_of, decode_steps=steps_of)
def test_positions_of_last_positions_come_through_the_cache(lengths: list[int], decode_steps: int) -> None:
    calls = {(sequence, position): call for sequence, position, call, _ in positions_of(np.array(lengths), decode_steps)}
    for sequence, length in enumerate(lengths):
        through_cache = min(decode_steps, length - 1)
        expected = [0] * (length - through_cache) + list(range(1, through_cache + 1))
        assert [calls[sequence, position] for position in range(length)] == expected


@pytest.mark.parametrize("tokens", [1, 3])
def test_logit_indices_ask_for_every_token(tokens: int) -> None:
    call = Call(np.zeros((2, tokens), np.int64), np.zeros((2, tokens), np.int64), np.zeros(2, np.int64))
    assert call.logit_indices.tolist() == [list(range(tokens))] * 2
