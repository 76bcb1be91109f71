from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.base.digest import canonical_json, digest_bytes, digest_of

words = st.text(st.characters(codec="utf-8"))
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | words,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4),
    max_leaves=12,
)


def test_canonical_json_keys_sorted_without_spaces_in_utf8() -> None:
    assert canonical_json({"b": [1, 2.5], "a": {"é": None}}) == '{"a":{"é":null},"b":[1,2.5]}'.encode()


@given(value=plain)
def test_canonical_json_value_survives(value: Any) -> None:
    assert json.loads(canonical_json(value)) == value
    assert canonical_json(json.loads(canonical_json(value))) == canonical_json(value)


@given(value=st.dictionaries(words, plain, max_size=5), order=st.randoms())
def test_digest_of_order_of_keys_does_not_matter(value: dict[str, Any], order: Any) -> None:
    items = list(value.items())
    order.shuffle(items)
    assert digest_of(dict(items)) == digest_of(value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, {"deep": [math.nan]}])
def test_canonical_json_numbers_that_json_lacks_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="JSON"):
        canonical_json(value)


def test_digest_of_known_value_is_stable() -> None:
    assert digest_of({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    assert digest_bytes(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_digest_of_is_sha256_of_the_canonical_text() -> None:
    assert digest_of([1, "two"]) == digest_bytes(b'[1,"two"]')


@pytest.mark.parametrize(
    ("one", "other"), [([1, 2], [2, 1]), ({"a": 1}, {"a": "1"}), ({"a": None}, {}), ("", []), (1, 1.5), (True, "true")]
)
def test_digest_of_different_values_differ(one: Any, other: Any) -> None:
    assert digest_of(one) != digest_of(other)
