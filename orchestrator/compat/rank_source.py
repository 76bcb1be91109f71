"""One rank of a model whose tensors are still in the source's files, and the single pass that cuts and quantizes them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from orchestrator.model.checkpoint import CheckpointIndex, SourceFile
from orchestrator.model.config import ModelConfig
from orchestrator.model.rules import Family
from orchestrator.model.targets import ArtifactScale, QuantizedWeight, Read, Target
from orchestrator.model.topology import Topology
from orchestrator.model.weight_map import WeightMap, weight_map
from orchestrator.planning.options import ConvertOptions
from orchestrator.planning.plan import Inputs
from orchestrator.planning.quantization import resolve
from orchestrator.spec.build import BuildConfig, QuantizationSpec
from orchestrator.stores import open_source, open_store
from orchestrator.stores.store import Writer
from orchestrator.work.convert.step import write_shards
from orchestrator.work.scales import Scales
from orchestrator.work.shards import Weight

NO_LIMIT = 2**62
"""Limit of a shard's size, unlimited: a rank is one file here."""


def rank_options(weights: WeightMap, index: CheckpointIndex, topology: Topology, rank: int) -> ConvertOptions:
    """Return the conversion options of a single rank, which read only the rows of this rank."""
    place = topology.coordinates(rank)
    (group,) = weights.stage(place.pp_rank)
    options, tp_rank = ConvertOptions.of(group, index, topology), place.tp_rank

    def only(target: Target) -> Target:
        taken = [number for number, read in enumerate(target.reads) if not read.ranks or tp_rank in read.ranks]
        return replace(
            target,
            reads=tuple(_narrow(target.reads[number], tp_rank) for number in taken),
            quantized=_only_modules(target.quantized, taken) if target.quantized else None,
            scale=_only_rank(target.scale, tp_rank) if isinstance(target.scale, ArtifactScale) else target.scale,
        )

    return ConvertOptions(
        format=options.format,
        files=options.files,
        targets=tuple(only(target) for target in options.targets),
        shards=(options.shards[tp_rank],),
    )


def _only_modules(quantized: QuantizedWeight, taken: list[int]) -> QuantizedWeight:
    modules, amax_modules = quantized.modules, quantized.amax_modules
    return replace(
        quantized,
        modules=tuple(modules[number] for number in taken),
        amax_modules=tuple(amax_modules[number] for number in taken),
    )


def _only_rank(scale: ArtifactScale, tp_rank: int) -> ArtifactScale:
    return replace(scale, entries=(scale.entries[tp_rank],), spans=(scale.spans[tp_rank],) if scale.spans else ())


def _narrow(read: Read, tp_rank: int) -> Read:
    if not read.spans:
        return replace(read, ranks=())
    position = read.ranks.index(tp_rank) if read.ranks else tp_rank
    return replace(read, spans=(read.spans[position],), ranks=())


@dataclass(frozen=True)
class RankSource:
    """Source of a rank's tensors, which are cut out of the source's files on demand."""

    folder: Path
    index: CheckpointIndex
    extra_files: tuple[SourceFile, ...]
    family: Family
    options: ConvertOptions
    scales: Scales | None = None

    def inputs(self, config: ModelConfig, topology: Topology, quantization: QuantizationSpec) -> Inputs:
        """Return the inputs of quantized conversion. Raises QuantizationError, SourceMissingError, TopologyError."""
        asked = resolve(quantization, config.num_hidden_layers)
        # One process calibrates the whole model at once, unless the user asks for parts.
        asked = replace(asked, num_stages=asked.num_stages or 1)
        weights = weight_map(self.index, self.family, config, topology, NO_LIMIT, asked.model)
        return Inputs(
            self.index, self.extra_files, str(self.folder), config, weights, None, BuildConfig(), asked, family=self.family.name
        )

    def quantized(self, inputs: Inputs, topology: Topology, rank: int, scales: Scales | None) -> RankSource:
        """Return the same source, cut and quantized according to `inputs`."""
        return replace(self, options=rank_options(inputs.weights, self.index, topology, rank), scales=scales)

    def write(self, path: Path) -> None:
        """Write the rank's file. Raises StoreError."""
        self._run(lambda _name, num_bytes: writer(path, num_bytes))

    def materialize(self) -> dict[str, Weight]:
        """Cut out all tensors of the rank, into one buffer."""
        memory = _Memory()
        self._run(lambda _name, num_bytes: memory.of(num_bytes))
        offset = len(memory.buffer) - sum(target.num_bytes for target in self.options.targets)
        weights = {}
        for target in self.options.targets:
            weights[target.name] = Weight(target.dtype, target.shape, memory.buffer[offset : offset + target.num_bytes])
            offset += target.num_bytes
        return weights

    def _run(self, output: Any) -> None:
        with open_source(str(self.folder)).open(self.options.files) as source:
            write_shards(self.options, source, output, lambda num_bytes: None, self.scales)


class _Memory:
    """A file in memory."""

    def of(self, num_bytes: int) -> AbstractContextManager[Self]:
        """Begin a file of this size."""
        self.buffer, self._position = np.empty(num_bytes, np.uint8), 0
        return nullcontext(self)

    def write(self, data: memoryview) -> None:
        self.buffer[self._position : self._position + len(data)] = np.frombuffer(data, np.uint8)
        self._position += len(data)


def writer(path: Path, num_bytes: int | None = None) -> Writer:
    """Open a writer of a file that gets its name when it is complete. Raises StoreError."""
    return open_store(path.parent.resolve().as_uri()).writer(path.name, num_bytes)
