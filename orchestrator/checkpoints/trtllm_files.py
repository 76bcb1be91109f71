"""Writer of the files of a TensorRT-LLM checkpoint beside its tensors: config.json, quant_cfg.json, indexes of shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from orchestrator.model.config import ModelConfig
from orchestrator.model.config_trtllm import to_trtllm
from orchestrator.model.quantization import ModelQuantization, quant_cfg
from orchestrator.model.topology import Topology
from orchestrator.model.weight_map import WeightMap
from orchestrator.stores.file import write_whole


def write_checkpoint_config(folder: Path, config: ModelConfig, topology: Topology, quantization: ModelQuantization | None) -> None:
    """Write quant_cfg.json, for mixed precision only, and last config.json of a TensorRT-LLM checkpoint."""
    for name, value in config_files(config, topology, quantization).items():
        write_json(folder / name, value)


def config_files(config: ModelConfig, topology: Topology, quantization: ModelQuantization | None) -> dict[str, dict[str, Any]]:
    """Return quant_cfg.json, for mixed precision only, and config.json of a TensorRT-LLM checkpoint, by name."""
    mixture = quant_cfg(quantization) if quantization else None
    return {**({"quant_cfg.json": mixture} if mixture else {}), "config.json": to_trtllm(config, topology, quantization)}


def shard_indexes(weights: WeightMap, topology: Topology) -> dict[str, dict[str, Any]]:
    """Return rank{N}.safetensors.index.json of the ranks with several shards, in Hugging Face's format, by name."""
    found = {}
    for number in range(topology.num_files):
        groups = weights.stage(number // topology.tp)
        if len(groups) > 1:
            listed = {target.name: group.shard_name(number) for group in groups for target in group.targets}
            size = sum(group.shard_bytes for group in groups)
            found[f"rank{number}.safetensors.index.json"] = {"metadata": {"total_size": size}, "weight_map": listed}
    return found


def write_json(path: Path, value: Any, indent: int = 4) -> None:
    """Write a JSON file, whole or not at all."""
    write_whole(path, (json.dumps(value, indent=indent) + "\n").encode())
