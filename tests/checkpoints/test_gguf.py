"""GGUF files presented as Hugging Face's tensors, plain and quantized."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.base.errors import ArchitectureError, SourceCorruptError, SourceMissingError
from orchestrator.checkpoints import gguf, read_source
from orchestrator.stores.source import LocalFolder
from tests.support.gguf import write_gguf
from tests.support.synthetic import model_config, random_arrays

CONFIG = model_config(
    hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, head_size=8, num_hidden_layers=2
)
ARRAYS = random_arrays(CONFIG, "F32")


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0"])
def test_gguf_every_row_range_is_that_of_the_model(tmp_path: Path, kind: str) -> None:
    expected = write_gguf(tmp_path, CONFIG, ARRAYS, kind)
    index, _ = read_source(str(tmp_path))
    assert index.format == "gguf"
    assert {name: tensor.shape for name, tensor in index.tensors.items()} == {name: array.shape for name, array in ARRAYS.items()}
    generator = np.random.default_rng(1)
    with LocalFolder(tmp_path).open(index.files) as source:
        for name, tensor in index.tensors.items():
            rows = sorted(generator.integers(0, tensor.shape[0] + 1, 2).tolist())
            for begin, end in ((0, tensor.shape[0]), rows):
                out = np.empty((end - begin) * (tensor.num_bytes // tensor.shape[0]), np.uint8)
                gguf.read_rows(source, tensor, begin, end, out.data)
                dtype = np.float16 if tensor.dtype == "F16" else np.float32
                assert out.tobytes() == expected[name][begin:end].astype(dtype).tobytes(), name


def test_gguf_config_has_the_keys_of_hugging_face(tmp_path: Path) -> None:
    write_gguf(tmp_path, CONFIG, ARRAYS, "Q8_0")
    assert read_source(str(tmp_path))[0].config == {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 37,
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": None, "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }  # fmt: skip


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_gguf_llama3_scaling_is_known_by_its_factors(tmp_path: Path, factor: float) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    base = 500000.0
    scaling = {"rope_type": "llama3", "factor": factor, **gguf._LLAMA_3}
    made: Any = LlamaConfig(hidden_size=256, num_attention_heads=2, rope_parameters={**scaling, "rope_theta": base})
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](made, "cpu")
    factors = (1 / base ** (np.arange(0, 128, 2) / 128) / frequencies.numpy()).astype(np.float32)
    config = CONFIG.model_copy(update={"rotary_base": base, "hidden_size": 256, "num_attention_heads": 2})
    arrays = {name: array for name, array in ARRAYS.items() if "layers" not in name}
    write_gguf(tmp_path, config, arrays, "F32", rope_freqs__weight=factors)
    assert read_source(str(tmp_path))[0].config["rope_scaling"] == scaling


def test_gguf_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "factors", CONFIG, ARRAYS, "F32", rope_freqs__weight=np.full(4, 3.0, np.float32))
    with pytest.raises(ArchitectureError, match="no known rotary scaling"):
        read_source(str(tmp_path / "factors"))
    write_gguf(tmp_path / "other", CONFIG, ARRAYS, "F32", architecture="qwen2")
    with pytest.raises(ArchitectureError, match="qwen2"):
        read_source(str(tmp_path / "other"))
    write_gguf(tmp_path / "short", CONFIG, ARRAYS, "F32")
    path = tmp_path / "short" / "model.gguf"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(SourceCorruptError, match="truncated or damaged"):
        read_source(str(tmp_path / "short"))
    path.with_name("second.gguf").write_bytes(b"")
    with pytest.raises(SourceMissingError, match=r"2 \.gguf files"):
        read_source(str(tmp_path / "short"))


def test_gguf_array_of_more_elements_than_the_file_has_bytes_is_refused_at_once(tmp_path: Path) -> None:
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    array = struct.pack("<Q1sIIQ", 1, b"a", 9, 4, 10**18)  # a key, the kind ARRAY of UINT32, a count
    (tmp_path / "model.gguf").write_bytes(header + array + bytes(64))
    with pytest.raises(SourceCorruptError, match="an array of 1000000000000000000 elements"):
        read_source(str(tmp_path))
