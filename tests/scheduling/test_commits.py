from __future__ import annotations

import threading
from typing import Any

import pytest

from orchestrator.planning.steps import Kind, Outcome, Output
from orchestrator.scheduling import commits
from orchestrator.stores import open_store
from orchestrator.stores.store import Store

DIGEST = "ab" * 32


@pytest.fixture
def store(store_url: str) -> Store:
    return open_store(store_url)


def written(store: Store, attempt: str = "one", data: bytes = b"weights", digest: str = DIGEST, **changes: Any) -> Outcome:
    """An outcome whose output lies in the store."""
    key = commits.attempt_prefix(digest, attempt) + "rank0.safetensors"
    store.put(key, data)
    output = Output(name="rank0.safetensors", key=key, num_bytes=len(data), sha256="0" * 64)
    return Outcome(digest=digest, name="convert", kind=Kind.CONVERT, outputs=(output,), node=attempt, **changes)


def test_keys_outputs_and_commits_lie_apart() -> None:
    assert commits.outcome_key(DIGEST) == f"outcomes/{DIGEST}.json"
    assert commits.attempt_prefix(DIGEST, "a1") == f"steps/{DIGEST}/a1/"


def test_lookup_nothing_committed_is_none(store: Store) -> None:
    written(store)
    assert commits.lookup(store, DIGEST) is None


def test_commit_outcome_is_found_again(store: Store) -> None:
    outcome = written(store, facts={"read": 5}, log_tail="é\n")
    assert commits.commit(store, outcome) == outcome
    assert commits.lookup(store, DIGEST) == outcome


def test_commit_second_attempt_gets_the_first_one(store: Store) -> None:
    first, second = written(store, "one"), written(store, "two")
    commits.commit(store, first)
    assert commits.commit(store, second) == first
    assert commits.lookup(store, DIGEST) == first


def test_commit_many_attempts_at_once_all_get_the_same_one(store: Store) -> None:
    outcomes = [written(store, str(number)) for number in range(8)]
    barrier = threading.Barrier(len(outcomes))
    answers: list[Outcome] = []

    def run(outcome: Outcome) -> None:
        barrier.wait()
        answers.append(commits.commit(store, outcome))

    threads = [threading.Thread(target=run, args=(outcome,)) for outcome in outcomes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == len(outcomes)
    assert {answer.node for answer in answers} == {answers[0].node}
    assert commits.lookup(store, DIGEST) == answers[0]


def test_lookup_lost_output_is_none(store: Store) -> None:
    outcome = commits.commit(store, written(store))
    store.delete(outcome.outputs[0].key)
    assert commits.lookup(store, DIGEST) is None


def test_lookup_output_of_another_size_is_none(store: Store) -> None:
    outcome = commits.commit(store, written(store))
    store.put(outcome.outputs[0].key, b"cut")
    assert commits.lookup(store, DIGEST) is None


def test_commit_over_an_outcome_that_lost_its_outputs_replaces_it(store: Store) -> None:
    lost = commits.commit(store, written(store, "one"))
    store.delete(lost.outputs[0].key)
    again = written(store, "two")
    assert commits.commit(store, again) == again
    assert commits.lookup(store, DIGEST) == again


@pytest.mark.parametrize("data", [b"", b"{", b"{}", b'{"digest": 5}', b"\xff"])
def test_lookup_damaged_commit_is_none_and_can_be_replaced(store: Store, data: bytes) -> None:
    store.put(commits.outcome_key(DIGEST), data)
    assert commits.lookup(store, DIGEST) is None
    outcome = written(store)
    assert commits.commit(store, outcome) == outcome
    assert commits.lookup(store, DIGEST) == outcome


def test_committed_finds_those_that_are_there(store: Store) -> None:
    digests = [f"{number:064x}" for number in range(40)]
    for digest in digests[::2]:
        commits.commit(store, written(store, digest=digest))
    found = commits.committed(store, iter(digests))
    assert set(found) == set(digests[::2])
    assert all(outcome.digest == digest for digest, outcome in found.items())


def test_committed_of_nothing_is_empty(store: Store) -> None:
    assert commits.committed(store, []) == {}


def test_block_that_is_interrupted_leaves_no_upload_of_its_own_attempts(store: Store) -> None:
    ours, theirs = (commits.attempt_prefix(DIGEST, attempt) + "rank0.safetensors" for attempt in ("0123abcd5", "9999abcd5"))
    with store.writer(theirs) as other:  # another build's attempt of the same step
        other.write(b"weights")
        store.writer(ours).__enter__().write(b"weights")  # its process is killed: nobody ends it
        assert len(list(store.list_uploads(commits.STEPS))) == 2
        with pytest.raises(KeyboardInterrupt), commits.nothing_left_begun(store, "0123"):
            raise KeyboardInterrupt
        (left,) = store.list_uploads(commits.STEPS)
        assert "/9999abcd5/" in left.key
    assert store.size(theirs) == 7


def test_block_that_ends_well_looks_for_no_upload(store: Store) -> None:
    with commits.nothing_left_begun(store, "0123"):
        store.writer(commits.attempt_prefix(DIGEST, "0123abcd5") + "rank0.safetensors").__enter__().write(b"weights")
    assert len(list(store.list_uploads(commits.STEPS))) == 1
