"""What travels to a cluster: files that decode to the same build, and an id that finds it again."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.base.errors import SourceMissingError, SpecError, ToolError
from orchestrator.events import Errored, decode_line
from orchestrator.spec.build import BuildSpec, SourceSpec
from orchestrator.spec.cluster import ClusterSpec
from orchestrator.spec.decoding import decode
from orchestrator.spec.loading import load_cluster, load_spec
from orchestrator.submit.bundle import ENTRYPOINT, Packed, bundle, expected_on_nodes, pack, submission_id


@pytest.fixture
def spec() -> BuildSpec:
    return BuildSpec.model_validate(
        {"source": {"path": "/models/llama"}, "topology": {"tp": 2}, "release": {"name": "llama_3.1", "version": "1"}}
    )


def test_bundle_read_back_gives_the_same_build(spec: BuildSpec, tmp_path: Path) -> None:
    place = ClusterSpec(kind="ray", store="s3://bucket/builds")
    for name, text in bundle(spec, place).items():
        (tmp_path / name).write_text(text)
    assert load_spec(tmp_path / "spec.yaml") == spec
    assert load_cluster(tmp_path / "cluster.yaml") == place


def test_entrypoint_names_the_files_of_the_bundle(spec: BuildSpec) -> None:
    files = bundle(spec, ClusterSpec(store="s3://bucket"))
    assert ENTRYPOINT == "exec sh build.sh"
    assert "build spec.yaml --cluster cluster.yaml --json" in files["build.sh"]
    assert sorted(files) == ["build.sh", "cluster.yaml", "spec.yaml"]


def test_submission_id_of_the_same_build_is_the_same(spec: BuildSpec) -> None:
    first = submission_id(spec, ClusterSpec(store="s3://bucket"))
    assert first == submission_id(spec, ClusterSpec(store="s3://bucket", threads_per_step=4))
    assert first.startswith("build-llama-3-1-")


def test_submission_id_of_another_store_or_spec_differs(spec: BuildSpec) -> None:
    other = spec.model_copy(update={"dtype": "float16"})
    ids = {
        submission_id(spec, ClusterSpec(store="s3://a")),
        submission_id(spec, ClusterSpec(store="s3://b")),
        submission_id(other, ClusterSpec(store="s3://a")),
    }
    assert len(ids) == 3


def quantized(spec: BuildSpec, **fields: object) -> BuildSpec:
    return decode(BuildSpec, {**spec.model_dump(mode="json", exclude_unset=True), "quantization": fields}, "test")


def test_pack_local_files_travel_under_names_of_their_content(spec: BuildSpec, tmp_path: Path) -> None:
    data, scales = tmp_path / "chats.jsonl", tmp_path / "scales"
    data.write_text('{"text": "one"}')
    scales.mkdir()
    (scales / "scales.safetensors").write_bytes(b"\0\1")
    wanted = quantized(spec, algorithm="FP8", scales=str(scales), calibration={"dataset": str(data)})
    packed = pack(wanted)
    assert packed.spec.quantization is not None
    dataset, folder = packed.spec.quantization.calibration.dataset, packed.spec.quantization.scales
    assert folder is not None
    assert packed.files == {dataset: data, f"{folder}/scales.safetensors": scales / "scales.safetensors"}
    assert (Path(dataset).name, Path(folder).name) == ("chats.jsonl", "scales")
    place = ClusterSpec(store="s3://bucket")
    before = submission_id(packed.spec, place)
    assert submission_id(pack(wanted).spec, place) == before
    data.write_text('{"text": "two"}')
    assert submission_id(pack(wanted).spec, place) != before


def test_pack_relative_file_that_is_not_here_is_refused(spec: BuildSpec) -> None:
    with pytest.raises(SourceMissingError, match=r"nowhere\.json"):
        pack(quantized(spec, algorithm="MIXED_PRECISION", quant_cfg="nowhere.json"))


def test_pack_absolute_file_that_is_not_here_is_expected_on_the_nodes(spec: BuildSpec) -> None:
    wanted = quantized(spec, algorithm="FP8", calibration={"dataset": "/data/chats.jsonl"})
    assert pack(wanted) == Packed(wanted, {})
    assert any("/data/chats.jsonl" in line for line in expected_on_nodes(wanted, ClusterSpec(store="s3://bucket")))


def test_pack_name_of_a_data_set_stays_a_name(spec: BuildSpec) -> None:
    wanted = quantized(spec, algorithm="FP8", calibration={"dataset": "cnn_dailymail"})
    assert pack(wanted) == Packed(wanted, {})


def test_pack_files_too_large_to_travel_are_refused(spec: BuildSpec, tmp_path: Path) -> None:
    large = tmp_path / "chats.txt"
    with large.open("wb") as file:
        file.truncate(100 * 10**6 + 1)
    with pytest.raises(SpecError, match="100,000,001 bytes"):
        pack(quantized(spec, algorithm="FP8", calibration={"dataset": str(large)}))


def test_expected_on_nodes_names_folders_and_no_urls(spec: BuildSpec) -> None:
    remote = spec.model_copy(update={"source": SourceSpec(path="s3://bucket/llama")})
    assert expected_on_nodes(remote, ClusterSpec(store="s3://bucket")) == ()
    assert len(expected_on_nodes(spec, ClusterSpec(store="file:///shared"))) == 2


def fake_python(path: Path, *, has_program: bool = True) -> Path:
    """Prints its own path and what it is asked to run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    imports = "exit 0" if has_program else "exit 1"
    path.write_text(f'#!/bin/sh\n[ "$1" = -c ] && {imports}\necho "{path} $*"\n')
    path.chmod(0o755)
    return path


def run_entrypoint(folder: Path, path: Path, raylet_python: Path | None = None, python: str | None = None) -> tuple[int, str]:
    """Run the entrypoint as Ray does: by a shell below a worker, which is below the raylet."""
    place = ClusterSpec.model_validate({"kind": "ray", "store": "s3://bucket", "driver": {"python": python} if python else {}})
    build = BuildSpec.model_validate({"source": {"path": "/models/llama"}, "release": {"name": "llama", "version": "1"}})
    for name, text in bundle(build, place).items():
        (folder / name).write_text(text)
    worker = f"{shlex.quote(sys.executable)} -c {shlex.quote(WORKER)}; exit $?"
    words = ["/bin/sh", "-c", worker, "raylet"]
    if raylet_python is not None:
        words.append(f"--python_worker_command={raylet_python} /site-packages/ray/default_worker.py --node-ip-address=1")
    environment = {**os.environ, "PATH": f"{path}:/usr/bin:/bin", "ENTRYPOINT": ENTRYPOINT}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout.strip()


WORKER = """
import os, subprocess, sys
sys.exit(subprocess.run(os.environ["ENTRYPOINT"], shell=True, start_new_session=True).returncode)
"""
BUILD = "-m orchestrator.cli build spec.yaml --cluster cluster.yaml --json"


def test_entrypoint_runs_the_python_of_ray_and_not_the_first_on_the_path(tmp_path: Path) -> None:
    fake_python(tmp_path / "bin" / "python")
    of_ray = fake_python(tmp_path / "venv" / "bin" / "python")
    assert run_entrypoint(tmp_path, tmp_path / "bin", of_ray) == (0, f"{of_ray} {BUILD}")


def test_entrypoint_runs_the_python_of_the_cluster_file(tmp_path: Path) -> None:
    of_ray = fake_python(tmp_path / "venv" / "bin" / "python")
    named = fake_python(tmp_path / "it's here" / "python")
    assert run_entrypoint(tmp_path, tmp_path / "bin", of_ray, str(named)) == (0, f"{named} {BUILD}")


def test_entrypoint_passes_over_a_python_without_the_program(tmp_path: Path) -> None:
    first = fake_python(tmp_path / "bin" / "python")
    of_ray = fake_python(tmp_path / "venv" / "bin" / "python", has_program=False)
    assert run_entrypoint(tmp_path, tmp_path / "bin", of_ray) == (0, f"{first} {BUILD}")


@pytest.mark.parametrize("named", [None, "/opt/it's not there/python"])
def test_entrypoint_without_a_python_that_has_the_program_says_so_as_the_last_word(tmp_path: Path, named: str | None) -> None:
    fake_python(tmp_path / "bin" / "python", has_program=False)
    fake_python(tmp_path / "bin" / "python3", has_program=False)
    code, said = run_entrypoint(tmp_path, tmp_path / "bin", None, named)
    word = decode_line(said)
    assert isinstance(word, Errored)
    assert (code, type(word.to_error())) == (ToolError.exit_code, ToolError)
    assert (named or "that of Ray") in json.loads(said)["message"]
    assert "driver.python" in word.advice
