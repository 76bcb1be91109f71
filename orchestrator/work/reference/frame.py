"""A causal LM of transformers without the weights of its layers: embedding, masks, rotary embedding, last norm, logits.

Every layer is a stand-in that calls back. The model is called three times: it records the arguments of each layer, captures the
input of the head, and finishes the logits.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

NO_VOCABULARY = 8
"""Vocabulary size of a placeholder embedding."""
Floats = npt.NDArray[np.float32]
Calls = list[list[Any]]
"""Tensors [1, S, ...] by sequence and call."""


def _enters(first: Any, number: int, hidden: Any, given: dict[str, Any]) -> Any:
    """Stand-in for a layer: the first returns `first`, the others their input."""
    del given
    return first if number == 0 else hidden


def _returns(products: Any, hidden: Any) -> Any:
    """Stand-in for the head: return known products."""
    del hidden
    return products


class Frame:
    """The model without its layers' weights: every layer is a stand-in that calls back."""

    def __init__(self, model_class: Any, config: Any) -> None:
        self._config = config
        small = copy.deepcopy(config)
        small.num_hidden_layers, small.vocab_size, small.pad_token_id, small.tie_word_embeddings = 0, NO_VOCABULARY, None, False
        self._model = model_class(small).eval()
        small.num_hidden_layers = config.num_hidden_layers
        with torch.device("meta"):
            self.layers = list(model_class(config).eval().model.layers)
        self._on_layer: Callable[[int, Any, dict[str, Any]], Any] = lambda number, hidden, given: hidden
        self._on_head: Callable[[Any], Any] = lambda hidden: hidden[..., :1]
        frame = self

        class Layer(torch.nn.Module):
            def __init__(self, number: int, real: Any) -> None:
                super().__init__()
                self.number = number
                plain = {name: value for name, value in vars(real).items() if isinstance(value, (str, int, bool))}
                self.__dict__.update({name: value for name, value in plain.items() if name != "training"})
                self._names = list(inspect.signature(real.forward).parameters)[1:]

            def forward(self, hidden_states: Any, *more: Any, **given: Any) -> Any:
                return frame._on_layer(self.number, hidden_states, {**dict(zip(self._names, more, strict=False)), **given})

        class Head(torch.nn.Module):
            def forward(self, hidden_states: Any) -> Any:
                return frame._on_head(hidden_states)

        self._model.model.layers = torch.nn.ModuleList(Layer(number, real) for number, real in enumerate(self.layers))
        self.head_has_bias = getattr(self._model.lm_head, "bias", None) is not None
        self._model.lm_head = Head()

    def set_embedding(self, table: Any) -> None:
        """Set the embedding table."""
        self._model.model.embed_tokens.weight = torch.nn.Parameter(table, requires_grad=False)

    def record(self, calls: Sequence[Any], *, cached: bool) -> tuple[list[Any], list[list[dict[str, Any]]]]:
        """Run the calls of one sequence; returns the first layer's input in each, and the arguments of every layer."""
        hidden: list[Any] = []
        arguments: list[list[dict[str, Any]]] = []
        cache = transformers.DynamicCache(config=self._config) if cached else None

        def record(number: int, states: Any, given: dict[str, Any]) -> Any:
            if number == 0:
                hidden.append(states)
                arguments.append([])
            arguments[-1].append(given)
            if cache is not None:  # masks of later calls follow from the cache's length
                nothing = torch.zeros(1, 1, states.shape[1], 1)
                cache.update(nothing, nothing, number)
            return states

        self._forget_length()
        self._on_layer, self._on_head = record, lambda states: states[..., :1]
        for call in calls:
            self._model(call, past_key_values=cache, use_cache=cached)
        return hidden, arguments

    def _forget_length(self) -> None:
        """Reset the state that dynamic rotary scaling keeps of a longer sequence (transformers 5)."""
        for module in self._model.modules():
            if hasattr(module, "max_seq_len_cached") and hasattr(module, "original_inv_freq"):
                module.max_seq_len_cached = module.original_max_seq_len
                module.inv_freq = module.original_inv_freq

    @property
    def norm_parameters(self) -> list[str]:
        """Names of the last norm's parameters: weight, and bias if it has one."""
        return [name for name, _ in self._model.model.norm.named_parameters()]

    def head_inputs(self, calls: Calls, stream: Calls, norm: dict[str, Any]) -> list[Any]:
        """Return the head's input [T, hidden] of each sequence, after the last norm with the parameters `norm`."""
        for name, values in norm.items():
            setattr(self._model.model.norm, name, torch.nn.Parameter(values, requires_grad=False))
        found: list[Any] = []

        def capture(states: Any) -> Any:
            found.append(states[0])
            return states[..., :1]

        joined = []
        for sequence, hidden in zip(calls, stream, strict=True):
            found = []
            for call, states in zip(sequence, hidden, strict=True):
                self._on_layer = functools.partial(_enters, states)
                self._on_head = capture
                self._model(call, use_cache=False)
            joined.append(torch.cat(found))
        return joined

    def finished(self, calls: Calls, raw: Sequence[Any]) -> list[Floats]:
        """Return the logits [T, vocabulary] of each sequence from the head's products `raw`."""
        self._on_layer = lambda number, hidden, given: hidden
        found = []
        for sequence, products in zip(calls, raw, strict=True):
            self._on_head = functools.partial(_returns, products[None])
            tokens = torch.cat(list(sequence), dim=1)
            found.append(self._model(tokens, use_cache=False).logits[0].float().numpy())
        return found
