"""The engines' runner on real GPUs and NCCL, with TensorRT replaced by ONNX Runtime on the host. Not timed.

    python -m benchmarks.engine_runner_gpu --prepare FOLDER      # anywhere, with the extras build and dev
    python -m benchmarks.engine_runner_gpu FOLDER                # on two GPUs, with the extra gpu and onnxruntime

Memory, copies, streams, the ids' way, sends, broadcasts and the engines' own collectives are real. Proven are the greedy tokens of
transformers at tp=2 and at pp=2, and that a rank whose neighbour has died ends by its time limit.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.base.errors import EngineRunError
from orchestrator.releases.reference_numbers import REFERENCE, read_numbers
from orchestrator.runners.tensorrt import EngineRunner, FileRendezvous, Libraries
from orchestrator.runners.tensorrt.device import CudaDevice
from orchestrator.runners.tensorrt.runner import read_manifest
from tests.support.fake_tensorrt import Context, FakeTensorRT

Array = npt.NDArray[Any]
LAYOUTS = {"tp2": (2, 1), "pp2": (1, 2)}
PROMPTS = [[5, 17, 99, 3, 42, 7, 11, 13, 120, 6, 8, 77], [9, 4, 66], [23, 24, 25, 26, 27, 28, 18, 19]]
NEW = 9
_SECONDS, _LONGEST_SECONDS = 20.0, 60.0


def main() -> None:
    """Prepare the releases, or run them, or be one rank of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--meet", type=Path)
    parser.add_argument("--dies", action="store_true")
    options = parser.parse_args()
    if options.prepare:
        prepare(options.folder)
    elif options.rank is not None:
        faulthandler.dump_traceback_later(_LONGEST_SECONDS, exit=True)
        print(json.dumps(run_rank(options.folder, options.rank, options.meet, dies=options.dies)), flush=True)
        sys.stdout.flush()
        os._exit(0)  # a lost rank leaves NCCL nothing to wait for
    else:
        check(options.folder)


def prepare(folder: Path) -> None:
    """Publish and pull a tiny release for each layout, and write what transformers generates."""
    import torch
    import transformers

    from tests.support.engine_release import release_of
    from tests.support.tiny import write_tiny_llama

    source = write_tiny_llama(folder / "source")
    for name, (tp, pp) in LAYOUTS.items():
        pulled = release_of(source, folder / f"{name}-build", tp, pp)
        pulled.rename(folder / name)
    model = transformers.LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
    made = [
        model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
        for prompt in PROMPTS
    ]
    tokens = [row[0, len(prompt) :].tolist() for row, prompt in zip(made, PROMPTS, strict=True)]
    (folder / "expected.json").write_text(json.dumps(tokens))


class RealCommunicator:
    """The collectives of an engine by NCCL, on a communicator that came by its pointer."""

    def __init__(self, device: CudaDevice, pointer: int) -> None:
        import nccl.core

        self.user: Any = None
        self._device, self._sum = device, nccl.core.SUM
        self._joined = nccl.core.Communicator(pointer)

    def exchange(self, operation: str, detail: Any, array: Array) -> Array:
        """As fake_nccl.Communicator's."""
        import torch

        sent = torch.from_numpy(np.ascontiguousarray(array)).to(f"cuda:{self._joined.rank}")
        received = torch.empty((len(array) * (self._joined.nranks if operation == "all_gather" else 1), *array.shape[1:]))
        received = received.to(sent.device)
        torch.cuda.synchronize(sent.device)
        if operation == "all_gather":
            self._joined.allgather(sent, received, stream=self._device.stream)
        else:
            self._joined.allreduce(sent, received, self._sum, stream=self._device.stream)
        self._device.wait()
        result: Array = received.cpu().numpy()
        return result


class RealContext(Context):
    """A context whose collectives are NCCL's."""

    def communicator_at(self, pointer: int) -> RealCommunicator:  # type: ignore[override]
        return RealCommunicator(self._device, pointer)  # type: ignore[arg-type]


def run_rank(folder: Path, rank: int, meet: Path, *, dies: bool) -> dict[str, Any]:
    """Generate, and check the reference numbers, as one rank."""
    import nccl.core

    device = CudaDevice(rank, _SECONDS)
    version = read_manifest(folder).ranks[rank].engine.tensorrt_version
    libraries = Libraries(FakeTensorRT(device, RealContext, __version__=version), nccl.core, device)
    begin = time.monotonic()
    try:
        with EngineRunner(folder, rank, libraries, FileRendezvous(meet)) as runner:
            steps = []
            for number, step in enumerate(runner.generate(PROMPTS, NEW)):
                if dies and rank == 1 and number == 3:
                    os._exit(9)
                steps.append(step)
            numbers = read_numbers(folder / REFERENCE)
            results = runner.logits(numbers.calls())
            agreement = numbers.check(numbers.rows_of(results), "float32") if runner.is_sampling else None
    except EngineRunError as error:
        return {"error": error.message, "seconds": round(time.monotonic() - begin, 1)}
    said = None if agreement is None else (agreement.num_positions, agreement.max_relative_error)
    return {"tokens": [list(row) for row in zip(*steps, strict=True)], "agreement": said}


def check(folder: Path) -> None:
    """Run both layouts on two GPUs, then one with a rank that dies."""
    expected = json.loads((folder / "expected.json").read_text())
    for name in LAYOUTS:
        first, second = _ranks(folder / name)
        assert first["tokens"] == second["tokens"] == expected, (first, second, expected)
        agreement = first["agreement"] or second["agreement"]
        print(f"{name}: {sum(map(len, expected))} greedy tokens equal; positions, error: {agreement}")
    alone, _ = _ranks(folder / "tp2", "--dies")
    assert "did not finish within" in alone["error"], alone
    print(f"tp2, rank 1 killed: rank 0 ended after {alone['seconds']} s: {alone['error']}")


def _ranks(folder: Path, *more: str) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as meet:
        start = partial(subprocess.Popen, stdout=subprocess.PIPE, text=True)
        base = [sys.executable, "-m", "benchmarks.engine_runner_gpu", str(folder), "--meet", meet]
        ranks = [start([*base, "--rank", str(rank), *more]) for rank in range(2)]
        said = [rank.communicate(timeout=200)[0].splitlines() for rank in ranks]
        return [json.loads(lines[-1]) if lines else {} for lines in said]


if __name__ == "__main__":
    main()
