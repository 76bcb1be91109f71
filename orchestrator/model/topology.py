"""Topology of the ranks: tensor parallel x context parallel x pipeline parallel.

Rank order is TensorRT-LLM's (`Mapping` of version 0.16): tp fastest, then cp, then pp. Context-parallel ranks split sequences,
not weights, so the ranks of one (tp_rank, pp_rank) share a checkpoint file. Layers are split over the stages by an explicit
partition, or like torch.tensor_split: the first L % pp stages hold one layer more.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from orchestrator.base.errors import TopologyError


@dataclass(frozen=True, slots=True)
class Coordinates:
    """Coordinates of one rank."""

    rank: int
    tp_rank: int
    pp_rank: int
    cp_rank: int = 0


@dataclass(frozen=True, slots=True)
class ParallelLimits:
    """Numbers of a model that decide which topologies are legal."""

    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    """Intermediate size of the dense MLPs; 0: the model has none."""
    num_experts: int = 0
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    global_kv_heads: int = 0
    """Number of key/value heads in layers whose heads differ from those of others (Gemma 4); 0: there are none."""


@dataclass(frozen=True, slots=True)
class Topology:
    """Degrees of parallelism, and the number of layers of each stage."""

    tp: int
    pp: int
    pp_partition: tuple[int, ...] | None = None
    """Number of layers of each stage; None: an even split, with the remainder on the first stages."""
    moe_ep: int = 1
    """Expert-parallel groups among the tensor-parallel ranks."""
    cp: int = 1
    """Context-parallel ranks. Each has a part of every sequence, and the weights of its (tp_rank, pp_rank)."""

    @property
    def moe_tp(self) -> int:
        """Number of ranks that share one expert."""
        return self.tp // self.moe_ep

    def moe_ranks(self, tp_rank: int) -> tuple[int, int]:
        """Return (moe_tp_rank, moe_ep_rank), in TensorRT-LLM's order."""
        return tp_rank // self.moe_ep, tp_rank % self.moe_ep

    @property
    def world_size(self) -> int:
        return self.tp * self.cp * self.pp

    @property
    def num_files(self) -> int:
        """Number of ranks with different weights, stored as rank0.safetensors to rank{num_files - 1}.safetensors."""
        return self.tp * self.pp

    def rank(self, tp_rank: int, pp_rank: int, cp_rank: int = 0) -> int:
        return (pp_rank * self.cp + cp_rank) * self.tp + tp_rank

    def file_number(self, tp_rank: int, pp_rank: int) -> int:
        """Return the N of rank{N}.safetensors, shared by all cp ranks: rank % tp + rank // (tp * cp) * tp.

        Source: `PretrainedModel.from_checkpoint` of TensorRT-LLM 0.16.
        """
        return pp_rank * self.tp + tp_rank

    def coordinates(self, rank: int) -> Coordinates:
        """Return the coordinates of `rank`. Raises TopologyError when it is outside the world."""
        if not 0 <= rank < self.world_size:
            sizes = f"tp={self.tp}, pp={self.pp}" + (f", cp={self.cp}" if self.cp > 1 else "")
            raise TopologyError(f"rank {rank} is not in 0..{self.world_size - 1} ({sizes})")
        replica, tp_rank = divmod(rank, self.tp)
        return Coordinates(rank, tp_rank, replica // self.cp, replica % self.cp)

    def ranks(self) -> Iterator[Coordinates]:
        for rank in range(self.world_size):
            yield self.coordinates(rank)

    def stages(self, num_layers: int) -> tuple[range, ...]:
        """Return the global layer numbers of each pipeline stage."""
        counts = self.pp_partition or _even_partition(num_layers, self.pp)
        bounds = [0]
        for count in counts:
            bounds.append(bounds[-1] + count)
        return tuple(range(begin, end) for begin, end in itertools.pairwise(bounds))


def _even_partition(num_layers: int, pp: int) -> tuple[int, ...]:
    short, longer = divmod(num_layers, pp)
    return tuple(short + 1 if stage < longer else short for stage in range(pp))


def problems(topology: Topology, limits: ParallelLimits) -> list[str]:
    """Return every reason why `topology` cannot be built; empty: it can."""
    found = _tp_problems(topology.tp, limits) + _moe_problems(topology, limits)
    if topology.cp > 1 and topology.moe_ep > 1:
        found.append(f"cp={topology.cp} and moe_ep={topology.moe_ep} exclude each other")
    layers = limits.num_hidden_layers
    if topology.pp > layers:
        found.append(f"pp={topology.pp} is greater than the model's {layers} layers")
    if topology.pp_partition is not None:
        if len(topology.pp_partition) != topology.pp:
            found.append(f"pp_partition has {len(topology.pp_partition)} stages, pp is {topology.pp}")
        if sum(topology.pp_partition) != layers:
            found.append(f"pp_partition sums to {sum(topology.pp_partition)}, the model has {layers} layers")
        if any(count < 1 for count in topology.pp_partition):
            found.append("pp_partition has a stage without layers")
    return found


def _tp_problems(tp: int, limits: ParallelLimits) -> list[str]:
    found = []
    heads, kv_heads = limits.num_attention_heads, limits.num_key_value_heads
    if heads % tp:
        found.append(f"tp={tp} does not divide the {heads} attention heads")
    found += [
        f"tp={tp} neither divides nor is a multiple of the {count} key/value heads"
        for count in dict.fromkeys((kv_heads, limits.global_kv_heads or kv_heads))
        if count % tp and tp % count
    ]
    if limits.intermediate_size % tp:
        found.append(f"tp={tp} does not divide intermediate_size {limits.intermediate_size}")
    if limits.shared_expert_intermediate_size % tp:
        found.append(f"tp={tp} does not divide the shared expert's intermediate size {limits.shared_expert_intermediate_size}")
    return found


def _moe_problems(topology: Topology, limits: ParallelLimits) -> list[str]:
    experts, ep = limits.num_experts, topology.moe_ep
    if not experts:
        return [f"moe_ep={ep}, but the model has no experts"] if ep > 1 else []
    if topology.tp % ep:
        return [f"moe_ep={ep} does not divide tp={topology.tp}"]
    found = [f"moe_ep={ep} does not divide the {experts} experts"] if experts % ep else []
    if limits.moe_intermediate_size % topology.moe_tp:
        found.append(
            f"tp / moe_ep = {topology.moe_tp} does not divide the experts' intermediate size {limits.moe_intermediate_size}"
        )
    return found


def legal_tp(limits: ParallelLimits, moe_ep: int = 1) -> list[int]:
    """Return every tensor-parallel size that is legal with `moe_ep`, ascending."""
    sizes = range(1, limits.num_attention_heads + 1)
    return [tp for tp in sizes if not _tp_problems(tp, limits) and not _moe_problems(Topology(tp, 1, None, moe_ep), limits)]


def legal_moe_ep(tp: int, limits: ParallelLimits) -> list[int]:
    """Return every legal number of expert-parallel groups among `tp` ranks, ascending."""
    return [ep for ep in range(1, tp + 1) if not _moe_problems(Topology(tp, 1, None, ep), limits)]


def check(topology: Topology, limits: ParallelLimits) -> None:
    """Check that `topology` is legal. Raises TopologyError with every reason and the legal alternatives."""
    found = problems(topology, limits)
    if found:
        raise TopologyError("illegal topology: " + "; ".join(found), f"Legal here: {_alternatives(topology, limits)}.")


def check_engines(topology: Topology) -> None:
    """Refuse splits that checkpoints support and engines do not. Raises TopologyError."""
    if topology.cp > 1:
        raise TopologyError(
            f"cp={topology.cp}: the engines built here do not split sequences over ranks",
            "Build with cp=1. `orchestrator convert --cp` writes a checkpoint for TensorRT-LLM's own builder.",
        )


def _alternatives(topology: Topology, limits: ParallelLimits) -> str:
    """Return the legal values: always of tp and pp, of the others only if they are wrong."""
    layers = limits.num_hidden_layers
    legal = [f"tp in {as_set(legal_tp(limits))}", f"pp from 1 to {layers}"]
    if limits.num_experts and _moe_problems(topology, limits):
        counts = legal_moe_ep(topology.tp, limits)
        legal.append(f"moe_ep in {as_set(counts)} with tp={topology.tp}" if counts else f"no moe_ep with tp={topology.tp}")
        fitting = legal_tp(limits, topology.moe_ep)
        legal.extend([f"tp in {as_set(fitting)} with moe_ep={topology.moe_ep}"] if fitting and topology.moe_ep > 1 else [])
    if topology.cp > 1 and topology.moe_ep > 1:
        legal.append("cp=1 or moe_ep=1")
    if topology.pp_partition is not None and topology.pp <= layers:
        legal.append(f"a pp_partition such as {list(_even_partition(layers, topology.pp))}")
    return ", ".join(legal)


def as_set(sizes: Iterable[int]) -> str:
    """Return the text {1, 2, 4}."""
    return "{" + ", ".join(str(size) for size in sizes) + "}"
