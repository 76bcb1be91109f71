"""Calibration tokens: rows of equal length, the same on every machine."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from orchestrator.base.digest import digest_bytes, digest_file
from orchestrator.base.errors import DigestError, QuantizationError, SourceMissingError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Tokens = npt.NDArray[np.int64]


class CalibrationData(BaseModel):
    """Identity of the calibration tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str
    """`default`, the name of a Hugging Face dataset, or the name of a local file without its folder."""
    digest: str | None
    """sha256 of the local file, or of the package's text; None: a Hugging Face dataset."""
    num_samples: int
    max_length: int
    batch_size: int
    seed: int


DEFAULT = "default"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_TEXT_FILE = "calibration_text.md"
_CHOICE = 8
"""Factor of the tokens read from a large dataset over the tokens asked for, so that the seed has a choice."""
_TOKENIZER = "Put the tokenizer of this model beside its weights, or set source.tokenizer."
_RECORDS = "Give a .txt file, or a .jsonl or .parquet file whose records have `text`, or `messages` for the model's chat template."


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder has a tokenizer that transformers can load."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def calibration_tokens(data: CalibrationData, dataset: str, tokenizer_folder: Path, vocab_size: int) -> Tokens:
    """Return int64 [samples, length]: joined texts, cut into rows without padding, `num_samples` of them chosen by the seed.

    The package's text may give fewer rows; other data must have enough. A model without a tokenizer gets seeded random ids.
    `dataset`: path of a local file, or empty. Raises SourceMissingError, QuantizationError, DigestError.
    """
    import numpy as np

    generator = np.random.default_rng(data.seed)
    if not has_tokenizer(tokenizer_folder):
        if data.dataset != DEFAULT:
            raise QuantizationError(
                f"the model has no tokenizer to read {data.dataset} with",
                f"Put one of {', '.join(_TOKENIZER_FILES)} beside the model, set source.tokenizer, "
                f"or use dataset: {DEFAULT} (random ids then).",
            )
        return generator.integers(0, vocab_size, (data.num_samples, data.max_length), dtype=np.int64)
    tokenizer = _tokenizer(tokenizer_folder)
    needed = data.num_samples * data.max_length
    ids = _first_ids(tokenizer, _texts(data, dataset, tokenizer), needed * _CHOICE)
    length = data.max_length
    if len(ids) < needed and data.dataset != DEFAULT:
        raise QuantizationError(
            f"the calibration data {data.dataset} has {len(ids)} tokens, too few for {data.num_samples} samples of {length}",
            f"Give more text, or set quantization.calibration.num_samples to {max(len(ids) // length, 1)} at most.",
        )
    if ids and max(ids) >= vocab_size:
        raise QuantizationError(
            f"the tokenizer belongs to another model: it gives id {max(ids)}, the vocabulary has {vocab_size}", _TOKENIZER
        )
    length = min(length, len(ids))
    rows = np.array(ids[: len(ids) // length * length], np.int64).reshape(-1, length)
    chosen = generator.permutation(len(rows))[: data.num_samples]
    return rows[np.sort(chosen)]


def default_digest() -> str:
    """Return the sha256 of the package's text."""
    return digest_bytes(_default_text())


def _default_text() -> bytes:
    return importlib.resources.files("orchestrator.quantizers").joinpath(_TEXT_FILE).read_bytes()


def check_data(path: Path) -> None:
    """Refuse a local file whose first record cannot be used, when the build is planned. Raises QuantizationError."""
    if path.suffix == ".jsonl":
        first = next(_entries(path), None)
        if first is None:
            raise QuantizationError(f"the calibration file {path} is empty", _RECORDS)
        _check_record(first, str(path))


@dataclass(frozen=True, slots=True)
class _Text:
    text: str
    is_chat: bool = False
    """Whether the text comes from the chat template, which adds special tokens."""


def _tokenizer(folder: Path) -> Any:
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizer classes raise many kinds of error
        raise QuantizationError(
            f"the source's tokenizer cannot be loaded: {error}", "Put the model's tokenizer.json beside the weights."
        ) from error


def _first_ids(tokenizer: Any, texts: Iterable[_Text], limit: int) -> list[int]:
    ids: list[int] = []
    for text in texts:
        ids.extend(tokenizer(text.text, add_special_tokens=not text.is_chat, verbose=False)["input_ids"])
        if len(ids) >= limit:
            break
    return ids[:limit]


def _texts(data: CalibrationData, dataset: str, tokenizer: Any) -> Iterator[_Text]:
    if data.dataset == DEFAULT:
        text = _default_text()
        if data.digest is not None and digest_bytes(text) != data.digest:
            raise DigestError("the package on this node has another calibration text", "Install the same version on every node.")
        lines = text.decode().partition("-->")[2].splitlines(keepends=True)
        return (_Text(paragraph) for paragraph in _paragraphs(lines))
    if dataset:
        path = Path(dataset)
        _check_same(path, data)
        return (_as_text(entry, tokenizer, str(path)) for entry in _entries(path))
    return (_as_text(entry, tokenizer, data.dataset) for entry in _hub_entries(data.dataset))


def _check_same(path: Path, data: CalibrationData) -> None:
    if not path.is_file():
        raise SourceMissingError(f"{path} is missing on this node", "Every node that calibrates must see the file under that path.")
    if digest_file(path) != data.digest:
        raise DigestError(f"{path} is not the file that the plan was made with", "Run the build again.")


def _entries(path: Path) -> Iterator[Any]:
    """Yield the paragraphs of a text file, or the records of a .jsonl or .parquet file."""
    if path.suffix == ".parquet":
        yield from _parquet(path)
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        if path.suffix == ".txt":
            yield from _paragraphs(file)
            return
        for number, line in enumerate(file, 1):
            try:
                if line.strip():
                    yield json.loads(line)
            except ValueError as error:
                raise QuantizationError(f"{path}, line {number} is not JSON: {error}", _RECORDS) from None


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Yield the paragraphs between empty lines."""
    held: list[str] = []
    for line in lines:
        if line.strip():
            held.append(line)
        elif held:
            yield "".join(held).strip("\n")
            held = []
    if held:
        yield "".join(held).strip("\n")


def _parquet(path: Path) -> Iterator[Any]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise QuantizationError(f"{path} needs pyarrow", "pip install pyarrow, or give a .jsonl or .txt file.") from None
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise QuantizationError(f"{path} cannot be read: {error}", _RECORDS) from error


def _hub_entries(name: str) -> Iterator[Any]:
    try:
        import datasets
    except ImportError:
        raise QuantizationError(
            f"the data set {name} needs the package datasets", "pip install datasets, or give a .txt, .jsonl or .parquet file."
        ) from None
    try:
        yield from datasets.load_dataset(name, split="train", streaming=True)
    except Exception as error:  # the hub, the network and the dataset's code raise many kinds of error
        raise QuantizationError(
            f"the data set {name} cannot be read: {error}", "Give a .txt, .jsonl or .parquet file instead."
        ) from error


def _check_record(entry: Any, origin: str) -> None:
    if isinstance(entry, str) or (
        isinstance(entry, dict) and (isinstance(entry.get("text"), str) or isinstance(entry.get("messages"), list))
    ):
        return
    known = ", ".join(sorted(entry)) if isinstance(entry, dict) else type(entry).__name__
    raise QuantizationError(f"a record of {origin} has neither text nor messages (it has: {known})", _RECORDS)


def _as_text(entry: Any, tokenizer: Any, origin: str) -> _Text:
    """Return the text of an entry: a plain text, or a record with `text`, or with `messages` for the tokenizer's chat template."""
    _check_record(entry, origin)
    if isinstance(entry, str):
        return _Text(entry)
    if isinstance(entry.get("text"), str):
        return _Text(entry["text"])
    if not getattr(tokenizer, "chat_template", None):
        raise QuantizationError(f"{origin} holds messages, but the model's tokenizer has no chat template", "Give a text field.")
    try:
        return _Text(tokenizer.apply_chat_template(entry["messages"], tokenize=False), is_chat=True)
    except Exception as error:  # the model's template may raise anything
        raise QuantizationError(f"the model's chat template refuses messages of {origin}: {error}", _RECORDS) from error
