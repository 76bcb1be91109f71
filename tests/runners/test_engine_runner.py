"""The ranks of a release as threads, by the rules of TensorRT and NCCL, against transformers' own generation."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from orchestrator.base.errors import DigestError, EngineRunError, MachineError, SpecError
from orchestrator.releases.manifest import MANIFEST, Manifest, parse_manifest
from orchestrator.releases.reference_numbers import REFERENCE, read_numbers
from orchestrator.runners import Sampling
from orchestrator.runners.tensorrt import EngineRunner, Libraries, calls
from orchestrator.runners.tensorrt.engine import RankEngine
from orchestrator.work.verify.inputs import Call
from tests.support import fake_nccl
from tests.support.engine_release import run_ranks
from tests.support.fake_nccl import FakeDevice
from tests.support.fake_tensorrt import FakeTensorRT

PROMPTS = [[5, 17, 99, 3, 42, 7, 11, 13, 120, 6, 8, 77, 30, 31, 29, 90, 12, 54, 101], [9, 4, 66], [23, 24, 25, 26, 27, 28, 18, 19]]
"""Prompts of 19, 3 and 8 tokens. At most 8 a call: the first takes three chunks, the others are padding in the last."""
NEW = 9
LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]


def expected(source: Path, prompt: list[int], count: int = NEW) -> list[int]:
    """Greedy tokens of transformers in float32."""
    model = transformers.LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
    ids = torch.tensor([prompt])
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return made[0, len(prompt) :].tolist()


def generated(runner: EngineRunner) -> list[list[int | None]]:
    """New tokens of each prompt."""
    return [list(row) for row in zip(*runner.generate(PROMPTS, NEW), strict=True)]


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_greedy_tokens_of_a_padded_batch_in_chunks_are_those_of_transformers(
    tp: int, pp: int, release: Callable[..., Path], tiny_llama: Path
) -> None:
    by_rank = run_ranks(release(tp, pp), tp, pp, generated)
    assert by_rank[0] == [expected(tiny_llama, prompt) for prompt in PROMPTS]
    assert all(found == by_rank[0] for found in by_rank)


@pytest.mark.parametrize("cache", ["INT8", "FP8"])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
def test_quantized_cache_swaps_its_buffers_and_gives_the_tokens_of_each_prompt_alone(
    cache: str, tp: int, pp: int, release: Callable[..., Path]
) -> None:
    folder = release(tp, pp, quantization={"kv_cache": cache})

    def alone(runner: EngineRunner) -> list[list[int | None]]:
        return [[row[0] for row in runner.generate([prompt], NEW)] for prompt in PROMPTS]

    together = run_ranks(folder, tp, pp, generated)[0]
    assert together == run_ranks(folder, tp, pp, alone)[0]
    assert together == run_ranks(release(1, 1, quantization={"kv_cache": cache}), 1, 1, generated)[0]


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_logits_of_the_verifications_calls_agree_with_the_releases_reference_numbers(
    tp: int, pp: int, release: Callable[..., Path]
) -> None:
    """Four texts in batches of three, up to 12 tokens in calls of eight, two logits a call, then the cache."""
    folder = release(tp, pp)
    numbers = read_numbers(folder / REFERENCE)
    by_rank = run_ranks(folder, tp, pp, lambda runner: runner.logits(numbers.calls()))
    agreement = numbers.check(numbers.rows_of(by_rank[tp * (pp - 1)]), "float32")
    assert agreement.num_positions == numbers.lengths.sum()
    assert agreement.max_relative_error < 1e-5
    assert all(part.size == 0 for rank, found in enumerate(by_rank) for part in found if rank != tp * (pp - 1))


def test_prompt_ends_with_a_stop_token_and_the_others_go_on(release: Callable[..., Path], tiny_llama: Path) -> None:
    wanted = [expected(tiny_llama, prompt) for prompt in PROMPTS]
    stop = wanted[1][2]
    (found,) = run_ranks(
        release(1, 1), 1, 1, lambda runner: [list(row) for row in zip(*runner.generate(PROMPTS, NEW, stop_ids=[stop]), strict=True)]
    )
    for row, whole in zip(found, wanted, strict=True):
        end = whole.index(stop) + 1 if stop in whole else NEW
        assert row == (whole[:end] + [None] * NEW)[: len(row)]
    assert None in found[1]


def test_sampling_gives_the_same_tokens_for_the_same_seed_on_every_layout(release: Callable[..., Path]) -> None:
    def sampled(seed: int) -> Callable[[EngineRunner], list[Any]]:
        return lambda runner: list(runner.generate(PROMPTS, NEW, sampling=Sampling(1.5, 0.9, seed)))

    first = run_ranks(release(1, 1), 1, 1, sampled(1))[0]
    assert run_ranks(release(2, 2), 2, 2, sampled(1)) == [first] * 4
    assert run_ranks(release(1, 1), 1, 1, sampled(2))[0] != first


@pytest.mark.parametrize(
    ("prompts", "count", "said"),
    [
        ([[1]] * 4, 1, "4 prompts at once"), ([], 1, "0 prompts at once"), ([[1], []], 1, r"prompts of \[1, 0\] tokens"),
        ([[1] * 40], 10, r"prompts of \[40\] tokens and 10 new ones"), ([[1]], 0, "0 new ones"),
        ([[1, 131]], 1, "no token id 131 below 131"),
    ],
)  # fmt: skip
def test_prompts_that_the_engines_cannot_hold_are_refused_before_a_call(
    prompts: list[list[int]], count: int, said: str, release: Callable[..., Path]
) -> None:
    with pytest.raises(SpecError, match=said):
        run_ranks(release(1, 1), 1, 1, lambda runner: runner.generate(prompts, count))


def test_text_may_fill_every_slot(release: Callable[..., Path], tiny_llama: Path) -> None:
    prompt = PROMPTS[0] + PROMPTS[2] + PROMPTS[0]
    assert len(prompt) == 46
    (found,) = run_ranks(release(1, 1), 1, 1, lambda runner: [row[0] for row in runner.generate([prompt], 3)])
    assert found == expected(tiny_llama, prompt, 3)


# Planted faults.


def test_communicator_that_is_refused_ends_the_rank(release: Callable[..., Path]) -> None:
    """TensorRT 11.0 would go on without its collectives, and compute wrong numbers."""

    def refuse(rank: int, libraries: Libraries) -> Libraries:
        return replace(libraries, trt=FakeTensorRT(libraries.device, refuse_communicator=True))  # type: ignore[arg-type]

    with pytest.raises(
        EngineRunError, match="refused the communicator of rank 0: The engine is not a multi-device engine"
    ) as caught:
        run_ranks(release(2, 1), 2, 1, generated, refuse)
    assert "11.2" in caught.value.advice


def test_cache_bound_to_other_memory_than_its_input_is_refused(
    release: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    allocate = RankEngine._allocate

    def wrong(engine: RankEngine) -> None:
        allocate(engine)
        engine._addresses["present_key_values.1.value"] = engine._addresses["present_key_values.0.value"]

    monkeypatch.setattr(RankEngine, "_allocate", wrong)
    with pytest.raises(EngineRunError, match=r"present_key_values\.1\.value and past_key_values\.1\.value must share memory"):
        run_ranks(release(1, 1), 1, 1, generated)


def test_quantized_cache_that_is_not_swapped_gives_other_tokens(
    release: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = release(1, 1, quantization={"kv_cache": "INT8"})
    right = run_ranks(folder, 1, 1, generated)[0]
    allocate = RankEngine._allocate

    def wrong(engine: RankEngine) -> None:
        allocate(engine)
        assert len(engine._swapped) == 8
        engine._swapped.clear()

    monkeypatch.setattr(RankEngine, "_allocate", wrong)
    assert run_ranks(folder, 1, 1, generated)[0] != right


def test_padding_written_over_a_prompts_tokens_gives_other_tokens(
    release: Callable[..., Path], tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sequence that has ended, in the chunk of a longer one, with the position 0 of usual padding."""
    chunks = calls.chunks

    def wrong(*given: Any) -> Any:
        for chunk in chunks(*given):
            write = np.where(chunk.lengths == 0, 0, chunk.call.write_indices)
            yield replace(chunk, call=Call(chunk.call.input_ids, chunk.call.position_ids, write))

    monkeypatch.setattr("orchestrator.runners.tensorrt.runner.chunks", wrong)
    found = run_ranks(release(1, 1), 1, 1, generated)[0]
    assert [row == expected(tiny_llama, prompt) for row, prompt in zip(found, PROMPTS, strict=True)] == [True, False, False]


@pytest.mark.parametrize(("tp", "pp", "lost"), [(2, 1, 1), (1, 2, 0), (2, 2, 3)])
def test_rank_that_dies_ends_the_others_after_their_time(
    tp: int, pp: int, lost: int, release: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = release(tp, pp)
    monkeypatch.setattr(fake_nccl, "SECONDS", 1.0)
    said: list[str] = []

    def run(runner: EngineRunner) -> None:
        try:
            for number, _ in enumerate(runner.generate(PROMPTS, NEW)):
                if runner._rank == lost and number == 2:
                    raise MemoryError("planted")
        except EngineRunError as error:
            said.append(error.message)
            raise

    begin = time.monotonic()
    with pytest.raises((EngineRunError, MemoryError)):
        run_ranks(folder, tp, pp, run)
    assert len(said) == tp * pp - 1
    assert all("another rank did not come" in message for message in said)
    assert time.monotonic() - begin < 10


def test_ranks_that_make_different_calls_are_stopped(release: Callable[..., Path]) -> None:
    def run(runner: EngineRunner) -> None:
        list(runner.generate(PROMPTS if runner._rank else PROMPTS[::-1][:2], NEW))

    with pytest.raises(EngineRunError, match="ranks differ: \\['all_reduce', 'all_reduce'\\]"):
        run_ranks(release(2, 1), 2, 1, run)


def changed_copy(folder: Path, target: Path, change: Callable[[Manifest], Manifest]) -> Path:
    """The pulled folder with another manifest, which agrees with itself."""
    shutil.copytree(folder, target)
    manifest = change(parse_manifest((folder / MANIFEST).read_bytes(), str(folder)))
    (target / MANIFEST).write_bytes(manifest.to_json())
    return target


def test_engine_of_another_rank_of_the_stage_is_told_by_its_digest(
    release: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its inputs, outputs and shapes are the same: nothing else would tell."""
    monkeypatch.setattr(fake_nccl, "SECONDS", 1.0)
    folder = changed_copy(release(2, 1), tmp_path / "copy", lambda manifest: manifest)
    shutil.copyfile(folder / "rank1.engine", folder / "rank0.engine")
    with pytest.raises(DigestError, match=r"rank0\.engine has sha256 .*, published was"):
        run_ranks(folder, 2, 1, generated)


def test_engine_of_another_stage_with_a_digest_that_fits_is_told_by_its_tensors(
    release: Callable[..., Path], tmp_path: Path
) -> None:
    def swap(manifest: Manifest) -> Manifest:
        first, second = manifest.ranks
        return manifest.model_copy(
            update={"ranks": (first.model_copy(update={"files": second.files}), second.model_copy(update={"files": first.files}))}
        )

    folder = changed_copy(release(1, 2), tmp_path / "copy", swap)
    with pytest.raises(
        EngineRunError, match="not the one that the manifest describes: hidden_states, hidden_states_out, input_ids"
    ):
        run_ranks(folder, 1, 2, generated)


def test_engine_of_other_limits_is_told_by_its_profiles(release: Callable[..., Path], tmp_path: Path) -> None:
    def grow(manifest: Manifest) -> Manifest:
        (record,) = manifest.ranks
        tensors = tuple(
            tensor.model_copy(update={"profiles": {name: {**shapes, "max": (4, 8)} for name, shapes in tensor.profiles.items()}})
            if tensor.name == "input_ids"
            else tensor
            for tensor in record.engine.tensors
        )
        engine = record.engine.model_copy(update={"tensors": tensors})
        return manifest.model_copy(update={"ranks": (record.model_copy(update={"engine": engine}),)})

    folder = changed_copy(release(1, 1), tmp_path / "copy", grow)
    with pytest.raises(EngineRunError, match="describes: input_ids in prefill, input_ids in decode"):
        run_ranks(folder, 1, 1, generated)


def test_other_tensorrt_than_the_engines_is_refused(release: Callable[..., Path]) -> None:
    def older(rank: int, libraries: Libraries) -> Libraries:
        return replace(libraries, trt=FakeTensorRT(libraries.device, __version__="1.0.0"))  # type: ignore[arg-type]

    with pytest.raises(MachineError, match=r"has tensorrt_rtx 1\.0\.0, the engine was built by 1\.7"):
        run_ranks(release(1, 1), 1, 1, generated, older)


def test_release_of_several_ranks_without_a_rendezvous_is_refused(release: Callable[..., Path]) -> None:
    device = FakeDevice()
    with pytest.raises(EngineRunError, match="several ranks"):
        EngineRunner(release(2, 1), 0, Libraries(FakeTensorRT(device), fake_nccl, device))


def test_missing_folder_rank_or_engine_is_named(release: Callable[..., Path], tmp_path: Path) -> None:
    device = FakeDevice()
    libraries = Libraries(FakeTensorRT(device), fake_nccl, device)
    with pytest.raises(EngineRunError, match="is no pulled release"):
        EngineRunner(tmp_path, 0, libraries)
    with pytest.raises(EngineRunError, match="tiny has no rank 1"):
        EngineRunner(release(1, 1), 1, libraries)
    folder = changed_copy(release(1, 1), tmp_path / "copy", lambda manifest: manifest)
    (folder / "rank0.engine").unlink()
    with pytest.raises(EngineRunError, match=r"rank0\.engine cannot be read"):
        EngineRunner(folder, 0, libraries)


def test_release_whose_ranks_return_parts_of_the_logits_is_refused(release: Callable[..., Path]) -> None:
    engine = {"max_batch_size": 3, "max_input_len": 8, "max_seq_len": 48, "gather_logits": False}
    with pytest.raises(EngineRunError, match="no rank has the logits of the whole vocabulary"):
        run_ranks(release(2, 1, engine=engine), 2, 1, generated)


def test_second_context_of_a_communicator_is_refused_by_the_rules_of_these_tests(release: Callable[..., Path]) -> None:
    def run(runner: EngineRunner) -> list[bool]:
        capsule = runner._communicators.capsule("stage0")
        other = runner._engine._engine.create_execution_context()
        return [other.set_communicator(capsule), runner._engine._context.set_communicator(capsule)]

    assert run_ranks(release(2, 1), 2, 1, run) == [[False, False]] * 2
