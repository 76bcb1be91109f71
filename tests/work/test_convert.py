"""Conversion against plain slices of whole tensors, written from the rules of TensorRT-LLM's checkpoints."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from orchestrator import stages, work
from orchestrator.base.errors import (
    DtypeError,
    OrchestratorError,
    SourceCorruptError,
    SourceMissingError,
    StoreError,
    WeightMapError,
)
from orchestrator.base.pages import is_on_page
from orchestrator.checkpoints.safetensors import read_header
from orchestrator.events import StepProgressed
from orchestrator.model.checkpoint import TensorInfo
from orchestrator.model.config import ModelConfig
from orchestrator.model.rules import Span
from orchestrator.model.targets import PackedScale, QuantizedWeight, Read, Target
from orchestrator.model.topology import Topology
from orchestrator.planning import preparation
from orchestrator.planning.options import ConvertOptions
from orchestrator.planning.plan import Plan
from orchestrator.planning.quantization import read_checkpoint
from orchestrator.planning.steps import Kind, Outcome, Task
from orchestrator.quantizers import QUANTIZERS
from orchestrator.quantizers.formats import pack_rows
from orchestrator.scheduling import commits
from orchestrator.stores import open_store
from orchestrator.stores.source import LocalFolder
from orchestrator.stores.store import Store
from orchestrator.work.context import HashingWriter, SharedBlock
from orchestrator.work.convert import cutting, packing
from orchestrator.work.convert import step as converting
from tests.support.strategies import parallel_models
from tests.support.synthetic import NUMPY_DTYPES, SAFETENSORS_DTYPES, Array, build_spec, model_config, random_arrays, write_source

UNLIMITED = 10**12
NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]
"""Name to dtype, shape and bytes."""


def expected_rank(arrays: dict[str, Array], config: ModelConfig, topology: Topology, rank: int) -> Tensors:
    """What `rank` holds: whole tensors, split by numpy."""
    tp, part, stage = topology.tp, rank % topology.tp, rank // topology.tp
    if topology.pp_partition is None:
        layers = np.array_split(np.arange(config.num_hidden_layers), topology.pp)[stage]
    else:
        layers = np.split(np.arange(config.num_hidden_layers), np.cumsum(topology.pp_partition)[:-1])[stage]
    embedding = arrays["model.embed_tokens.weight"]
    found: dict[str, Array] = {}
    if stage == 0:
        found["transformer.vocab_embedding.weight"] = embedding
    for local, layer in enumerate(layers):
        for name, array in _expected_layer(arrays, f"model.layers.{layer}.", config, tp, part).items():
            found[f"transformer.layers.{local}.{name}"] = array
    if stage == topology.pp - 1:
        head = embedding if config.tie_word_embeddings else arrays["lm_head.weight"]
        padded = np.concatenate([head, np.zeros((-len(head) % tp, head.shape[1]), head.dtype)])
        found["transformer.ln_f.weight"] = arrays["model.norm.weight"]
        found["lm_head.weight"] = np.split(padded, tp)[part]
    return {name: (SAFETENSORS_DTYPES[array.dtype], array.shape, array.tobytes()) for name, array in found.items()}


def _expected_layer(arrays: dict[str, Array], prefix: str, config: ModelConfig, tp: int, part: int) -> dict[str, Array]:
    def source(name: str) -> Array:
        return arrays[prefix + name]

    def kv_heads(name: str) -> Array:
        heads = np.split(source(name), config.num_key_value_heads)
        copies = max(tp // config.num_key_value_heads, 1)
        return np.split(np.concatenate([head for head in heads for _ in range(copies)]), tp)[part]

    def fused(what: str) -> Array:
        query = np.split(source(f"self_attn.q_proj.{what}"), tp)[part]
        return np.concatenate([query, kv_heads(f"self_attn.k_proj.{what}"), kv_heads(f"self_attn.v_proj.{what}")])

    found = {
        "input_layernorm.weight": source("input_layernorm.weight"),
        "post_layernorm.weight": source("post_attention_layernorm.weight"),
        "attention.qkv.weight": fused("weight"),
        "attention.dense.weight": np.split(source("self_attn.o_proj.weight"), tp, axis=1)[part],
        "mlp.fc.weight": np.split(source("mlp.gate_proj.weight"), tp)[part],
        "mlp.gate.weight": np.split(source("mlp.up_proj.weight"), tp)[part],
        "mlp.proj.weight": np.split(source("mlp.down_proj.weight"), tp, axis=1)[part],
    }
    if config.attn_bias:
        found["attention.qkv.bias"] = fused("bias")
        found["attention.dense.bias"] = source("self_attn.o_proj.bias")
    if config.mlp_bias:
        found["mlp.fc.bias"] = np.split(source("mlp.gate_proj.bias"), tp)[part]
        found["mlp.gate.bias"] = np.split(source("mlp.up_proj.bias"), tp)[part]
        found["mlp.proj.bias"] = source("mlp.down_proj.bias")
    return found


@dataclass
class Conversion:
    """A plan whose convert steps can be run one after the other."""

    plan: Plan
    store: Store
    scratch: Path

    def run(self) -> list[Outcome]:
        return [self.run_step(number) for number in range(len(list(self.plan.of_kind(Kind.CONVERT))))]

    def run_step(self, number: int, events: list[StepProgressed] | None = None) -> Outcome:
        step = list(self.plan.of_kind(Kind.CONVERT))[number]
        task = Task(step=step, inputs={}, attempt=1, store=self.store.url, scratch=str(self.scratch))
        return work.run(task, [].append if events is None else events.append, "node")


def conversion(
    folder: Path, config: ModelConfig, arrays: dict[str, Array], topology: Topology | None = None, **sections: Any
) -> Conversion:
    """Write the source below `folder`, plan it, and open an empty store beside it; `sections` as in the spec."""
    wanted = topology or Topology(1, 1)
    source = write_source(folder / "source", config, arrays, num_files=sections.pop("num_files", 1))
    split = {"tp": wanted.tp, "pp": wanted.pp, "pp_partition": wanted.pp_partition}
    made = preparation.plan(build_spec(source, **{"dtype": config.dtype, "topology": split, **sections}))
    (folder / "scratch").mkdir()
    return Conversion(made, open_store((folder / "store").as_uri()), folder / "scratch")


def contents(store: Store, outcomes: list[Outcome]) -> dict[str, Tensors]:
    """Every written file, read by the safetensors library, after its size and sha256 were compared with the outcome."""
    found: dict[str, Tensors] = {}
    for outcome in outcomes:
        for output in outcome.outputs:
            data = store.get(output.key)
            assert (len(data), hashlib.sha256(data).hexdigest()) == (output.num_bytes, output.sha256)
            assert output.name not in found
            found[output.name] = {
                name: (fields["dtype"], tuple(fields["shape"]), bytes(fields["data"]))
                for name, fields in safetensors.deserialize(data)
            }
    return found


def ranks_of(files: dict[str, Tensors], topology: Topology) -> list[Tensors]:
    """The tensors of each rank, whatever number of shards they are in; none twice."""
    ranks: list[Tensors] = [{} for _ in range(topology.world_size)]
    for file, tensors in files.items():
        rank = int(file.removeprefix("rank").split(".")[0].split("-")[0])
        assert ranks[rank].keys().isdisjoint(tensors)
        ranks[rank] |= tensors
    return ranks


def check_everything(made: Conversion, config: ModelConfig, topology: Topology, arrays: dict[str, Array]) -> dict[str, Tensors]:
    outcomes = made.run()
    files = contents(made.store, outcomes)
    for rank, tensors in enumerate(ranks_of(files, topology)):
        assert tensors == expected_rank(arrays, config, topology, rank)
    assert [outcome.facts.source_bytes_read for outcome in outcomes] == [
        sum(tensor.num_bytes for tensor in group.sources().values()) for group in made.plan.inputs.weights.groups
    ]
    return files


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    model=parallel_models(),
    dtype=st.sampled_from(["F32", "BF16", "F16"]),
    max_shard_bytes=st.sampled_from([1, 700, UNLIMITED]),
    block_bytes=st.sampled_from([1, 5, 16, 64, 1000, cutting.BLOCK_BYTES]),
    num_files=st.integers(1, 3),
)
def test_convert_any_model_and_topology_equals_plain_slices(
    tmp_path_factory: pytest.TempPathFactory,
    model: tuple[ModelConfig, Topology],
    dtype: str,
    max_shard_bytes: int,
    block_bytes: int,
    num_files: int,
) -> None:
    config, topology = model[0].model_copy(update={"dtype": NAMES[dtype]}), model[1]
    arrays = random_arrays(config, dtype, seed=max_shard_bytes + block_bytes)
    shards = {"max_shard_bytes": max_shard_bytes}
    made = conversion(tmp_path_factory.mktemp("convert"), config, arrays, topology, conversion=shards, num_files=num_files)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutting, "BLOCK_BYTES", block_bytes)
        check_everything(made, config, topology, arrays)


ROWS = 7
ROW_BYTES = 2 * 8


@pytest.mark.parametrize(
    "block_bytes", [1, ROW_BYTES - 1, ROW_BYTES, ROW_BYTES + 1, 2 * ROW_BYTES, ROWS * ROW_BYTES - 1, ROWS * ROW_BYTES]
)
@pytest.mark.parametrize("tied", [False, True])
def test_convert_blocks_of_any_size_give_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int, tied: bool
) -> None:
    config = model_config(hidden_size=8, vocab_size=ROWS, num_hidden_layers=1, tie_word_embeddings=tied)
    arrays, topology = random_arrays(config), Topology(4, 1)
    monkeypatch.setattr(cutting, "BLOCK_BYTES", block_bytes)
    check_everything(conversion(tmp_path, config, arrays, topology), config, topology, arrays)


def test_convert_more_ranks_than_words_gives_some_ranks_only_padding(tmp_path: Path) -> None:
    config = model_config(vocab_size=5, num_attention_heads=4, num_key_value_heads=1)
    arrays, topology = random_arrays(config), Topology(4, 1)
    files = check_everything(conversion(tmp_path, config, arrays, topology), config, topology, arrays)
    assert files["rank3.safetensors"]["lm_head.weight"] == ("BF16", (2, 16), bytes(2 * 16 * 2))


@pytest.mark.parametrize(("pp", "times_read"), [(1, 1), (2, 2)])
def test_convert_tied_embedding_is_read_once_by_each_task(tmp_path: Path, pp: int, times_read: int) -> None:
    config = model_config(tie_word_embeddings=True)
    arrays, topology = random_arrays(config), Topology(2, pp)
    made = conversion(tmp_path, config, arrays, topology)
    check_everything(made, config, topology, arrays)
    others = sum(array.nbytes for name, array in arrays.items() if name != "model.embed_tokens.weight")
    done = commits.committed(made.store, (step.digest for step in made.plan.steps))
    total = sum(outcome.facts.source_bytes_read for outcome in done.values())
    assert total == others + times_read * arrays["model.embed_tokens.weight"].nbytes


def test_convert_ranks_split_by_max_shard_bytes_hold_the_same_tensors(tmp_path: Path) -> None:
    config = model_config()
    arrays, topology = random_arrays(config), Topology(2, 1)
    shards = {"max_shard_bytes": 3000}
    files = check_everything(conversion(tmp_path, config, arrays, topology, conversion=shards), config, topology, arrays)
    assert sorted(files) == [f"rank{rank}-{number:05d}-of-00004.safetensors" for rank in range(2) for number in (1, 2, 3, 4)]
    for tensors in files.values():
        assert sum(len(data) for _, _, data in tensors.values()) <= 3000


def test_convert_stages_name_their_files_by_world_rank(tmp_path: Path) -> None:
    config = model_config()
    made = conversion(tmp_path, config, random_arrays(config), Topology(2, 2))
    outputs = [[output.name for output in outcome.outputs] for outcome in made.run()]
    assert outputs == [["rank0.safetensors", "rank1.safetensors"], ["rank2.safetensors", "rank3.safetensors"]]


def test_convert_file_is_loaded_by_torch_and_its_data_starts_on_a_page(tmp_path: Path) -> None:
    config = model_config()
    made = conversion(tmp_path, config, random_arrays(config))
    path = made.store.local_path(made.run()[0].outputs[0].key)
    assert path is not None
    loaded = safetensors.torch.load_file(path)
    assert str(loaded["lm_head.weight"].dtype) == "torch.bfloat16"
    entries, metadata = read_header(path)
    assert entries[0].offset % 4096 == 0
    assert metadata == {"format": "pt"}


def test_convert_progress_ends_at_the_estimate(tmp_path: Path) -> None:
    config = model_config()
    made, events = conversion(tmp_path, config, random_arrays(config)), list[StepProgressed]()
    outcome = made.run_step(0, events)
    assert [event.done for event in events] == sorted(event.done for event in events)
    assert events[-1].done == events[-1].total == outcome.facts.source_bytes_read
    assert {(event.phase, event.unit, event.digest) for event in events} == {("convert", "bytes", outcome.digest)}


def test_run_committed_step_is_not_done_again(tmp_path: Path) -> None:
    config = model_config()
    made = conversion(tmp_path, config, random_arrays(config))
    first = made.run_step(0)
    (tmp_path / "source" / "model.safetensors").unlink()
    assert made.run_step(0) == first
    assert first.node == "node"
    assert first.facts.peak_memory_bytes > 0


def objects(store: Store) -> list[str]:
    return [info.key for info in store.list("")]


def fails_and_leaves_nothing(made: Conversion, error: type[OrchestratorError], words: str) -> OrchestratorError:
    with pytest.raises(error, match=words) as caught:
        made.run_step(0)
    assert objects(made.store) == []
    assert commits.committed(made.store, (step.digest for step in made.plan.steps)) == {}
    assert list(made.scratch.iterdir()) == []
    return caught.value


@pytest.mark.parametrize("lost", [1, 300, 10_000])
def test_convert_source_that_shrinks_after_planning_leaves_nothing(tmp_path: Path, lost: int) -> None:
    config = model_config()
    made = conversion(tmp_path, config, random_arrays(config), Topology(2, 1))
    path = tmp_path / "source" / "model.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - lost)
    fails_and_leaves_nothing(made, SourceCorruptError, "model.safetensors is not the file that the plan was made from")


def test_convert_source_that_vanishes_after_planning_leaves_nothing(tmp_path: Path) -> None:
    config = model_config()
    made = conversion(tmp_path, config, random_arrays(config))
    (tmp_path / "source" / "model.safetensors").unlink()
    fails_and_leaves_nothing(made, SourceMissingError, "is missing on this node")


def test_convert_source_that_is_replaced_after_planning_leaves_nothing(tmp_path: Path) -> None:
    config = model_config()
    made = conversion(tmp_path, config, random_arrays(config, seed=1))
    write_source(tmp_path / "source", config, random_arrays(config, seed=2))
    with (tmp_path / "source" / "model.safetensors").open("ab") as file:
        file.write(b"grown")
    fails_and_leaves_nothing(made, SourceCorruptError, "model.safetensors")


@pytest.mark.parametrize("source", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("target", ["F32", "F16", "BF16"])
def test_convert_to_another_dtype_rounds_as_torch_does(tmp_path: Path, source: str, target: str) -> None:
    import torch

    config = model_config(dtype=NAMES[target])
    arrays, topology = random_arrays(config, source), Topology(2, 1)
    kinds = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    cast = {name: _torch_cast(array, kinds[source], kinds[target]).view(NUMPY_DTYPES[target]) for name, array in arrays.items()}
    made = conversion(tmp_path, config, arrays, topology)
    for rank, tensors in enumerate(ranks_of(contents(made.store, made.run()), topology)):
        assert tensors == expected_rank(cast, config, topology, rank)


def _torch_cast(array: Array, source: Any, target: Any) -> Array:
    import torch

    whole = torch.frombuffer(bytearray(array.tobytes()), dtype=source).reshape(array.shape)
    found: Array = whole.to(target).contiguous().view(torch.uint8).numpy()
    return found


@pytest.mark.parametrize("target", ["F16", "BF16"])
@given(values=hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(-65000, 65000, width=32)))
def test_cast_rounds_to_nearest_even(target: str, values: Array) -> None:
    info = TensorInfo("w", "F32", values.shape, 0, 0, values.nbytes)
    block = values.view(np.uint8).reshape(len(values), 4).copy()
    found = cutting.cast(block, info, target)
    assert found.shape == (len(values), 2)
    assert found.tobytes() == values.astype(NUMPY_DTYPES[target]).tobytes()


def with_value(config: ModelConfig, dtype: str, value: float) -> dict[str, Array]:
    arrays = random_arrays(config, dtype)
    arrays["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    return arrays


@pytest.mark.parametrize(("dtype", "value"), [("F32", 70000.0), ("F32", -65520.0), ("BF16", 1e6), ("F64", 1e300)])
def test_convert_value_beyond_float16_leaves_nothing(tmp_path: Path, dtype: str, value: float) -> None:
    config = model_config(dtype="float16")
    made = conversion(tmp_path, config, with_value(config, dtype, value), Topology(2, 1))
    error = fails_and_leaves_nothing(made, DtypeError, r"model\.layers\.1\.mlp\.up_proj\.weight holds .*, float16 ends at 65504")
    assert "bfloat16" in error.advice


@pytest.mark.parametrize("value", [65504.0, 65519.0, float("inf"), float("-inf"), float("nan"), 1e-9])
def test_convert_value_that_float16_has_is_kept(tmp_path: Path, value: float) -> None:
    config = model_config(dtype="float16")
    made = conversion(tmp_path, config, with_value(config, "F32", value))
    (tensors,) = contents(made.store, made.run()).values()
    found = np.frombuffer(tensors["transformer.layers.1.mlp.gate.weight"][2], np.float16).reshape(24, 16)[3, 5]
    np.testing.assert_equal(found, np.float16(min(value, 65504.0)) if np.isfinite(value) else np.float16(value))


@pytest.mark.parametrize(
    ("dtype", "target", "value"), [("F32", "bfloat16", 3.4028234e38), ("F64", "bfloat16", 1e300), ("F64", "float32", 1e300)]
)
def test_convert_value_beyond_the_other_dtypes_leaves_nothing(tmp_path: Path, dtype: str, target: str, value: float) -> None:
    config = model_config(dtype=target)
    made = conversion(tmp_path, config, with_value(config, dtype, value))
    fails_and_leaves_nothing(made, DtypeError, "holds")


def test_convert_integers_are_no_weights(tmp_path: Path) -> None:
    config = model_config()
    arrays = random_arrays(config)
    arrays["model.norm.weight"] = np.arange(16)
    with pytest.raises(WeightMapError, match=r"model\.norm\.weight is I64, weights must be one of F64, F32, F16, BF16"):
        conversion(tmp_path, config, arrays)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@given(place=st.integers(0, 999), value=st.sampled_from([np.nan, np.inf, -np.inf]), sign=st.sampled_from([1, -1]))
def test_is_finite_finds_one_value_wherever_it_stands(dtype: str, place: int, value: float, sign: int) -> None:
    values = np.random.default_rng(place).normal(size=1000).astype(NUMPY_DTYPES[dtype])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutting, "_STRETCH_BYTES", 64)
        assert cutting.is_finite(values.view(np.uint8).reshape(10, -1), dtype)
        values[place] = np.copysign(value, sign)
        assert not cutting.is_finite(values.view(np.uint8).reshape(10, -1), dtype)


class SlowSource:
    """One tensor of numbered rows; knows how many blocks it has given."""

    def __init__(self, rows: int, row_bytes: int) -> None:
        self.data = np.repeat(np.arange(rows, dtype=np.uint8), row_bytes)
        self.changed = threading.Condition()
        self.blocks = 0

    def read_rows(self, tensor: TensorInfo, begin: int, end: int, buffer: memoryview) -> None:
        row_bytes = tensor.num_bytes // tensor.shape[0]
        buffer[:] = self.data[begin * row_bytes : end * row_bytes].data
        with self.changed:
            self.blocks += 1
            self.changed.notify_all()

    def wait_for(self, blocks: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.blocks >= blocks, timeout=30)


class SlowSink:
    """Takes a block only after two more were read behind it."""

    def __init__(self, source: SlowSource, num_blocks: int) -> None:
        self.source, self.num_blocks = source, num_blocks
        self.written: list[bytes] = []

    def write(self, data: memoryview) -> None:
        self.source.wait_for(min(len(self.written) + 3, self.num_blocks))
        self.written.append(bytes(data))


def test_cutter_reads_ahead_without_touching_what_is_being_written(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, row_bytes = 12, 8
    monkeypatch.setattr(cutting, "BLOCK_BYTES", row_bytes)
    source = SlowSource(rows, row_bytes)
    sinks = [SlowSink(source, rows) for _ in range(2)]
    tensor = TensorInfo("w", "F16", (rows, row_bytes // 2), 0, 0, rows * row_bytes)
    moved: list[int] = []
    cutting.Cutter(source.read_rows, sinks, moved.append).run([Target("t", "F16", tensor.shape, (Read(tensor, None, ()),))])
    for sink in sinks:
        assert b"".join(sink.written) == source.data.tobytes()
    assert moved == [row_bytes] * rows


def test_cutter_reads_the_next_tensor_while_one_is_written() -> None:
    rows, row_bytes = 4, 8
    source = SlowSource(3 * rows, row_bytes)
    tensors = [TensorInfo(f"w{part}", "F16", (rows, row_bytes // 2), 0, 0, rows * row_bytes) for part in range(3)]
    sink = SlowSink(source, len(tensors))

    def read_rows(tensor: TensorInfo, begin: int, end: int, buffer: memoryview) -> None:
        first = tensors.index(tensor) * rows
        source.read_rows(tensor, first + begin, first + end, buffer)

    targets = [Target(tensor.name, "F16", tensor.shape, (Read(tensor, None, ()),)) for tensor in tensors]
    cutting.Cutter(read_rows, [sink], lambda num_bytes: None).run(targets)
    assert sink.written == [bytes(part) for part in np.split(source.data, 3)]


class Blocks:
    """A sink that knows whether each of its pieces started on a page, and which threads brought them."""

    def __init__(self) -> None:
        self.on_page: list[bool] = []
        self.threads: set[int] = set()
        self.data = b""

    def write(self, data: memoryview) -> None:
        self.threads.add(threading.get_ident())
        self.on_page.append(is_on_page(data))
        self.data += data


@pytest.mark.parametrize("axis", [0, 1])
def test_cutter_gives_cuts_of_rows_and_of_columns_on_pages(axis: int) -> None:
    array = np.random.default_rng(axis).integers(0, 256, (8, 4096), np.uint8)
    tensor = TensorInfo("w", "F16", (8, 2048), 0, 0, array.size)
    spans = (Span(0, tensor.shape[axis] // 2), Span(tensor.shape[axis] // 2, tensor.shape[axis]))
    sinks = [Blocks(), Blocks()]

    def read_rows(_tensor: TensorInfo, begin: int, end: int, buffer: memoryview) -> None:
        assert is_on_page(buffer)
        buffer[:] = array[begin:end].reshape(-1).data

    target = Target("t", "F16", tensor.shape, (Read(tensor, axis, spans),))
    cutting.Cutter(read_rows, sinks, lambda num_bytes: None).run([target])
    assert [sink.data for sink in sinks] == [part.tobytes() for part in np.split(array, 2, axis)]
    assert [sink.on_page for sink in sinks] == [[True], [True]]


@pytest.mark.parametrize("block_rows", [1, 6, 64])
def test_cutter_writes_the_parts_of_a_quantized_weight_in_order_and_its_scales_behind(
    monkeypatch: pytest.MonkeyPatch, block_rows: int
) -> None:
    import torch

    rows, inner = 64, 32
    weight = torch.randn(rows, inner, generator=torch.Generator().manual_seed(1))
    tensor = TensorInfo("model.layers.0.w.weight", "F32", (rows, inner), 0, 0, rows * inner * 4)
    fmt = QUANTIZERS["W8A16"].linear
    monkeypatch.setattr(cutting, "BLOCK_BYTES", block_rows * inner * 4)
    monkeypatch.setattr(packing, "_ROWS_BYTES", 2 * inner * 4)  # two rows at a time: many pieces of one rank in a block
    half = rows // 2
    read = Read(tensor, 0, (Span(0, half), Span(half, rows)))
    stored = "transformer.layers.0.w.weight"
    targets = [
        Target(stored, "I8", (half, inner), (read,), QuantizedWeight(fmt, "F32", ("model.layers.0.w",), (("model.layers.0.w",),))),
        Target("scale", "F32", (half,), scale=PackedScale(stored)),
    ]
    sinks = [Blocks(), Blocks()]
    data = weight.numpy().view(np.uint8)

    def read_rows(_tensor: TensorInfo, begin: int, end: int, buffer: memoryview) -> None:
        buffer[:] = data[begin:end].reshape(-1).data

    cutting.Cutter(read_rows, sinks, lambda num_bytes: None).run(targets)
    for sink, part in zip(sinks, weight.split(half), strict=True):
        packed = pack_rows(part, fmt, None)
        assert packed.scales is not None
        assert sink.data == packed.weight.numpy().tobytes() + packed.scales.float().numpy().tobytes()
        assert len(sink.threads) == 1  # more than one would write in any order


class Drain:
    """A store's writer that keeps what it is given."""

    def __init__(self) -> None:
        self.data = bytearray()

    def __enter__(self) -> Drain:
        return self

    def __exit__(self, *error: object) -> None: ...

    def write(self, data: bytes | bytearray | memoryview) -> int:
        self.data += data
        return len(data)


@given(blocks=st.lists(st.tuples(st.binary(max_size=50), st.sampled_from(["shared", "first alone", "all alone"])), max_size=8))
def test_writers_of_shared_blocks_have_the_hash_of_their_own_bytes(blocks: list[tuple[bytes, str]]) -> None:
    drains = [Drain() for _ in range(3)]
    writers = [HashingWriter(drain) for drain in drains]
    for data, how in blocks:
        if how == "shared":
            block = SharedBlock(memoryview(data))
            with ThreadPoolExecutor(3) as pool:
                list(pool.map(lambda writer, block=block: writer.write_shared(block), writers))
        else:
            for writer in writers[:1] if how == "first alone" else writers:
                writer.write(data)
    for drain, writer in zip(drains, writers, strict=True):
        assert (writer.sha256, writer.num_bytes) == (hashlib.sha256(drain.data).hexdigest(), len(drain.data))


class CountingHash:
    """Remembers what it has hashed; counts the work of all copies."""

    def __init__(self, seen: bytes, work: list[bytes]) -> None:
        self.seen, self.work = seen, work

    def digest(self) -> bytes:
        return self.seen

    def copy(self) -> CountingHash:
        return CountingHash(self.seen, self.work)

    def update(self, data: memoryview) -> None:
        self.seen += bytes(data)
        self.work.append(bytes(data))


def test_shared_block_is_hashed_once_for_each_history() -> None:
    work_done: list[bytes] = []
    block: Any = SharedBlock(memoryview(b"block"))
    found = [block.hashed_after(CountingHash(seen, work_done)).seen for seen in (b"a", b"a", b"b", b"a", b"b")]
    assert found == [b"ablock", b"ablock", b"bblock", b"ablock", b"bblock"]
    assert work_done == [b"block"] * 2


class FullSink:
    """A disk that is full after some bytes."""

    def __init__(self, room: int) -> None:
        self.room = room

    def write(self, data: memoryview) -> None:
        self.room -= len(data)
        if self.room < 0:
            raise StoreError("no space left")


@pytest.mark.parametrize("room", [0, 4500, 6000])
def test_write_shards_error_of_one_sink_discards_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    config = model_config()
    made = conversion(tmp_path, config, random_arrays(config), Topology(2, 1))
    options = ConvertOptions.model_validate(next(made.plan.of_kind(Kind.CONVERT)).options)
    monkeypatch.setattr(cutting, "BLOCK_BYTES", 64)
    ended: list[str] = []

    @contextmanager
    def open_output(name: str, num_bytes: int) -> Iterator[FullSink]:
        try:
            yield FullSink(room if name == options.shards[1] else num_bytes)
        except StoreError:
            ended.append(name)
            raise

    with pytest.raises(StoreError, match="no space left"), converting_source(tmp_path, options) as source:
        converting.write_shards(options, source, open_output, lambda num_bytes: None)
    assert sorted(ended) == sorted(options.shards)


@contextmanager
def converting_source(folder: Path, options: ConvertOptions) -> Iterator[Any]:
    with LocalFolder(folder / "source").open(options.files) as source:
        yield source


def test_verbs_convert_folder_has_config_indexes_and_every_rank(tmp_path: Path) -> None:
    config = model_config()
    arrays, topology = random_arrays(config), Topology(2, 2)
    source = write_source(tmp_path / "source", config, arrays)
    split = {"topology": {"tp": 2, "pp": 2}, "conversion": {"max_shard_bytes": 4000}}
    output = tmp_path / "checkpoint"
    stages.convert(build_spec(source, **split), output)
    assert read_checkpoint(output) == (config, topology, None)
    for rank in range(4):
        assert folder_rank(output, rank) == expected_rank(arrays, config, topology, rank)
    assert not (output / ".staging").exists()
    with pytest.raises(StoreError, match="already holds a checkpoint"):
        stages.convert(build_spec(source, **split), output)


def folder_rank(folder: Path, rank: int) -> Tensors:
    """A rank of a folder, found through its index where it has one."""
    index = folder / f"rank{rank}.safetensors.index.json"
    listed = json.loads(index.read_text())["weight_map"] if index.exists() else {}
    names = set(listed.values()) or {f"rank{rank}.safetensors"}
    found: Tensors = {}
    for name in names:
        for tensor, fields in safetensors.deserialize((folder / name).read_bytes()):
            assert listed.get(tensor, name) == name
            found[tensor] = (fields["dtype"], tuple(fields["shape"]), bytes(fields["data"]))
    return found
