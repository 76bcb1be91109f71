"""Which bytes of the source make which tensor of which rank; every source tensor accounted for.

The map is the program that conversion runs: per pipeline stage and layer group, the targets in file order, each with the
reads that it is joined from and, for every tensor-parallel rank, the span that it takes of each read.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from orchestrator.core.checkpoint import CheckpointIndex, TensorInfo
from orchestrator.core.dtypes import MODEL_DTYPES, num_bytes
from orchestrator.core.errors import WeightMapError
from orchestrator.core.model_config import ModelConfig
from orchestrator.core.rules import Family, Part, Rule, Span, Where, spans
from orchestrator.core.topology import Topology


@dataclass(frozen=True, slots=True)
class Read:
    """A source tensor and what each tensor-parallel rank takes of it."""

    tensor: TensorInfo
    axis: int | None
    """The cut axis, 0 or 1; None: every rank takes all."""
    spans: tuple[Span, ...]
    """By tp_rank; empty when axis is None."""


@dataclass(frozen=True, slots=True)
class Target:
    """A tensor of a rank file; all tensor-parallel ranks hold one of this name and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    """Local to a rank."""
    reads: tuple[Read, ...]

    @property
    def num_bytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return num_bytes(self.dtype, count)


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """What one conversion task writes: one shard for each tensor-parallel rank of a stage."""

    pp_rank: int
    index: int
    """Number of the group within its stage."""
    num_groups: int
    """Groups of the stage: the N of rank0-00001-of-0000N.safetensors."""
    layers: range
    targets: tuple[Target, ...]

    @property
    def shard_bytes(self) -> int:
        """Tensor bytes of one rank's shard."""
        return sum(target.num_bytes for target in self.targets)

    def sources(self) -> dict[str, TensorInfo]:
        return {read.tensor.name: read.tensor for target in self.targets for read in target.reads}

    def shard_name(self, rank: int) -> str:
        """As Hugging Face numbers shards; the plain name when the rank has one."""
        if self.num_groups == 1:
            return f"rank{rank}.safetensors"
        return f"rank{rank}-{self.index + 1:05d}-of-{self.num_groups:05d}.safetensors"


@dataclass(frozen=True, slots=True)
class WeightMap:
    """All groups of all stages, and what was left out on purpose."""

    groups: tuple[LayerGroup, ...]
    ignored: tuple[tuple[str, str], ...]
    """Source tensor and reason."""

    def stage(self, pp_rank: int) -> list[LayerGroup]:
        return [group for group in self.groups if group.pp_rank == pp_rank]


def weight_map(index: CheckpointIndex, family: Family, config: ModelConfig, topology: Topology, max_shard_bytes: int) -> WeightMap:
    """Expand `family`'s rules over the ranks.

    Raises WeightMapError when a tensor is missing, has another shape than the config says, or would be dropped; raises
    TopologyError when a cut does not divide.
    """
    expander = _Expander(index, family, config, topology)
    stages = [expander.stage(pp_rank, layers) for pp_rank, layers in enumerate(topology.stages(config.num_hidden_layers))]
    expander.raise_problems()
    groups: list[LayerGroup] = []
    for pp_rank, blocks in enumerate(stages):
        groups.extend(_group_blocks(pp_rank, blocks, max_shard_bytes))
    return WeightMap(tuple(groups), expander.account())


@dataclass(frozen=True, slots=True)
class _Block:
    """Targets that are never parted: the embedding, one layer, or the head."""

    layer: int | None
    targets: tuple[Target, ...]


class _Expander:
    """Walks rules x layers, collecting problems so that one error can name them all."""

    def __init__(self, index: CheckpointIndex, family: Family, config: ModelConfig, topology: Topology) -> None:
        self.index, self.family, self.config, self.topology = index, family, config, topology
        self.dims = config.dims()
        self.dtype = MODEL_DTYPES[config.dtype]
        self.used: set[str] = set()
        self.missing: list[str] = []
        self.misshapen: list[str] = []
        self.rules = [rule for rule in family.rules if rule.applies(config)]

    def stage(self, pp_rank: int, layers: range) -> list[_Block]:
        blocks: list[_Block] = []
        if pp_rank == 0:
            blocks.append(_Block(None, tuple(self._targets(Where.FIRST_STAGE))))
        for local, layer in enumerate(layers):
            blocks.append(_Block(layer, tuple(self._targets(Where.EVERY_LAYER, local, layer))))
        if pp_rank == self.topology.pp - 1:
            blocks.append(_Block(None, tuple(self._targets(Where.LAST_STAGE))))
        return blocks

    def _targets(self, where: Where, local: int = 0, layer: int = 0) -> Iterator[Target]:
        for rule in self.rules:
            if rule.where is where:
                target = self._target(rule, local, layer)
                if target is not None:
                    yield target

    def _target(self, rule: Rule, local: int, layer: int) -> Target | None:
        reads = [self._read(part, layer) for part in rule.parts]
        if any(read is None for read in reads):
            return None
        present = [read for read in reads if read is not None]
        shape = list(present[0].tensor.shape)
        shape[0] = sum(_local_size(read, 0) for read in present)
        if len(shape) > 1:
            shape[1] = _local_size(present[0], 1)
        return Target(rule.target.format(layer=local), self.dtype, tuple(shape), tuple(present))

    def _read(self, part: Part, layer: int) -> Read | None:
        name = part.source.format(layer=layer)
        tensor = self.index.tensors.get(name)
        if tensor is None:
            self.missing.append(name)
            return None
        self.used.add(name)
        expected = tuple(self.dims[dim] for dim in part.shape)
        if tensor.shape != expected:
            self.misshapen.append(f"{name} is {list(tensor.shape)}, the config says {list(expected)}")
            return None
        if part.cut is None:
            return Read(tensor, None, ())
        return Read(tensor, part.cut.axis, spans(part.cut, expected[part.cut.axis], self.config, self.topology.tp))

    def raise_problems(self) -> None:
        if self.missing:
            missing = list(dict.fromkeys(self.missing))
            raise WeightMapError(
                f"the checkpoint lacks {len(missing)} tensors that {self.family.name} needs: {_some(missing)}",
                "Check that all shards were downloaded and that config.json belongs to these weights.",
            )
        if self.misshapen:
            raise WeightMapError(
                f"{len(self.misshapen)} tensors have another shape than config.json says: {_some(self.misshapen)}",
                "config.json and the weights are of different models.",
            )

    def account(self) -> tuple[tuple[str, str], ...]:
        ignored: list[tuple[str, str]] = []
        unknown: list[str] = []
        patterns = [entry for entry in self.family.ignored if entry.applies(self.config)]
        for name in self.index.tensors:
            if name in self.used:
                continue
            reason = next((entry.reason for entry in patterns if fnmatch.fnmatchcase(name, entry.pattern)), None)
            if reason is None:
                unknown.append(name)
            else:
                ignored.append((name, reason))
        if unknown:
            raise WeightMapError(
                f"{len(unknown)} tensors of the checkpoint would be dropped, {self.family.name} has no rule for them: "
                f"{_some(unknown)}",
                "The checkpoint is of another architecture, or holds an adapter; name the right family or remove them.",
            )
        return tuple(ignored)


def _local_size(read: Read, axis: int) -> int:
    return read.spans[0].length if read.axis == axis else read.tensor.shape[axis]


def _some(names: Sequence[str], count: int = 3) -> str:
    shown = ", ".join(names[:count])
    return shown if len(names) <= count else f"{shown}, and {len(names) - count} more"


def _group_blocks(pp_rank: int, blocks: Iterable[_Block], max_shard_bytes: int) -> Iterator[LayerGroup]:
    """Fill groups in order; a block larger than the limit stands alone."""
    groups: list[list[_Block]] = [[]]
    size = 0
    for block in blocks:
        block_bytes = sum(target.num_bytes for target in block.targets)
        if groups[-1] and size + block_bytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(block)
        size += block_bytes
    for index, members in enumerate(groups):
        layers = [block.layer for block in members if block.layer is not None]
        covered = range(layers[0], layers[-1] + 1) if layers else range(0)
        targets = tuple(target for block in members for target in block.targets)
        yield LayerGroup(pp_rank, index, len(groups), covered, targets)
