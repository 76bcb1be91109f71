"""Which bytes of the source make which tensor of which rank; every source tensor accounted for.

The map is the program that conversion runs: per pipeline stage and layer group, the targets in file order, each with the
reads that it is joined from and, for every tensor-parallel rank, the span that it takes of each read.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from orchestrator.base.dtypes import MODEL_DTYPES, num_bytes
from orchestrator.base.errors import ArchitectureError, WeightMapError
from orchestrator.model import quantized_targets
from orchestrator.model.checkpoint import CheckpointIndex, TensorInfo
from orchestrator.model.config import ModelConfig
from orchestrator.model.quantization import LinearFormat, ModelQuantization, global_name, linear_of
from orchestrator.model.rules import Cut, Family, Part, Rule, Span, Where, spans
from orchestrator.model.targets import ArtifactScale, Read, Target
from orchestrator.model.topology import Topology

_FLOATS = ("F64", "F32", "F16", "BF16")


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

    @property
    def needs_scales(self) -> bool:
        """Whether the calibration artifact is needed to write the group."""
        return any(isinstance(target.scale, ArtifactScale) for target in self.targets)

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

    def exact_sources(self) -> tuple[str, ...]:
        """Source tensors that the graph reads in float32, whatever the model's dtype, sorted."""
        wide = (target for group in self.groups for target in group.targets if target.dtype == "F32" and not target.quantized)
        return tuple(sorted({read.tensor.name for target in wide for read in target.reads}))

    def largest_layer_bytes(self, pp_rank: int) -> int:
        """Bytes in float32 of the largest layer of a rank of the stage, or of what stands outside of the layers.

        Formats of four bits are counted as if a byte held two values; scales are counted too.
        """
        sizes: dict[str, int] = {}
        for target in (target for group in self.stage(pp_rank) for target in group.targets):
            layer = ".".join(target.name.split(".")[:3]) if target.name.startswith("transformer.layers.") else target.name
            values = math.prod(target.shape) * (2 if target.quantized and target.dtype in ("U8", "I8") else 1)
            # Rows are looked up in an embedding as it is stored.
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
    """Expand `family`'s rules over the ranks.

    Raises WeightMapError when a tensor is missing, has another shape than the config says, or would be dropped; raises
    TopologyError when a cut does not divide, QuantizationError when a linear does not fit its format.
    """
    expander = _Expander(index, family, config, topology, quantization)
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

    def __init__(
        self,
        index: CheckpointIndex,
        family: Family,
        config: ModelConfig,
        topology: Topology,
        quantization: ModelQuantization | None,
    ) -> None:
        self.index, self.family, self.config, self.topology = index, family, config, topology
        self.quantization = quantization
        self.unfit: list[quantized_targets.Problem] = []
        self.dims = config.dims()
        self.dtype = MODEL_DTYPES[config.dtype]
        self.used: set[str] = set()
        self.missing: list[str] = []
        self.misshapen: list[str] = []
        self.rules = [rule for rule in family.rules if rule.applies(config)]
        self._spans: dict[tuple[Cut | None, int, int], tuple[Span, ...]] = {}

    def stage(self, pp_rank: int, layers: range) -> list[_Block]:
        blocks: list[_Block] = []
        if pp_rank == 0:
            blocks.append(_Block(None, tuple(self._targets(Where.FIRST_STAGE))))
        for local, layer in enumerate(layers):
            targets = tuple(self._targets(Where.EVERY_LAYER, local, layer))
            blocks.append(_Block(layer, self._quantized(targets, local, layer) if self.quantization else targets))
        if pp_rank == self.topology.pp - 1:
            blocks.append(_Block(None, tuple(self._targets(Where.LAST_STAGE))))
        return blocks

    def _targets(self, where: Where, local: int = 0, layer: int = 0) -> Iterator[Target]:
        for rule in self.rules:
            if rule.where is where:
                target = self._target(rule, local, layer)
                if target is not None:
                    yield target

    def _quantized(self, targets: tuple[Target, ...], local: int, layer: int) -> tuple[Target, ...]:
        """A layer's targets with the quantized weights, and the scales of weights, activations and cache, in their place."""
        assert self.quantization is not None
        by_name = {target.name: target for target in targets}
        found: list[Target] = []
        for target in targets:
            fmt = self._format(target, local, layer)
            unfit = quantized_targets.problem(target, fmt) if fmt else None
            if fmt is None or unfit is not None:
                found.append(target)
                self.unfit.extend([unfit] if unfit else [])
            else:
                partner = by_name.get(_partner(target.name)) if fmt.fuse_gate else None
                if partner is not None and self._format(partner, local, layer) != fmt:
                    partner = None
                modules = [quantized_targets.module_of(read) for read in partner.reads] if partner else []
                found.extend(quantized_targets.quantized(target, fmt, modules, self.topology.tp))
            if self.quantization.kv_cache and target.name.endswith("attention.qkv.weight"):
                found.extend(quantized_targets.kv_cache_targets(target, self.quantization.kv_cache, self.topology.tp))
        return tuple(found)

    def _format(self, target: Target, local: int, layer: int) -> LinearFormat | None:
        linear = linear_of(target.name)
        return self.quantization.format_of(global_name(linear, local, layer)) if linear and self.quantization else None

    def _target(self, rule: Rule, local: int, layer: int) -> Target | None:
        if rule.per_expert:
            return self._expert_target(rule, local, layer)
        reads = [self._read(part, layer) for part in rule.parts]
        present = [read for read in reads if read is not None]
        if len(present) < len(reads):
            return None
        return Target(rule.target.format(layer=local), rule.dtype or self.dtype, _joined(present), tuple(present))

    def _expert_target(self, rule: Rule, local: int, layer: int) -> Target | None:
        """[experts of the rank, ...]: every rank of an expert's group takes its cut, the others nothing."""
        if self.config.moe is None:
            raise ArchitectureError(
                f"config.json of this {self.config.architecture} names no experts, which every model of the family has",
                "Use the config.json of the model's publisher.",
            )
        count, ep = self.config.moe.num_experts, self.topology.moe_ep
        groups = [
            tuple(rank for rank in range(self.topology.tp) if self.topology.moe_ranks(rank)[1] == group) for group in range(ep)
        ]
        reads: list[Read] = []
        for expert in range(count):
            for part in rule.parts:
                read = self._read(part, layer, expert)
                if read is not None:
                    ranks = groups[expert * ep // count]
                    reads.append(replace(read, ranks=ranks, spans=tuple(read.spans[rank] for rank in ranks)))
        if len(reads) < count * len(rule.parts):
            return None
        shape = (count // ep, *_joined(reads[: len(rule.parts)]))
        return Target(rule.target.format(layer=local), rule.dtype or self.dtype, shape, tuple(reads))

    def _read(self, part: Part, layer: int, expert: int = 0) -> Read | None:
        name = part.source.format(layer=layer, expert=expert)
        tensor = self.index.tensors.get(name)
        if tensor is None:
            self.missing.append(name)
            return None
        self.used.add(name)
        wanted = tuple(self.dims[dim] for dim in part.shape)
        sections = [self.dims[dim] for dim in part.sections]
        expected = (sum(sections), *wanted[1:]) if sections else wanted
        if tensor.shape != expected:
            self.misshapen.append(f"{name} is {list(tensor.shape)}, the config says {list(expected)}")
            return None
        if tensor.dtype not in _FLOATS:
            self.misshapen.append(f"{name} is {tensor.dtype}, weights are {', '.join(_FLOATS)}")
            return None
        start = sum(sections[: part.section])
        if part.cut is None and not sections:
            return Read(tensor, None, (), add=part.add)
        axis = part.cut.axis if part.cut else 0
        return Read(tensor, axis, self._spans_of(part.cut, wanted[axis], start), add=part.add)

    def _spans_of(self, cut: Cut | None, size: int, start: int) -> tuple[Span, ...]:
        """Spans of an axis of `size` elements that begins at `start` of the source's; computed once for all layers."""
        key = (cut, size, start)
        if key not in self._spans:
            whole = (Span(0, size),) * self.topology.tp
            plain = spans(cut, size, self.config, self.topology) if cut else whole
            self._spans[key] = tuple(Span(span.begin + start, span.end + start, span.pad) for span in plain)
        return self._spans[key]

    def raise_problems(self) -> None:
        if self.missing:
            missing = list(dict.fromkeys(self.missing))
            prefixed = _as_prefixed(missing[0], self.index.tensors)
            if prefixed is not None:
                raise WeightMapError(
                    f"the checkpoint calls {missing[0]} {prefixed}: it holds a language model within a larger model",
                    "Save the language model as a checkpoint of its own (with transformers: load the larger model, then call "
                    "save_pretrained on its language model), and build that.",
                )
            raise WeightMapError(
                f"the checkpoint lacks {len(missing)} tensors that {self.family.name} needs: {_some(missing)}",
                "Check that all shards were downloaded and that config.json belongs to these weights.",
            )
        if self.misshapen:
            raise WeightMapError(
                f"{len(self.misshapen)} tensors have another shape or dtype than config.json says: {_some(self.misshapen)}",
                "config.json and the weights are of different models.",
            )
        quantized_targets.raise_problems(self.unfit)

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


def _partner(name: str) -> str:
    """mlp.fc of mlp.gate, and the other way round."""
    if name.endswith("mlp.fc.weight"):
        return name.replace("mlp.fc.weight", "mlp.gate.weight")
    return name.replace("mlp.gate.weight", "mlp.fc.weight")


def _joined(reads: Sequence[Read]) -> tuple[int, ...]:
    """Local shape of slices joined along axis 0."""
    shape = list(reads[0].tensor.shape)
    shape[0] = sum(_local_size(read, 0) for read in reads)
    if len(shape) > 1:
        shape[1] = _local_size(reads[0], 1)
    return tuple(shape)


def _local_size(read: Read, axis: int) -> int:
    return read.spans[0].length if read.axis == axis else read.tensor.shape[axis]


def _as_prefixed(name: str, tensors: Iterable[str]) -> str | None:
    """The tensor that ends as `name` does: with a longer prefix, or without `model.` at its beginning."""
    end = "." + name.removeprefix("model.")
    return next((other for other in tensors if f".{other}".endswith(end)), None)


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
