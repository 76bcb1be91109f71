"""The reference's largest logits in a release: made from the reference step's file, compared with an executor's logits."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save

from orchestrator.base.digest import digest_bytes
from orchestrator.base.errors import DamagedOutputError, DigestError, VerificationError
from orchestrator.planning.steps import Output
from orchestrator.releases.collecting import collect
from orchestrator.releases.pulling import pull
from orchestrator.releases.reading import open_release
from orchestrator.releases.reference_numbers import REFERENCE, TOP, LogitsOf, ReferenceNumbers, read_numbers, shortened
from orchestrator.releases.verifying import verify
from orchestrator.spec.build import ToleranceSpec
from orchestrator.stores import open_store
from orchestrator.stores.store import Store
from orchestrator.work.verify.inputs import positions_of
from tests.support.releases import make_keys, publish_tiny

Array = npt.NDArray[Any]
LENGTHS, STEPS, VOCABULARY = np.array([12, 7, 9]), 3, 200
VERIFIED = {"verification": {"max_tokens": 12}}


def reference() -> dict[str, Array]:
    generator = np.random.default_rng(1)
    tokens = np.where(np.arange(12) < LENGTHS[:, None], generator.integers(1, VOCABULARY, (3, 12)), 0)
    return {"tokens": tokens, "lengths": LENGTHS, "logits": generator.standard_normal((3, 12, VOCABULARY)).astype(np.float32) * 5}


def stored(store: Store, arrays: dict[str, Array]) -> Output:
    data = save(arrays)
    store.put("steps/reference", data)
    return Output(name=REFERENCE, key="steps/reference", num_bytes=len(data), sha256=digest_bytes(data))


def numbers_of(folder: Path, arrays: dict[str, Array], tolerance: ToleranceSpec | None = None) -> ReferenceNumbers:
    store = open_store(folder.as_uri())
    data = shortened(store, stored(store, arrays), STEPS, tolerance or ToleranceSpec())
    (folder / "numbers.safetensors").write_bytes(data)
    return read_numbers(folder / "numbers.safetensors")


def as_rows(numbers: ReferenceNumbers, logits: Array) -> LogitsOf:
    """An executor's logits by call."""
    results = [np.zeros((*call.input_ids.shape, VOCABULARY), np.float32) for call in numbers.calls()]
    for sequence, position, call, row in positions_of(LENGTHS, STEPS):
        results[call][sequence, row] = logits[sequence, position]
    return numbers.rows_of(results)


def test_numbers_hold_the_largest_logits_of_every_position_and_the_text(tmp_path: Path) -> None:
    arrays = reference()
    found = numbers_of(tmp_path, arrays)
    assert found.decode_steps == STEPS
    np.testing.assert_array_equal(found.tokens, arrays["tokens"])
    np.testing.assert_array_equal(found.lengths, LENGTHS)
    assert len(found.places) == LENGTHS.sum()
    for (sequence, position), indices, values, largest in zip(
        found.places, found.indices, found.values, found.largest, strict=True
    ):
        row = arrays["logits"][sequence, position]
        np.testing.assert_array_equal(values, np.sort(row)[::-1][:TOP])
        np.testing.assert_array_equal(row[indices], values)
        assert largest == np.abs(row).max()


def test_numbers_of_a_long_text_and_a_large_vocabulary_stay_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.stores.store.BLOCK_BYTES", 1000)  # rows that span blocks
    tokens = np.ones((4, 512), np.int64)
    arrays = {"tokens": tokens, "lengths": np.full(4, 512), "logits": np.random.default_rng(2).random((4, 512, 1000), np.float32)}
    found = numbers_of(tmp_path, arrays)
    assert (tmp_path / "numbers.safetensors").stat().st_size < 110_000
    assert len(found.places) == 300
    assert {0, 3} == {int(found.places[0][0]), int(found.places[-1][0])}
    np.testing.assert_array_equal(found.values[7][0], arrays["logits"][tuple(found.places[7])].max())


def test_equal_logits_agree_exactly_and_small_errors_pass_in_wide_arithmetic_only(tmp_path: Path) -> None:
    arrays = reference()
    numbers = numbers_of(tmp_path, arrays)
    exact = numbers.check(as_rows(numbers, arrays["logits"]), "float32")
    assert (exact.num_positions, exact.max_relative_error, exact.top1_agreement) == (28, 0.0, 1.0)
    rounded = as_rows(numbers, arrays["logits"] * 1.01)
    assert numbers.check(rounded, "float16").max_relative_error == pytest.approx(0.01, rel=1e-3)
    with pytest.raises(VerificationError, match=r"relative error 0\.01 > 5e-05"):
        numbers.check(rounded, "float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8"])
@pytest.mark.parametrize("fault", ["swapped-positions", "not-finite", "another-token-on-top", "other-sequence"])
def test_wrong_logits_are_found_in_every_arithmetic(tmp_path: Path, fault: str, dtype: str) -> None:
    arrays = reference()
    numbers = numbers_of(tmp_path, arrays)
    logits = arrays["logits"].copy()
    if fault == "swapped-positions":
        logits[:, [3, 4]] = logits[:, [4, 3]]
    elif fault == "not-finite":
        logits[0, 0, 5] = np.nan
    elif fault == "another-token-on-top":
        logits[1, 6, np.argmin(logits[1, 6])] = 40  # none of the logits that were kept
    else:
        logits[[0, 1]] = logits[[1, 0]]
    with pytest.raises(VerificationError, match="differ from the reference on 28 positions"):
        numbers.check(as_rows(numbers, logits), dtype)


def test_tolerance_is_that_of_the_build(tmp_path: Path) -> None:
    arrays = reference()
    numbers = numbers_of(tmp_path, arrays, ToleranceSpec(max_relative_error=0.2, min_top1_agreement=0.5))
    numbers.check(as_rows(numbers, arrays["logits"] * 1.1), "float32")
    with pytest.raises(VerificationError, match=r"relative error 0\.3 > 0\.2"):
        numbers.check(as_rows(numbers, arrays["logits"] * 1.3), "float32")


def test_reference_that_was_damaged_in_the_store_is_named(tmp_path: Path) -> None:
    store = open_store(tmp_path.as_uri())
    output = stored(store, reference())
    data = bytearray(store.get(output.key))
    data[-5] ^= 1
    store.put(output.key, bytes(data))
    with pytest.raises(DamagedOutputError) as caught:
        shortened(store, output, STEPS, ToleranceSpec())
    assert caught.value.key == output.key


def test_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "numbers.safetensors").write_bytes(save({"tokens": np.zeros(3)}))
    with pytest.raises(DigestError, match="holds no reference numbers"):
        read_numbers(tmp_path / "numbers.safetensors")


def test_verified_release_holds_signed_numbers_that_pull_fetches_and_collect_keeps(tmp_path: Path) -> None:
    private, public = make_keys(tmp_path / "keys")
    published = publish_tiny(tmp_path, private, **VERIFIED)
    record = published.manifest.reference
    assert record is not None
    assert record.role == "reference"
    assert REFERENCE in open_release(published.url, public).signed_digests()
    pull(published.url, tmp_path / "pulled", ranks=[1], public_key=public, check=False)
    assert read_numbers(tmp_path / "pulled" / REFERENCE).decode_steps == 4
    now = datetime.datetime.now(datetime.UTC)
    for days in (0, 30):
        collect(published.store.url, delete=True, now=now + datetime.timedelta(days=days))
    verify(published.url, public)
    (published.folder / record.key).write_bytes(b"x" * record.num_bytes)
    with pytest.raises(DigestError, match=r"reference\.safetensors has sha256"):
        verify(published.url, public)


def test_release_that_was_not_verified_has_no_numbers(tmp_path: Path) -> None:
    assert publish_tiny(tmp_path).manifest.reference is None
