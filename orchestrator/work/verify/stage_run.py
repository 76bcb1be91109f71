"""Parts that the executors of a pipeline stage share: inputs of a call, first caches, sessions, agreement, the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from orchestrator.base.errors import VerificationError
from orchestrator.model.stage import StageNetwork, StageOptions
from orchestrator.networks.shape import RankShape
from orchestrator.networks.slices import Slice, executable, key_of
from orchestrator.work.verify.inputs import Call
from orchestrator.work.verify.ort import element_type, empty_cache, open_session, ort_value

Array = npt.NDArray[Any]
_AGREEMENT = 1e-5
"""Largest difference between the ranks' values, relative to the largest value."""


def feeds(stage: StageOptions, call: Call, hidden_states: Array | None) -> dict[str, Any]:
    """Return the OrtValues that every rank gets, by name. `hidden_states`: result of the stage before; None: the first stage."""
    found: dict[str, Array] = {"position_ids": call.position_ids, "write_indices": call.write_indices}
    found |= {"input_ids": call.input_ids} if hidden_states is None else {"hidden_states": hidden_states}
    if stage.is_last:
        found["logit_indices"] = call.logit_indices
    return {name: ort_value(value) for name, value in found.items()}


class FirstCaches:
    """OrtValues of the key and value caches of any rank before the first call: one for all caches of a size."""

    def __init__(self, stage: StageOptions, batch: int, slots: int, *, halved: bool = False) -> None:
        """`halved`: as in a portable graph, whose caches are all of one size."""
        whole = RankShape(stage, "float32", portable=True, halved=halved)
        shapes = [whole.of_layer(layer) for layer in range(stage.num_layers)]
        self._sizes = [(shape.num_kv_heads, shape.cache_head_size) for shape in shapes]
        self._by_size = {
            size: empty_cache(shape, batch, slots) for size, shape in dict(zip(self._sizes, shapes, strict=True)).items()
        }

    def of(self, name: str) -> Any:
        """Return the cache of an input `past_key_values.L.key`, with or without a rank's prefix."""
        layer = int(name.rpartition(".")[0].rpartition(".")[2]) if len(self._by_size) > 1 else 0
        return self._by_size[self._sizes[layer]]


class Sessions:
    """Sessions of the slices of a stage's graphs. Slices that differ only in names share one."""

    def __init__(self, opsets: Sequence[onnx.OperatorSetIdProto], device: str = "cpu") -> None:
        self._opsets, self._device = opsets, device
        self._opened: dict[tuple[object, ...], Any] = {}

    def __len__(self) -> int:
        return len(self._opened)

    def of(self, part: Slice, inputs: Sequence[Any]) -> Any:
        """Return the session of a slice. `inputs`: its inputs, then its weights, as `run_session` takes them."""
        kinds = [element_type(value) for value in inputs]
        key = (*kinds, *key_of(part))
        if key not in self._opened:
            model = executable(part, self._opsets, kinds).SerializeToString()
            self._opened[key] = open_session(model, device=self._device)
        return self._opened[key]


def check_agreement(stage: StageOptions, values: Sequence[Array], where: str) -> None:
    """Compare the ranks' values with rank 0's; a NaN agrees with a NaN only. Raises VerificationError, which says `where`."""
    first = values[0]
    limit = _AGREEMENT * float(np.abs(first).max(initial=0.0, where=np.isfinite(first)))
    for tp_rank, other in enumerate(values[1:], 1):
        same = (other == first) | (np.isnan(other) & np.isnan(first))
        worst = np.where(same, 0.0, np.nan_to_num(np.abs(other - first), nan=np.inf)).max(initial=0.0)
        if worst > limit:
            raise VerificationError(f"rank {stage.rank(tp_rank)} and rank {stage.rank(0)} differ by {worst:.3g} {where}")


def result_name(stage: StageOptions) -> str:
    """Return the name of each rank's result."""
    return "logits" if stage.is_last else "hidden_states_out"


def joined(network: StageNetwork, results: Sequence[Array]) -> Array:
    """Return the stage's result of a call from its ranks': hidden states, or the logits of the whole vocabulary.

    Raises VerificationError when results that must be equal differ.
    """
    stage = network.stage
    if stage.is_last and not network.gather_logits:
        return np.concatenate(results, axis=-1)[..., : stage.config.vocab_size]
    check_agreement(stage, results, f"in the output of stage {stage.pp_rank}")
    return results[0]
