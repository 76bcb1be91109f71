"""Context-parallel ranks share the files of a checkpoint, and engines refuse them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from orchestrator import stages
from orchestrator.base.errors import SourceMissingError, TopologyError
from orchestrator.checkpoints import read_source
from orchestrator.checkpoints.compare import compare
from orchestrator.cli.commands import app
from orchestrator.compat.models import BuildConfig, LLaMAForCausalLM, Mapping, build
from orchestrator.model.config import ModelConfig, MoeConfig
from orchestrator.model.config_trtllm import from_trtllm, to_trtllm
from orchestrator.model.topology import Topology
from tests.support.strategies import parallel_models
from tests.support.synthetic import build_spec, model_config, random_arrays, write_source

CONFIG = model_config()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("source"), CONFIG, random_arrays(CONFIG))


def cli(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "config.json"}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Path:
    """tp=2, cp=3, pp=2, each rank in shards."""
    output = tmp_path_factory.mktemp("converted") / "cp"
    words = ["--tp", "2", "--pp", "2", "--cp", "3", "--dtype", "bfloat16", "--max-shard-bytes", "3KB"]
    result = cli("convert", "--source", source, "--output", output, *words)
    assert result.exit_code == 0, result.output
    assert "12 ranks in 4 files" in result.output
    return output


def test_convert_with_cp_writes_the_files_of_tp_and_pp(converted: Path, source: Path, tmp_path: Path) -> None:
    words = ["--tp", "2", "--pp", "2", "--dtype", "bfloat16", "--max-shard-bytes", "3KB"]
    assert cli("convert", "--source", source, "--output", tmp_path / "plain", *words).exit_code == 0
    assert files(converted) == files(tmp_path / "plain")
    mapping = json.loads((converted / "config.json").read_text())["mapping"]
    sizes = {"world_size": 12, "tp_size": 2, "cp_size": 3, "pp_size": 2, "moe_tp_size": 2, "moe_ep_size": 1, "gpus_per_node": 8}
    assert mapping == sizes


def test_checkpoint_with_cp_read_back_is_the_source(converted: Path, source: Path) -> None:
    assert compare(str(source), str(converted)).same
    assert read_source(str(converted))[0].warnings == ()


def test_from_checkpoint_cp_ranks_have_the_weights_of_their_file(converted: Path) -> None:
    found = [LLaMAForCausalLM.from_checkpoint(converted, rank) for rank in range(12)]
    for rank, model in enumerate(found):
        twin = found[rank % 2 + rank // 6 * 6]
        assert model.mapping.file_number == rank % 2 + rank // 6 * 2
        assert model.weights().keys() == twin.weights().keys()
        assert all(bytes(weight.data) == bytes(twin.weights()[name].data) for name, weight in model.weights().items())
    with pytest.raises(TopologyError, match=r"rank 12 is not in 0\.\.11 \(tp=2, pp=2, cp=3\)"):
        LLaMAForCausalLM.from_checkpoint(converted, 12)


def test_engines_of_cp_ranks_are_refused_everywhere(converted: Path, source: Path, tmp_path: Path) -> None:
    model = LLaMAForCausalLM.from_checkpoint(converted, 0)
    with pytest.raises(TopologyError, match="do not split sequences"):
        build(model, BuildConfig(max_seq_len=64, max_input_len=16))
    result = cli("build-engine", "--checkpoint", converted, "--output", tmp_path / "engines")
    assert result.exit_code == TopologyError.exit_code
    assert not (tmp_path / "engines").exists()
    spec = tmp_path / "spec.yaml"
    wanted = {"source": {"path": str(tmp_path / "nowhere")}, "topology": {"cp": 2}, "release": {"name": "n", "version": "1"}}
    spec.write_text(yaml.safe_dump(wanted))
    for words in (["plan", spec], ["build", spec, "--store", tmp_path / "store"]):
        result = cli(*words)
        assert result.exit_code == TopologyError.exit_code, result.output  # said before the missing source is
        assert "convert --cp" in " ".join(result.output.split())
    assert not (tmp_path / "store").exists()


def test_convert_of_ranks_with_cp_to_other_ranks_equals_direct_conversion(converted: Path, source: Path, tmp_path: Path) -> None:
    for name, origin in (("again", converted), ("direct", source)):
        stages.convert(build_spec(origin, topology={"tp": 4}, dtype="bfloat16"), tmp_path / name)
    assert files(tmp_path / "again") == files(tmp_path / "direct")


def test_cp_with_expert_parallelism_is_refused(tmp_path: Path) -> None:
    config = model_config(architecture="MixtralForCausalLM", moe=MoeConfig(num_experts=4, top_k=2))
    topology = Topology(2, 1, moe_ep=2, cp=2)
    (tmp_path / "config.json").write_text(json.dumps(to_trtllm(config, topology)))
    (tmp_path / "rank0.safetensors").touch()
    with pytest.raises(TopologyError, match="cp=2 and moe_ep=2 exclude each other"):
        read_source(str(tmp_path))


def mapping_of(config: ModelConfig, **changes: int) -> Topology:
    plain = to_trtllm(config, Topology(4, 2))
    return from_trtllm({**plain, "mapping": {**plain["mapping"], **changes}})[1]


def test_mapping_that_contradicts_itself_is_refused_with_the_legal_sizes() -> None:
    with pytest.raises(TopologyError, match="world_size 8 is not tp_size 4 x pp_size 2 x cp_size 2") as caught:
        mapping_of(CONFIG, cp_size=2)
    assert "Set world_size to 16" in caught.value.advice
    experts = model_config(moe=MoeConfig(num_experts=4, top_k=2))
    with pytest.raises(TopologyError, match="moe_tp_size 4 x moe_ep_size 2 is not tp_size 4") as caught:
        mapping_of(experts, moe_ep_size=2)
    assert "4 x 1, 2 x 2, 1 x 4" in caught.value.advice
    assert mapping_of(experts, moe_ep_size=2, moe_tp_size=2) == Topology(4, 2, moe_ep=2)
    assert mapping_of(CONFIG, moe_tp_size=8) == Topology(4, 2)  # without experts nothing is split by it


def test_mapping_of_model_optimizer_has_three_keys() -> None:
    plain = {**to_trtllm(CONFIG, Topology(1, 1)), "mapping": {"world_size": 8, "tp_size": 4, "pp_size": 2}}
    assert from_trtllm(plain)[1] == Topology(4, 2)


def test_checkpoint_that_lacks_the_file_of_its_cp_ranks_is_refused(converted: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((converted / "config.json").read_bytes())
    (tmp_path / "rank0.safetensors").touch()
    with pytest.raises(SourceMissingError, match=r"no rank1\.safetensors"):
        read_source(str(tmp_path))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(models=parallel_models(), cp=st.integers(2, 4), seed=st.integers(0, 2**16))
def test_gather_of_any_conversion_with_cp_is_bit_identical(
    tmp_path_factory: pytest.TempPathFactory, models: tuple[ModelConfig, Topology], cp: int, seed: int
) -> None:
    """Whichever of the context-parallel ranks writes a file, the checkpoint is the same."""
    config, plain = models
    folder = tmp_path_factory.mktemp("cp")
    origin = write_source(folder / "source", config, random_arrays(config, seed=seed))
    topology = Topology(plain.tp, plain.pp, plain.pp_partition, cp=cp)
    for place in topology.ranks():
        if place.cp_rank == (place.tp_rank + seed) % cp:
            mapping = Mapping(plain.tp, plain.pp, place.rank, plain.pp_partition, cp_size=cp)
            LLaMAForCausalLM.from_hugging_face(origin, "bfloat16", mapping).save_checkpoint(folder / "ranks")
    assert len(list((folder / "ranks").glob("*.safetensors"))) == topology.num_files
    assert compare(str(origin), str(folder / "ranks")).same
