"""Experts of a layer as one linear each, which Model Optimizer calibrates like any other.

transformers holds all experts of a layer in two tensors, whether the source does or not. Model Optimizer gives such tensors one
scale for all experts; engines have one per expert, for both kinds of source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from orchestrator.model.quantized_targets import expert_part, is_of_expert
from orchestrator.planning.calibration import layer_of
from orchestrator.planning.options import CalibrateOptions

EXPERT_LINEARS = {"w1": "gate", "gate_proj": "gate", "w3": "up", "up_proj": "up", "w2": "down", "down_proj": "down"}
"""Roles of an expert's linears, by their names in checkpoints that store experts separately."""


def unfuse_experts(model: Any, options: CalibrateOptions) -> dict[str, str]:
    """Replace transformers' fused experts by linears, in place. Returns the source module of each linear by its path."""
    found: dict[str, str] = {}
    for number, layer in enumerate(model.model.layers):
        mine = [name for name in options.modules if layer_of(name) == options.first_layer + number and is_of_expert(name)]
        if not mine:
            continue
        parent = next(module for module in layer.modules() if hasattr(getattr(module, "experts", None), "gate_up_proj"))
        parent.experts = Experts(parent.experts)
        path = next(name for name, module in model.named_modules() if module is parent.experts)
        found |= {f"{path}.{place}": source for place, source in _places(mine)}
    return found


def _places(modules: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield place (3.gate) and name of the source modules of a layer's experts."""
    parts = {module: expert_part(module) for module in modules}
    up_rows: dict[str, int] = {}
    for part in parts.values():
        if part is not None:
            up_rows[part.tensor] = max(up_rows.get(part.tensor, 0), part.first_row)
    for module, part in parts.items():
        if part is None:
            prefix, _, linear = module.rpartition(".")
            yield f"{prefix.rpartition('.')[2]}.{EXPERT_LINEARS[linear]}", module
        elif not up_rows[part.tensor]:  # one linear per expert
            yield f"{part.expert}.down", module
        else:  # gate comes first, in halves and in turns
            yield f"{part.expert}.{'up' if part.first_row else 'gate'}", module


class Expert(torch.nn.Module):
    """One expert."""

    def __init__(self, gate: Any, up: Any, down: Any, gated: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.gate, self.up, self.down, self._gated = gate, up, down, gated

    def forward(self, x: Any) -> Any:
        return self.down(self._gated(self.gate(x), self.up(x)))


class Experts(torch.nn.ModuleList):
    """Experts of a layer, by number. The order of sums is that of transformers' eager experts."""

    def __init__(self, fused: Any) -> None:
        """Take the weights of transformers' experts, which are left without. Weights stored as [out, in] keep their memory."""
        gated = _gated(fused)
        super().__init__(Expert(*linears, gated) for linears in _take_linears(fused))
        self.num_tokens = [0] * len(self)
        """Number of tokens that each expert has seen."""

    def forward(self, hidden_states: Any, top_k_index: Any = None, top_k_weights: Any = None) -> Any:
        """Return the experts' weighted sum, [tokens, hidden]; without choices see `_of_weighed`."""
        if top_k_index is None:
            return self._of_weighed(hidden_states)
        total = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            tokens, place = torch.where(top_k_index == number)
            if self._is_reached(number, tokens):
                weighted = expert(hidden_states[tokens]) * top_k_weights[tokens, place, None]
                total.index_add_(0, tokens, weighted.to(total.dtype))
        return total

    def _of_weighed(self, hidden_states: Any) -> Any:
        """Return each expert's outputs, [experts x tokens, hidden], of inputs of that shape.

        Llama 4 gives every expert all tokens, weighed, and zeros where the token did not choose it. Zeros are no calibration data:
        they would lower the averages over the tokens.
        """
        states = hidden_states.view(len(self), -1, hidden_states.shape[-1])
        outputs = torch.zeros_like(states)
        for number, expert in enumerate(self):
            (tokens,) = torch.where(states[number].any(dim=-1))
            if self._is_reached(number, tokens):
                outputs[number, tokens] = expert(states[number, tokens])
        return outputs.view_as(hidden_states)

    def _is_reached(self, number: int, tokens: Any) -> bool:
        self.num_tokens[number] += len(tokens)
        return len(tokens) > 0


def _gated(fused: Any) -> Callable[[Any, Any], Any]:
    """Return the function of the outputs of gate and up by which transformers' experts make the input of down."""
    if not hasattr(fused, "_apply_gate"):
        return lambda gate, up: fused.act_fn(gate) * up
    if getattr(fused, "is_concatenated", True):
        return lambda gate, up: fused._apply_gate(torch.cat((gate, up), dim=-1))
    return lambda gate, up: fused._apply_gate(torch.stack((gate, up), dim=-1).flatten(-2))


def _take_linears(fused: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Yield gate, up and down of each expert. Tensors leave `fused` one by one, so that copies are of one tensor only."""
    both, down = fused.gate_up_proj.shape, fused.down_proj.shape
    # Stored as [in, out], by the shapes: transformers' Llama 4 does not say so elsewhere.
    transposed = (both[1], both[2]) == (down[2], 2 * down[1])
    rows = 2 * (down[1] if transposed else down[2])
    halves = (slice(rows // 2), slice(rows // 2, None))
    gate, up = halves if getattr(fused, "is_concatenated", True) else (slice(0, None, 2), slice(1, None, 2))
    gates, ups = _take(fused, "gate_up_proj", transposed, gate, up)
    (downs,) = _take(fused, "down_proj", transposed, slice(None))
    return zip(gates, ups, downs, strict=True)


def _take(fused: Any, name: str, transposed: bool, *rows: slice) -> list[list[Any]]:
    """Return, for each choice of output features, the linears of all experts. `fused` loses the tensor and its biases."""
    weights, biases = fused._parameters.pop(name).data, fused._parameters.pop(f"{name}_bias", None)
    weights = weights.mT if transposed else weights
    biases = [None] * len(weights) if biases is None else biases.data
    pairs = list(zip(weights, biases, strict=True))
    return [[_linear(weight[chosen], None if bias is None else bias[chosen]) for weight, bias in pairs] for chosen in rows]


def _linear(weight: Any, bias: Any) -> Any:
    """Return a linear. It shares the memory of a weight [out, in] whose elements follow each other."""
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = torch.nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        linear.bias = torch.nn.Parameter(bias.contiguous(), requires_grad=False)
    return linear
