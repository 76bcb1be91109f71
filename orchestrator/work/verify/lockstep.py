"""Execute the ranks of a pipeline stage in lockstep, in one process, with only one slice of one rank's weights in memory.

For every slice of the graph, each rank's weights are read, widened and bound, all calls pass it, and the weights are dropped. Then
the collective that ends the slice is computed for every call. Keys and values of a layer live from its first slice to its last.
Only the hidden states of all calls stay: neither layers nor ranks add to the peak.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.model.stage import StageNetwork
from orchestrator.networks import Network, Rendering, decoder_network
from orchestrator.networks.kv_cache import PAST, present_of
from orchestrator.networks.slices import Collective, Slice, Sliced, cut, looked_up
from orchestrator.work.binding import PortableWeights
from orchestrator.work.shards import Weight
from orchestrator.work.verify.inputs import Call
from orchestrator.work.verify.ort import first_rows, ort_value, run_session, widened_on_gpu
from orchestrator.work.verify.stage_run import FirstCaches, Sessions, check_agreement, feeds, joined, result_name

Array = npt.NDArray[Any]
_NOTHING: Array = np.zeros(0)


@dataclass
class _Rank:
    """Graph, weights and values of one rank."""

    network: Network
    sliced: Sliced
    weights: PortableWeights
    first_caches: FirstCaches
    """OrtValue that fills every initial cache: a large number, so that reading an unwritten slot gives a wrong result."""
    values: list[dict[str, Any]]
    """OrtValues by call and name, from the slice that makes them to the last one that reads them."""
    cache: dict[str, Any] = field(default_factory=dict)
    """Keys and values for the next call, by the name of the output."""


class Lockstep:
    """Ranks of a stage, and the calls that pass them."""

    def __init__(
        self,
        network: StageNetwork,
        weights: Sequence[Mapping[str, Weight]],
        calls: Sequence[Call],
        hidden_states: Sequence[Array],
        device: str = "cpu",
    ) -> None:
        """`weights` by tp_rank; `hidden_states` by call, from the stage before (empty for the first stage).

        Raises SourceMissingError, SourceCorruptError, ArchitectureError.
        """
        self._network, self._stage, self._calls = network, network.stage, calls
        self._device = device
        positions = 1 + max(int(call.position_ids.max()) for call in calls)
        self._ranks = []
        for tp_rank, mine in enumerate(weights):
            graph = decoder_network(network, tp_rank, Rendering.executed())
            before: Sequence[Array | None] = hidden_states or [None] * len(calls)
            values = [feeds(network.stage, call, hidden) for call, hidden in zip(calls, before, strict=True)]
            empty = FirstCaches(network.stage, len(calls[0].input_ids), network.stage.config.cache_slots(positions))
            self._ranks.append(_Rank(graph, cut(graph), PortableWeights(graph, mine), empty, values))
        self._sessions = Sessions(self._ranks[0].network.model.opset_import, device)

    def run(
        self,
        report: Callable[[int, int], None] = lambda done, total: None,
        watch: Callable[[int, list[Array]], None] = lambda layer, hidden_states: None,
        keep: Callable[[int, Callable[[], dict[str, Array]]], None] = lambda layer, state: None,
        last: tuple[int, Mapping[str, Array]] | None = None,
    ) -> list[Array]:
        """Return the hidden states [B, S, hidden] by call, or logits [B, S, vocabulary] on the last stage.

        `report` gets the number of finished slices and of all. `watch` gets a layer's number in the model and the hidden states
        at its end, by call; then `keep` gets that number and a function that copies the values that later slices read. `last`:
        such a layer and its values, from an earlier attempt; slices up to its end are skipped. Raises VerificationError when the
        ranks' hidden states differ.
        """
        slices = self._ranks[0].sliced.slices
        first = 0 if last is None else self._restore(*last)
        weights = self._weights_ahead(first)
        for number, part in enumerate(slices[first:], first):
            for rank in self._ranks:
                self._pass(rank, number, next(weights))
                rank.weights.release(part.weights)
            if part.collective is not None:
                self._exchange(part.collective)
            if part.layer is not None:
                ended = self._ended(part.nodes[-1].name, self._stage.first_layer + part.layer)
                watch(self._stage.first_layer + part.layer, ended)
            self._forget(number, layer_ended=part.layer is not None)
            if part.layer is not None:
                keep(self._stage.first_layer + part.layer, self._state)
            report(number + 1, len(slices))
        return self._results()

    def _weights_ahead(self, first: int) -> Iterator[list[Any]]:
        """Yield the weights of each slice and rank, as OrtValues; the next are read while a slice is executed."""
        count = len(self._ranks[0].sliced.slices)
        order = [(rank, number) for number in range(first, count) for rank in self._ranks]
        if not order:
            return
        with ThreadPoolExecutor(1, "weights") as pool:
            coming = pool.submit(_bind, *order[0], self._device)
            for following in [*order[1:], None]:
                bound = [coming.result()]
                if following is not None:
                    coming = pool.submit(_bind, *following, self._device)
                yield bound.pop()

    def _pass(self, rank: _Rank, number: int, weights: list[Any]) -> None:
        """Run all calls through one slice of one rank."""
        part = rank.sliced.slices[number]
        if not part.nodes:
            return
        session = None
        for call, values in zip(self._calls, rank.values, strict=True):
            inputs = [_input(rank, part, values, name, call) for name in part.inputs] + weights
            session = session or self._sessions.of(part, inputs)
            for name, value in zip(part.outputs, run_session(session, inputs), strict=True):
                if rank.sliced.is_read_after(name, number) or name == result_name(self._stage):
                    values[name] = value
                if present_of(PAST) in name and not call.repeats:
                    rank.cache[name] = value

    def _exchange(self, collective: Collective) -> None:
        """Give every rank the sum of all ranks' values, or their concatenation along axis 0."""
        for call in range(len(self._calls)):
            parts = [rank.values[call][collective.source].numpy() for rank in self._ranks]
            together = functools.reduce(np.add, parts) if collective.operation == "all_reduce" else np.concatenate(parts)
            shared = ort_value(np.ascontiguousarray(together))
            for rank in self._ranks:
                rank.values[call][collective.result] = shared

    def _ended(self, name: str, layer: int) -> list[Array]:
        """Return the hidden states at a layer's end by call. Raises VerificationError when the ranks differ."""
        found = [[rank.values[call][name].numpy() for rank in self._ranks] for call in range(len(self._calls))]
        for values in found:
            check_agreement(self._stage, values, f"after layer {layer}")
        return [values[0] for values in found]

    def _forget(self, number: int, *, layer_ended: bool) -> None:
        for rank in self._ranks:
            for values in rank.values:
                for name in [name for name in values if rank.sliced.last_use.get(name) == number]:
                    del values[name]
            if layer_ended:
                rank.cache.clear()

    def _state(self) -> dict[str, Array]:
        """Return the values that later slices read, by rank, call and name, without those that equal rank 0's."""
        state: dict[str, Array] = {}
        for tp_rank, rank in enumerate(self._ranks):
            for call, values in enumerate(rank.values):
                for name, value in values.items():
                    array = value.numpy()
                    if tp_rank and np.array_equal(array, state.get(f"0/{call}/{name}", _NOTHING)):
                        continue
                    state[f"{tp_rank}/{call}/{name}"] = array
        return state

    def _restore(self, layer: int, state: Mapping[str, Array]) -> int:
        """Restore the values of an earlier attempt; returns the number of the first slice after the layer."""
        for tp_rank, rank in enumerate(self._ranks):
            for key, array in state.items():
                of_rank, call, name = key.split("/", 2)
                if int(of_rank) == tp_rank or (of_rank == "0" and f"{tp_rank}/{call}/{name}" not in state):
                    rank.values[int(call)][name] = ort_value(np.ascontiguousarray(array))
        ends = [number for number, part in enumerate(self._ranks[0].sliced.slices) if part.layer == layer - self._stage.first_layer]
        return ends[0] + 1

    def _results(self) -> list[Array]:
        name = result_name(self._stage)
        return [
            joined(self._network, [rank.values[call][name].numpy() for rank in self._ranks]) for call in range(len(self._calls))
        ]


def _input(rank: _Rank, part: Slice, values: Mapping[str, Any], name: str, call: Call) -> Any:
    """Return a value of the call, or the cache left by the previous call."""
    if not name.startswith(PAST):
        return values[name]
    # Of the cache of another slice only its shape is read: `cut` ensures that.
    empty = rank.first_caches.of(name)
    cache = rank.cache.get(present_of(name), empty) if present_of(name) in part.outputs else empty
    return first_rows(cache, len(call.input_ids)) if call.repeats else cache


def _bind(rank: _Rank, number: int, device: str) -> list[Any]:
    """Return the weights of a slice, in the order of its inputs."""
    part = rank.sliced.slices[number]
    rows_only = {name for name in looked_up(part) if rank.weights.is_widened(name)}

    def bound(name: str) -> Any:
        if device == "cuda" and name not in rows_only and rank.weights.is_widened(name):
            return widened_on_gpu(*rank.weights.stored(name))
        return ort_value(*(rank.weights.stored(name) if name in rows_only else rank.weights[name]))

    return [bound(name) for name in part.weights]
