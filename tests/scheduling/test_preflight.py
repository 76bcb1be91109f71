"""What is known to be wrong before the first step: sources, dtypes, disks, memory; and how warnings are shown."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import ml_dtypes
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import save_file
from typer.testing import CliRunner

from orchestrator import building, stages
from orchestrator.base.errors import ClusterError, LfsPointerError, QuantizationError, StoreError, TopologyError
from orchestrator.checkpoints import read_source
from orchestrator.cli.commands import app
from orchestrator.compat.models import DecoderModelForCausalLM
from orchestrator.compat.models import build as build_in_process
from orchestrator.events import Planned, encode_line
from orchestrator.planning import preparation
from orchestrator.planning.steps import Kind
from orchestrator.report import LiveView
from orchestrator.scheduling import cluster, preflight
from orchestrator.spec.cluster import ClusterSpec, PoolSpec
from orchestrator.stores import open_store
from tests.support.meta import write_bin, write_meta
from tests.support.synthetic import build_spec, encode_safetensors, model_config, random_arrays, write_source

CONFIG = model_config()
ARRAYS = random_arrays(CONFIG)
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source", CONFIG, ARRAYS, num_files=3)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


QUANTIZED: dict[str, tuple[dict[str, Any], str, str]] = {
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes: weights", "dequantize()"),
    "bitsandbytes-old": ({"load_in_8bit": True}, r"\(bitsandbytes\)", "dequantize()"),
    "another": ({"quant_method": "sinq"}, r"\(sinq\): an unknown method", "unquantized checkpoint"),
    "modelopt-of-4-and-8-bits": ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "quant_algo is 'W4A8_AWQ'", "unquantized"),
    "modelopt-old": ({"quant_algo": "INT3"}, "quant_algo is 'INT3'; read are FP8", "unquantized checkpoint"),
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_source_of_a_quantization_that_is_not_read_is_named_with_advice(source: Path, name: str) -> None:
    found, words, advice = QUANTIZED[name]
    change_config(source, quantization_config=found)
    with pytest.raises(QuantizationError, match=words) as caught:
        preparation.plan(build_spec(source))
    assert advice in caught.value.advice


@pytest.mark.parametrize("mark", ["quantize_config.json", "quant_config.json"])
def test_source_that_a_file_beside_calls_quantized_but_is_not_is_warned_of(source: Path, mark: str) -> None:
    (source / mark).write_text("{}")
    assert any("no tensor is quantized" in warning for warning in preparation.plan(build_spec(source)).warnings)


def test_compression_config_of_older_llm_compressor_is_decoded(source: Path) -> None:
    change_config(source, compression_config={"quant_method": "compressed-tensors"})
    with pytest.raises(QuantizationError, match="compression_config: config_groups is missing"):
        preparation.plan(build_spec(source))


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_source_of_float8_without_a_word_in_its_config_is_called_quantized(tmp_path: Path, dtype: str) -> None:
    folder = write_source(tmp_path / "source", CONFIG, ARRAYS)
    tensors = {name: array.astype(ml_dtypes.float8_e4m3fn) for name, array in ARRAYS.items()}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(QuantizationError, match="F8_E4M3: it is quantized"):
        preparation.plan(build_spec(folder, dtype=dtype))


def test_source_of_one_weight_set_has_no_warnings(source: Path) -> None:
    (source / "tokenizer.json").write_text("{}")
    (source / "training_args.bin").write_bytes(b"x")
    (source / ".cache").mkdir()
    (source / ".cache" / "part.safetensors").write_bytes(b"x")
    assert read_source(str(source))[0].warnings == ()


def test_second_weight_sets_are_named_as_passed_over(source: Path) -> None:
    (source / "original").mkdir()
    for name in ("consolidated.safetensors", "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin",
                 "original/consolidated.00.pth", "original/consolidated.01.pth"):  # fmt: skip
        (source / name).write_bytes(b"never opened")
    (said,) = preparation.plan(build_spec(source)).inputs.index.warnings
    assert "not read: consolidated.safetensors, original/consolidated.*.pth (2 files), pytorch_model-*-of-*.bin (2 files)." in said
    assert "reads model-*-of-*.safetensors (3 files) (source.format huggingface)" in said


def test_forced_format_names_the_safetensors_that_it_passes_over(source: Path) -> None:
    write_bin(source, CONFIG, ARRAYS)
    (said,) = read_source(str(source), "bin")[0].warnings
    assert "not read: model-*-of-*.safetensors (3 files). The build reads pytorch_model.bin" in said


def test_tokenizer_that_is_a_git_lfs_pointer_is_refused(source: Path) -> None:
    (source / "tokenizer.json").write_text(POINTER)
    with pytest.raises(LfsPointerError, match=r"tokenizer\.json is a Git-LFS pointer"):
        preparation.plan(build_spec(source))


def test_embedding_split_by_a_hidden_size_that_does_not_divide_names_the_legal_tp(tmp_path: Path) -> None:
    config = model_config(hidden_size=18)
    folder = write_source(tmp_path / "source", config, random_arrays(config))
    plain = json.loads((folder / "config.json").read_text())
    # Llama's hidden size is a multiple of the heads, and so of every legal tp; Mistral's need not be.
    plain |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    (folder / "config.json").write_text(json.dumps(plain))
    conversion = {"use_parallel_embedding": True, "embedding_sharding_dim": 1}
    with pytest.raises(TopologyError, match="tp=4 does not divide hidden_size 18") as caught:
        preparation.plan(build_spec(folder, topology={"tp": 4}, conversion=conversion))
    assert "tp in {1, 2}" in caught.value.advice


# Places


Usage = namedtuple("Usage", "total used free")


def small_disk(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, free))


def test_convert_onto_a_disk_that_is_too_small_is_refused_before_any_step(
    monkeypatch: pytest.MonkeyPatch, source: Path, tmp_path: Path
) -> None:
    small_disk(monkeypatch, 1000)
    with pytest.raises(StoreError, match="1,000 bytes free, the steps write about 1"):
        stages.convert(build_spec(source), tmp_path / "output")
    assert not list((tmp_path / "output").rglob("*.safetensors"))


def test_build_onto_a_disk_that_is_too_small_is_refused_before_the_cluster_opens(
    monkeypatch: pytest.MonkeyPatch, source: Path, tmp_path: Path
) -> None:
    small_disk(monkeypatch, 1000)
    with pytest.raises(StoreError, match="the steps write about"):
        building.build(build_spec(source), ClusterSpec(store=(tmp_path / "store").as_uri()), open_cluster=never)


def never(place: ClusterSpec) -> Any:
    raise AssertionError("the cluster was opened")


@pytest.fixture
def memory_url() -> Iterator[str]:
    files = fsspec.filesystem("memory")
    yield "memory://preflight"
    if files.exists("/preflight"):
        files.rm("/preflight", recursive=True)


def upload(folder: Path, url: str) -> str:
    for path in folder.iterdir():
        fsspec.filesystem("memory").pipe_file(f"/{url.removeprefix('memory://')}/{path.name}", path.read_bytes())
    return url


def test_build_for_gpus_without_the_number_format_is_refused_before_the_cluster_opens(tmp_path: Path) -> None:
    config = model_config(hidden_size=64, head_size=16, intermediate_size=64)
    folder = write_source(tmp_path / "wide", config, random_arrays(config))
    engine = {"max_batch_size": 2, "max_input_len": 16, "max_seq_len": 64, "compute_capabilities": ["8.6"]}
    spec = build_spec(folder, quantization={"algorithm": "MXFP8"}, engine=engine)
    with pytest.raises(QuantizationError, match=r"MXFP8 needs compute capability 8\.9 or newer"):
        building.build(spec, ClusterSpec(store=(tmp_path / "store").as_uri()), open_cluster=never)
    stages.convert(spec, tmp_path / "checkpoint")
    with pytest.raises(QuantizationError, match=r"engine\.compute_capabilities has 8\.6"):
        stages.build_engine(tmp_path / "checkpoint", None, tmp_path / "engines", spec.engine, lambda *_: None)
    assert not (tmp_path / "engines").exists()
    model = DecoderModelForCausalLM.from_checkpoint(tmp_path / "checkpoint")
    with pytest.raises(QuantizationError, match=r"MXFP8 needs compute capability 8\.9"):
        build_in_process(model, spec.engine)


def test_scratch_room_is_that_of_the_largest_copy(source: Path, tmp_path: Path, memory_url: str) -> None:
    remote = open_store(f"{memory_url}/store")
    folder = open_store((tmp_path / "store").as_uri())
    made = preparation.plan(build_spec(source))
    (reference,) = made.of_kind(Kind.REFERENCE)
    (build,) = made.of_kind(Kind.BUILD)
    assert preflight._scratch_bytes(reference, remote) == 0
    assert preflight._scratch_bytes(build, folder) == 0
    assert preflight._scratch_bytes(build, remote) == build.estimate.read_bytes


def test_memory_that_the_machine_or_the_pool_lacks_is_an_error_with_what_helps(
    monkeypatch: pytest.MonkeyPatch, source: Path, tmp_path: Path
) -> None:
    made = preparation.plan(build_spec(source, topology={"tp": 2}))
    place = ClusterSpec(store=(tmp_path / "store").as_uri())
    store = open_store(place.store)
    monkeypatch.setattr(cluster, "machine_memory_bytes", lambda: 10**12)
    preflight.check_steps(made, made.steps, place, store)
    monkeypatch.setattr(cluster, "machine_memory_bytes", lambda: 3 * 10**8)
    with pytest.raises(ClusterError, match=r"miniature needs about 700,000,000 bytes of memory, this machine has 300,000,000\n"):
        preflight.check_steps(made, made.steps, place, store)
    committed = {step.digest: None for step in made.steps if step.kind is not Kind.BUILD}
    with pytest.raises(ClusterError, match=r"^build/rank0 needs about .*, and 1 more steps need more than it has\n") as caught:
        preflight.check_steps(made, made.pending(committed), place, store)  # type: ignore[arg-type]  # only the keys count
    assert "More tp or pp makes ranks smaller" in caught.value.advice
    preflight.check_steps(made, (), place, store)
    promised = place.model_copy(update={"pools": {"default": PoolSpec(memory=10**12)}})
    preflight.check_steps(made, made.steps, promised, store)
    pools = place.model_copy(update={"pools": {"small": PoolSpec(memory=3 * 10**8)}})
    with pytest.raises(ClusterError, match=r"needs about 7\d\d,\d\d\d,\d\d\d bytes of memory, its pool has 300,000,000"):
        preflight.check_steps(made, made.steps, pools, store)


# How they are shown


def test_plan_prints_warnings_and_notes(source: Path, tmp_path: Path) -> None:
    (source / "consolidated.safetensors").write_bytes(encode_safetensors({"x": np.zeros(1, np.float32)}))
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(build_spec(source, topology={"tp": 2}).model_dump(mode="json")))
    shown = CliRunner().invoke(app, ["plan", str(spec)]).output
    assert "warning: the source holds weights that are not read: consolidated.safetensors" in shown
    assert "warning: query heads of a rank: 8 elements" in shown
    assert "note: the vocabulary of 37 is padded to 38 for tp=2: 1 row of zeros" in shown
    facts = json.loads(CliRunner().invoke(app, ["plan", str(spec), "--json"]).stdout)
    assert len(facts["warnings"]) == 4
    assert len(facts["notes"]) == 1


def test_listeners_show_warnings_before_the_first_step(source: Path) -> None:
    made = dataclasses.replace(preparation.plan(build_spec(source)), warnings=("mind [the] gap",), notes=("a note",))
    text = io.StringIO()
    LiveView(Console(file=text, width=80)).on(Planned.of(made, ()))
    assert "warning: mind [the] gap" in text.getvalue()
    said = json.loads(encode_line(Planned.of(made, made.steps)))
    assert (said["warnings"], said["notes"]) == (["mind [the] gap"], ["a note"])


# inspect


def inspected(url: str | Path) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["inspect", str(url), "--json"])
    assert result.exit_code == 0, result.output
    facts: dict[str, Any] = json.loads(result.stdout)
    return facts


def test_inspect_of_every_format_at_a_url_equals_that_of_the_folder(source: Path, tmp_path: Path, memory_url: str) -> None:
    stages.convert(build_spec(source, topology={"tp": 2, "cp": 2}), tmp_path / "trtllm")
    write_meta(tmp_path / "meta", CONFIG, ARRAYS, 1)
    write_bin(tmp_path / "bin", CONFIG, ARRAYS)
    for name, found_format in (("source", "huggingface"), ("trtllm", "trtllm"), ("meta", "meta"), ("bin", "bin")):
        facts = inspected(tmp_path / name)
        assert facts["format"] == found_format
        assert sum(file["tensors"] for file in facts["files"]) > 20
        assert inspected(upload(tmp_path / name, f"{memory_url}/{name}")) == facts
    shown = CliRunner().invoke(app, ["inspect", f"{memory_url}/trtllm"]).output
    assert "TensorRT-LLM checkpoint  LlamaForCausalLM  tp=2 pp=1 cp=2, bfloat16" in shown


def test_inspect_of_a_release_at_a_url_is_told_from_a_checkpoint(memory_url: str) -> None:
    golden = Path(__file__).parents[1] / "golden" / "manifest_tiny.json"
    fsspec.filesystem("memory").pipe_file("/preflight/release/manifest.json", golden.read_bytes())
    for url in (f"{memory_url}/release", f"{memory_url}/release/manifest.json"):
        assert inspected(url) == inspected(f"{memory_url}/release/")
    assert inspected(f"{memory_url}/release")["name"] == json.loads(golden.read_bytes())["name"]


def test_inspect_names_weights_that_are_passed_over_and_an_empty_url_is_refused(source: Path, memory_url: str) -> None:
    (source / "consolidated.safetensors").write_bytes(b"never opened")
    assert "consolidated.safetensors" in inspected(upload(source, f"{memory_url}/source"))["warnings"][0]
    result = CliRunner().invoke(app, ["inspect", f"{memory_url}/nothing"])
    assert result.exit_code == 13
    assert "there is nothing at memory://preflight/nothing" in result.output
