"""The command line: what bad input says, with which exit code, and that it leaves nothing behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from orchestrator.base import errors
from orchestrator.cli.commands import app
from orchestrator.releases.manifest import MANIFEST


class Workplace:
    """A spec file, a source and a store to spoil."""

    def __init__(self, folder: Path, source: Path) -> None:
        self.folder, self.source, self.store = folder, source, folder / "store"
        self.spec: dict[str, Any] = {
            "source": {"path": str(source)},
            "engine": {"max_batch_size": 2, "max_input_len": 16, "max_seq_len": 64},
            "release": {"name": "tiny", "version": "1"},
        }

    def run(self, *words: str) -> Result:
        path = self.folder / "spec.yaml"
        path.write_text(yaml.safe_dump(self.spec))
        return CliRunner().invoke(app, [*words, str(path), *(["--store", str(self.store)] if words[0] == "build" else [])])

    def left_behind(self) -> list[Path]:
        return [path for path in self.store.rglob("*") if path.is_file()] if self.store.is_dir() else []


@pytest.fixture
def workplace(tmp_path: Path, sharded_llama: Path) -> Workplace:
    return Workplace(tmp_path, Path(shutil.copytree(sharded_llama, tmp_path / "model")))


def refused(result: Result, error: type[errors.OrchestratorError], *words: str) -> None:
    assert result.exit_code == error.exit_code, result.output
    shown = " ".join(result.output.split())
    for word in words:
        assert word in shown


def test_build_with_an_unknown_key_names_its_path(workplace: Workplace) -> None:
    workplace.spec["engine"]["max_batchsize"] = 4
    refused(workplace.run("build"), errors.SpecError, "unknown key engine.max_batchsize", "did you mean max_batch_size?")
    assert not workplace.left_behind()


def test_build_with_an_illegal_tp_lists_the_legal_ones(workplace: Workplace) -> None:
    workplace.spec["topology"] = {"tp": 3}
    refused(workplace.run("build"), errors.TopologyError, "tp=3 does not divide the 4 attention heads", "tp in {1, 2, 4}")
    assert not workplace.left_behind()


def test_plan_with_more_stages_than_layers_is_refused(workplace: Workplace) -> None:
    workplace.spec["topology"] = {"pp": 5}
    refused(workplace.run("plan"), errors.TopologyError, "pp=5 is greater than the model's 4 layers", "pp from 1 to 4")


def test_build_with_a_missing_shard_names_it(workplace: Workplace) -> None:
    victim = sorted(workplace.source.glob("model-*.safetensors"))[1]
    victim.unlink()
    refused(workplace.run("build"), errors.SourceMissingError, victim.name)
    assert not workplace.left_behind()


def test_build_with_a_truncated_file_names_it(workplace: Workplace) -> None:
    victim = sorted(workplace.source.glob("model-*.safetensors"))[1]
    victim.write_bytes(victim.read_bytes()[:-100])
    refused(workplace.run("build"), errors.SourceCorruptError, victim.name, "truncated")
    assert not workplace.left_behind()


def test_build_from_a_git_lfs_pointer_says_so(workplace: Workplace) -> None:
    victim = sorted(workplace.source.glob("model-*.safetensors"))[0]
    victim.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")
    refused(workplace.run("build"), errors.LfsPointerError, victim.name, "git lfs pull")
    assert not workplace.left_behind()


def test_build_of_an_unknown_architecture_lists_the_known(workplace: Workplace) -> None:
    config = json.loads((workplace.source / "config.json").read_text())
    (workplace.source / "config.json").write_text(json.dumps({**config, "architectures": ["NovelForCausalLM"]}))
    refused(workplace.run("build"), errors.ArchitectureError, "NovelForCausalLM", "Nearest is", " llama,")
    assert not workplace.left_behind()


def test_build_into_an_unwritable_store_is_refused(workplace: Workplace) -> None:
    workplace.store.write_text("a file where a folder should be")
    refused(workplace.run("build"), errors.StoreError, "cannot write to the store")


def test_build_over_another_release_is_refused_before_any_step(workplace: Workplace) -> None:
    golden = Path(__file__).parents[1] / "golden" / "manifest_tiny.json"
    manifest = workplace.store / "releases" / "tiny" / "1" / MANIFEST
    manifest.parent.mkdir(parents=True)
    shutil.copyfile(golden, manifest)
    refused(workplace.run("build"), errors.ReleaseExistsError, "tiny 1 is already published", "raise release.version")
    assert workplace.left_behind() == [manifest]


def test_build_with_an_unknown_quantizer_is_refused(workplace: Workplace) -> None:
    workplace.spec["quantization"] = {"algorithm": "FP7"}
    refused(workplace.run("build"), errors.QuantizationError, "FP7")


def test_build_with_more_positions_than_the_model_has_is_refused(workplace: Workplace) -> None:
    workplace.spec["engine"]["max_seq_len"] = 4096
    refused(workplace.run("build"), errors.SpecError, "max_seq_len 4096 is greater than the model's 128 positions")


def test_plan_as_json_counts_every_source_byte_once(workplace: Workplace) -> None:
    workplace.spec["topology"] = {"tp": 2, "pp": 2}
    result = workplace.run("plan", "--json")
    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    assert facts["convert_read_bytes"] == facts["source_bytes"]
    assert [step["name"] for step in facts["steps"] if step["kind"] == "build"] == [f"build/rank{rank}" for rank in range(4)]


def test_error_as_json_has_its_exit_code(workplace: Workplace) -> None:
    workplace.spec["topology"] = {"tp": 3}
    result = workplace.run("plan", "--json")
    assert result.exit_code == errors.TopologyError.exit_code
    assert json.loads(result.stdout)["error"] == "TopologyError"


def test_inspect_of_a_folder_that_is_nothing_is_refused(tmp_path: Path) -> None:
    refused(CliRunner().invoke(app, ["inspect", str(tmp_path)]), errors.SourceMissingError, "neither a release nor a checkpoint")


def test_inspect_of_a_hugging_face_folder_lists_its_files(sharded_llama: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(sharded_llama), "--json"])
    assert json.loads(result.stdout)["architecture"] == "LlamaForCausalLM"


@pytest.mark.parametrize("what", ["build", "cluster", "manifest"])
def test_schema_of_every_file_is_printed(what: str) -> None:
    result = CliRunner().invoke(app, ["schema", what])
    assert json.loads(result.stdout)["type"] == "object"
