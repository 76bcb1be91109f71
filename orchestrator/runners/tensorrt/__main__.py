"""Generate with a pulled release: one process per rank, started by torchrun, or by hand with RANK, LOCAL_RANK and WORLD_SIZE set.

    torchrun --nproc-per-node 4 -m orchestrator.runners.tensorrt engines --prompt "The capital of France is"
    mpiexec -n 4 sh -c 'RANK=$PMI_RANK LOCAL_RANK=$MPI_LOCALRANKID WORLD_SIZE=4 exec "$@"' - \\
        python -m orchestrator.runners.tensorrt engines --tokens 1,450,7483 --rendezvous /shared/run-17
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from orchestrator.base.errors import EngineRunError, OrchestratorError
from orchestrator.releases.reference_numbers import REFERENCE, arithmetic_of, read_numbers
from orchestrator.runners import Sampling
from orchestrator.runners.tensorrt import EngineRunner, FileRendezvous, Libraries, StoreRendezvous, open_libraries
from orchestrator.runners.tensorrt.runner import read_manifest
from orchestrator.runners.tokenizer import Tokenizer

_ENVIRONMENT = (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))


def main(arguments: Sequence[str] | None = None, open_rank: Callable[..., Libraries] = open_libraries) -> int:
    """Run this process's rank; rank 0 prints a line for each prompt. Returns the exit code."""
    options = _options().parse_args(arguments)
    try:
        return _run(options, open_rank)
    except OrchestratorError as error:
        print(f"error: {error.message}\n{error.advice}", file=sys.stderr)
        return error.exit_code


def _run(options: argparse.Namespace, open_rank: Callable[..., Libraries]) -> int:
    rank, local_rank, num_ranks = (int(os.environ.get(name, default)) for name, default in _ENVIRONMENT)
    manifest = read_manifest(options.folder)
    if num_ranks != len(manifest.ranks):
        raise EngineRunError(f"{num_ranks} processes for {len(manifest.ranks)} ranks", "Start one process for each rank.")
    prompts = [[int(token) for token in text.split(",")] for text in options.tokens]
    tokenizer = Tokenizer(options.folder / "tokenizer") if options.prompt else None
    if tokenizer is not None:
        prompts += [tokenizer.encode(text) for text in options.prompt]
    libraries = open_rank(manifest.rank(rank).engine, local_rank, alone=num_ranks == 1)
    rendezvous = None if num_ranks == 1 else FileRendezvous(options.rendezvous) if options.rendezvous else StoreRendezvous()
    with EngineRunner(options.folder, rank, libraries, rendezvous) as runner:
        if options.check:
            numbers = read_numbers(options.folder / REFERENCE)
            results = runner.logits(numbers.calls())
            if runner.is_sampling:
                print(f"check passed: {numbers.check(numbers.rows_of(results), arithmetic_of(manifest))}", flush=True)
        sampling = Sampling(options.temperature, options.top_p, options.seed)
        steps = list(runner.generate(prompts, options.max_new_tokens, sampling=sampling, stop_ids=options.stop)) if prompts else []
    for row in zip(*steps, strict=True) if rank == 0 else ():
        tokens = [token for token in row if token is not None]
        print("".join(tokenizer.decode(tokens)) if tokenizer is not None else ",".join(map(str, tokens)), flush=True)
    return 0


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m orchestrator.runners.tensorrt", description="Generate with a pulled release.")
    parser.add_argument("folder", type=Path, help="folder that `orchestrator pull` wrote, on this machine")
    parser.add_argument("--prompt", action="append", default=[], help="a text; may be repeated up to the engines' batch size")
    parser.add_argument("--tokens", action="append", default=[], help="a prompt as token ids, such as 1,450,7483")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--stop", action="append", type=int, default=[], help="token id that ends a text; may be repeated")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the most probable token")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", action="store_true", help="compare with the reference numbers of the release first")
    parser.add_argument("--rendezvous", type=Path, help="new folder that all ranks see; default: torchrun's store")
    return parser


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # NCCL and CUDA would wait for a rank that was lost
