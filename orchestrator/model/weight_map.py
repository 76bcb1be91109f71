"""Map from the bytes of the source to the tensors of each rank. Accounts for every source tensor.

Conversion executes the map: for each pipeline stage and layer group, the targets in file order, each with its reads, and for
each read the span of every tensor-parallel rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from orchestrator.base.dtypes import num_bytes
from orchestrator.model.checkpoint import CheckpointIndex, TensorInfo
from orchestrator.model.config import ModelConfig
from orchestrator.model.quantization import ModelQuantization
from orchestrator.model.rule_expansion import Block, Expander
from orchestrator.model.rules import Family
from orchestrator.model.targets import ArtifactScale, Target
from orchestrator.model.topology import Topology


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Unit of conversion: one task writes one shard for each tensor-parallel rank of a stage."""

    pp_rank: int
    index: int
    """Index of the group within its stage."""
    num_groups: int
    """Number of groups of the stage: the N of rank0-00001-of-0000N.safetensors."""
    layers: range
    targets: tuple[Target, ...]

    @property
    def shard_bytes(self) -> int:
        """Size of the tensors in one rank's shard."""
        return sum(target.num_bytes for target in self.targets)

    @property
    def needs_scales(self) -> bool:
        """Whether conversion of the group needs the calibration artifact."""
        return any(isinstance(target.scale, ArtifactScale) for target in self.targets)

    def sources(self) -> dict[str, TensorInfo]:
        return {tensor.name: tensor for target in self.targets for tensor in target.tensors()}

    def shard_name(self, rank: int) -> str:
        """Return the shard's file name: numbered as Hugging Face does, or plain when the rank has one shard."""
        if self.num_groups == 1:
            return f"rank{rank}.safetensors"
        return f"rank{rank}-{self.index + 1:05d}-of-{self.num_groups:05d}.safetensors"


@dataclass(frozen=True, slots=True)
class WeightMap:
    """Groups of all stages, and the source tensors that are left out on purpose."""

    groups: tuple[LayerGroup, ...]
    ignored: tuple[tuple[str, str], ...]
    """(source tensor, reason)."""

    def exact_sources(self) -> tuple[str, ...]:
        """Return the source tensors that the graph reads in float32, whatever the model's dtype, sorted."""
        wide = (target for group in self.groups for target in group.targets if target.dtype == "F32" and not target.quantized)
        return tuple(sorted({read.tensor.name for target in wide for read in target.reads}))

    def largest_layer_bytes(self, pp_rank: int) -> int:
        """Return the size in float32 of a rank's largest layer, or of its largest weight outside of the layers if that is larger.

        A byte of a 4-bit format counts as two values. Scales count too. The second linear of all experts counts as a layer: a
        verification holds it apart from the rest.
        """
        sizes: dict[str, int] = {}
        for target in (target for group in self.stage(pp_rank) for target in group.targets):
            layer = ".".join(target.name.split(".")[:3]) if target.name.startswith("transformer.layers.") else target.name
            if ".mlp.proj." in target.name and len(target.shape) == 3:
                layer += ".proj"
            values = math.prod(target.shape) * (2 if target.name.endswith(".weight") and target.dtype in ("U8", "I8") else 1)
            # The embedding is not widened: rows are looked up in its stored dtype.
            width = num_bytes(target.dtype, 1) if target.name == "transformer.vocab_embedding.weight" else 4
            sizes[layer] = sizes.get(layer, 0) + values * width
        return max(sizes.values(), default=0)

    def stage(self, pp_rank: int) -> list[LayerGroup]:
        return [group for group in self.groups if group.pp_rank == pp_rank]


def weight_map(
    index: CheckpointIndex,
    family: Family,
    config: ModelConfig,
    topology: Topology,
    max_shard_bytes: int,
    quantization: ModelQuantization | None = None,
) -> WeightMap:
    """Expand the rules of `family` over the ranks.

    Raises WeightMapError when a tensor is missing, would be dropped, or has another shape than the config says. Raises
    TopologyError when a cut does not divide, and QuantizationError when a linear does not fit its format.
    """
    expander = Expander(index, family, config, topology, quantization)
    stages = [expander.stage(pp_rank, layers) for pp_rank, layers in enumerate(topology.stages(config.num_hidden_layers))]
    expander.raise_problems()
    groups: list[LayerGroup] = []
    for pp_rank, blocks in enumerate(stages):
        groups.extend(_group_blocks(pp_rank, blocks, max_shard_bytes))
    return WeightMap(tuple(groups), expander.account())


@dataclass(frozen=True, slots=True)
class Accounting:
    """Accounting of a checkpoint's tensors by a family's rules."""

    read: frozenset[str]
    ignored: tuple[tuple[str, str], ...]
    """(source tensor, reason)."""
    missing: tuple[str, ...]
    """Tensors that a rule reads and that are not there."""
    misshapen: tuple[str, ...]
    """Sentences about tensors of another shape or dtype than config.json says."""
    unread: tuple[str, ...]
    """Tensors that would be dropped: no rule reads them and no entry ignores them."""

    @property
    def is_complete(self) -> bool:
        return not (self.missing or self.misshapen or self.unread)


def accounting(index: CheckpointIndex, family: Family, config: ModelConfig) -> Accounting:
    """Account for every tensor of a checkpoint; what does not fit is no error. Raises ArchitectureError as `weight_map`."""
    expander = Expander(index, family, config, Topology(1, 1), None)
    expander.stage(0, range(config.num_hidden_layers))
    ignored, unread = expander.left_over()
    missing = tuple(dict.fromkeys(expander.missing))
    return Accounting(frozenset(expander.used), ignored, missing, tuple(expander.misshapen), unread)


def _group_blocks(pp_rank: int, blocks: Iterable[Block], max_shard_bytes: int) -> Iterator[LayerGroup]:
    """Fill groups with blocks in order. A block larger than the limit has a group of its own."""
    groups: list[list[Block]] = [[]]
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
