"""What the source model itself says: transformers in float32 on the verification text.

Weights are first rounded to the build's dtype, so that a comparison measures conversion and graph, not the dtype. Nothing
here depends on a topology: one reference serves every build of a source.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.checkpoints.places import LocalPlace, Place, open_place
from orchestrator.core.checkpoint import SourceFile
from orchestrator.core.digest import digest_bytes
from orchestrator.core.errors import SourceCorruptError
from orchestrator.core.options import ReferenceOptions
from orchestrator.core.step import Task
from orchestrator.work.calibration_data import has_tokenizer
from orchestrator.work.context import Context
from orchestrator.work.presenting import as_hugging_face
from orchestrator.work.texts import PROMPTS

OUTPUT = "reference.safetensors"
"""tokens int64 [B, T] padded with 0, lengths int64 [B], logits float32 [B, T, vocabulary]."""
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
    logits = _logits(options, folder, sequences, context)
    longest = max(len(sequence) for sequence in sequences)
    tokens = np.zeros((len(sequences), longest), np.int64)
    padded = np.zeros((len(sequences), longest, options.vocab_size), np.float32)
    for row, (sequence, values) in enumerate(zip(sequences, logits, strict=True)):
        tokens[row, : len(sequence)] = sequence
        padded[row, : len(sequence)] = values
    lengths = np.array([len(sequence) for sequence in sequences], np.int64)
    data = safetensors.numpy.save({"tokens": tokens, "lengths": lengths, "logits": padded})
    with context.output(OUTPUT, len(data)) as writer:
        writer.write(data)
    return {"num_sequences": len(sequences), "num_tokens": int(lengths.sum()), "text": text}


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
    return [sequence for sequence in encoded if len(sequence) > 1], "text"


def _logits(options: ReferenceOptions, folder: Path, sequences: list[list[int]], context: Context) -> list[npt.NDArray[np.float32]]:
    """[T, vocabulary] for each sequence, one at a time: no padding can disturb the reference."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, attn_implementation="eager"
    ).eval()
    _round_weights(model, getattr(torch, options.dtype), set(options.offset_weights))
    found = []
    with torch.inference_mode():
        for number, sequence in enumerate(sequences):
            output = model(torch.tensor([sequence]), use_cache=False)
            found.append(output.logits[0].float().numpy())
            context.report("reference", number + 1, len(sequences), "steps")
    return found


def _round_weights(model: Any, dtype: Any, offset: set[str]) -> None:
    """Round every weight as the checkpoint stores it: norms kept as weight + 1 are rounded with the 1."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            add = 1.0 if name in offset else 0.0
            parameter.copy_((parameter + add).to(dtype).float() - add)
