"""YAML of specs and cluster files: what is refused, where it says so, and that what we write is read as the same."""

from __future__ import annotations

import contextlib
import time
import tracemalloc
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.base.errors import SpecError
from orchestrator.spec.build import BuildSpec
from orchestrator.spec.cluster import ClusterSpec
from orchestrator.spec.decoding import decode_yaml
from orchestrator.spec.yaml_text import MAX_BYTES, dump_yaml, parse_yaml
from tests.fuzz.specs import bomb

SPEC = "source: {path: model}\nrelease: {name: a, version: '1'}\n"


def refused(data: bytes | str) -> SpecError:
    with pytest.raises(SpecError) as caught:
        parse_yaml(data if isinstance(data, bytes) else data.encode(errors="surrogatepass"), "spec.yaml")
    assert caught.value.message.startswith("spec.yaml")
    assert len(caught.value.message) < 400
    assert caught.value.advice
    return caught.value


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"a: 1\nb: \xff\n", "is not UTF-8: line 2: byte 0xff"),
        ("a: 1\n".encode("utf-16"), "is UTF-16, not UTF-8"),
        ("a: 1\nb: x\0y\n", "line 2, column 5: the character U+0000 is not allowed"),
        ("a: !!int abc\n", "line 1, column 4: tags such as tag:yaml.org,2002:int"),
        ("a: !!python/object/apply:os.system [ls]\n", "tags such as"),
        ("a: 1\nb: " + "9" * 5000, "line 2, column 4: a number of 5,000 digits"),
        ("a: " + "[" * 100_000, "line 1, column 36: values in one another more than 32 deep"),
        ("- " * 50_000, "more than 32 deep"),
        ("a: 1\nb:\n  c: 1\n  c: 2\n", "line 4, column 3: b.c stands here again, first in line 3"),
        ("a: 1\n---\nb: 2\n", "line 2, column 1: a second document begins here"),
        ("a: &x [*x]\n", "*x stands within &x"),
        ("a: *x\n", "*x names no anchor before it"),
        ('a: "\\ud800"', "line 1, column 4: half of a character"),
        ("1: a\n", "the key 1 is not text"),
        ("null: a\n", "the key null is not text"),
        ("? [a]\n: b\n", "a key that is a list"),
        ("a: 1\n\tb: 2\n", "line 2, column 1: found character '\\t'"),
        ("a: 'b\n", "line 2, column 1: found unexpected end of stream"),
        ("a" * 900 + ": 1\n" + "a" * 900 + ": 2\n", "stands here again, first in line 1"),
        ("x: !" + "y" * 5000 + " 1\n", "tags such as"),
        (b"a: " + b"x" * MAX_BYTES, "more than 262,144 bytes"),
        ("%YAML 3.0\n---\na: 1\n", "is not YAML: "),
    ],
)
def test_parse_yaml_of_what_is_no_plain_document_says_where(data: bytes | str, words: str) -> None:
    assert words in refused(data).message


@pytest.mark.parametrize("depth", [8, 30])
def test_parse_yaml_of_aliases_that_multiply_stops_early(depth: int) -> None:
    tracemalloc.start()
    started = time.process_time()
    assert "more than 50,000 values" in refused(bomb(9, depth)).message
    assert time.process_time() - started < 1
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7), ("-7", -7), ("0x10", 16), ("0", 0), ("1.5", 1.5), ("1e3", 1000.0), ("-1E-3", -0.001), (".5", 0.5),
        ("true", True), ("False", False), ("null", None), ("~", None), ("", None), ("'7'", "7"), ('"true"', "true"), ("!!str 7",
        "7"),
        ("on", "on"), ("no", "no"), ("1:30", "1:30"), ("010", "010"), ("0o17", "0o17"), ("1_000", "1_000"), ("2024-01-01",
        "2024-01-01"),
        (".inf", ".inf"), (".nan", ".nan"), ("0b1", "0b1"), ("|\n 7", "7"), ("[a, [b]]", ["a", ["b"]]), ("{b: {c: 1}}",
        {"b": {"c": 1}}),
    ],
)  # fmt: skip
def test_parse_yaml_of_plain_words_follows_yaml_1_2(text: str, value: Any) -> None:
    found = parse_yaml(f"a: {text}".encode(), "x").data["a"]
    assert (found, type(found)) == (value, type(value))


def test_parse_yaml_keeps_the_line_and_the_text_of_each_value() -> None:
    marks = parse_yaml(b"\xef\xbb\xbfa:\r\n  b: 1.10\r\n  c: [x, 'y']\r\n", "x").marks
    assert (marks["a", "b"].line, marks["a", "b"].text) == (2, "1.10")
    assert (marks["a", "c", 1].line, marks["a", "c", 1].text) == (3, None)


def test_parse_yaml_of_anchors_repeats_the_value() -> None:
    assert parse_yaml(b"a: &x {b: [1]}\nc: *x\n", "x").data == {"a": {"b": [1]}, "c": {"b": [1]}}


_PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.from_regex(r"[-+0-9._eExob:~]{1,6}", fullmatch=True) | st.sampled_from(["yes", "off", "null", "1e5", "0o7", "=", "<<",
    "\x85"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abcyno10.", min_size=1), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(_PLAIN)
def test_dump_yaml_of_any_plain_data_is_read_as_the_same(value: Any) -> None:
    assert parse_yaml(dump_yaml({"a": value}).encode(), "x").data == {"a": value}


@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode(errors="surrogatepass")))
def test_parse_yaml_of_any_bytes_raises_nothing_else(data: bytes) -> None:
    with contextlib.suppress(SpecError):
        parse_yaml(data, "x")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("topology: {tp: on}", "topology.tp (line 3): expected a number, not the text 'on'"),
        ("topology: {tp: yes}", "topology.tp (line 3): expected a number, not the text 'yes'"),
        ("topology: {tp: true}", "topology.tp (line 3): expected a number, not true"),
        ("topology: {tp: 0o2}", "topology.tp (line 3): expected a number, not the text '0o2'"),
        ("topology: {tp: 1:30}", "topology.tp (line 3): expected a number, not the text '1:30'"),
        ("topology: {tp: 010}", "expected a number, not the text '010'"),
        ("topology: {tp: '2'}", "expected a number, not the text '2'"),
        ("topology:\n  pp: 2\n  pp_partition: [1, true]", "topology.pp_partition (line 5): expected a number, not true"),
        ("conversion: {max_shard_bytes: on}", "conversion.max_shard_bytes (line 3): 'on' is not a size"),
        ("conversion: {max_shard_bytes: " + "9" * 40 + "GB}", "conversion.max_shard_bytes (line 3): "),
        ("verification: {tolerance: {max_mean_kl: .inf}}", "expected a number, not the text '.inf'"),
        ("engine: {max_batch_size: 1e999}", "engine.max_batch_size (line 3): "),
        ("verification:\n  tolerance: {max_mean_kl: 1e999}", "verification.tolerance.max_mean_kl (line 4): "),
        ("topolgy: {tp: 2}", "unknown key topolgy (line 3) (did you mean topology?)"),
        ("dtype: int8", "dtype (line 3): Input should be"),
        ("topology: 2", "topology (line 3): expected a mapping with fields such as tp, pp, "),
        ("x" * 900 + ": 1", "unknown key xxx"),
    ],
)
def test_decode_yaml_of_a_wrong_value_names_path_and_line(lines: str, words: str) -> None:
    with pytest.raises(SpecError) as caught:
        decode_yaml(BuildSpec, SPEC + lines + "\n", "spec.yaml")
    assert words in caught.value.message
    assert len(caught.value.message) < 600


@pytest.mark.parametrize("text", ["1", "1.10", "0x1", "true"])
def test_decode_yaml_of_a_version_without_quotes_says_to_put_it_in_quotes(text: str) -> None:
    with pytest.raises(SpecError) as caught:
        decode_yaml(BuildSpec, f"source: {{path: model}}\nrelease:\n  name: a\n  version: {text}\n", "spec.yaml")
    assert "release.version (line 4)" in caught.value.message
    assert f'put it in quotes: "{text}"' in caught.value.message


def test_decode_yaml_of_many_mistakes_names_a_dozen() -> None:
    with pytest.raises(SpecError) as caught:
        decode_yaml(BuildSpec, SPEC + "".join(f"k{number}: 1\n" for number in range(5000)), "spec.yaml")
    assert "unknown key k0 (line 3)" in caught.value.message
    assert "and 4,988 more mistakes" in caught.value.message


def test_decode_yaml_of_numbers_in_resources_and_yes_for_a_boolean_is_as_written() -> None:
    text = "store: s3://b\ndriver: {resources: {driver: 1}}\nretries: {backoff_seconds: 1e-1}\npools: {a: {memory: 1.5GB}}\n"
    place = decode_yaml(ClusterSpec, text, "cluster.yaml")
    assert (place.driver.resources, place.retries.backoff_seconds, place.pools["a"].memory) == ({"driver": 1.0}, 0.1, 1_500_000_000)
    spec = decode_yaml(BuildSpec, SPEC + "verification: {enabled: off}\nengine: {weight_streaming: yes}\n", "spec.yaml")
    assert (spec.verification.enabled, spec.engine.weight_streaming) == (False, True)


def test_decode_yaml_of_every_file_of_the_repository_equals_pyyaml_where_both_read_it() -> None:
    from pathlib import Path

    root = Path(__file__).parents[2] / "cluster_configs"
    files = [path for path in root.rglob("*.yaml") if "launcher" not in path.name]
    assert len(files) > 10
    for path in files:
        assert parse_yaml(path.read_bytes(), str(path)).data == yaml.safe_load(path.read_text())
