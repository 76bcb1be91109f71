"""The same weights in every source format convert to the same rank files, byte for byte."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from orchestrator import stages
from orchestrator.base.errors import (
    ArchitectureError,
    OrchestratorError,
    QuantizationError,
    SourceCorruptError,
    SourceMissingError,
    WeightMapError,
)
from orchestrator.checkpoints import read_source, trtllm, trtllm_files
from orchestrator.checkpoints.compare import compare
from orchestrator.checkpoints.hugging_face_config import hugging_face_config
from orchestrator.compat.models import LLaMAForCausalLM
from orchestrator.compat.models import Mapping as Place
from orchestrator.families import family_named
from orchestrator.model.config import ModelConfig, MoeConfig
from orchestrator.model.config_trtllm import to_trtllm
from orchestrator.planning import preparation
from orchestrator.planning.steps import Kind
from orchestrator.stores.file import FileStore
from orchestrator.work.convert import cutting, strips
from orchestrator.work.scales import SCALES
from tests.integration.steps import run_steps
from tests.support import keras_presets, orbax_checkpoints
from tests.support.keras import write_preset
from tests.support.meta import write_bin, write_meta
from tests.support.orbax_checkpoints import unpack
from tests.support.synthetic import Array, build_spec, encode_safetensors, model_config, random_arrays, write_source

Writer = Callable[[Path, ModelConfig, Mapping[str, Array]], Path]

CONFIG = model_config(
    num_attention_heads=8, num_key_value_heads=4, head_size=4, hidden_size=32, intermediate_size=48, vocab_size=56,
    num_hidden_layers=5,
)  # fmt: skip
"""56 rows of vocabulary: eight files of Meta's split them evenly, tp=3 would pad them."""
ARRAYS = random_arrays(CONFIG)


def converted(
    source: Path | str, store: Path, topology: Mapping[str, Any], dtype: str = "bfloat16", **sections: Any
) -> dict[str, str]:
    """sha256 by file name of what conversion writes."""
    made = preparation.plan(build_spec(source, topology=dict(topology), dtype=dtype, **sections))
    outcomes = run_steps(made, store.as_uri(), (Kind.CONVERT,))
    return {output.name: output.sha256 for outcome in outcomes.values() for output in outcome.outputs}


TOPOLOGIES = [
    pytest.param({}, id="tp1"),
    pytest.param({"tp": 2, "pp": 2}, id="tp2-pp2-uneven"),
    pytest.param({"tp": 4, "pp": 3, "pp_partition": [1, 3, 1]}, id="tp4-pp3-partition"),
    pytest.param({"tp": 8}, id="tp8-kv-heads-duplicated"),
]


@pytest.fixture(scope="module")
def direct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("direct"), CONFIG, ARRAYS)


@pytest.fixture(scope="module")
def metas(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, bool], Path]:
    root = tmp_path_factory.mktemp("meta")
    return {
        (files, llama3): write_meta(root / f"{files}-{llama3}", CONFIG, ARRAYS, files, llama3=llama3)
        for files in (1, 2, 4, 8)
        for llama3 in (False, True)
    }


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_convert_of_meta_files_equals_that_of_hugging_face(
    tmp_path: Path, direct: Path, metas: dict[tuple[int, bool], Path], topology: dict[str, Any]
) -> None:
    expected = converted(direct, tmp_path / "direct", topology)
    for key, source in metas.items():
        assert converted(source, tmp_path / f"{key}", topology) == expected, key


def test_convert_of_meta_files_to_another_dtype_and_small_shards(
    tmp_path: Path, direct: Path, metas: dict[tuple[int, bool], Path]
) -> None:
    sections: dict[str, Any] = {"conversion": {"max_shard_bytes": "20KB"}}
    expected = converted(direct, tmp_path / "direct", {"tp": 2}, "float16", **sections)
    assert len(expected) > 2
    assert converted(metas[4, True], tmp_path / "meta", {"tp": 2}, "float16", **sections) == expected


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_convert_of_keras_presets_by_blocks_and_strips_equals_that_of_hugging_face(
    tmp_path: Path, direct: Path, topology: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_preset(tmp_path / "keras", CONFIG, ARRAYS)
    expected = converted(direct, tmp_path / "direct", topology)
    assert converted(source, tmp_path / "whole", topology) == expected
    monkeypatch.setattr(cutting, "BLOCK_BYTES", 3 * 64)
    assert converted(source, tmp_path / "blocks", topology) == expected
    monkeypatch.setattr(strips, "STRIP_BYTES", 7 * 64)  # not a multiple of the blocks
    assert converted(source, tmp_path / "strips", topology) == expected


@pytest.mark.parametrize("num_files", [1, 3])
def test_convert_of_bin_files_equals_that_of_safetensors(tmp_path: Path, direct: Path, num_files: int) -> None:
    source = write_bin(tmp_path / "bin", CONFIG, ARRAYS, num_files)
    for number, topology in enumerate(({"tp": 2, "pp": 2}, {"tp": 8})):
        expected = converted(direct, tmp_path / f"direct{number}", topology)
        assert converted(source, tmp_path / f"store{number}", topology) == expected


def small_arrays(config: ModelConfig, seed: int = 1) -> dict[str, Array]:
    """Weights with which a model's logits stay of ordinary size."""
    return {name: np.multiply(array, 0.2).astype(array.dtype) for name, array in random_arrays(config, seed=seed).items()}


def test_verification_of_every_format_agrees_with_transformers(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"num_hidden_layers": 1, "intermediate_size": 64})
    arrays = small_arrays(config)
    source = write_source(tmp_path / "safetensors", config, arrays)
    write_bin(tmp_path / "bin", config, arrays)
    write_meta(tmp_path / "meta", config, arrays, 2)
    write_ranks(source, tmp_path / "trtllm", {"tp": 2})
    write_preset(tmp_path / "keras", config, arrays)
    for name in ("bin", "meta", "trtllm", "keras"):
        made = preparation.plan(build_spec(tmp_path / name, dtype="bfloat16"))
        kinds = (Kind.MINIATURE, Kind.REFERENCE, Kind.CONVERT, Kind.VERIFY)
        outcomes = run_steps(made, (tmp_path / f"{name}-built").as_uri(), kinds)
        assert outcomes["verify/stage0"].facts.verification.max_relative_error < 1e-3, name


@pytest.mark.parametrize("case", ["llama3", "gemma2", "gemma-flax"])
def test_verification_of_orbax_checkpoints_agrees_with_transformers(tmp_path: Path, case: str) -> None:
    made = preparation.plan(build_spec(unpack(case, tmp_path / "source"), dtype="bfloat16"))
    outcomes = run_steps(made, (tmp_path / "built").as_uri(), (Kind.REFERENCE, Kind.CONVERT, Kind.VERIFY))
    assert outcomes["verify/stage0"].facts.verification.max_relative_error < 1e-3


@pytest.mark.parametrize("unpacked", [orbax_checkpoints.unpack, keras_presets.unpack], ids=["orbax", "keras"])
def test_convert_of_a_remote_checkpoint_equals_that_of_the_folder(
    tmp_path: Path, upload: Callable[[Path], str], unpacked: Callable[[str, Path], Path]
) -> None:
    source = unpacked("llama", tmp_path / "source")
    for number, topology in enumerate(({"tp": 2, "pp": 2}, {})):
        expected = converted(source, tmp_path / f"local{number}", topology)
        assert converted(upload(source), tmp_path / f"remote{number}", topology) == expected


def test_plan_of_stacked_layers_says_what_several_tasks_read_again(tmp_path: Path) -> None:
    source = unpack("llama", tmp_path)
    assert not any("reads them whole" in note for note in preparation.plan(build_spec(source)).notes)
    made = preparation.plan(build_spec(source, conversion={"max_shard_bytes": "8KB"}))
    (note,) = [note for note in made.notes if "reads them whole" in note]
    assert "9 arrays hold layers of several conversion tasks" in note


def test_calibration_of_every_format_equals_that_of_safetensors(tmp_path: Path, upload: Callable[[Path], str]) -> None:
    config = CONFIG.model_copy(update={"num_hidden_layers": 2, "intermediate_size": 64})
    arrays = small_arrays(config)
    source = write_source(tmp_path / "safetensors", config, arrays)
    write_bin(tmp_path / "bin", config, arrays)
    write_meta(tmp_path / "meta", config, arrays, 2)
    write_ranks(source, tmp_path / "trtllm", {"tp": 2})
    write_preset(tmp_path / "keras", config, arrays)
    expected = scales(str(source), tmp_path / "safetensors-built")
    assert min(expected.values()) > 0
    names = ("bin", "meta", "trtllm", "keras")
    remote = {f"remote {name}": upload(tmp_path / name) for name in ("safetensors", "meta", "keras")}
    sources = {**{name: str(tmp_path / name) for name in names}, **remote}
    for name, place in sources.items():
        assert scales(place, tmp_path / f"{name}-built") == expected, name


def scales(source: str, store: Path) -> dict[str, float]:
    """What calibration in two parts finds, every amax."""
    calibration = {"num_samples": 2, "max_length": 8, "num_stages": 2}
    made = preparation.plan(build_spec(source, dtype="bfloat16", quantization={"algorithm": "FP8", "calibration": calibration}))
    outcomes = run_steps(made, store.as_uri(), (Kind.CALIBRATE,))
    values = [safetensors.numpy.load(FileStore(store.as_uri()).get(outcome.output(SCALES).key)) for outcome in outcomes.values()]
    return {name: float(value) for part in values for name, value in part.items()}


def test_reference_of_a_forced_format_is_of_its_weights_and_not_of_those_beside(tmp_path: Path) -> None:
    """Two weight sets in one folder that differ: verification would fail if transformers took the other one."""
    config = CONFIG.model_copy(update={"num_hidden_layers": 1, "intermediate_size": 64})
    sets = [small_arrays(config, seed) for seed in (1, 2)]
    both = write_source(tmp_path / "both", config, sets[0])
    write_bin(both, config, sets[1])
    write_meta(both, config, sets[1], 1)
    for forced in ("huggingface", "bin", "meta"):
        spec = build_spec(both, dtype="bfloat16")
        made = preparation.plan(spec.model_copy(update={"source": spec.source.model_copy(update={"format": forced})}))
        outcomes = run_steps(made, (tmp_path / forced).as_uri(), (Kind.REFERENCE, Kind.CONVERT, Kind.VERIFY))
        assert outcomes["verify/stage0"].facts.verification.max_relative_error < 1e-3, forced


def test_reference_of_an_index_beside_a_single_file_is_of_the_index(tmp_path: Path) -> None:
    """transformers would take the single file; the plan reads the shards."""
    config = CONFIG.model_copy(update={"num_hidden_layers": 1})
    sets = [small_arrays(config, seed) for seed in (1, 2)]
    folder = write_source(tmp_path / "source", config, sets[0], num_files=2)
    write_source(folder, config, sets[1])
    made = preparation.plan(build_spec(folder, dtype="bfloat16"))
    assert "not read: model.safetensors." in made.warnings[0]
    outcomes = run_steps(made, (tmp_path / "store").as_uri(), (Kind.REFERENCE, Kind.CONVERT, Kind.VERIFY))
    assert outcomes["verify/stage0"].facts.verification.max_relative_error < 1e-3


@pytest.fixture
def upload() -> Iterator[Callable[[Path], str]]:
    """Copy a folder to memory://; gives its URL."""
    files = fsspec.filesystem("memory")

    def put(folder: Path) -> str:
        for path in folder.rglob("*"):
            if path.is_file():
                files.pipe_file(f"/formats/{folder.name}/{path.relative_to(folder).as_posix()}", path.read_bytes())
        return f"memory://formats/{folder.name}"

    yield put
    files.rm("/formats", recursive=True)


def test_convert_from_object_storage_equals_that_of_the_folder(
    tmp_path: Path, direct: Path, metas: dict[tuple[int, bool], Path], upload: Callable[[Path], str]
) -> None:
    expected = converted(direct, tmp_path / "direct", {"tp": 4})
    ranks = write_ranks(direct, tmp_path / "ranks", {"tp": 2, "pp": 2})
    for source in (metas[4, False], write_bin(tmp_path / "bin", CONFIG, ARRAYS), ranks):
        made = preparation.plan(build_spec(upload(source), topology={"tp": 4}, dtype="bfloat16"))
        outcomes = run_steps(made, (tmp_path / f"{source.name}-built").as_uri(), (Kind.CONVERT,))
        found = {output.name: output.sha256 for outcome in outcomes.values() for output in outcome.outputs}
        assert found == expected, source.name
        num_read = sum(outcome.facts.source_bytes_read for outcome in outcomes.values())
        assert num_read < 1.5 * made.inputs.index.num_bytes  # small neighbours are fetched together with torch's padding


def test_convert_step_names_the_files_of_its_pieces_alone(tmp_path: Path, direct: Path) -> None:
    ranks = write_ranks(direct, tmp_path / "ranks", {"tp": 2, "pp": 2})
    steps = list(preparation.plan(build_spec(ranks, topology={"tp": 4, "pp": 2}, dtype="bfloat16")).of_kind(Kind.CONVERT))
    named = [[file["name"] for file in step.options["files"]] for step in steps]
    assert named == [["rank0.safetensors", "rank1.safetensors"], ["rank2.safetensors", "rank3.safetensors"]]


def test_convert_step_of_plain_tensors_says_nothing_of_pieces(direct: Path) -> None:
    (step,) = preparation.plan(build_spec(direct, dtype="bfloat16")).of_kind(Kind.CONVERT)
    assert "assembly" not in json.dumps(step.options)


def test_from_meta_ckpt_reads_only_meta(tmp_path: Path, direct: Path, metas: dict[tuple[int, bool], Path]) -> None:
    place = Place(tp_size=8, rank=3)
    expected = LLaMAForCausalLM.from_hugging_face(direct, mapping=place).weights()
    found = LLaMAForCausalLM.from_meta_ckpt(metas[8, False], mapping=place).weights()
    assert {name: bytes(weight.data) for name, weight in found.items()} == {
        name: bytes(weight.data) for name, weight in expected.items()
    }
    with pytest.raises(SourceMissingError, match="not in Meta's format"):
        LLaMAForCausalLM.from_meta_ckpt(direct)


def write_ranks(source: Path, folder: Path, topology: Mapping[str, Any], max_shard_bytes: str = "1GB") -> Path:
    """A TensorRT-LLM checkpoint folder, as `orchestrator convert` leaves it."""
    dtype = json.loads((source / "config.json").read_text())["dtype"]
    conversion = {"max_shard_bytes": max_shard_bytes}
    made = preparation.plan(build_spec(source, topology=dict(topology), dtype=dtype, conversion=conversion))
    store = FileStore((folder.parent / f"{folder.name}-store").as_uri())
    folder.mkdir()
    for outcome in run_steps(made, store.url, (Kind.CONVERT,)).values():
        for output in outcome.outputs:
            (folder / output.name).write_bytes(store.get(output.key))
    for name, index in trtllm_files.shard_indexes(made.inputs.weights, made.topology).items():
        trtllm_files.write_json(folder / name, index)
    (folder / "config.json").write_text(json.dumps(to_trtllm(made.inputs.config, made.topology)))
    return folder


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize(
    ("written", "max_shard_bytes"),
    [
        pytest.param({}, "1GB", id="from-one-rank"),
        pytest.param({"tp": 2, "pp": 2}, "1GB", id="from-tp2-pp2-uneven"),
        pytest.param({"tp": 4, "pp": 3, "pp_partition": [1, 3, 1]}, "3KB", id="from-tp4-pp3-partition-in-shards"),
        pytest.param({"tp": 8}, "1GB", id="from-tp8-kv-heads-duplicated"),
    ],
)
def test_convert_of_ranks_to_other_ranks_equals_direct_conversion(
    tmp_path: Path, direct: Path, written: dict[str, Any], max_shard_bytes: str, topology: dict[str, Any]
) -> None:
    ranks = write_ranks(direct, tmp_path / "ranks", written, max_shard_bytes)
    assert read_source(str(ranks))[0].format == "trtllm"
    assert converted(ranks, tmp_path / "again", topology) == converted(direct, tmp_path / "direct", topology)


MODELS: list[Any] = [
    pytest.param({"tie_word_embeddings": True}, id="tied"),
    pytest.param({"attn_bias": True, "attn_dense_bias": True, "mlp_bias": True}, id="biases"),
    pytest.param({"vocab_size": 53, "dtype": "float16"}, id="padded-vocabulary"),
    pytest.param({"rotary_base": 500000.0, "num_key_value_heads": 1}, id="one-kv-head"),
]


@pytest.mark.parametrize("changes", MODELS)
def test_convert_of_ranks_of_other_models_equals_direct_conversion(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = CONFIG.model_copy(update=changes)
    dtype = {"bfloat16": "BF16", "float16": "F16"}[config.dtype]
    source = write_source(tmp_path / "source", config, random_arrays(config, dtype))
    ranks = write_ranks(source, tmp_path / "ranks", {"tp": 4, "pp": 2})
    for number, topology in enumerate(({"tp": 2, "pp": 3}, {"tp": 8})):
        expected = converted(source, tmp_path / f"direct{number}", topology, config.dtype)
        assert converted(ranks, tmp_path / f"again{number}", topology, config.dtype) == expected


FAMILY_MODELS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 5},
    "qwen2": {"attn_bias": True},
    "qwen3": {"qk_layernorm": "head"},
    "phi3": {"rotary_embedding_dim": 2, "hidden_act": "swiglu"},
    "granite": {"embedding_multiplier": 12.0, "attention_scale": 0.5, "residual_multiplier": 0.22, "logits_scaling": 8.0},
    "olmo2": {"norm_placement": "post", "qk_layernorm": "full"},
    "gemma": {"exact_norms": True, "embedding_multiplier": 32**0.5, "tie_word_embeddings": True},
    "gemma2": {
        "exact_norms": True, "embedding_multiplier": 32**0.5, "norm_placement": "sandwich", "attention_scale": 0.25,
        "sliding_window": 7, "window_layers": (True, False, True), "final_logit_softcapping": 30.0,
    },
    "gemma3": {
        "exact_norms": True, "embedding_multiplier": 32**0.5, "norm_placement": "sandwich", "attention_scale": 0.25,
        "qk_layernorm": "head", "rotary_base_local": 5.0, "sliding_window": 7, "tie_word_embeddings": True,
    },
    "mixtral": {"moe": MoeConfig(num_experts=4, top_k=2)},
    "phimoe": {
        "norm_kind": "layer", "norm_bias": True, "attn_bias": True, "attn_dense_bias": True, "head_bias": True,
        "moe": MoeConfig(num_experts=4, top_k=2, normalization_mode=0, scoring="sparse_mixer", jitter=0.01),
    },
    "qwen3_moe": {
        "qk_layernorm": "head", "moe_intermediate_size": 16, "moe": MoeConfig(num_experts=4, top_k=2, normalization_mode=0),
    },
    "qwen2_moe": {
        "attn_bias": True, "moe_intermediate_size": 16,
        "moe": MoeConfig(num_experts=4, top_k=2, normalization_mode=0, shared_expert_intermediate_size=24),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_convert_of_ranks_of_every_kind_of_family_equals_direct_conversion(tmp_path: Path, name: str) -> None:
    family = family_named(name)
    config = CONFIG.model_copy(update={"architecture": family.architectures[0], "num_hidden_layers": 3, **FAMILY_MODELS[name]})
    generator = np.random.default_rng(3)
    whole = trtllm._whole_tensors(family, config)
    arrays = {key: generator.standard_normal(tensor.shape).astype(ml_dtypes.bfloat16) for key, tensor in whole.items()}
    source = write_source(tmp_path / "source", config, arrays)
    (source / "config.json").write_text(json.dumps(hugging_face_config(config, family)))
    split = {"tp": 4, "pp": 2, "moe_ep": 2} if config.moe else {"tp": 4, "pp": 2}
    ranks = write_ranks(source, tmp_path / "ranks", split)
    for number, topology in enumerate(({"tp": 2, "pp": 3}, {"tp": 4, "moe_ep": 4} if config.moe else {"tp": 8})):
        expected = converted(source, tmp_path / f"direct{number}", topology)
        assert converted(ranks, tmp_path / f"again{number}", topology) == expected
    found = compare(str(source), str(ranks))
    assert (found.only_a, found.only_b, found.beyond) == ((), (), ())
    assert found.same
    widened = {re.sub(r"\d+", "*", item.name) for item in found.differences}
    assert {item.dtypes for item in found.differences} <= {("BF16", "F32")}
    assert widened == {re.sub(r"\d+", "*", name) for name in arrays if is_kept_in_float32(name, config)}


def is_kept_in_float32(name: str, config: ModelConfig) -> bool:
    router = config.moe is not None and name.endswith((".gate.weight",))
    return router or (config.exact_norms and "norm" in name)


def test_compare_of_a_mixture_with_another_router_finds_it(tmp_path: Path) -> None:
    family = family_named("mixtral")
    config = CONFIG.model_copy(update={"architecture": family.architectures[0], "num_hidden_layers": 2, **FAMILY_MODELS["mixtral"]})
    whole = trtllm._whole_tensors(family, config)
    arrays = {key: np.ones(tensor.shape, ml_dtypes.bfloat16) for key, tensor in whole.items()}
    source, other = (write_source(tmp_path / name, config, arrays) for name in ("source", "other"))
    router = "model.layers.1.block_sparse_moe.gate.weight"
    for folder in (source, other):
        (folder / "config.json").write_text(json.dumps(hugging_face_config(config, family)))
    ranks = write_ranks(source, tmp_path / "ranks", {"tp": 2})
    arrays[router][3, 5] = 1.0078125  # the next number of bfloat16
    (other / "model.safetensors").write_bytes(encode_safetensors(arrays))
    found = compare(str(other), str(ranks))
    assert not found.same
    assert [(item.name, item.num_different) for item in found.beyond] == [(router, 1)]


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_convert_of_phi3_joins_up_and_gate_as_tensorrt_llm_does(tmp_path: Path, tp: int) -> None:
    """TensorRT-LLM 0.16 swaps the halves of gate_up_proj (models/phi3/convert.py); each rank takes its part of both."""
    family = family_named("phi3")
    config = CONFIG.model_copy(update={"architecture": family.architectures[0], "num_hidden_layers": 1, "hidden_act": "swiglu"})
    generator = np.random.default_rng(5)
    whole = trtllm._whole_tensors(family, config)
    arrays = {key: generator.standard_normal(tensor.shape).astype(ml_dtypes.bfloat16) for key, tensor in whole.items()}
    source = write_source(tmp_path / "source", config, arrays)
    (source / "config.json").write_text(json.dumps(hugging_face_config(config, family)))
    stages.convert(build_spec(source, topology={"tp": tp}), tmp_path / "ranks")
    written = json.loads((tmp_path / "ranks" / "config.json").read_text())
    assert (written["architecture"], written["hidden_act"]) == ("Phi3ForCausalLM", "swiglu")
    gate, up = np.split(arrays["model.layers.0.mlp.gate_up_proj.weight"], 2)
    for rank in range(tp):
        tensors = safetensors.numpy.load_file(tmp_path / "ranks" / f"rank{rank}.safetensors")
        assert not any(".mlp.gate." in name for name in tensors)
        wanted = np.concatenate([np.split(up, tp)[rank], np.split(gate, tp)[rank]])
        np.testing.assert_array_equal(tensors["transformer.layers.0.mlp.fc.weight"], wanted)


@pytest.mark.parametrize(
    "scaling",
    [{"type": "linear", "factor": 4}, {"rope_type": "yarn", "factor": 4.0, "finetuned": True}, {"type": "dynamic", "factor": 2.0}],
)
def test_ranks_whose_rotary_scaling_is_written_as_hugging_face_has_it_are_read(
    tmp_path: Path, direct: Path, scaling: dict[str, Any]
) -> None:
    ranks = write_ranks(direct, tmp_path / "ranks", {"tp": 2})
    plain = json.loads((ranks / "config.json").read_text())
    (ranks / "config.json").write_text(json.dumps({**plain, "rotary_scaling": scaling}))
    read = preparation.plan(build_spec(ranks)).inputs.config.rotary_scaling
    assert read is not None
    assert (read["rope_type"], read["factor"]) == (scaling.get("rope_type", scaling.get("type")), scaling["factor"])


def test_ranks_whose_positions_are_of_another_type_are_refused(tmp_path: Path, direct: Path) -> None:
    ranks = write_ranks(direct, tmp_path / "ranks", {"tp": 2})
    plain = json.loads((ranks / "config.json").read_text())
    (ranks / "config.json").write_text(json.dumps({**plain, "position_embedding_type": "long_rope"}))
    with pytest.raises(ArchitectureError, match=r"position_embedding_type .* 'long_rope'"):
        read_source(str(ranks))


def test_ranks_of_gemma_without_exact_norms_are_refused(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"architecture": "GemmaForCausalLM"})
    with pytest.raises(ArchitectureError, match="rounded after adding 1"):
        trtllm._whole_tensors(family_named("gemma"), config)


@pytest.mark.parametrize("dim", [0, 1])
def test_convert_of_ranks_with_a_split_embedding_equals_direct_conversion(tmp_path: Path, direct: Path, dim: int) -> None:
    ranks = write_ranks(direct, tmp_path / "ranks", {"tp": 2})
    for rank in range(2):
        path = ranks / f"rank{rank}.safetensors"
        tensors = safetensors.numpy.load_file(path)
        name = "transformer.vocab_embedding.weight"
        tensors[name] = np.ascontiguousarray(np.split(tensors[name], 2, dim)[rank])
        safetensors.numpy.save_file({**tensors, "rotary_inv_freq": np.ones(2, np.float32)}, path)
    change(ranks, use_parallel_embedding=True, embedding_sharding_dim=dim)
    assert converted(ranks, tmp_path / "again", {"tp": 4}) == converted(direct, tmp_path / "direct", {"tp": 4})


def change(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_ranks_of_a_tied_model_may_lack_the_head(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"tie_word_embeddings": True})
    source = write_source(tmp_path / "source", config, random_arrays(config))
    ranks = write_ranks(source, tmp_path / "ranks", {})
    tensors = safetensors.numpy.load_file(ranks / "rank0.safetensors")
    del tensors["lm_head.weight"]
    safetensors.numpy.save_file(tensors, ranks / "rank0.safetensors")
    assert converted(ranks, tmp_path / "again", {"tp": 2}) == converted(source, tmp_path / "direct", {"tp": 2})


def test_ranks_that_do_not_add_up_are_refused(tmp_path: Path, direct: Path) -> None:
    ranks = write_ranks(direct, tmp_path / "ranks", {"tp": 2, "pp": 2})
    good = (ranks / "config.json").read_text()
    change(ranks, quantization={"quant_algo": "FP8"})
    refused(ranks, QuantizationError, "FP8")
    (ranks / "config.json").write_text(good)
    change(ranks, intermediate_size=96)
    refused(ranks, SourceCorruptError, "config.json says")
    (ranks / "config.json").write_text(good)
    change(ranks, hidden_size="many")
    refused(ranks, SourceCorruptError, "not the config of a TensorRT-LLM checkpoint")
    (ranks / "config.json").write_text(good)
    change(ranks, architecture="BertModel")
    refused(ranks, ArchitectureError, "BertModel")
    (ranks / "config.json").write_text(good)
    change(ranks, residual_multiplier=2.0)
    refused(ranks, ArchitectureError, "residual_multiplier differ")
    (ranks / "config.json").write_text(good)
    path = ranks / "rank2.safetensors"
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file({**tensors, "transformer.layers.0.mlp.fc.scale": np.ones(2, np.float32)}, path)
    refused(ranks, WeightMapError, r"rank2 holds 1 tensors .*mlp\.fc\.scale")
    del tensors["transformer.layers.1.mlp.fc.weight"]
    safetensors.numpy.save_file(tensors, path)
    refused(ranks, SourceMissingError, r"rank2 lacks transformer\.layers\.1\.mlp\.fc\.weight")
    path.unlink()
    refused(ranks, SourceMissingError, r"no rank2\.safetensors")


def refused(folder: Path, error: type[OrchestratorError], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        read_source(str(folder))
    assert type(caught.value) is error
