"""Greedy tokens and tokens per second of the portable part in ONNX Runtime GenAI, against transformers' `generate`.

    python -m benchmarks.portable [--model DIR] [--folder DIR] [--tokens 64] [--prompts 8] [--family WORD] [--record]

Every family of the suite on tiny models at every topology; then the model in `--model` at tp and pp, on prompts in its chat
template, with the speed of both on this CPU. Both run alternately in one process, in float32, with as many threads.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.recording import record
from orchestrator.base.errors import OrchestratorError
from orchestrator.planning import preparation
from orchestrator.planning.plan import Plan
from orchestrator.runners.genai import GenaiBackend
from orchestrator.runners.tokenizer import Tokenizer
from orchestrator.spec.build import BuildSpec
from orchestrator.spec.decoding import decode
from tests.support.families import TINY, write_tiny
from tests.support.portable import expected_tokens, greedy, portable_folder, random_prompts

TOPOLOGIES: dict[str, dict[str, int]] = {"1x1": {}, "tp2": {"tp": 2}, "pp2": {"pp": 2}, "tp2 pp2": {"tp": 2, "pp": 2}}
MODEL_TOPOLOGIES: dict[str, dict[str, int]] = {"1x1": {}, "tp3": {"tp": 3}, "pp2": {"pp": 2}, "tp3 pp2": {"tp": 3, "pp": 2}}
POSITIONS = 96
QUESTIONS = (
    "What is the capital of France?", "Write one sentence about the sea.", "Name three colours.", "What is 12 times 12?",
    "Explain gravity to a child.", "Who wrote Hamlet?", "Give a synonym of quick.", "What do bees make, and why?",
)  # fmt: skip


def plan(source: Path, topology: dict[str, int], positions: int) -> Plan:
    """The plan of a build with a portable part, in float32."""
    plain = {
        "source": {"path": str(source.resolve())}, "dtype": "float32", "topology": topology,
        "release": {"name": "none", "version": "0", "include": ["engines", "portable"]},
        "engine": {"max_batch_size": 1, "max_input_len": 16, "max_seq_len": positions},
        "verification": {"max_tokens": 12, "decode_steps": 3},
    }  # fmt: skip
    return preparation.plan(decode(BuildSpec, plain, "benchmark"))


def laid_out(source: Path, topology: dict[str, int], folder: Path, positions: int) -> Path:
    """Make the portable part in a fresh folder, and return it."""
    target = folder / "model"
    shutil.rmtree(target, ignore_errors=True)
    portable_folder(plan(source, topology, positions), (folder / "store").resolve(), target)
    return target


def refusal(source: Path) -> str | None:
    """Why a plan refuses a portable part; None: it does not."""
    try:
        plan(source, {}, POSITIONS)
    except OrchestratorError as error:
        return error.message
    return None


def families(folder: Path, num_tokens: int, num_prompts: int, word: str = "", *, recording: bool = False) -> Table:
    """Compare the greedy tokens of every tiny family whose name holds `word`, at every topology."""
    table = Table(
        "family", *TOPOLOGIES, box=None, title=f"prompts of {num_prompts} with the same {num_tokens} tokens as transformers"
    )
    for family in (name for name in TINY if word in name):
        source = folder / family
        if not (source / "config.json").is_file():
            changes: dict[str, Any] = {"original_max_position_embeddings": POSITIONS} if family in ("phi3", "phimoe") else {}
            write_tiny(family, source, dtype="float32", max_position_embeddings=POSITIONS, **changes)
        if (why := refusal(source)) is not None:
            table.add_row(family, why)
            if recording:
                record(family, portable="refused")
            continue
        prompts = random_prompts(num_prompts, 131)
        expected = expected_tokens(source, prompts, num_tokens)
        cells = []
        for topology in TOPOLOGIES.values():
            found = greedy(laid_out(source, topology, folder, POSITIONS), prompts, num_tokens)
            cells.append(str(sum(mine == theirs for mine, theirs in zip(found, expected, strict=True))))
        table.add_row(family, *cells)
        if recording:
            record(family, portable=f"{min(map(int, cells))} of {num_prompts}")
    return table


def real(source: Path, folder: Path, num_tokens: int, num_prompts: int) -> Table:
    """Compare tokens and speed of a real model."""
    import torch
    import transformers

    threads = os.cpu_count() or 1
    torch.set_num_threads(threads)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokenizer = Tokenizer(source)
    prompts = [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in QUESTIONS[:num_prompts]]
    table = Table(source.name, "same tokens", "tokens/s: GenAI", "transformers", "ratio", box=None)
    for name, topology in MODEL_TOPOLOGIES.items():
        backend = GenaiBackend(laid_out(source, topology, folder, 512), 512)
        same, rates = 0, []
        for prompt in prompts:
            began = time.perf_counter()
            mine = list(backend.stream(prompt, num_tokens))
            between = time.perf_counter()
            made = loaded.generate(torch.tensor([prompt]), max_new_tokens=num_tokens, do_sample=False)
            ended = time.perf_counter()
            theirs = made[0, len(prompt) :].tolist()
            same += mine == theirs
            rates.append((len(mine) / (between - began), len(theirs) / (ended - between)))
        ours, other = (statistics.median(column) for column in zip(*rates, strict=True))
        table.add_row(name, f"{same} of {len(prompts)}", f"{ours:.1f}", f"{other:.1f}", f"{ours / other:.2f}")
    return table


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path(".cache/smollm2-135m-instruct"))
    parser.add_argument("--folder", type=Path, default=Path(".cache/portable"))
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=len(QUESTIONS))
    parser.add_argument("--only", choices=["families", "model"])
    parser.add_argument("--family", default="", help="Families whose name holds this word.")
    parser.add_argument("--record", action="store_true", help="Write the results of families to docs/models.json.")
    arguments = parser.parse_args()
    console = Console(width=140)
    if arguments.only != "model":
        table = families(arguments.folder, arguments.tokens, arguments.prompts, arguments.family, recording=arguments.record)
        console.print(table)
    if arguments.only != "families":
        console.print(real(arguments.model, arguments.folder / "real", arguments.tokens, arguments.prompts))


if __name__ == "__main__":
    main()
