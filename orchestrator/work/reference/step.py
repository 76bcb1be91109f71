"""Logits of the source model on the verification text: transformers in float32, one layer in memory at a time.

Weights are first rounded to the build's dtype, so that a comparison measures conversion and graph, not the dtype. Nothing
here depends on a topology: one reference serves every build of a source.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.base.errors import SourceCorruptError, SpecError
from orchestrator.checkpoints import read_source
from orchestrator.checkpoints.safetensors import encode_header
from orchestrator.planning.facts import ReferenceFacts
from orchestrator.planning.options import ReferenceOptions
from orchestrator.planning.steps import Task
from orchestrator.quantizers.calibration_data import has_tokenizer
from orchestrator.work.companions import companion_folder
from orchestrator.work.context import Context
from orchestrator.work.device import device_of
from orchestrator.work.reference.prompts import PROMPTS
from orchestrator.work.resume import LayerStates

OUTPUT = "reference.safetensors"
"""File with tokens int64 [B, T] padded with 0, lengths int64 [B], logits float32 [B, T, vocabulary].

Also source_logits [B, T, vocabulary], of unrounded weights, if rounding to the build's dtype changes any.
"""
HIDDEN_STATES = "reference_hidden_states.safetensors"
"""File with layer{i} float32 [positions, hidden]: the end of every layer, one sequence after the other."""
_RANDOM_SEED = 20
Floats = npt.NDArray[np.float32]


def reference(task: Task, context: Context) -> ReferenceFacts:
    """Write the reference logits. Facts: number of sequences and tokens, and whether the text was real.

    Raises the source's errors, and SourceCorruptError when it changed since the plan.
    """
    import safetensors.numpy
    import transformers

    from orchestrator.work.reference.streamed_model import LayerEnd, StreamedModel

    options = ReferenceOptions.model_validate(task.step.options)
    source = task.step.locations["source"]
    index, _ = read_source(source, options.format)
    if index.files != options.files[: len(index.files)]:
        raise SourceCorruptError("the source was changed during the build", "Run the build again.")
    context.tools["transformers"] = transformers.__version__
    sequences, text = _sequences(
        options, companion_folder(task.step.locations, options.files[len(index.files) :], context, index.format)
    )
    context.log(f"reference: {len(sequences)} sequences of {text}, {[len(sequence) for sequence in sequences]} tokens")
    device = device_of(task, "verification.device")
    model = StreamedModel(source, index, options.dtype, options.exact_weights, device)
    context.log(f"reference: layers on {device}")
    lengths = np.array([len(sequence) for sequence in sequences], np.int64)
    shape = (int(lengths.sum()), model.hidden_size)
    header = encode_header(((f"layer{layer}", "F32", shape) for layer in range(model.num_layers)), {})
    states = LayerStates(context, task.step.digest)
    saved = states.saved()
    last = None
    if saved:
        end = saved[max(saved)]
        last = LayerEnd(max(saved), end["rounded"], end.get("own"))
        context.log(f"reference: an earlier attempt finished {len(saved)} of {model.num_layers} layers: resume after them")
    with context.output(HIDDEN_STATES, len(header) + 4 * math.prod((model.num_layers, *shape))) as writer:
        writer.write(header)
        for arrays in saved.values():
            writer.write(arrays["rounded"].tobytes())

        def keep(layer: int, rounded: Floats, own: Floats | None) -> None:
            writer.write(rounded.tobytes())
            states.keep(layer, lambda: {"rounded": rounded} if own is None else {"rounded": rounded, "own": own})

        logits, own = model.logits(
            sequences,
            options.decode_steps,
            lambda done, total: context.report("reference", done, total, "steps"),
            keep,
            last,
        )
    arrays = {
        "tokens": _padded([np.array(sequence, np.int64) for sequence in sequences]),
        "lengths": lengths,
        "logits": _padded(logits),
    }
    if own is not None:
        arrays["source_logits"] = _padded(own)
    data = safetensors.numpy.save(arrays)
    with context.output(OUTPUT, len(data)) as writer:
        writer.write(data)
    return ReferenceFacts(num_sequences=len(sequences), num_tokens=int(lengths.sum()), text=text)


def _padded(rows: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """Join rows of different lengths into one array, padded with zeros."""
    longest = max(len(row) for row in rows)
    return np.stack([np.pad(row, [(0, longest - len(row)), *([(0, 0)] * (row.ndim - 1))]) for row in rows])


def _sequences(options: ReferenceOptions, folder: Path) -> tuple[list[list[int]], str]:
    """Return token ids and a description of them. A model without a tokenizer gets seeded random ids."""
    if not has_tokenizer(folder):
        generator = np.random.default_rng(_RANDOM_SEED)
        lengths = [options.max_tokens, max(options.max_tokens * 2 // 3, 2), options.max_tokens]
        return [generator.integers(0, options.vocab_size, length).tolist() for length in lengths], "random token ids"
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    prompts = options.prompts or PROMPTS
    encoded: list[list[int]] = [tokenizer(prompt)["input_ids"][: options.max_tokens] for prompt in prompts]
    for prompt, sequence in zip(prompts, encoded, strict=True):
        if not sequence:
            raise SpecError(
                f"the tokenizer returns no tokens for the verification prompt {prompt[:40]!r}", "Remove or change the prompt."
            )
    return encoded, "text"
