"""The miniature as this project builds it: files converted, graphs of the ranks executed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.checkpoints import read_source
from orchestrator.model.config import ModelConfig
from orchestrator.model.rules import Family
from orchestrator.model.stage import StageNetwork, StageOptions
from orchestrator.model.topology import Topology, problems
from orchestrator.model.weight_map import weight_map
from orchestrator.planning.options import ConvertOptions
from orchestrator.stores import open_source
from orchestrator.stores.source import planned_ranges
from orchestrator.work.convert.step import write_shards
from orchestrator.work.miniature.prompts import Prompt
from orchestrator.work.shards import Weight, map_shards
from orchestrator.work.verify.inputs import make_calls
from orchestrator.work.verify.merged_stage import MergedStage

Floats = npt.NDArray[np.float32]
PartOfModel = tuple[int | None, str]
_SHARD_BYTES = 2**62


@dataclass(frozen=True, slots=True)
class Layout:
    """A topology of the miniature."""

    topology: Topology

    @property
    def name(self) -> str:
        """Name such as tp=2, ep=2."""
        topology = self.topology
        parts = [f"tp={topology.tp}"] if topology.tp > 1 else []
        parts += [f"ep={topology.moe_ep}"] if topology.moe_ep > 1 else []
        parts += [f"pp={topology.pp}"] if topology.pp > 1 else []
        return ", ".join(parts) or "one rank"


def layouts(config: ModelConfig) -> list[Layout]:
    """Return the legal layouts among one rank, two tensor-parallel ranks, experts over both, and two stages.

    The first stage has one layer, so that a pattern of layers counted from the second stage's first layer would differ.
    """
    stages = Topology(1, 2, (1, config.num_hidden_layers - 1))
    wanted = [Topology(1, 1), Topology(2, 1), Topology(2, 1, moe_ep=2), stages]
    wanted = wanted if config.moe else [topology for topology in wanted if topology.moe_ep == 1]
    return [Layout(topology) for topology in wanted if not problems(topology, config.limits())]


def convert(source: Path, folder: Path, family: Family, config: ModelConfig, topology: Topology) -> list[list[dict[str, Weight]]]:
    """Convert the files in `folder`; returns the tensors of every rank by stage and tp_rank. Raises as plan and conversion do."""
    folder.mkdir(parents=True)
    index, _ = read_source(str(source))
    for group in weight_map(index, family, config, topology, _SHARD_BYTES).groups:
        options = ConvertOptions.of(group, index, topology)
        planned = planned_ranges(tensor for target in options.targets for tensor in target.tensors())
        with open_source(str(source)).open(options.files, planned) as reads:
            write_shards(options, reads, lambda name, _size: (folder / name).open("wb"), lambda _num_bytes: None)
    return [
        [map_shards([folder / f"rank{topology.file_number(tp_rank, pp_rank)}.safetensors"]) for tp_rank in range(topology.tp)]
        for pp_rank in range(topology.pp)
    ]


class Ranks:
    """All ranks of the miniature, ready to run."""

    def __init__(
        self,
        config: ModelConfig,
        topology: Topology,
        weights: Sequence[Sequence[Mapping[str, Weight]]],
        max_seq_len: int,
        *,
        observed: bool = False,
    ) -> None:
        """`weights`: result of `convert`. `observed`: `parts` are kept."""
        options = [StageOptions.of(config, topology, pp_rank) for pp_rank in range(topology.pp)]
        self._first_layers = [stage.first_layer for stage in options]
        self._stages = [
            MergedStage(StageNetwork(stage=stage, max_seq_len=max_seq_len), shards, observed=observed)
            for stage, shards in zip(options, weights, strict=True)
        ]
        self.parts: dict[PartOfModel, Floats] = {}
        """(layer of the model, name) -> value [tokens, hidden] of the last text, in the order in which they are computed."""

    def logits(self, prompt: Prompt) -> Floats:
        """Return the logits [tokens, vocabulary] of a text, fed in the prompt's calls."""
        for stage in self._stages:
            stage.reset(batch=1)
        tokens = np.array([prompt.tokens], np.int64)
        found: list[Floats] = []
        seen: dict[PartOfModel, list[Floats]] = {}
        for call in make_calls(tokens, np.array([len(prompt.tokens)]), prompt.decode_steps):
            result: npt.NDArray[Any] | None = None
            for first, stage in zip(self._first_layers, self._stages, strict=True):
                result = stage.run(call, result)
                for part, value in stage.parts.items():
                    layer = None if part.layer is None else first + part.layer
                    seen.setdefault((layer, part.what), []).append(value[0])
            assert result is not None
            found.append(result[0])
        self.parts = {part: np.concatenate(values) for part, values in seen.items()}
        return np.concatenate(found)
