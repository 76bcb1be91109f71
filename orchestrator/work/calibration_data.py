"""The tokens that a model reads while it is calibrated: rows of equal length, the same on every machine."""

from __future__ import annotations

import hashlib
import importlib.resources
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.core.errors import DigestError, QuantizationError, SourceMissingError
from orchestrator.core.options import CalibrationData

Tokens = npt.NDArray[np.int64]
DEFAULT = "default"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_TEXT_FILE = "calibration_text.md"
_MAX_TEXTS = 100_000
"""Read of a large data set at most; far more than any calibration takes."""


def has_tokenizer(folder: Path) -> bool:
    """Whether transformers finds a tokenizer there."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def calibration_tokens(data: CalibrationData, dataset: str, tokenizer_folder: Path, vocab_size: int) -> Tokens:
    """int64 [samples, length]: texts one after the other, cut into rows, `num_samples` of them chosen by the seed.

    There is no padding. A text that yields fewer rows than asked for gives those; a model without a tokenizer reads seeded
    random ids. Raises SourceMissingError, QuantizationError, DigestError.
    """
    generator = np.random.default_rng(data.seed)
    if not has_tokenizer(tokenizer_folder):
        return generator.integers(0, vocab_size, (data.num_samples, data.max_length), dtype=np.int64)
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
    ids = [number for text in _texts(data, dataset, tokenizer) for number in _encode(tokenizer, text)]
    length = min(data.max_length, len(ids))
    if length < 2:
        raise QuantizationError(f"the calibration data {data.dataset} has {len(ids)} tokens", "Give a text of some pages.")
    rows = np.array(ids[: len(ids) // length * length], np.int64).reshape(-1, length)
    chosen = generator.permutation(len(rows))[: data.num_samples]
    return rows[np.sort(chosen)]


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"]
    return ids


def _texts(data: CalibrationData, dataset: str, tokenizer: Any) -> Iterator[str]:
    if data.dataset == DEFAULT:
        text = importlib.resources.files("orchestrator.work").joinpath(_TEXT_FILE).read_text()
        return iter(text.partition("-->")[2].split("\n\n"))
    if dataset:
        path = Path(dataset)
        _check_same(path, data)
        return (_as_text(entry, tokenizer, str(path)) for entry in _entries(path))
    return (_as_text(entry, tokenizer, data.dataset) for entry in _hub_entries(data.dataset))


def _check_same(path: Path, data: CalibrationData) -> None:
    if not path.is_file():
        raise SourceMissingError(
            f"{path} is not there on this node", "Every node that calibrates must see the file under that path."
        )
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != data.digest:
            raise DigestError(f"{path} is not the file that the plan was made with", "Run the build again.")


def _entries(path: Path) -> Iterator[Any]:
    """A text file's paragraphs, or the records of a .jsonl or .parquet file."""
    if path.suffix == ".txt":
        yield from (paragraph for paragraph in path.read_text(errors="replace").split("\n\n") if paragraph.strip())
    elif path.suffix == ".jsonl":
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                yield json.loads(line)
            except ValueError as error:
                raise QuantizationError(f"{path}, line {number} is not JSON: {error}") from None
    else:
        yield from _parquet(path)


def _parquet(path: Path) -> Iterator[Any]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise QuantizationError(f"{path} needs pyarrow", "pip install pyarrow, or give a .jsonl or .txt file.") from None
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
        yield from batch.to_pylist()


def _hub_entries(name: str) -> Iterator[Any]:
    try:
        import datasets
    except ImportError:
        raise QuantizationError(
            f"the data set {name} needs the package datasets", "pip install datasets, or give a .txt, .jsonl or .parquet file."
        ) from None
    try:
        stream = datasets.load_dataset(name, split="train", streaming=True)
        yield from stream.take(_MAX_TEXTS)
    except Exception as error:  # whatever the hub, the network or the data set's own code raises
        raise QuantizationError(
            f"the data set {name} cannot be read: {error}", "Give a .txt, .jsonl or .parquet file instead."
        ) from error


def _as_text(entry: Any, tokenizer: Any, origin: str) -> str:
    """A plain text, or a record with `text`, or with `messages` under the tokenizer's chat template."""
    if isinstance(entry, str):
        return entry
    if isinstance(entry, dict):
        if isinstance(entry.get("text"), str):
            return str(entry["text"])
        if isinstance(entry.get("messages"), list):
            if not getattr(tokenizer, "chat_template", None):
                raise QuantizationError(
                    f"{origin} holds messages, the model's tokenizer has no chat template", "Give a text field."
                )
            return str(tokenizer.apply_chat_template(entry["messages"], tokenize=False))
    known = ", ".join(sorted(entry)) if isinstance(entry, dict) else type(entry).__name__
    raise QuantizationError(f"a record of {origin} has neither text nor messages (it has: {known})")
