"""Parts of the engines' runner alone: sampling, calls, groups of ranks, and how the ids of their communicators travel."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.base.errors import EngineRunError, SpecError
from orchestrator.runners import Sampling
from orchestrator.runners.tensorrt import FileRendezvous, Rendezvous, StoreRendezvous
from orchestrator.runners.tensorrt.calls import chunks, part_of, rows_of
from orchestrator.runners.tensorrt.communicators import groups_of
from orchestrator.runners.tensorrt.sampling import Sampler
from orchestrator.work.verify.inputs import make_calls

LOGITS = np.log(np.array([[0.1, 0.5, 0.15, 0.25]], np.float32))


def drawn(sampling: Sampling, count: int = 4000) -> np.ndarray:
    sampler = Sampler(sampling)
    return np.bincount([int(sampler.next_tokens(LOGITS)[0]) for _ in range(count)], minlength=4) / count


def test_sampling_at_temperature_zero_takes_the_most_probable_token() -> None:
    assert Sampler(Sampling()).next_tokens(np.vstack([LOGITS, LOGITS[:, ::-1]])).tolist() == [1, 2]


def test_sampling_draws_by_the_models_probabilities() -> None:
    np.testing.assert_allclose(drawn(Sampling(1.0)), [0.1, 0.5, 0.15, 0.25], atol=0.03)


def test_sampling_at_a_low_temperature_sharpens_them() -> None:
    squares = np.array([0.1, 0.5, 0.15, 0.25]) ** 2
    np.testing.assert_allclose(drawn(Sampling(0.5)), squares / squares.sum(), atol=0.03)


def test_sampling_with_top_p_draws_from_the_smallest_set_that_reaches_it() -> None:
    np.testing.assert_allclose(drawn(Sampling(1.0, 0.6)), [0, 2 / 3, 0, 1 / 3], atol=0.03)
    assert drawn(Sampling(1.0, 0.5), 100)[1] == 1.0


@pytest.mark.parametrize(("temperature", "top_p"), [(-1.0, 1.0), (float("nan"), 1.0), (1.0, 0.0), (1.0, 1.5)])
def test_sampling_that_chooses_no_token_is_refused(temperature: float, top_p: float) -> None:
    with pytest.raises(SpecError, match="choose no token"):
        Sampler(Sampling(temperature, top_p))


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 5)), min_size=1, max_size=4), st.integers(1, 9))
def test_chunks_write_every_token_to_its_slot_and_no_padding_over_one(rows: list[tuple[int, int]], most: int) -> None:
    tokens, first = [list(range(100, 100 + length)) for length, _ in rows], [start for _, start in rows]
    most_slots = max(first) + max(length for length, _ in rows)
    slots = np.full((len(rows), most_slots), -1)
    for chunk in chunks(tokens, first, most):
        call = chunk.call
        assert call.input_ids.shape == call.position_ids.shape
        assert call.input_ids.shape[1] <= most
        np.testing.assert_array_equal(call.write_indices, call.position_ids[:, 0])
        for row, write in enumerate(call.write_indices):
            slots[row, write : write + call.input_ids.shape[1]] = call.input_ids[row]
            real = chunk.lengths[row]
            np.testing.assert_array_equal(call.position_ids[row, :real], first[row] + chunk.begin + np.arange(real))
    for row, (start, made) in enumerate(zip(first, tokens, strict=True)):
        assert slots[row, start : start + len(made)].tolist() == made


def test_rows_of_a_verifications_calls_are_its_real_tokens() -> None:
    tokens, lengths = np.arange(1, 25).reshape(2, 12), np.array([12, 7])
    prefill, *steps = make_calls(tokens, lengths, 3)
    assert rows_of(prefill) == ([[1, 2, 3, 4, 5, 6, 7, 8, 9], [13, 14, 15, 16]], [0, 0])
    assert [rows_of(step) for step in steps] == [([[10], [17]], [9, 4]), ([[11], [18]], [10, 5]), ([[12], [19]], [11, 6])]
    assert rows_of(part_of(prefill, slice(1, 2))) == ([[13, 14, 15, 16]], [0])


def test_groups_are_stages_pairs_of_neighbours_and_all_ranks() -> None:
    found = {group.name: group.ranks for group in groups_of(2, 2)}
    assert found == {"stage0": (0, 1), "stage1": (2, 3), "pair0": (0, 2), "pair1": (1, 3), "world": (0, 1, 2, 3)}
    assert groups_of(1, 1) == ()
    assert [group.name for group in groups_of(1, 3)] == ["pair0", "pair1", "world"]
    assert [group.name for group in groups_of(4, 1)] == ["stage0", "world"]


def exchanged(make: Callable[[], Rendezvous]) -> list[bytes]:
    """Results of three ranks, of which the last is the first of the group."""
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(make().exchange, "stage0", None) for _ in range(2)]
        threading.Event().wait(0.1)
        made = make().exchange("stage0", lambda: b"\x00id" * 40)
        return [made, *(task.result() for task in waiting)]


def test_ids_travel_by_files(tmp_path: Path) -> None:
    assert exchanged(lambda: FileRendezvous(tmp_path)) == [b"\x00id" * 40] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["stage0.id"]


def test_ids_travel_by_the_store_of_torchrun() -> None:
    import torch.distributed

    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert exchanged(lambda: StoreRendezvous(torch.distributed.TCPStore("127.0.0.1", store.port))) == [b"\x00id" * 40] * 3


def test_files_of_an_earlier_run_are_not_taken_for_this_ones(tmp_path: Path) -> None:
    FileRendezvous(tmp_path).exchange("world", lambda: b"old")
    with pytest.raises(EngineRunError, match=r"world\.id is left from an earlier run"):
        FileRendezvous(tmp_path).exchange("world", lambda: b"new")
    assert (tmp_path / "world.id").read_bytes() == b"old"


def test_id_that_does_not_come_ends_the_rank(tmp_path: Path) -> None:
    with pytest.raises(EngineRunError, match=r"no id of world came to .* within 0\.1 seconds"):
        FileRendezvous(tmp_path, 0.1).exchange("world", None)


def test_store_without_the_id_ends_the_rank() -> None:
    import datetime

    import torch.distributed

    store = torch.distributed.HashStore()
    store.set_timeout(datetime.timedelta(seconds=0.1))
    with pytest.raises(EngineRunError, match="no id of world came"):
        StoreRendezvous(store).exchange("world", None)
