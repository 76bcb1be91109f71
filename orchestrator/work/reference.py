"""What the source model itself says: transformers in float32 on the verification text.

Weights are first rounded to the build's dtype, so that a comparison measures conversion and graph, not the dtype. Nothing
here depends on a topology: one reference serves every build of a source.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.core.options import ReferenceOptions
from orchestrator.core.step import Task
from orchestrator.work.context import Context
from orchestrator.work.texts import PROMPTS

OUTPUT = "reference.safetensors"
"""tokens int64 [B, T] padded with 0, lengths int64 [B], logits float32 [B, T, vocabulary]."""
_RANDOM_SEED = 20
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def reference(task: Task, context: Context) -> dict[str, Any]:
    """Write the reference logits. Facts: how many sequences and tokens, and whether the text was real."""
    import safetensors.numpy
    import transformers

    options = ReferenceOptions.model_validate(task.step.options)
    folder = Path(task.step.places["source"])
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


def _sequences(options: ReferenceOptions, folder: Path) -> tuple[list[list[int]], str]:
    """Token ids, and what they are. A model without a tokenizer gets seeded random ids."""
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
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
        folder, dtype=getattr(torch, options.dtype), local_files_only=True, attn_implementation="eager"
    )
    model = model.float().eval()
    found = []
    with torch.inference_mode():
        for number, sequence in enumerate(sequences):
            output = model(torch.tensor([sequence]), use_cache=False)
            found.append(output.logits[0].float().numpy())
            context.report("reference", number + 1, len(sequences), "steps")
    return found
