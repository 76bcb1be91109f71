"""Reference numbers of a release: the largest logits of the source model on the verification text.

The verification's reference holds all logits, about 60 MB. A release gets, for up to 300 of its positions, the 32 largest logits
and the largest absolute one: enough to tell whether an executor on another machine computes this model, in about 100 kB.

    numbers = read_numbers(folder / "reference.safetensors")
    numbers.check(numbers.rows_of(runner.logits(numbers.calls())), "bfloat16")
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.base.errors import DamagedOutputError, DigestError, VerificationError
from orchestrator.checkpoints.safetensors import encode_header, read_header
from orchestrator.model.quantization import ActivationFormat
from orchestrator.planning.steps import Output
from orchestrator.releases.asked import model_quantization
from orchestrator.releases.manifest import Manifest
from orchestrator.spec.build import ToleranceSpec
from orchestrator.stores.store import Store

LogitsOf = Callable[[int, int], Any]
"""Sequence and position -> logits [vocabulary], as a numpy array."""
REFERENCE = "reference.safetensors"
TOP = 32
"""Logits that are kept of each position."""
_MAX_POSITIONS = 300
ROUNDING = {"float32": 0.0, "float16": 0.02, "bfloat16": 0.1, "float8": 0.15}
"""Relative error that an executor's arithmetic may add to the build's tolerance, by dtype. float8: activations in 8 bits or fewer,
whose matrix products GPUs accumulate less exactly than the verification does."""
_ROUNDED_TOP1 = 0.9
"""Least top-1 agreement in other arithmetic than float32: rounding swaps tokens of almost equal probability."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Difference between an executor's logits and the reference's largest ones."""

    num_positions: int
    max_relative_error: float
    """Largest over positions of max |logit - reference| / max |reference|, over the logits that were kept."""
    top1_agreement: float


@dataclass(frozen=True, slots=True)
class ReferenceNumbers:
    """Verification text and the reference's largest logits. P positions, at most TOP logits (K) of each, the largest first."""

    tokens: Any
    """int64 [B, T], padded with 0."""
    lengths: Any
    """int64 [B]."""
    decode_steps: int
    places: Any
    """int64 [P, 2]: sequence and position."""
    indices: Any
    """int32 [P, K]: token ids."""
    values: Any
    """float32 [P, K]: their logits."""
    largest: Any
    """float32 [P]: largest absolute logit."""
    tolerance: ToleranceSpec
    """Tolerance of the build's verification, which includes the error of its quantization."""

    def calls(self) -> list[Any]:
        """Return the calls of the verification, as work/verify/inputs makes them."""
        from orchestrator.work.verify.inputs import make_calls

        return make_calls(self.tokens, self.lengths, self.decode_steps)

    def rows_of(self, results: Sequence[Any]) -> LogitsOf:
        """Return the logits of a position from those of the calls, [B, S, vocabulary] each."""
        from orchestrator.work.verify.inputs import positions_of

        places = {(seq, position): (call, row) for seq, position, call, row in positions_of(self.lengths, self.decode_steps)}

        def logits_of(sequence: int, position: int) -> Any:
            call, row = places[sequence, position]
            return results[call][sequence, row]

        return logits_of

    def texts(self) -> list[list[int]]:
        """Return the tokens of each sequence."""
        return [row[:length].tolist() for row, length in zip(self.tokens, self.lengths, strict=True)]

    def compare(self, logits_of: LogitsOf) -> Agreement:
        """Compare the logits [vocabulary] of a sequence's position."""
        import numpy as np

        worst, same = 0.0, 0
        for (sequence, position), indices, values, largest in zip(
            self.places.tolist(), self.indices, self.values, self.largest, strict=True
        ):
            logits = logits_of(sequence, position).astype(np.float64)
            # A logit that was not kept is smaller than all that were.
            difference = max(float(np.abs(logits[indices] - values).max()), float(logits.max() - values[0]))
            if not np.isfinite(logits).all():
                difference = float("inf")
            worst = max(worst, difference / max(float(largest), float(np.finfo(np.float32).tiny)))
            same += int(logits.argmax()) == int(indices[0])
        return Agreement(len(self.places), worst, same / len(self.places))

    def check(self, logits_of: LogitsOf, dtype: str) -> Agreement:
        """Compare, and check with the tolerance for arithmetic in `dtype`, a key of ROUNDING. Raises VerificationError."""
        found, rounding = self.compare(logits_of), ROUNDING[dtype]
        limit = None if self.tolerance.max_relative_error is None else self.tolerance.max_relative_error + rounding
        least = min(self.tolerance.min_top1_agreement, _ROUNDED_TOP1) if rounding else self.tolerance.min_top1_agreement
        problems = []
        if limit is not None and not found.max_relative_error <= limit:
            problems.append(f"relative error {found.max_relative_error:.3g} > {limit:g}")
        if found.top1_agreement < least:
            problems.append(f"top-1 agreement {found.top1_agreement:.4f} < {least:g}")
        if problems:
            raise VerificationError(
                f"the engines differ from the reference on {found.num_positions} positions: {', '.join(problems)}",
                "Do not serve with them here: verify the release's bytes (`orchestrator verify`), then the GPU and its driver.",
            )
        return found


def arithmetic_of(manifest: Manifest) -> str:
    """Return the key of ROUNDING for a release's engines: the model's dtype, or float8 where activations are quantized."""
    found = model_quantization(manifest)
    rounded = found is not None and any(fmt.activation is not ActivationFormat.NONE for fmt in found.formats())
    return "float8" if rounded else manifest.model.dtype


def shortened(store: Store, output: Output, decode_steps: int, tolerance: ToleranceSpec) -> bytes:
    """Return the file with the reference numbers, made from a reference step's output, which is streamed.

    Raises DamagedOutputError when its bytes are not those that the step wrote.
    """
    import numpy as np

    size = int.from_bytes(store.get_range(output.key, 0, 8), "little")
    header = json.loads(store.get_range(output.key, 8, 8 + size))
    spans = {name: [8 + size + offset for offset in entry["data_offsets"]] for name, entry in header.items() if name[0] != "_"}
    tokens = np.frombuffer(store.get_range(output.key, *spans["tokens"]), np.int64).reshape(header["tokens"]["shape"])
    lengths = np.frombuffer(store.get_range(output.key, *spans["lengths"]), np.int64)
    width, vocab_size = header["logits"]["shape"][1:]
    every = [(sequence, position) for sequence, length in enumerate(lengths) for position in range(int(length))]
    chosen = [every[number] for number in sorted(set(np.linspace(0, len(every) - 1, min(len(every), _MAX_POSITIONS)).astype(int)))]
    hasher, kept = hashlib.sha256(), {}
    wanted = {sequence * width + position: (sequence, position) for sequence, position in chosen}
    for number, row in enumerate(_rows(store.blocks(output.key), spans["logits"], 4 * vocab_size, hasher)):
        if number in wanted:
            logits = np.frombuffer(row, np.float32)
            order = np.argsort(-logits, kind="stable")[:TOP]
            kept[wanted[number]] = order, logits[order], np.abs(logits).max()
    if hasher.hexdigest() != output.sha256:
        raise DamagedOutputError(f"{output.key} in {store.url} is not what was written", key=output.key)
    return _encoded(
        {
            "tokens": ("I64", tokens),
            "lengths": ("I64", lengths),
            "places": ("I64", np.array(chosen, np.int64)),
            "indices": ("I32", np.stack([kept[place][0] for place in chosen]).astype(np.int32)),
            "values": ("F32", np.stack([kept[place][1] for place in chosen])),
            "largest": ("F32", np.array([kept[place][2] for place in chosen], np.float32)),
        },
        {"decode_steps": str(decode_steps), "tolerance": tolerance.model_dump_json()},
    )


def _rows(blocks: Iterable[bytes | memoryview], span: Sequence[int], row_bytes: int, hasher: Any) -> Iterator[bytes]:
    """Yield the rows of a tensor in the bytes `span` of a file that is hashed as it streams by."""
    position, held = 0, bytearray()
    for block in blocks:
        hasher.update(block)
        held += memoryview(block)[max(span[0] - position, 0) : max(span[1] - position, 0)]
        position += len(block)
        while len(held) >= row_bytes:
            yield bytes(held[:row_bytes])
            del held[:row_bytes]


def _encoded(arrays: Mapping[str, tuple[str, Any]], metadata: Mapping[str, str]) -> bytes:
    header = encode_header(((name, dtype, array.shape) for name, (dtype, array) in arrays.items()), metadata)
    return header + b"".join(array.tobytes() for _, array in arrays.values())


_KINDS = {"I64": "<i8", "I32": "<i4", "F32": "<f4"}


def read_numbers(path: Path) -> ReferenceNumbers:
    """Read the file that `shortened` made. Raises DigestError for another file."""
    import numpy as np

    try:
        entries, metadata = read_header(path)
        data = path.read_bytes()
        arrays = {
            entry.name: np.frombuffer(data[entry.offset : entry.offset + entry.num_bytes], _KINDS[entry.dtype]).reshape(entry.shape)
            for entry in entries
        }
        return ReferenceNumbers(
            **arrays,
            decode_steps=int(metadata["decode_steps"]),
            tolerance=ToleranceSpec.model_validate_json(metadata["tolerance"]),
        )
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise DigestError(f"{path} holds no reference numbers: {error}", "Pull the release again.") from error
