"""Experts that a source stores as one tensor of a layer, read as those of the family: one tensor for each linear."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.base.errors import QuantizationError, SourceCorruptError
from orchestrator.checkpoints import read_source
from orchestrator.checkpoints.fused_experts import single_experts
from orchestrator.checkpoints.reading import RowReader
from orchestrator.families import family_named
from orchestrator.families.wrappers import language_config
from orchestrator.model.checkpoint import Encoding, Packing, Stored, TensorInfo
from orchestrator.model.config_hugging_face import from_hugging_face
from tests.checkpoints.test_language_models import TOKENS, computed, relative_error
from tests.support.wrappers import TEXTS, write_wrapper

QWEN3_VL_MOE = "Qwen3VLMoeForConditionalGeneration"
EXPERTS = "model.layers.0.mlp.experts"


def as_on_the_hub(folder: Path) -> None:
    """Store the experts as Qwen's publisher does, transposed."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    fused = [name for name in tensors if ".experts." in name]
    assert len(fused) == 6
    turned = {name: np.ascontiguousarray(tensors[name].swapaxes(1, 2)) for name in fused}
    save_file({**tensors, **turned}, folder / "model.safetensors")


@pytest.mark.parametrize("size", [48, 64, 32], ids=["no square", "square down", "square gate and up"])
def test_experts_of_one_tensor_are_read_as_on_the_hub_and_as_transformers_writes_them(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setitem(TEXTS["Qwen3VLMoe"], "moe_intermediate_size", size)
    larger = write_wrapper(QWEN3_VL_MOE, tmp_path / "model")
    with torch.inference_mode():
        expected = larger(input_ids=torch.tensor([TOKENS])).logits[0].numpy()
    _, written = computed(tmp_path / "model", tmp_path / "written")
    as_on_the_hub(tmp_path / "model")
    index, published = computed(tmp_path / "model", tmp_path / "published")
    assert relative_error(written, expected) < 1e-5
    assert np.array_equal(published, written)
    assert index.tensors[f"{EXPERTS}.7.up_proj.weight"].shape == (size, 64)
    assert not any(name.endswith((".gate_up_proj", "experts.down_proj")) for name in index.tensors)
    assert index.num_bytes == sum(each.num_bytes for each in read_source(str(tmp_path / "model"))[0].tensors.values())


class Counted:
    """A file in memory, which counts how often each of its bytes is read."""

    def __init__(self, data: bytes) -> None:
        self._data, self.times = data, Counter[int]()

    def read_into(self, file: int, offset: int, out: memoryview) -> None:
        out[:] = self._data[offset : offset + len(out)]
        self.times.update(range(offset, offset + len(out)))


def stored(fused: Any, down: Any) -> tuple[dict[str, TensorInfo], bytes]:
    """The index and the bytes of a file with both tensors."""
    tensors = {
        f"{EXPERTS}.gate_up_proj": TensorInfo(f"{EXPERTS}.gate_up_proj", "F32", fused.shape, 0, 0, fused.nbytes),
        f"{EXPERTS}.down_proj": TensorInfo(f"{EXPERTS}.down_proj", "F32", down.shape, 0, fused.nbytes, down.nbytes),
    }
    return tensors, fused.tobytes() + down.tobytes()


@given(
    count=st.integers(1, 3), hidden=st.integers(1, 6), inter=st.integers(1, 6), transposed=st.booleans(), share=st.floats(0, 1),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_every_row_of_an_expert_is_that_of_the_tensor_of_all_and_each_byte_is_read_once(
    count: int, hidden: int, inter: int, transposed: bool, share: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    fused, down = (rng.random((count, *size), np.float32) for size in ((2 * inter, hidden), (hidden, inter)))
    turned = [np.ascontiguousarray(each.swapaxes(1, 2)) if transposed else each for each in (fused, down)]
    tensors, data = stored(*turned)
    source = Counted(data)
    reader = RowReader("huggingface", source)  # type: ignore[arg-type]
    wanted = {"gate_proj": fused[:, :inter], "up_proj": fused[:, inter:], "down_proj": down}
    found = single_experts(tensors, hidden)
    assert len(found) == 3 * count
    for expert in range(count):
        for linear in ("up_proj", "gate_proj", "down_proj"):
            tensor, values = found[f"{EXPERTS}.{expert}.{linear}.weight"], wanted[linear][expert]
            assert tensor.shape == values.shape
            cut = round(share * len(values))
            for begin, end in ((0, cut), (cut, len(values))):
                out = bytearray(values[begin:end].nbytes)
                reader.read(tensor, begin, end, memoryview(out))
                assert bytes(out) == values[begin:end].tobytes()
    assert set(source.times) == set(range(len(data)))
    assert max(source.times.values()) == 1


@pytest.mark.parametrize(
    ("fused", "down"),
    [((4, 16, 8), (4, 8, 16)), ((4, 16, 8), (3, 8, 8)), ((4, 8, 16), (4, 8, 4)), ((4, 16, 9), (4, 8, 8)), ((4, 15, 8), (4, 8, 7))],
)
def test_experts_of_other_shapes_are_refused(fused: tuple[int, ...], down: tuple[int, ...]) -> None:
    tensors, _ = stored(np.zeros(fused, np.float32), np.zeros(down, np.float32))
    with pytest.raises(SourceCorruptError, match="which are no experts of hidden size 8"):
        single_experts(tensors, 8)


def test_quantized_experts_of_one_tensor_are_refused() -> None:
    tensors, _ = stored(np.zeros((4, 16, 8), np.float32), np.zeros((4, 8, 8), np.float32))
    name = f"{EXPERTS}.gate_up_proj"
    codes, scale = Stored("F8_E4M3", (16, 8), 0, 0), Stored("F32", (1, 1), 0, 0)
    tensors[name] = replace(tensors[name], encoding=Encoding(Packing.BYTES, "E4M3", codes, scale, (16, 8)))
    with pytest.raises(QuantizationError, match="quantized weights of all experts"):
        single_experts(tensors, 8)


@pytest.mark.parametrize(
    "given", [{}, {"norm_topk_prob": False, "use_sliding_window": True}, {"num_local_experts": 8, "rope_theta": 1e6}], ids=str
)
def test_keys_that_a_text_config_lacks_are_those_of_its_class(given: dict[str, Any]) -> None:
    """transformers' class differs from Qwen 3 MoE's in its defaults, and always normalizes the weights."""
    import transformers

    text = {"model_type": "qwen3_vl_moe_text", **given}
    found = language_config({"architectures": [QWEN3_VL_MOE], "model_type": "qwen3_vl_moe", "text_config": text})
    ours = from_hugging_face(found, found["architectures"][0], "bfloat16", family_named("qwen3_moe").config)
    theirs = transformers.Qwen3VLMoeTextConfig(**json.loads(json.dumps(given)))
    for name in (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.rotary_base == theirs.rope_parameters["rope_theta"]
    assert ours.head_size == theirs.head_dim
    assert ours.moe is not None
    assert (ours.moe.num_experts, ours.moe.top_k, ours.expert_size) == (
        theirs.num_local_experts if given.get("num_local_experts") else theirs.num_experts,
        theirs.num_experts_per_tok,
        theirs.moe_intermediate_size,
    )
    assert ours.moe.normalization_mode == 1
    assert ours.sliding_window is None
