"""What a model reads while it is calibrated: files, data sets, the text of the package, and what is refused."""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from orchestrator.base.errors import DigestError, QuantizationError, SourceMissingError
from orchestrator.planning.quantization import resolve
from orchestrator.quantizers.calibration_data import DEFAULT, CalibrationData, calibration_tokens
from orchestrator.spec.build import QuantizationSpec

if TYPE_CHECKING:
    from orchestrator.quantizers.calibration_data import Tokens

BOS, CHAT, UNKNOWN = 0, 1, 2
FIRST_WORD = 3
TEMPLATE = """{% for message in messages %}
{%- if message['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif -%}
<chat> {{ message['content'] }} {% endfor %}"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Word n of `w0 w1 ...` is token n + 3; every plain text begins with token 0, every turn of a chat with token 1."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<bos>", "<chat>", "<unk>", *(f"w{number}" for number in range(200))]
    fast = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="<unk>", chat_template=TEMPLATE).save_pretrained(folder)
    return folder


def words(numbers: range) -> str:
    return " ".join(f"w{number}" for number in numbers)


def ids(numbers: range) -> list[int]:
    return [FIRST_WORD + number for number in numbers]


def data(dataset: str, digest: str | None = None, **changes: int) -> CalibrationData:
    plain = {"num_samples": 2, "max_length": 4, "batch_size": 1, "seed": 1, **changes}
    return CalibrationData(dataset=dataset, digest=digest, **plain)


def read(path: Path, tokenizer: Path, **changes: int) -> Tokens:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return calibration_tokens(data(path.name, digest, **changes), str(path), tokenizer, 300)


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path


def test_paragraphs_of_a_text_file_follow_each_other_without_padding(tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    path.write_text(f"{words(range(3))}\n\n\n{words(range(3, 5))}\n{words(range(5, 9))}\n\n")
    assert read(path, tokenizer).tolist() == [[BOS, *ids(range(3))], [BOS, *ids(range(3, 6))]]


def test_records_of_a_jsonl_file_are_read_by_their_text(tokenizer: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "some.jsonl", {"text": words(range(3)), "id": 1}, {"text": f"w3\u2028{words(range(4, 7))}"})
    assert read(path, tokenizer).tolist() == [[BOS, *ids(range(3))], [BOS, *ids(range(3, 6))]]


def test_messages_are_read_under_the_chat_template_which_puts_the_special_tokens(tokenizer: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": words(range(3))}, {"role": "assistant", "content": words(range(3, 6))}]
    path = write(tmp_path / "some.jsonl", {"messages": turns})
    assert read(path, tokenizer).tolist() == [[CHAT, *ids(range(3))], [CHAT, *ids(range(3, 6))]]


def test_messages_without_a_chat_template_are_refused(tokenizer: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "tokenizer.json").write_bytes((tokenizer / "tokenizer.json").read_bytes())
    (bare / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    path = write(tmp_path / "some.jsonl", {"messages": [{"role": "user", "content": "w1"}]})
    with pytest.raises(QuantizationError, match="no chat template"):
        read(path, bare)


def test_rows_are_chosen_by_the_seed_among_more_than_asked_for(tokenizer: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "some.jsonl", *({"text": words(range(n, n + 3))} for n in range(0, 120, 3)))
    one, again, other = (read(path, tokenizer, num_samples=5, seed=seed) for seed in (1, 1, 2))
    assert one.tolist() == again.tolist()
    assert one.tolist() != other.tolist()
    assert one.shape == (5, 4)
    assert len(np.unique(one[:, 1])) == 5


def test_the_packages_text_gives_the_rows_that_it_has(tokenizer: Path) -> None:
    few = calibration_tokens(data(DEFAULT, num_samples=8, max_length=32), "", tokenizer, 300)
    assert few.shape == (8, 32)
    many = calibration_tokens(data(DEFAULT, num_samples=100_000, max_length=32), "", tokenizer, 300)
    assert 100 < len(many) < 100_000
    assert "licence" not in str(many)


def test_a_model_without_a_tokenizer_reads_seeded_random_ids(tmp_path: Path) -> None:
    one, again, other = (calibration_tokens(data(DEFAULT, seed=seed, max_length=50), "", tmp_path, 300) for seed in (1, 1, 2))
    assert one.tolist() == again.tolist() != other.tolist()
    assert 0 <= one.min() <= one.max() < 300


def test_a_tokenizer_that_cannot_be_loaded_is_refused_with_advice(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"nothing that a library reads")
    with pytest.raises(QuantizationError, match="tokenizer cannot be loaded"):
        calibration_tokens(data(DEFAULT), "", tmp_path, 300)


def test_data_with_fewer_tokens_than_asked_for_are_refused_with_the_largest_number(tokenizer: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "some.jsonl", {"text": words(range(14))})
    with pytest.raises(QuantizationError, match="has 15 tokens, too few for 9 samples of 4") as refused:
        read(path, tokenizer, num_samples=9)
    assert "num_samples to 3" in refused.value.advice


def test_a_line_that_is_not_json_is_named(tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text('{"text": "w1"}\n\n{"text"\n')
    with pytest.raises(QuantizationError, match="line 3 is not JSON"):
        read(path, tokenizer)


@pytest.mark.parametrize(
    ("content", "said"),
    [('{"body": "w1"}\n', "it has: body"), ("[1]\n", "it has: list"), ("", "is empty"), ("{", "line 1 is not JSON")],
)
def test_a_file_without_text_is_refused_before_anything_is_planned(content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text(content)
    with pytest.raises(QuantizationError, match=said):
        resolve(QuantizationSpec.model_validate({"algorithm": "FP8", "calibration": {"dataset": str(path)}}), 4)


def test_a_file_that_changed_since_the_plan_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "some.jsonl", {"text": "w1"})
    with pytest.raises(DigestError, match="not the file that the plan was made with"):
        calibration_tokens(data(path.name, "0" * 64), str(path), tokenizer, 300)


def test_a_file_that_a_node_does_not_see_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceMissingError, match="on this node"):
        calibration_tokens(data("gone.txt", "0" * 64), str(tmp_path / "gone.txt"), tokenizer, 300)


class FakeParquetFile:
    """pyarrow's, whose file holds one JSON record per line."""

    def __init__(self, path: Path) -> None:
        self._lines = path.read_text().splitlines()

    def iter_batches(self) -> Iterator[Any]:
        for line in self._lines:
            yield SimpleNamespace(to_pylist=lambda line=line: [json.loads(line)])


def test_records_of_a_parquet_file_are_read_by_their_text(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet = SimpleNamespace(ParquetFile=FakeParquetFile)
    monkeypatch.setitem(sys.modules, "pyarrow", SimpleNamespace(parquet=parquet, ArrowException=ValueError))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)
    path = write(tmp_path / "some.parquet", {"text": words(range(3))}, {"text": words(range(3))})
    assert read(path, tokenizer).tolist() == [[BOS, *ids(range(3))]] * 2


@pytest.mark.parametrize(("module", "dataset"), [("pyarrow", "some.parquet"), ("datasets", "some/dataset")])
def test_a_package_that_is_not_installed_is_named_with_what_does_without(
    module: str, dataset: str, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    path = tmp_path / "some.parquet"
    path.write_bytes(b"PAR1")
    is_file = dataset.endswith(".parquet")
    digest = hashlib.sha256(b"PAR1").hexdigest() if is_file else None
    with pytest.raises(QuantizationError, match=f"needs .*{module}") as refused:
        calibration_tokens(data(dataset, digest), str(path) if is_file else "", tokenizer, 300)
    assert ".jsonl" in refused.value.advice


def test_a_hugging_face_dataset_is_read_only_as_far_as_it_is_needed(tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, *, split: str, streaming: bool) -> Iterator[Any]:
        asked.append((name, split, streaming))
        return ({"text": words(range(3))} for _ in itertools.count())  # without end

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    tokens = calibration_tokens(data("some/dataset", num_samples=3), "", tokenizer, 300)
    assert asked == [("some/dataset", "train", True)]
    assert tokens.tolist() == [[BOS, *ids(range(3))]] * 3


def test_a_hugging_face_dataset_that_cannot_be_reached_is_refused_with_advice(
    tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(QuantizationError, match="no network") as refused:
        calibration_tokens(data("some/dataset"), "", tokenizer, 300)
    assert ".jsonl" in refused.value.advice


def test_messages_that_the_chat_template_refuses_are_named(tokenizer: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "chat.jsonl", {"messages": [{"role": "system", "content": "w1"}]})
    with pytest.raises(QuantizationError, match=r"chat template refuses messages of .*chat\.jsonl: no system role"):
        read(path, tokenizer)


def test_the_packages_text_is_part_of_the_identity_and_the_same_on_every_node(tokenizer: Path) -> None:
    planned = resolve(QuantizationSpec(algorithm="FP8"), 2).data
    assert planned.digest is not None
    calibration_tokens(planned, "", tokenizer, 300)
    with pytest.raises(DigestError, match="another calibration text"):
        calibration_tokens(planned.model_copy(update={"digest": "0" * 64}), "", tokenizer, 300)


def test_a_tokenizer_of_another_model_is_refused(tokenizer: Path) -> None:
    with pytest.raises(QuantizationError, match=r"belongs to another model: it gives id 2, the vocabulary has 2"):
        calibration_tokens(data(DEFAULT), "", tokenizer, 2)


def test_data_that_a_model_without_a_tokenizer_cannot_read_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(words(range(50)))
    with pytest.raises(QuantizationError, match=r"no tokenizer to read text\.txt with"):
        read(path, tmp_path)
