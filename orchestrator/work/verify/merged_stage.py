"""Execute a pipeline stage in one process: the ranks' graphs merged into one, run by ONNX Runtime in float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy.typing as npt
import onnx

from orchestrator.model.stage import StageNetwork
from orchestrator.networks import Part, Rendering, decoder_network
from orchestrator.networks.kv_cache import PAST, present_of
from orchestrator.networks.merge import merge_ranks, ranked
from orchestrator.work.binding import bind_portable
from orchestrator.work.shards import Weight
from orchestrator.work.verify.inputs import Call
from orchestrator.work.verify.ort import open_session, ort_value
from orchestrator.work.verify.stage_run import FirstCaches, feeds, joined, result_name

Array = npt.NDArray[Any]


class MergedStage:
    """All ranks of a stage, with their KV caches."""

    def __init__(self, network: StageNetwork, weights: Sequence[Mapping[str, Weight]], *, observed: bool = False) -> None:
        """`weights` by tp_rank. `observed`: every call keeps the values of the network's parts in `parts`."""
        ranks = [decoder_network(network, tp_rank, Rendering.executed()) for tp_rank in range(network.stage.tp)]
        bound = {
            ranked(name, rank): ort_value(value, kind)
            for rank, each in enumerate(ranks)
            for name, (value, kind) in bind_portable(each, weights[rank]).items()
        }
        self._network, self._stage = network, network.stage
        self._bound = bound  # the session reads this memory
        merged = merge_ranks([each.model for each in ranks])
        self._observed = _observe(merged, ranks[0].parts) if observed else {}
        self.parts: dict[Part, Array] = {}
        """Values of the last call, of the first rank where ranks differ."""
        self._session = open_session(merged.SerializeToString(), bound)
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._cache: dict[str, Any] = {}

    def reset(self, batch: int) -> None:
        """Empty the caches: the next call begins `batch` new sequences."""
        names = [value.name for value in self._session.get_inputs() if PAST in value.name]
        empty = FirstCaches(self._stage, batch, self._network.cache_slots)
        self._cache = {name: empty.of(name) for name in names}

    def run(self, call: Call, hidden_states: Array | None = None) -> Array:
        """Execute a call and advance the caches. Returns hidden states, or on the last stage the logits of the whole vocabulary.

        Raises VerificationError when the ranks' outputs differ.
        """
        values = {**feeds(self._stage, call, hidden_states), **self._cache}
        outputs = dict(zip(self._outputs, self._session.run_with_ort_values(self._outputs, values), strict=True))
        self._cache = {name: outputs[present_of(name)] for name in self._cache}
        self.parts = {part: outputs[name].numpy() for part, name in self._observed.items()}
        results = [outputs[ranked(result_name(self._stage), rank)].numpy() for rank in range(self._stage.tp)]
        return joined(self._network, results)


def _observe(merged: onnx.ModelProto, parts: Sequence[Part]) -> dict[Part, str]:
    """Add the parts' values to the outputs of a merged graph. Returns their names there; inputs of the graph are left out."""
    made = {name for node in merged.graph.node for name in node.output}
    candidates = ((part, name) for part in parts for name in (ranked(part.value, 0), part.value))
    names = {part: name for part, name in candidates if name in made}
    merged.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(names.values()))
    return names
