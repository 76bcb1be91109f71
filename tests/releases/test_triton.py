"""The Triton layout, read with Triton's own protobuf: what its TensorRT backend can run, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig, ModelInstanceGroup

from orchestrator.base.errors import SpecError, StoreError
from orchestrator.releases import pull
from orchestrator.releases.layouts import Request, arrange
from orchestrator.releases.layouts.triton import _TYPES
from orchestrator.releases.transfers import Silent
from tests.support.releases import FOR_TRITON, Published, files_below, publish_tiny

HIDDEN, SLOTS = 16, 64


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Published]:
    """Releases for Triton by (tp, pp)."""
    return {
        (tp, pp): publish_tiny(tmp_path_factory.mktemp(f"triton{tp}{pp}"), topology={"tp": tp, "pp": pp}, engine=FOR_TRITON)
        for tp in (1, 2)
        for pp in (1, 2)
    }


def configs(folder: Path) -> dict[str, ModelConfig]:
    """The configuration of every model of a repository, as Triton reads it."""
    found = {path.parent.name: text_format.Parse(path.read_text(), ModelConfig()) for path in folder.glob("*/config.pbtxt")}
    assert all(name == config.name for name, config in found.items())
    assert {path.name for path in folder.iterdir()} == found.keys()  # Triton takes every other folder for a broken model
    return found


def shapes(tensors: Any) -> dict[str, tuple[str, list[int]]]:
    return {tensor.name: (DataType.Name(tensor.data_type), list(tensor.dims)) for tensor in tensors}


def test_triton_of_one_rank_keeps_its_caches_as_states_of_a_sequence(
    released: dict[tuple[int, int], Published], tmp_path: Path
) -> None:
    release = released[1, 1]
    pull(release.url, tmp_path, layout="triton", check=False)
    (config,) = configs(tmp_path).values()
    assert (config.name, config.backend, config.max_batch_size) == ("tiny", "tensorrt", 0)
    assert shapes(config.input) == {
        "input_ids": ("TYPE_INT64", [-1, -1]), "position_ids": ("TYPE_INT64", [-1, -1]), "write_indices": ("TYPE_INT64", [-1]),
        "logit_indices": ("TYPE_INT64", [-1, -1]),
    }  # fmt: skip
    assert shapes(config.output) == {"logits": ("TYPE_FP32", [-1, -1, release.manifest.model.vocab_size])}
    (group,) = config.instance_group
    assert (group.kind, list(group.gpus), list(group.profile)) == (ModelInstanceGroup.KIND_GPU, [0], ["0"])
    states = config.sequence_batching.state
    assert {(state.input_name, state.output_name) for state in states} == {
        (f"past_key_values.{layer}.{what}", f"present_key_values.{layer}.{what}")
        for layer in range(release.manifest.model.num_hidden_layers)
        for what in ("key", "value")
    }
    for state in states:
        (first,) = state.initial_state
        assert state.use_same_buffer_for_input_output
        assert list(state.dims) == [-1, *first.dims[1:]]
        assert (first.zero_data, first.data_type, first.dims[0], first.dims[2]) == (True, state.data_type, 1, SLOTS)
    assert (tmp_path / "tiny" / "1" / "model.plan").read_bytes() == release.path(0).read_bytes()


def test_triton_of_tensor_parallel_ranks_is_one_model_with_a_plan_per_rank(
    released: dict[tuple[int, int], Published], tmp_path: Path
) -> None:
    release = released[2, 1]
    pull(release.url, tmp_path, layout="triton", check=False)
    (config,) = configs(tmp_path).values()
    (group,) = config.instance_group
    assert (config.backend, config.max_batch_size) == ("tensorrt", 0)
    assert (group.kind, group.count, list(group.gpus)) == (ModelInstanceGroup.KIND_MODEL, 1, [])
    assert {name: value.string_value for name, value in config.parameters.items()} == {
        "enable_multi_device": "true", "multi_device_gpus": "0,1", "multi_device_per_rank_engines": "true",
    }  # fmt: skip
    engine = release.manifest.ranks[0].engine
    assert shapes(config.input).keys() | shapes(config.output).keys() == {tensor.name for tensor in engine.tensors}
    assert not config.HasField("sequence_batching")
    version = tmp_path / "tiny" / "1"
    for rank in range(2):
        assert (version / f"model.plan.rank{rank}").read_bytes() == release.path(rank).read_bytes()
    assert (version / "model.plan").readlink() == Path("model.plan.rank0")


@pytest.mark.parametrize("tp", [1, 2])
def test_triton_of_pipeline_stages_is_an_ensemble_that_hands_on_hidden_states(
    released: dict[tuple[int, int], Published], tmp_path: Path, tp: int
) -> None:
    num_layers = released[tp, 2].manifest.model.num_hidden_layers
    pull(released[tp, 2].url, tmp_path, layout="triton", check=False)
    found = configs(tmp_path)
    assert set(found) == {"tiny", "tiny-stage0", "tiny-stage1"}
    ensemble = found["tiny"]
    assert (ensemble.platform, ensemble.max_batch_size) == ("ensemble", 0)
    assert (tmp_path / "tiny" / "1").is_dir()
    known = shapes(ensemble.input)
    for step in ensemble.ensemble_scheduling.step:
        model = found[step.model_name]
        inputs, outputs = shapes(model.input), shapes(model.output)
        assert step.input_map.keys() == inputs.keys()
        assert {outer: inputs[inner] for inner, outer in step.input_map.items()}.items() <= known.items()
        known |= {outer: outputs[inner] for inner, outer in step.output_map.items()}
    assert shapes(ensemble.output) == {"logits": known["logits"]}
    assert known["hidden_states.1"][1] == [-1, -1, HIDDEN]
    used = [found[f"tiny-stage{stage}"].parameters["multi_device_gpus"].string_value for stage in range(2)]
    assert used == (["", ""] if tp == 1 else ["0,1", "2,3"])
    assert sum(len(model.sequence_batching.state) for model in found.values()) == (2 * num_layers if tp == 1 else 0)
    assert ("stage1.past_key_values.0.key" in known) == (tp == 2)


def test_triton_of_one_stage_of_two_has_no_ensemble(released: dict[tuple[int, int], Published], tmp_path: Path) -> None:
    pull(released[2, 2].url, tmp_path, ranks=[2, 3], layout="triton", check=False)
    (config,) = configs(tmp_path).values()
    assert config.name == "tiny-stage1"
    assert config.parameters["multi_device_gpus"].string_value == "0,1"


def test_triton_of_tensor_parallel_ranks_says_prefill_only_in_the_file_and_to_the_caller(
    released: dict[tuple[int, int], Published], tmp_path: Path
) -> None:
    notes: list[str] = []

    class Noting(Silent):
        def on_note(self, text: str) -> None:
            notes.append(text)

    pull(released[2, 1].url, tmp_path, layout="triton", check=False, listener=Noting())
    assert "prefill only" in notes[0]
    assert (tmp_path / "tiny" / "config.pbtxt").read_text().startswith("# prefill only")


def test_triton_pulled_again_keeps_the_version_and_mends_the_link(
    released: dict[tuple[int, int], Published], tmp_path: Path
) -> None:
    release = released[2, 1]
    pull(release.url, tmp_path, layout="triton", check=False)
    link = tmp_path / "tiny" / "1" / "model.plan"
    elsewhere = tmp_path.parent / "elsewhere"
    elsewhere.write_bytes(b"mine")
    link.unlink()
    link.symlink_to(elsewhere)
    pull(release.url, tmp_path, layout="triton", check=False)
    assert link.readlink() == Path("model.plan.rank0")
    assert elsewhere.read_bytes() == b"mine"
    assert not list(tmp_path.rglob("*.part"))


def test_triton_where_a_folder_has_the_links_name_is_an_error_of_the_folder(
    released: dict[tuple[int, int], Published], tmp_path: Path
) -> None:
    (tmp_path / "tiny" / "1" / "model.plan" / "full").mkdir(parents=True)
    with pytest.raises(StoreError, match="cannot write"):
        pull(released[2, 1].url, tmp_path, layout="triton", check=False)


def test_triton_repository_holds_the_whole_release(released: dict[tuple[int, int], Published], tmp_path: Path) -> None:
    pull(released[2, 2].url, tmp_path, layout="triton", check=False)
    release = released[2, 2].manifest
    beside = {f"tiny-stage0/release/{file.path}" for file in release.all_files() if file.role != "engine"}
    assert beside | {"tiny-stage0/release/manifest.json"} <= files_below(tmp_path).keys()


@pytest.mark.parametrize(
    ("engine", "reason", "advice"),
    [
        ({}, "holds engines of tensorrt_rtx", "for_triton: true"),
        ({"backend": "tensorrt"}, "updates present_key_values.0.key in place", "for_triton: true"),
        ({**FOR_TRITON, "gather_logits": False}, "slice of the logits", "gather_logits: true"),
    ],
)
def test_triton_of_engines_that_its_backend_cannot_run_is_refused(
    tmp_path: Path, engine: dict[str, Any], reason: str, advice: str
) -> None:
    limits = {"max_batch_size": 2, "max_input_len": 16, "max_seq_len": 64}
    release = publish_tiny(tmp_path / "published", engine={**limits, **engine})
    with pytest.raises(SpecError, match=reason) as caught:
        pull(release.url, tmp_path / "out", layout="triton", check=False)
    assert advice in caught.value.advice
    assert not (tmp_path / "out").exists()


def test_triton_of_a_stage_without_all_its_ranks_is_refused(released: dict[tuple[int, int], Published], tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="stage 1 has 2 ranks, of which 1") as caught:
        pull(released[2, 2].url, tmp_path, ranks=[0, 1, 3], layout="triton", check=False)
    assert "--rank 2-3" in caught.value.advice


def changed(release: Published, **engine: Any) -> Request:
    """A request for a release whose engines' records have other fields."""
    ranks = tuple(
        record.model_copy(update={"engine": record.engine.model_copy(update=engine)}) for record in release.manifest.ranks
    )
    manifest = release.manifest.model_copy(update={"ranks": ranks})
    return Request(manifest, tuple(range(len(ranks))), tuple(manifest.all_files()), manifest.to_json(), None)


def test_triton_of_two_profiles_lists_both_for_one_rank_and_is_refused_for_more(
    released: dict[tuple[int, int], Published],
) -> None:
    both = ("prefill", "decode")
    written = arrange("triton", changed(released[1, 1], profiles=both)).written["tiny/config.pbtxt"]
    (group,) = text_format.Parse(written, ModelConfig()).instance_group
    assert list(group.profile) == ["0", "1"]
    with pytest.raises(SpecError, match="2 optimization profiles, and Triton takes one with tp=2"):
        arrange("triton", changed(released[2, 1], profiles=both))


def test_triton_of_a_dtype_that_it_does_not_have_is_refused(released: dict[tuple[int, int], Published]) -> None:
    tensors = [
        tensor.model_copy(update={"dtype": "fp8"}) if "key_values" in tensor.name else tensor
        for tensor in released[1, 1].manifest.ranks[0].engine.tensors
    ]
    with pytest.raises(SpecError, match="is fp8, which Triton"):
        arrange("triton", changed(released[1, 1], tensors=tuple(tensors)))


@pytest.mark.parametrize("name", ['a" }\n]\nmodel_warmup [ { name: "é', "back\\slash", "a\tb", "\x00", "'"])
def test_triton_name_of_a_tensor_comes_back_from_the_parser_as_it_was(
    released: dict[tuple[int, int], Published], name: str
) -> None:
    first, *others = released[1, 1].manifest.ranks[0].engine.tensors
    request = changed(released[1, 1], tensors=(first.model_copy(update={"name": name}), *others))
    config = text_format.Parse(arrange("triton", request).written["tiny/config.pbtxt"], ModelConfig())
    assert config.input[0].name == name
    assert not config.model_warmup


def test_triton_dtypes_are_those_of_its_protobuf() -> None:
    assert set(_TYPES.values()) <= set(DataType.keys())
