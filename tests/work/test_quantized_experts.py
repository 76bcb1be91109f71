"""gpt-oss's experts in MXFP4: blocks and scales of all experts are cut as the dense tensors that transformers makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from orchestrator.checkpoints import read_source
from orchestrator.model.config import ModelConfig, MoeConfig
from orchestrator.model.topology import Topology
from orchestrator.model.weight_map import weight_map
from orchestrator.planning.options import ConvertOptions
from orchestrator.stores import open_source
from orchestrator.stores.source import planned_ranges
from orchestrator.work.convert.step import write_shards
from tests.support.synthetic import model_config
from tests.work.test_fused_experts import family

EXPERTS, HIDDEN, SIZE = 4, 64, 32
CONFIG = model_config(
    dtype="bfloat16",
    num_hidden_layers=1,
    hidden_size=HIDDEN,
    moe=MoeConfig(num_experts=EXPERTS, top_k=2, router_bias=True, expert_bias=True),
    moe_intermediate_size=SIZE,
    tie_word_embeddings=True,
)
PREFIX = "model.layers.0.mlp."


def write(folder: Path) -> tuple[Path, Path]:
    """The experts of a layer in MXFP4, and the dense folder of the same values."""
    generator = torch.Generator().manual_seed(3)
    plain = {
        "router.weight": torch.randn(EXPERTS, HIDDEN, generator=generator),
        "router.bias": torch.randn(EXPERTS, generator=generator),
        "experts.gate_up_proj_bias": torch.randn(EXPERTS, 2 * SIZE, generator=generator),
        "experts.down_proj_bias": torch.randn(EXPERTS, HIDDEN, generator=generator),
    }
    stored = {PREFIX + name: tensor.bfloat16() for name, tensor in plain.items()}
    dense = dict(stored)
    for name, out, inner in (("gate_up_proj", 2 * SIZE, HIDDEN), ("down_proj", HIDDEN, SIZE)):
        blocks = torch.randint(0, 256, (EXPERTS, out, inner // 32, 16), generator=generator).to(torch.uint8)
        scales = torch.randint(110, 130, (EXPERTS, out, inner // 32), generator=generator).to(torch.uint8)
        stored |= {f"{PREFIX}experts.{name}_blocks": blocks, f"{PREFIX}experts.{name}_scales": scales}
        dense[f"{PREFIX}experts.{name}"] = convert_moe_packed_tensors(blocks, scales)
    for name, tensors, more in (("quantized", stored, {"quantization_config": {"quant_method": "mxfp4"}}), ("dense", dense, {})):
        (folder / name).mkdir()
        safetensors.torch.save_file(tensors, folder / name / "model.safetensors")
        config = {"architectures": ["Qwen3MoeForCausalLM"], "dtype": "bfloat16", **more}
        (folder / name / "config.json").write_text(json.dumps(config))
    return folder / "quantized", folder / "dense"


def convert(source: Path, topology: Topology, config: ModelConfig = CONFIG) -> tuple[dict[str, bytes], int, int]:
    """Rank files by name, the bytes that were read, and the bytes that the source stores."""
    index, _ = read_source(str(source))
    (group,) = weight_map(index, family(True, True), config, topology, 2**40).groups
    options = ConvertOptions.of(group, index, topology)
    planned = planned_ranges(tensor for target in options.targets for tensor in target.tensors())
    with open_source(str(source)).open(options.files, planned) as opened:
        write_shards(options, opened, lambda name, _size: (source / name).open("wb"), lambda _count: None)
        read = opened.bytes_read
    return {name: (source / name).read_bytes() for name in options.shards}, read, index.num_bytes


@pytest.mark.parametrize("topology", [Topology(1, 1), Topology(2, 1), Topology(4, 1), Topology(4, 1, moe_ep=2)], ids=str)
def test_conversion_of_mxfp4_experts_is_that_of_the_dense_ones_and_reads_every_byte_once(
    tmp_path: Path, topology: Topology
) -> None:
    quantized, dense = write(tmp_path)
    found, read, stored = convert(quantized, topology)
    assert found == convert(dense, topology)[0]
    assert read == stored
