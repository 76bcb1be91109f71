"""Execute a pipeline stage in one process: the ranks' graphs merged into one, run by ONNX Runtime in float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.base.errors import VerificationError
from orchestrator.model.stage import StageNetwork
from orchestrator.networks import Rendering, decoder_network
from orchestrator.networks.kv_cache import past_name, present_name
from orchestrator.networks.merge import merge_ranks, ranked
from orchestrator.networks.shape import RankShape
from orchestrator.work.binding import bind_portable
from orchestrator.work.shards import Weight
from orchestrator.work.verify.inputs import Call
from orchestrator.work.verify.ort import empty_cache, open_session, ort_value

Array = npt.NDArray[Any]
_AGREEMENT = 1e-5
"""Largest difference between the ranks' outputs, relative to the largest output."""


class MergedStage:
    """All ranks of a stage, with their KV caches."""

    def __init__(self, network: StageNetwork, weights: Sequence[Mapping[str, Weight]]) -> None:
        """`weights` by tp_rank."""
        stage = network.stage
        ranks = [decoder_network(network, tp_rank, Rendering.executed()) for tp_rank in range(stage.tp)]
        bound = {
            ranked(name, rank): ort_value(value, kind)
            for rank, each in enumerate(ranks)
            for name, (value, kind) in bind_portable(each, weights[rank]).items()
        }
        self._stage, self._network = stage, network
        self._bound = bound  # the session reads this memory
        self._session = open_session(merge_ranks([each.model for each in ranks]).SerializeToString(), bound)
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._cache: dict[str, Any] = {}

    def reset(self, batch: int) -> None:
        """Empty the caches: the next call begins `batch` new sequences."""
        for rank in range(self._stage.tp):
            empty = empty_cache(RankShape(self._stage, "float32", rank, portable=True), batch, self._network.max_seq_len)
            for layer in range(self._stage.num_layers):
                self._cache |= {ranked(past_name(layer, what), rank): empty for what in ("key", "value")}

    def run(self, call: Call, hidden_states: Array | None = None) -> Array:
        """Execute a call and advance the caches. Returns hidden states, or on the last stage the logits of the whole vocabulary.

        Raises VerificationError when the ranks' outputs differ.
        """
        feeds: dict[str, Array] = {"position_ids": call.position_ids, "write_indices": call.write_indices}
        feeds |= {"input_ids": call.input_ids} if hidden_states is None else {"hidden_states": hidden_states}
        if self._stage.is_last:
            feeds["logit_indices"] = call.logit_indices
        values = {name: ort_value(value) for name, value in feeds.items()}
        outputs = dict(zip(self._outputs, self._session.run_with_ort_values(self._outputs, {**values, **self._cache}), strict=True))
        for rank in range(self._stage.tp):
            for layer in range(self._stage.num_layers):
                for what in ("key", "value"):
                    self._cache[ranked(past_name(layer, what), rank)] = outputs[ranked(present_name(layer, what), rank)]
        name = "logits" if self._stage.is_last else "hidden_states_out"
        results = [outputs[ranked(name, rank)].numpy() for rank in range(self._stage.tp)]
        if self._stage.is_last and not self._network.gather_logits:
            whole: Array = np.concatenate(results, axis=-1)[..., : self._stage.config.vocab_size]
            return whole
        return _agreed(results, self._stage.pp_rank)


def _agreed(results: Sequence[Array], pp_rank: int) -> Array:
    """Return the first rank's output after checking that all ranks agree; a NaN agrees with a NaN only."""
    first = results[0]
    limit = _AGREEMENT * float(np.abs(first).max(initial=0.0, where=np.isfinite(first)))
    for other in results:
        same = (other == first) | (np.isnan(other) & np.isnan(first))
        difference = np.where(same, 0.0, np.nan_to_num(np.abs(other - first), nan=np.inf))
        if difference.max(initial=0.0) > limit:
            raise VerificationError(f"tensor-parallel ranks disagree on the output of stage {pp_rank} by {difference.max():g}")
    return first
