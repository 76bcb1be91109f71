"""A causal LM of transformers, run with one layer in memory at a time and weights read from any store.

The layers are transformers' own, with eager attention, in float32. Everything around them (embedding, masks, rotary embedding,
last norm, scaling of the logits) runs in a transformers model with stand-ins for layers and head. It is called three times: to
record each layer's arguments, to capture the head's input, and to finish the logits. Between the first two calls, all sequences
pass a layer before the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers

from orchestrator.base.dtypes import MODEL_DTYPES
from orchestrator.base.errors import ArchitectureError, SourceMissingError, ToolError
from orchestrator.checkpoints.reading import RowReader
from orchestrator.model.checkpoint import CheckpointIndex, TensorInfo
from orchestrator.stores import open_source
from orchestrator.stores.source import planned_ranges
from orchestrator.work.as_hugging_face import LayerNames, causal_class, loadable_config
from orchestrator.work.calibrate.part_model import read_tensor_rows
from orchestrator.work.reference.frame import Calls, Floats, Frame
from orchestrator.work.reference.layers import Experts, Layer, SourceLayers

_EMBEDDING, _HEAD, _HEAD_BIAS, _NORM = "model.embed_tokens.weight", "lm_head.weight", "lm_head.bias", "model.norm."
_CACHES = ("past_key_values", "past_key_value")
"""Arguments of a layer that are the cache."""
_HEAD_BLOCK_BYTES = 256 * 2**20
"""Float32 bytes of the head's rows that are multiplied at once."""
Arguments = list[list[list[dict[str, Any]]]]
"""Keyword arguments of each layer besides the hidden states, by sequence, call and layer."""


@dataclass(frozen=True)
class LayerEnd:
    """Hidden states at the end of a layer: float32 [positions, hidden], one sequence after the other."""

    layer: int
    rounded: Floats
    own: Floats | None
    """Hidden states with unrounded weights. None: rounding has changed no weight so far."""


class StreamedModel:
    """Source model that is run layer by layer."""

    def __init__(self, source: str, index: CheckpointIndex, dtype: str, exact: Sequence[str] = (), device: str = "cpu") -> None:
        """`dtype`: dtype that weights are rounded to; `exact`: source tensors that are not rounded.

        Raises ArchitectureError for a config without a causal LM in transformers.
        """
        self._source, self._dtype, self._exact = source, dtype, tuple(exact)
        self._index = index.dequantized_to(MODEL_DTYPES[dtype])
        self._device = torch.device(device)
        self._config = transformers.AutoConfig.for_model(**loadable_config(index))
        self._config._attn_implementation = self._config._experts_implementation = "eager"
        self._class = causal_class(self._config)
        if self._class is None:
            raise ArchitectureError(f"transformers {transformers.__version__} has no causal LM of {type(self._config).__name__}")
        self._frame = Frame(self._class, self._config)
        self._names = LayerNames(self._config.model_type)

    @property
    def num_layers(self) -> int:
        return int(self._config.num_hidden_layers)

    @property
    def hidden_size(self) -> int:
        return int(self._config.hidden_size)

    def logits(
        self,
        sequences: Sequence[Sequence[int]],
        decode_steps: int | None,
        report: Callable[[int, int], None],
        keep: Callable[[int, Floats, Floats | None], None] = lambda layer, rounded, own: None,
        last: LayerEnd | None = None,
    ) -> tuple[list[Floats], list[Floats] | None]:
        """Return logits [T, vocabulary] of each sequence: with rounded weights, and with unrounded ones if rounding changes any.

        `decode_steps`: tokens at the end of a sequence that go one by one through the cache; None: one call. `report` gets
        the number of finished layers and of all. `keep` gets a layer and the hidden states at its end [positions, hidden], one
        sequence after the other: with rounded weights, and with unrounded ones where they differ. `last` is such an end from an
        earlier attempt: layers up to it are skipped. Raises the source's errors, QuantizationError for weights that it lacks.
        """
        planned = planned_ranges(self._index.tensors.values())
        with torch.inference_mode(), open_source(self._source).open(self._index.files, planned) as opened:
            reader = RowReader(self._index.format, opened, self._index.tensors.values())
            calls: Calls = [_split(torch.tensor([sequence]), decode_steps) for sequence in sequences]
            rounded, own, arguments = self._embed(calls, reader, cached=decode_steps is not None)
            first = 0
            if last is not None:
                first, rounded = last.layer + 1, _in_calls(last.rounded, rounded)
                own = _in_calls(last.own, rounded) if last.own is not None else None
            for layer in SourceLayers(reader, self._index, self._frame.layers, self._names, self._device).loaded(first):
                own = self._through(layer, rounded, own, arguments)
                keep(layer.number, _joined(rounded), None if own is None else _joined(own))
                report(layer.number + 1, self.num_layers)
            return self._finish(calls, rounded, own, reader)

    def _tensor(self, name: str) -> TensorInfo:
        if name not in self._index.tensors:
            raise SourceMissingError(f"the source has no tensor {name}")
        return self._index.tensors[name]

    def _rows(self, reader: RowReader, name: str, begin: int, end: int) -> tuple[Any, Any]:
        """Read rows of a source tensor in float32: rounded and unrounded. Both are the same tensor if rounding changes nothing."""
        tensor = self._tensor(name)
        own = read_tensor_rows(reader, tensor, begin, end).float()
        return (own if name in self._exact or not self._may_change(tensor) else self._rounded(own)), own

    def _rounded(self, values: Any) -> Any:
        return values.to(getattr(torch, self._dtype)).float()

    def _may_change(self, tensor: TensorInfo) -> bool:
        return tensor.dtype != MODEL_DTYPES[self._dtype]

    def _embed(self, calls: Calls, reader: RowReader, *, cached: bool) -> tuple[Calls, Calls | None, Arguments]:
        """Return the first layer's input with rounded and with unrounded weights (None if equal), and the layers' arguments."""
        ids = sorted({int(token) for sequence in calls for call in sequence for token in call[0]})
        rows = {token: self._rows(reader, _EMBEDDING, token, token + 1) for token in ids}
        shape = self._tensor(_EMBEDDING).shape
        # numpy's zeros take no memory until they are written: only the rows of used tokens are.
        table = torch.from_numpy(np.zeros(shape, np.float32))
        self._frame.set_embedding(table)
        streams: list[Calls] = []
        arguments: Arguments = []
        differ = any(not torch.equal(*pair) for pair in rows.values())
        for which in (0, 1) if differ else (0,):
            for token, pair in rows.items():
                table[token] = pair[which][0]
            found = [self._frame.record(sequence, cached=cached) for sequence in calls]
            streams.append([hidden for hidden, _ in found])
            arguments = [of_layers for _, of_layers in found]
        return streams[0], streams[1] if differ else None, arguments

    def _changed(self, layer: Layer) -> list[Any]:
        """Return the parameters of a layer that rounding changes."""
        if not any(self._may_change(tensor) for tensor in layer.tensors.values()):
            return []
        kept = {self._names(name) for name in self._exact if f".layers.{layer.number}." in name}
        parameters = dict(layer.module.named_parameters())
        if missing := sorted(kept - parameters.keys() - dict(layer.module.named_buffers()).keys()):
            raise ToolError(f"this version of transformers has no parameter {missing[0]} in layer {layer.number}")
        return [
            parameter
            for name, parameter in parameters.items()
            if name not in kept and not torch.equal(self._rounded(parameter), parameter)
        ]

    def _through(self, layer: Layer, rounded: Calls, own: Calls | None, arguments: Arguments) -> Calls | None:
        """Pass both streams through a layer. The unrounded stream begins where rounding first changes a weight; None: not yet."""
        changed = self._changed(layer)
        experts_change = layer.experts is not None and any(map(self._may_change, layer.experts.tensors()))
        if own is None and (changed or experts_change):
            own = [list(sequence) for sequence in rounded]
        if layer.experts is not None:
            self._pass_experts(layer, layer.experts, changed, rounded, own, arguments)
            return own
        if own is not None:
            self._pass(layer, own, arguments)
        for parameter in changed:
            parameter.copy_(self._rounded(parameter))
        self._pass(layer, rounded, arguments)
        return own

    def _pass_experts(
        self, layer: Layer, experts: Experts, changed: Sequence[Any], rounded: Calls, own: Calls | None, arguments: Arguments
    ) -> None:
        """Pass both streams through a layer with experts: record their calls, compute them, run it again with the results."""
        originals = [parameter.clone() for parameter in changed]
        streams = [(rounded, self._rounded), *([] if own is None else [(own, _unchanged)])]

        def weigh(function: Callable[[Any], Any]) -> None:
            for parameter, original in zip(changed, originals, strict=True):
                parameter.copy_(function(original))

        recorded = []
        for stream, function in streams:
            weigh(function)
            trial = [list(sequence) for sequence in stream]
            recorded.append((experts.recorded(lambda trial=trial: self._pass(layer, trial, arguments)), function))  # type: ignore[misc]
        for (stream, function), results in zip(streams, experts.compute(recorded), strict=True):
            weigh(function)
            experts.answered(lambda stream=stream: self._pass(layer, stream, arguments), results)  # type: ignore[misc]

    def _pass(self, layer: Layer, stream: Calls, arguments: Arguments) -> None:
        """Run all calls through a layer, in place."""
        for hidden, of_calls in zip(stream, arguments, strict=True):
            cache = transformers.DynamicCache(config=self._config)
            for call, of_layers in enumerate(of_calls):
                given = _on(self._device, of_layers[layer.number])
                given = {**given, **{name: cache for name in _CACHES if given.get(name) is not None}}
                hidden[call] = layer.module(hidden[call].to(self._device), **given).cpu()

    def _finish(
        self, calls: Calls, rounded: Calls, own: Calls | None, reader: RowReader
    ) -> tuple[list[Floats], list[Floats] | None]:
        """Compute the logits: last norm, head in blocks of rows, then the model's own scaling of logits."""
        norm = {
            name: self._rows(reader, _NORM + name, 0, self._tensor(_NORM + name).shape[0]) for name in self._frame.norm_parameters
        }
        biases = [self._rows(reader, _HEAD_BIAS, 0, self._tensor(_HEAD_BIAS).shape[0])] if self._frame.head_has_bias else []
        name = _EMBEDDING if self._config.tie_word_embeddings else _HEAD
        vocabulary, hidden_size = self._tensor(name).shape
        block = max(_HEAD_BLOCK_BYTES // (4 * hidden_size), 1)
        streams = [(rounded, 0)]
        if own is not None or not all(torch.equal(*both) for both in (*norm.values(), *biases)):
            own = own if own is not None else [list(sequence) for sequence in rounded]
            streams.append((own, 1))
        inputs = [
            self._frame.head_inputs(calls, stream, {name: both[which] for name, both in norm.items()}) for stream, which in streams
        ]
        raw: list[list[list[Any]]] = [[[] for _ in calls] for _ in streams]
        for begin in range(0, vocabulary, block):
            end = min(begin + block, vocabulary)
            rows = self._rows(reader, name, begin, end)
            if len(streams) == 1 and not torch.equal(*rows):
                streams.append((rounded, 1))
                inputs.append(inputs[0])
                raw.append([list(parts) for parts in raw[0]])
            for number, (_, which) in enumerate(streams):
                weight = rows[which].to(self._device)
                bias = biases[0][which][begin:end].to(self._device) if biases else None
                for sequence, values in enumerate(inputs[number]):
                    product = torch.nn.functional.linear(values.to(self._device), weight, bias)
                    raw[number][sequence].append(product.cpu())
        found = [self._frame.finished(calls, [torch.cat(parts, dim=-1) for parts in of_stream]) for of_stream in raw]
        return found[0], found[1] if len(found) > 1 else None


def _on(device: torch.device, value: Any) -> Any:
    """Return a layer's argument with its tensors on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _on(device, each) for name, each in value.items()}
    return tuple(_on(device, each) for each in value) if isinstance(value, tuple) else value


def _unchanged(values: Any) -> Any:
    return values


def _joined(stream: Calls) -> Floats:
    """Join all sequences and calls to [positions, hidden]."""
    states: Floats = torch.cat([states[0] for sequence in stream for states in sequence]).numpy()
    return states


def _in_calls(states: Floats, like: Calls) -> Calls:
    """Split [positions, hidden] into sequences and calls of the lengths in `like`."""
    sizes = [call.shape[1] for sequence in like for call in sequence]
    parts = iter(torch.split(torch.from_numpy(np.array(states)), sizes))
    return [[next(parts)[None] for _ in sequence] for sequence in like]


def _split(tokens: Any, decode_steps: int | None) -> list[Any]:
    """Split a sequence [1, T] into calls: one call, or a prefill of at least one token and then one token each."""
    if decode_steps is None:
        return [tokens]
    prefill = max(tokens.shape[1] - decode_steps, 1)
    return [tokens[:, :prefill], *tokens[:, prefill:].split(1, dim=1)]
