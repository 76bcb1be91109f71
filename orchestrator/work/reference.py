"""What the source model itself says: transformers in float32 on the verification text.

Weights are first rounded to the build's dtype, so that a comparison measures conversion and graph, not the dtype. Nothing
here depends on a topology: one reference serves every build of a source.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.checkpoints.places import LocalPlace, Place, open_place
from orchestrator.core.checkpoint import SourceFile
from orchestrator.core.digest import digest_bytes
from orchestrator.core.errors import SourceCorruptError, SpecError, ToolError
from orchestrator.core.options import ReferenceOptions
from orchestrator.core.step import Task
from orchestrator.work.calibration_data import has_tokenizer
from orchestrator.work.context import Context
from orchestrator.work.presenting import as_hugging_face
from orchestrator.work.texts import PROMPTS

OUTPUT = "reference.safetensors"
"""tokens int64 [B, T] padded with 0, lengths int64 [B], logits float32 [B, T, vocabulary].

source_logits [B, T, vocabulary], where rounding to the build's dtype changes a weight: those of the source as it is.
"""
_RANDOM_SEED = 20
_INDEX_SUFFIX = ".index.json"
_COPY_BLOCK_BYTES = 64 * 2**20


def reference(task: Task, context: Context) -> dict[str, Any]:
    """Write the reference logits. Facts: how many sequences and tokens, and whether the text was real."""
    import safetensors.numpy
    import transformers

    options = ReferenceOptions.model_validate(task.step.options)
    folder = as_hugging_face(local_source(task.step.places["source"], options.files, context), options.format, context)
    context.tools["transformers"] = transformers.__version__
    sequences, text = _sequences(options, folder)
    context.log(f"reference: {len(sequences)} sequences of {text}, {[len(sequence) for sequence in sequences]} tokens")
    logits, own = _logits(options, folder, sequences, context)
    lengths = np.array([len(sequence) for sequence in sequences], np.int64)
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
    return {"num_sequences": len(sequences), "num_tokens": int(lengths.sum()), "text": text}


def _padded(rows: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """Rows of different lengths as one array, zeros behind each."""
    longest = max(len(row) for row in rows)
    return np.stack([np.pad(row, [(0, longest - len(row)), *([(0, 0)] * (row.ndim - 1))]) for row in rows])


def local_source(source: str, files: tuple[SourceFile, ...], context: Context) -> Path:
    """The source as a folder of this machine, as transformers needs it; a source at a URL is first copied to scratch.

    Each copy is checked to be the file that the plan was made from. Raises SourceMissingError, SourceCorruptError, StoreError.
    """
    place = open_place(source)
    if isinstance(place, LocalPlace):
        return place.folder
    folder = context.scratch / "source"
    folder.mkdir()
    context.log(f"reference: copies {len(files)} files, {sum(file.num_bytes for file in files):,} bytes, from {source} to scratch")
    for name in place.names():
        if name.endswith(_INDEX_SUFFIX) and "/" not in name:
            (folder / name).write_bytes(place.read(name))
    for file in files:
        _copy(place, file, folder / file.name, context)
    return folder


def _copy(place: Place, file: SourceFile, target: Path, context: Context) -> None:
    """One file, in blocks. The plan knows config and tokenizer by their content, weights by what the place says of them."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if file.identity.startswith("sha256:"):
        data = place.read(file.name)
        if file.identity != "sha256:" + digest_bytes(data):
            raise SourceCorruptError(f"{file.name} of the source was changed during the build", "Run the build again.")
        target.write_bytes(data)
        return
    buffer = memoryview(bytearray(min(_COPY_BLOCK_BYTES, file.num_bytes)))
    with place.open((file,)) as source, target.open("wb") as output:
        for begin in range(0, file.num_bytes, _COPY_BLOCK_BYTES):
            block = buffer[: min(_COPY_BLOCK_BYTES, file.num_bytes - begin)]
            source.read_into(0, begin, block)
            output.write(block)
            context.report("copy", begin + len(block), file.num_bytes, "bytes")


def _sequences(options: ReferenceOptions, folder: Path) -> tuple[list[list[int]], str]:
    """Token ids, and what they are. A model without a tokenizer gets seeded random ids."""
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
                f"the tokenizer makes no token of the verification prompt {prompt[:40]!r}", "Remove or change the prompt."
            )
    return encoded, "text"


Logits = list[npt.NDArray[np.float32]]


def _logits(options: ReferenceOptions, folder: Path, sequences: list[list[int]], context: Context) -> tuple[Logits, Logits | None]:
    """[T, vocabulary] for each sequence: of the weights rounded to the build's dtype, and of the source's own where they differ."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, attn_implementation="eager"
    ).eval()
    own = _run(model, options, sequences, context)
    if not _round_weights(model, getattr(torch, options.dtype), options.exact_weights):
        return own, None
    return _run(model, options, sequences, context), own


def _run(model: Any, options: ReferenceOptions, sequences: list[list[int]], context: Context) -> Logits:
    """One sequence at a time: no padding can disturb the reference."""
    import torch

    found = []
    with torch.inference_mode():
        for number, sequence in enumerate(sequences):
            _forget_length(model)
            found.append(_logits_of(model, torch.tensor([sequence]), options.decode_steps))
            context.report("reference", number + 1, len(sequences), "steps")
    return found


def _logits_of(model: Any, tokens: Any, decode_steps: int | None) -> npt.NDArray[np.float32]:
    """[T, vocabulary] of tokens [1, T], in one call, or in the calls of the verification through transformers' cache."""
    if decode_steps is None:
        calls = [tokens]
    else:
        prefill = max(tokens.shape[1] - decode_steps, 1)
        calls = [tokens[:, :prefill], *tokens[:, prefill:].split(1, dim=1)]
    cache, logits = None, []
    for call in calls:
        output = model(call, past_key_values=cache, use_cache=decode_steps is not None)
        cache = output.past_key_values
        logits.append(output.logits[0].float().numpy())
    return np.concatenate(logits)


def _forget_length(model: Any) -> None:
    """Undo what dynamic rotary scaling keeps of a longer sequence before (transformers 5): each sequence is a text of its own."""
    for module in model.modules():
        if hasattr(module, "max_seq_len_cached") and hasattr(module, "original_inv_freq"):
            module.max_seq_len_cached = module.original_max_seq_len
            module.inv_freq = module.original_inv_freq


_RENAMED = {".block_sparse_moe.gate.": ".mlp.gate."}
"""Part of a source tensor's name -> what transformers 5 calls it in its models (its `conversion_mapping`)."""


def _round_weights(model: Any, dtype: Any, exact: Iterable[str]) -> bool:
    """Round every weight that the rank files hold in the build's dtype. Returns whether any has changed.

    Raises ToolError for a name of `exact` that the model does not have: it would be rounded all the same.
    """
    import torch

    kept = {functools.reduce(lambda name, pair: name.replace(*pair), _RENAMED.items(), name) for name in exact}
    parameters = dict(model.named_parameters())
    if missing := sorted(kept - parameters.keys()):
        raise ToolError(f"this version of transformers has no parameter {missing[0]} ({len(missing)} missing in all)")
    changed = False
    with torch.no_grad():
        for name, parameter in parameters.items():
            if name not in kept:
                rounded = parameter.to(dtype).float()
                changed = changed or not torch.equal(rounded, parameter)
                parameter.copy_(rounded)
    return changed
