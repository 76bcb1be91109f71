"""A model run layer by layer gives the logits of transformers' whole model, from any place, and holds one layer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
import transformers

from orchestrator.base.errors import QuantizationError, ToolError
from orchestrator.checkpoints import read_source
from orchestrator.work.as_hugging_face import causal_class
from orchestrator.work.reference.streamed_model import StreamedModel
from tests.support.families import TINY, write_tiny

SEQUENCES = [[int(token) for token in np.random.default_rng(seed).integers(3, 131, length)] for seed, length in ((1, 12), (2, 8))]


def streamed(source: str, dtype: str = "float32", exact: tuple[str, ...] = (), decode_steps: int | None = None) -> Any:
    index, _ = read_source(source)
    return StreamedModel(source, index, dtype, exact).logits(SEQUENCES, decode_steps, lambda done, total: None)


def whole(source: Path, dtype: str = "float32") -> list[Any]:
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = causal_class(transformers.AutoConfig.from_pretrained(source)).from_pretrained(source, dtype=torch.float32, **eager)
    model.eval()
    with torch.inference_mode():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(getattr(torch, dtype)).float())
        return [model(torch.tensor([sequence])).logits[0].numpy() for sequence in SEQUENCES]


@pytest.mark.parametrize("family", TINY)
def test_streamed_model_of_a_family_equals_the_whole_model_to_the_bit(family: str, tmp_path: Path) -> None:
    source = write_tiny(family, tmp_path, dtype="float32")
    rounded, own = streamed(str(source), "bfloat16")
    for found, wanted in zip(rounded, whole(source, "bfloat16"), strict=True):
        np.testing.assert_array_equal(found, wanted)
    for found, wanted in zip(own, whole(source), strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral"])
def test_streamed_model_called_token_by_token_equals_one_call(family: str, tmp_path: Path) -> None:
    source = write_tiny(family, tmp_path, dtype="float32")
    logits, own = streamed(str(source), decode_steps=3)
    assert own is None  # nothing is rounded
    for found, wanted in zip(logits, whole(source), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=5e-6 * np.abs(wanted).max())


def test_streamed_model_leaves_exact_weights_unrounded(tmp_path: Path) -> None:
    source = write_tiny("mixtral", tmp_path, dtype="float32")
    routers = tuple(f"model.layers.{layer}.block_sparse_moe.gate.weight" for layer in range(3))
    everything, _ = streamed(str(source), "bfloat16")
    but_routers, _ = streamed(str(source), "bfloat16", routers)
    assert not np.array_equal(everything[0], but_routers[0])


def test_streamed_model_without_the_parameter_of_an_exact_weight_is_refused(tmp_path: Path) -> None:
    """It would be rounded all the same."""
    source = write_tiny("llama", tmp_path, dtype="float32")
    with pytest.raises(ToolError, match=r"no parameter mlp\.router\.weight in layer 1"):
        streamed(str(source), "bfloat16", ("model.layers.1.mlp.router.weight",))


@pytest.fixture
def memory_url() -> Iterator[str]:
    yield "memory://streamed"
    fsspec.filesystem("memory").rm("/streamed", recursive=True)


def test_streamed_model_reads_a_source_at_a_url_by_range(tmp_path: Path, memory_url: str) -> None:
    source = write_tiny("llama", tmp_path, dtype="float32", tie_word_embeddings=True)
    for path in source.iterdir():
        fsspec.filesystem("memory").pipe_file(f"/streamed/{path.name}", path.read_bytes())
    logits, _ = streamed(memory_url)
    for found, wanted in zip(logits, whole(source), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_streamed_model_of_a_source_that_lacks_a_weight_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = write_tiny("llama", tmp_path, dtype="float32")
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(QuantizationError, match=r"cannot be loaded from the source, e\.g\. model\.layers\.1\.mlp\.up_proj"):
        streamed(str(source))
