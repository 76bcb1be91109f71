"""Decoder layers of transformers with weights read from a source: one layer at a time, the experts of a mixture one by one.

The next layer is read in the source's dtype while a layer computes. Experts are not loaded: a stand-in records their inputs,
each expert is read once and computes for all calls, and the layer runs again with the results. The order of sums is that of
transformers' eager experts, so the results are equal to the bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from orchestrator.base.errors import QuantizationError
from orchestrator.checkpoints.reading import RowReader
from orchestrator.model.checkpoint import CheckpointIndex, TensorInfo
from orchestrator.planning.calibration import layer_of
from orchestrator.work.as_hugging_face import LayerNames
from orchestrator.work.calibrate.experts import EXPERT_LINEARS
from orchestrator.work.calibrate.part_model import read_tensor_rows, read_tensors

_EXPERTS = ".experts."


@dataclass(frozen=True, slots=True)
class ExpertCall:
    """Arguments of one call of a layer's experts."""

    hidden_states: Any
    """[tokens, hidden]."""
    top_k_index: Any
    """int64 [tokens, k]; -1: no expert."""
    top_k_weights: Any
    """[tokens, k]; None: the hidden states are weighed already, and the experts take nothing else."""


class _StandIn(torch.nn.Module):
    """Stand-in for the experts of a layer: records calls, or answers them."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self._num_experts = num_experts
        self.calls: list[ExpertCall] = []
        self.answers: Iterator[Any] | None = None

    def forward(self, hidden_states: Any, top_k_index: Any = None, top_k_weights: Any = None) -> Any:
        if self.answers is not None:
            return next(self.answers)
        if top_k_index is None:
            top_k_index = self._chosen(hidden_states)
        self.calls.append(ExpertCall(hidden_states, top_k_index, top_k_weights))
        return torch.zeros_like(hidden_states)

    def _chosen(self, hidden_states: Any) -> Any:
        """Return the expert of each row: Llama 4 gives every expert all tokens, zeros where the token did not choose it."""
        by_expert = hidden_states.view(self._num_experts, -1).any(dim=-1)
        experts = torch.where(by_expert, torch.arange(self._num_experts, device=hidden_states.device), -1)
        return experts.repeat_interleave(len(hidden_states) // self._num_experts)[:, None]


class Experts:
    """Experts of one layer, read when they compute."""

    def __init__(
        self,
        parent: Any,
        tensors: Mapping[int, Mapping[str, TensorInfo]],
        read: Callable[[int, Mapping[str, TensorInfo]], dict[str, Any]],
    ) -> None:
        """`parent` holds transformers' experts, which a stand-in replaces.

        `tensors`: by expert and linear (gate, up, down), or by the module's parameters, where each holds all experts.
        """
        self._module, self._tensors, self._read = parent.experts, tensors, read
        self._stand_in = parent.experts = _StandIn(parent.experts.num_experts)

    def tensors(self) -> Iterator[TensorInfo]:
        """Yield all weights of all experts."""
        return (tensor for linears in self._tensors.values() for tensor in linears.values())

    def recorded(self, run: Callable[[], None]) -> list[ExpertCall]:
        """Return the experts' calls that `run` makes."""
        self._stand_in.calls, self._stand_in.answers = [], None
        run()
        return self._stand_in.calls

    def answered(self, run: Callable[[], None], results: Sequence[Any]) -> None:
        """Run the layer with the results of the calls, in their order."""
        self._stand_in.answers = iter(results)
        run()

    def compute(self, streams: Sequence[tuple[Sequence[ExpertCall], Callable[[Any], Any]]]) -> list[list[Any]]:
        """Return the results of every call by stream. A stream's function makes its weights from the source's in float32."""
        totals = [[torch.zeros_like(call.hidden_states) for call in calls] for calls, _ in streams]
        hit = [
            expert
            for expert in sorted(self._tensors)
            if any((call.top_k_index == expert).any() for calls, _ in streams for call in calls)
        ]
        with ThreadPoolExecutor(1, "expert") as pool:
            coming = pool.submit(self._read, hit[0], self._tensors[hit[0]]) if hit else None
            for position, expert in enumerate(hit):
                assert coming is not None
                stored = coming.result()
                following = hit[position + 1] if position + 1 < len(hit) else None
                coming = pool.submit(self._read, following, self._tensors[following]) if following is not None else None
                for (calls, weights), sums in zip(streams, totals, strict=True):
                    module = self._one({name: weights(values.float()) for name, values in stored.items()})
                    for call, total in zip(calls, sums, strict=True):
                        _add(module, expert, call, total)
        return totals

    def _one(self, stored: Mapping[str, Any]) -> Any:
        """Return transformers' experts with this expert only."""
        if "gate" in stored:
            stored = {"gate_up_proj": torch.cat([stored["gate"], stored["up"]])[None], "down_proj": stored["down"][None]}
        module = copy.copy(self._module)
        module._parameters = {name: torch.nn.Parameter(values, requires_grad=False) for name, values in stored.items()}
        module.num_experts = 1
        return module


def _add(module: Any, expert: int, call: ExpertCall, total: Any) -> None:
    # The order, by k and then by token, is that of transformers' eager experts: another may round differently.
    places, tokens = torch.where((call.top_k_index == expert).T)
    if not len(tokens):
        return
    if call.top_k_weights is None:
        result = module(call.hidden_states[tokens])
    else:
        first = torch.zeros((len(tokens), 1), dtype=torch.int64, device=tokens.device)
        result = module(call.hidden_states[tokens], first, call.top_k_weights[tokens, places, None])
    total.index_add_(0, tokens, result.to(total.dtype))


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer with unrounded weights, in float32."""

    number: int
    module: Any
    experts: Experts | None
    """None: a dense layer."""
    tensors: Mapping[str, TensorInfo]
    """Source tensor of each parameter except experts, by the parameter's name in the layer."""


class SourceLayers:
    """Reads the layers of a source."""

    def __init__(
        self, reader: RowReader, index: CheckpointIndex, skeletons: Sequence[Any], names: LayerNames, device: torch.device
    ) -> None:
        """`skeletons`: transformers' layers without memory (device meta)."""
        self._reader, self._skeletons, self._device = reader, skeletons, device
        self._dense: list[dict[str, TensorInfo]] = [{} for _ in skeletons]
        self._experts: list[dict[int, dict[str, TensorInfo]]] = [{} for _ in skeletons]
        for name, tensor in index.tensors.items():
            if ".layers." not in name or layer_of(name) >= len(skeletons):
                continue
            local = names(name)
            if _EXPERTS in f".{local}":
                expert, *linear = local.rpartition("experts.")[2].split(".")[:2]
                if linear:
                    self._experts[layer_of(name)].setdefault(int(expert), {})[EXPERT_LINEARS[linear[0]]] = tensor
                else:  # a parameter of all experts
                    for number in range(tensor.shape[0]):
                        self._experts[layer_of(name)].setdefault(number, {})[expert] = tensor
            else:
                self._dense[layer_of(name)][local] = tensor

    def loaded(self, first: int) -> Iterator[Layer]:
        """Yield layers from number `first` on. A layer is dropped before the next is widened to float32.

        Raises QuantizationError for weights that the source lacks.
        """
        with ThreadPoolExecutor(1, "layer") as pool:
            coming = pool.submit(self._read, self._dense[first]) if first < len(self._skeletons) else None
            for number in range(first, len(self._skeletons)):
                assert coming is not None
                stored = coming.result()
                coming = pool.submit(self._read, self._dense[number + 1]) if number + 1 < len(self._skeletons) else None
                yield self._layer(number, stored)
                self._skeletons[number].to("meta")

    def _read(self, tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
        return read_tensors(self._reader, tensors)

    def _read_to_device(self, tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
        return {name: values.to(self._device) for name, values in self._read(tensors).items()}

    def _read_expert(self, expert: int, tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
        """Read the weights of an expert: its tensors, or its rows [1, ...] of the tensors of all experts."""
        if "gate" in tensors:
            return self._read_to_device(tensors)
        rows = {name: read_tensor_rows(self._reader, tensor, expert, expert + 1) for name, tensor in tensors.items()}
        return {name: values.to(self._device) for name, values in rows.items()}

    def _layer(self, number: int, stored: dict[str, Any]) -> Layer:
        module = self._skeletons[number]
        experts = self._stream_experts(number, module)
        missing = sorted(module.state_dict().keys() - stored.keys())
        if missing:
            raise QuantizationError(
                f"{len(missing)} weights of the model cannot be loaded from the source, e.g. model.layers.{number}.{missing[0]}",
                "Use the complete checkpoint.",
            )
        parameters = dict(module.named_parameters())
        for name in list(module.state_dict()):
            path, _, last = name.rpartition(".")
            values, owner = stored.pop(name).to(self._device).float(), module.get_submodule(path)
            if name in parameters:
                owner.register_parameter(last, torch.nn.Parameter(values, requires_grad=False))
            else:  # the router's bias of some families
                owner.register_buffer(last, values)
        return Layer(number, module, experts, self._dense[number])

    def _stream_experts(self, number: int, module: Any) -> Experts | None:
        parents = [each for each in module.modules() if hasattr(getattr(each, "experts", None), "gate_up_proj")]
        if not parents:
            return None
        (parent,) = parents
        wanted = ({"gate", "up", "down"}, {name for name, _ in parent.experts.named_parameters()})
        found = self._experts[number]
        lacking = [expert for expert in range(parent.experts.num_experts) if set(found.get(expert, ())) not in wanted]
        if lacking:
            raise QuantizationError(
                f"the source lacks weights of {len(lacking)} experts of layer {number}, e.g. of expert {lacking[0]}",
                "Use the complete checkpoint.",
            )
        return Experts(parent, self._experts[number], self._read_expert)
