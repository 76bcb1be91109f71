"""Expansion of a family's rules over layers and ranks: which spans of which source tensors make each target.

It notes problems instead of raising them, so that one error can name them all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from orchestrator.base.dtypes import MODEL_DTYPES
from orchestrator.base.errors import ArchitectureError, WeightMapError, some_of
from orchestrator.model import quantized_targets, stored_targets
from orchestrator.model.checkpoint import CheckpointIndex, TensorInfo
from orchestrator.model.config import ModelConfig
from orchestrator.model.quantization import LinearFormat, ModelQuantization, global_name, linear_of
from orchestrator.model.rules import Cut, Family, Fusion, Part, Rule, Span, Where, spans
from orchestrator.model.targets import ExpertRows, Read, Target
from orchestrator.model.topology import Topology

_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Block:
    """Targets that stay in one shard: the embedding, one layer, or the head."""

    layer: int | None
    targets: tuple[Target, ...]


class Expander:
    """Expands rules x layers, and collects problems so that one error can name them all."""

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
        self._dims: dict[tuple[int, int], dict[str, int]] = {}
        self.dtype = MODEL_DTYPES[config.dtype]
        self.used: set[str] = set()
        self.missing: list[str] = []
        self.misshapen: list[str] = []
        self.rules = [rule for rule in family.rules if rule.applies(config)]
        self._spans: dict[tuple[Cut | None, int, int, int], tuple[Span, ...]] = {}

    def stage(self, pp_rank: int, layers: range) -> list[Block]:
        blocks: list[Block] = []
        if pp_rank == 0:
            blocks.append(Block(None, tuple(self._targets(Where.FIRST_STAGE))))
        for local, layer in enumerate(layers):
            targets = tuple(self._targets(Where.EVERY_LAYER, local, layer))
            blocks.append(Block(layer, self._quantized(targets, local, layer) if self.quantization else targets))
        if pp_rank == self.topology.pp - 1:
            blocks.append(Block(None, tuple(self._targets(Where.LAST_STAGE))))
        return blocks

    def _targets(self, where: Where, local: int = 0, layer: int = 0) -> Iterator[Target]:
        for rule in self.rules:
            if rule.where is where and rule.in_layer(self.config, layer):
                target = self._target(rule, local, layer)
                if target is not None:
                    yield target

    def _quantized(self, targets: tuple[Target, ...], local: int, layer: int) -> tuple[Target, ...]:
        """Return a layer's targets with quantized weights replaced, and with scales of weights, activations and KV cache."""
        assert self.quantization is not None
        by_name = {target.name: target for target in targets}
        found: list[Target] = []
        for target in targets:
            fmt = self._format(target, local, layer)
            unfit = quantized_targets.problem(target, fmt) if fmt else None
            if fmt is None or unfit is not None:
                found.append(target)
                self.unfit.extend([unfit] if unfit else [])
            elif self.quantization.as_stored:
                found.extend(stored_targets.stored(target, fmt, self.topology.tp))
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
        if rule.per_head:
            return self._head_target(rule, local, layer)
        reads = [self._read(part, layer) for part in rule.parts]
        present = [read for read in reads if read is not None]
        if len(present) < len(reads):
            return None
        return Target(rule.target.format(layer=local), rule.dtype or self.dtype, _joined(present), tuple(present))

    def _expert_target(self, rule: Rule, local: int, layer: int) -> Target | None:
        """Return a target [experts of the rank, ...]. Ranks of an expert's group take their cut of it, other ranks nothing."""
        if self.config.moe is None:
            raise ArchitectureError(
                f"config.json of this {self.config.architecture} has no experts, which every model of the family has",
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
                    spans = tuple(read.spans[rank] for rank in ranks) if read.spans else ()
                    reads.append(replace(read, ranks=ranks, spans=spans))
        if len(reads) < count * len(rule.parts):
            return None
        shape = (count // ep, *_joined(reads[: len(rule.parts)]))
        return Target(rule.target.format(layer=local), rule.dtype or self.dtype, shape, tuple(reads))

    def _head_target(self, rule: Rule, local: int, layer: int) -> Target | None:
        """Return a target [heads of the rank, ...]."""
        count, tp = self.config.num_attention_heads, self.topology.tp
        reads: list[Read] = []
        for head in range(count):
            rank = head * tp // count
            for part in rule.parts:
                read = self._read(part, layer, head=head)
                if read is None:
                    return None
                reads.append(replace(read, ranks=(rank,), spans=(read.spans[rank],)))
        shape = (count // tp, *_joined(reads[: len(rule.parts)]))
        return Target(rule.target.format(layer=local), rule.dtype or self.dtype, shape, tuple(reads))

    def _read(self, part: Part, layer: int, expert: int = 0, head: int | None = None) -> Read | None:
        """Return the read of a part, or of the part of one head among all heads'; None: a problem was noted."""
        name = part.source.format(layer=layer, expert=expert)
        tensor = self.index.tensors.get(name)
        if tensor is None:
            self.missing.append(name)
            return None
        self.used.add(name)
        tensor = tensor if tensor.shape else replace(tensor, shape=(1,))  # a number is a vector of one
        config = self.config.of_layer(layer)
        dims = self._dims_of(config)
        wanted = tuple(dims[dim] for dim in part.shape)
        if part.fusion is not None:
            return self._read_of_expert(part, part.fusion, tensor, wanted, expert)
        sections = [dims[dim] for dim in part.sections]
        heads = 1 if head is None else self.config.num_attention_heads
        expected = (sum(sections) * heads, *wanted[1:]) if sections else wanted
        if not self._fits(tensor, (1, *expected) if part.has_first_axis else expected):
            return None
        tensor = replace(tensor, shape=expected)
        start = sum(sections[: part.section]) + (head or 0) * sum(sections)
        if part.cut is None and not sections:
            return Read(tensor, None, (), add=part.add)
        axis = part.cut.axis if part.cut else 0
        return Read(tensor, axis, self._spans_of(part.cut, wanted[axis], start, config), add=part.add)

    def _dims_of(self, config: ModelConfig) -> dict[str, int]:
        """Return the sizes that rules name. Cached for all layers with heads of one size and number."""
        heads = config.head_size, config.num_key_value_heads
        if heads not in self._dims:
            self._dims[heads] = config.dims()
        return self._dims[heads]

    def _fits(self, tensor: TensorInfo, expected: tuple[int, ...]) -> bool:
        """Whether a tensor has the expected shape and a dtype of weights; else that is kept as a problem."""
        if tensor.shape != expected:
            self.misshapen.append(f"{tensor.name} is {list(tensor.shape)}, config.json says {list(expected)}")
            return False
        if tensor.dtype not in _FLOATS:
            self.misshapen.append(f"{tensor.name} is {tensor.dtype}, weights must be one of {', '.join(_FLOATS)}")
            return False
        return True

    def _read_of_expert(self, part: Part, fusion: Fusion, tensor: TensorInfo, wanted: tuple[int, ...], expert: int) -> Read | None:
        """Return the read of an expert's part of a tensor of all experts; None: a problem was noted."""
        count, *inner = wanted
        stored = (fusion.count * count, *inner)
        if not self._fits(tensor, (self._dims_of(self.config)["experts"], *(reversed(stored) if fusion.transposed else stored))):
            return None
        first, step = (fusion.index, fusion.count) if fusion.interleaved else (fusion.index * count, 1)
        rows = ExpertRows(expert, first, step, count, fusion.transposed)
        if part.cut is None:
            return Read(tensor, None, (), add=part.add, rows=rows)
        return Read(tensor, part.cut.axis, self._spans_of(part.cut, wanted[part.cut.axis], 0, self.config), add=part.add, rows=rows)

    def _spans_of(self, cut: Cut | None, size: int, start: int, config: ModelConfig) -> tuple[Span, ...]:
        """Return the spans of an axis of `size` elements that starts at `start` of the source axis. Cached for all layers."""
        key = (cut, size, start, config.num_key_value_heads)
        if key not in self._spans:
            whole = (Span(0, size),) * self.topology.tp
            plain = spans(cut, size, config, self.topology) if cut else whole
            self._spans[key] = tuple(Span(span.begin + start, span.end + start, span.pad) for span in plain)
        return self._spans[key]

    def raise_problems(self) -> None:
        if self.missing:
            missing = list(dict.fromkeys(self.missing))
            prefixed = _as_prefixed(missing[0], self.index.tensors)
            if prefixed is not None:
                raise WeightMapError(
                    f"the checkpoint names {missing[0]} {prefixed}: it holds a language model within a larger model",
                    "Save the language model as a separate checkpoint (with transformers: load the larger model, then call "
                    "save_pretrained on its language model), and build that.",
                )
            raise WeightMapError(
                f"the checkpoint lacks {len(missing)} tensors that {self.family.name} needs: {some_of(missing)}",
                "Check that all shards were downloaded and that config.json belongs to these weights.",
            )
        if self.misshapen:
            raise WeightMapError(
                f"{len(self.misshapen)} tensors have another shape or dtype than config.json says: {some_of(self.misshapen)}",
                "config.json and the weights are of different models.",
            )
        quantized_targets.raise_problems(self.unfit)

    def account(self) -> tuple[tuple[str, str], ...]:
        ignored, unread = self.left_over()
        if unread:
            raise WeightMapError(
                f"{len(unread)} tensors of the checkpoint would be dropped, because {self.family.name} has no rule for them: "
                f"{some_of(unread)}",
                "The checkpoint is of another architecture, or holds an adapter; name the right family or remove them.",
            )
        return ignored

    def left_over(self) -> tuple[tuple[tuple[str, str], ...], tuple[str, ...]]:
        """Return the tensors that no rule has used: those that are ignored, with the reasons, and the others."""
        ignored: list[tuple[str, str]] = list(self.index.left_out.items())
        unread: list[str] = []
        patterns = [entry for entry in self.family.ignored if entry.applies(self.config)]
        for name in self.index.tensors:
            if name in self.used:
                continue
            reason = next((entry.reason for entry in patterns if entry.matches(name, self.config)), None)
            if reason is None:
                unread.append(name)
            else:
                ignored.append((name, reason))
        return tuple(ignored), tuple(unread)


def _partner(name: str) -> str:
    """Return mlp.fc for mlp.gate, and mlp.gate for mlp.fc."""
    if name.endswith("mlp.fc.weight"):
        return name.replace("mlp.fc.weight", "mlp.gate.weight")
    return name.replace("mlp.gate.weight", "mlp.fc.weight")


def _joined(reads: Sequence[Read]) -> tuple[int, ...]:
    """Return the shape on one rank of the slices joined along axis 0."""
    shape = list(reads[0].shape)
    shape[0] = sum(_local_size(read, 0) for read in reads)
    if len(shape) > 1:
        shape[1] = _local_size(reads[0], 1)
    return tuple(shape)


def _local_size(read: Read, axis: int) -> int:
    return read.spans[0].length if read.axis == axis else read.shape[axis]


def _as_prefixed(name: str, tensors: Iterable[str]) -> str | None:
    """Return a tensor with the same name but a longer prefix, or without the leading `model.`."""
    end = "." + name.removeprefix("model.")
    return next((other for other in tensors if f".{other}".endswith(end)), None)
