"""The two ways to start the engines' ranks, as real processes on the fakes: torchrun, and Ray actors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.releases.manifest import Manifest
from orchestrator.runners.tensorrt.__main__ import main
from tests.runners.test_engine_runner import PROMPTS, changed_copy, expected
from tests.support.fake_rank import open_fakes
from tests.support.fake_tensorrt import spoilt

ROOT = Path(__file__).resolve().parents[2]
TOKENS = [word for prompt in PROMPTS for word in ("--tokens", ",".join(map(str, prompt)))]
WEIGHT = "transformer.layers.2.mlp.proj.weight"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}


def lines(source: Path, count: int) -> list[str]:
    return [",".join(map(str, expected(source, prompt, count))) for prompt in PROMPTS]


def test_torchrun_starts_every_rank_which_check_themselves_and_generate(release: Callable[..., Path], tiny_llama: Path) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tests.support.fake_rank",
        str(release(2, 1)), *TOKENS, "--max-new-tokens", "4", "--check",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    checked, *generated = done.stdout.splitlines()
    assert checked.startswith("check passed: Agreement(num_positions=")
    assert generated == lines(tiny_llama, 4)


def test_process_alone_needs_no_launcher(
    release: Callable[..., Path], tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(release(1, 1)), *TOKENS, "--max-new-tokens", "3"], open_fakes) == 0
    assert capsys.readouterr().out.splitlines() == lines(tiny_llama, 3)


def test_ranks_started_by_hand_meet_in_a_folder(release: Callable[..., Path], tiny_llama: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.support.fake_rank", str(release(1, 2)), *TOKENS, "--max-new-tokens", "3"]
    ranks = [
        subprocess.Popen(
            [*command, "--rendezvous", str(tmp_path)],
            env={**ENVIRONMENT, "RANK": str(rank), "WORLD_SIZE": "2"}, cwd=ROOT, stdout=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert said == ["\n".join(lines(tiny_llama, 3)) + "\n", ""]


def test_wrong_number_of_processes_is_said(release: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(release(2, 1))], open_fakes) == 47
    assert capsys.readouterr().err == "error: 1 processes for 2 ranks\nStart one process for each rank.\n"


def test_check_of_engines_that_compute_another_model_fails(
    release: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The numbers of the release are right, the engine's weights are not, and the manifest vouches for both."""

    def vouch(manifest: Manifest) -> Manifest:
        (record,) = manifest.ranks
        files = tuple(file.model_copy(update={"sha256": digest}) for file in record.files)
        return manifest.model_copy(update={"ranks": (record.model_copy(update={"files": files}),)})

    digest = spoilt(changed_copy(release(1, 1), tmp_path / "spoilt", lambda manifest: manifest) / "rank0.engine", WEIGHT)
    folder = changed_copy(tmp_path / "spoilt", tmp_path / "vouched", vouch)
    assert main([str(folder), "--check"], open_fakes) == 24
    assert "the engines differ from the reference" in capsys.readouterr().err


_RAY = """
import json, sys
from pathlib import Path
import ray
from actors.engine_ranks import RayEngineRunner
from orchestrator.base.errors import EngineRunError, MachineError, SpecError
from orchestrator.releases.reference_numbers import REFERENCE, read_numbers
from tests.support.fake_rank import open_fakes, open_fakes_or_die

folder, prompts = Path(sys.argv[1]), json.loads(sys.argv[2])
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR", object_store_memory=10**8)
said = {}
with RayEngineRunner(folder, gpus_per_rank=0, open_rank=open_fakes) as runner:
    said["tokens"] = [list(row) for row in zip(*runner.generate(prompts, 4), strict=True)]
    numbers = read_numbers(folder / REFERENCE)
    said["error"] = numbers.check(numbers.rows_of(runner.logits(numbers.calls())), "float32").max_relative_error
    try:
        list(runner.generate([[1, 999]], 4))
    except SpecError as error:
        said["refused"] = error.message
    said["again"] = [row[0] for row in runner.generate(prompts[:1], 2)]
try:
    RayEngineRunner(folder.parent / "new", url=sys.argv[3], gpus_per_rank=0, open_rank=open_fakes)
except MachineError as error:
    said["machine"] = error.message
try:
    with RayEngineRunner(folder, gpus_per_rank=0, open_rank=open_fakes_or_die) as runner:
        list(runner.generate(prompts, 4))
except EngineRunError as error:
    said["lost"] = error.message[:80]
print(json.dumps(said))
"""


@pytest.mark.slow
def test_ray_actors_run_the_ranks_and_a_lost_one_ends_them_all(
    release: Callable[..., Path], tiny_llama: Path, tmp_path: Path
) -> None:
    folder = release(2, 1)
    url = (folder.parent / "store" / "releases" / "tiny" / "1").as_uri()
    done = subprocess.run(
        [sys.executable, "-c", _RAY, str(folder), json.dumps(PROMPTS), url],
        capture_output=True, text=True, env={**ENVIRONMENT, "DYING": str(tmp_path / "dying")}, cwd=ROOT, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert said["tokens"] == [expected(tiny_llama, prompt, 4) for prompt in PROMPTS]
    assert said["error"] < 1e-5
    assert said["refused"] == "there is no token id 999 below 131"
    assert said["again"] == expected(tiny_llama, PROMPTS[0], 2)
    assert said["machine"] == "this machine cannot run tiny 1: it has no NVIDIA GPU, or no driver for it"
    assert "was lost" in said["lost"]
