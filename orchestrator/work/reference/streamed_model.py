"""A causal LM of transformers that is run layer by layer, one layer in memory at a time, with weights read from any place.

The layers are transformers' own, with eager attention, in float32. What stands around them (embedding, masks, rotary embedding,
last norm, scaling of the logits) is a model of theirs without layers. It is called three times: it records what each layer is
called with, shows what the head is called with, and finishes the logits. In between all sequences pass a layer before the next.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.base.dtypes import MODEL_DTYPES
from orchestrator.base.errors import ArchitectureError, SourceMissingError, ToolError
from orchestrator.model.checkpoint import CheckpointIndex, TensorInfo
from orchestrator.stores import open_source
from orchestrator.stores.source import ByteSource, planned_ranges
from orchestrator.work.as_hugging_face import loadable_config
from orchestrator.work.calibrate.part_model import layer_tensors, load_layers, read_tensor_rows, read_tensors

_EMBEDDING, _HEAD, _NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
_RENAMED = {"block_sparse_moe.gate.": "mlp.gate."}
"""Part of a source tensor's name -> what transformers 5 calls it in its models (its `conversion_mapping`)."""
_HEAD_BLOCK_BYTES = 256 * 2**20
"""Float32 bytes of the head's rows that are multiplied at once."""
_NO_VOCABULARY = 8
Floats = npt.NDArray[np.float32]
Calls = list[list[Any]]
"""By sequence and call: a tensor [1, S, ...]."""
Arguments = list[list[list[dict[str, Any]]]]
"""By sequence, call and layer: what a layer is called with besides the hidden states."""


@dataclass(frozen=True)
class LayerEnd:
    """Hidden states at the end of a layer: float32 [positions, hidden], one sequence after the other."""

    layer: int
    rounded: Floats
    own: Floats | None
    """With the source's own weights; None: rounding has changed none so far."""


class StreamedModel:
    """The model of a source."""

    def __init__(self, source: str, index: CheckpointIndex, dtype: str, exact: Sequence[str] = ()) -> None:
        """`dtype`: what weights are rounded to; `exact`: source tensors that are not rounded.

        Raises ArchitectureError for a config that transformers makes no causal LM from.
        """
        import transformers
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

        self._source, self._index, self._dtype, self._exact = source, index, dtype, tuple(exact)
        self._config = transformers.AutoConfig.for_model(**loadable_config(index))
        self._config._attn_implementation = "eager"
        if type(self._config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ArchitectureError(f"transformers {transformers.__version__} has no causal LM of {type(self._config).__name__}")
        self._class = MODEL_FOR_CAUSAL_LM_MAPPING[type(self._config)]
        self._frame = _Frame(self._class, self._config)

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
        """[T, vocabulary] of each sequence: of rounded weights, and of the source's own where rounding changes one.

        `decode_steps`: tokens at the end of a sequence that go one by one through the cache; None: one call. `report` gets the
        layers that are done and their number; `keep` a layer and the hidden states at its end [positions, hidden], one sequence
        after the other: of rounded weights, and of the source's own where they differ. `last` is such an end of an earlier attempt:
        the layers up to it are skipped. Raises the source's errors, QuantizationError for weights that it lacks.
        """
        import torch

        planned = planned_ranges(self._index.tensors.values())
        with torch.inference_mode(), open_source(self._source).open(self._index.files, planned) as opened:
            calls: Calls = [_split(torch.tensor([sequence]), decode_steps) for sequence in sequences]
            rounded, own, arguments = self._embed(calls, opened, cached=decode_steps is not None)
            first = 0
            if last is not None:
                first, rounded = last.layer + 1, _in_calls(last.rounded, rounded)
                own = _in_calls(last.own, rounded) if last.own is not None else None
            for number, layer in enumerate(self._loaded_layers(opened, first), first):
                changed = self._changed(number, layer)
                if changed and own is None:
                    own = [list(sequence) for sequence in rounded]
                if own is not None:
                    self._pass(number, layer, own, arguments)
                for parameter in changed:
                    parameter.copy_(self._rounded(parameter))
                self._pass(number, layer, rounded, arguments)
                layer.to("meta")
                keep(number, _joined(rounded), None if own is None else _joined(own))
                report(number + 1, self._config.num_hidden_layers)
            return self._finish(calls, rounded, own, opened)

    def _tensor(self, name: str) -> TensorInfo:
        if name not in self._index.tensors:
            raise SourceMissingError(f"the source has no tensor {name}")
        return self._index.tensors[name]

    def _rows(self, opened: ByteSource, name: str, begin: int, end: int) -> tuple[Any, Any]:
        """Rows of a source tensor in float32: rounded, and as they are; the same tensor twice where rounding changes nothing."""
        tensor = self._tensor(name)
        own = read_tensor_rows(opened, self._index.format, tensor, begin, end).float()
        return (own if name in self._exact or not self._may_change(tensor) else self._rounded(own)), own

    def _rounded(self, values: Any) -> Any:
        import torch

        return values.to(getattr(torch, self._dtype)).float()

    def _may_change(self, tensor: TensorInfo) -> bool:
        return tensor.dtype != MODEL_DTYPES[self._dtype]

    def _embed(self, calls: Calls, opened: ByteSource, *, cached: bool) -> tuple[Calls, Calls | None, Arguments]:
        """Input of the first layer, from rounded weights and, where they differ, from the source's own."""
        import torch

        ids = sorted({int(token) for sequence in calls for call in sequence for token in call[0]})
        rows = {token: self._rows(opened, _EMBEDDING, token, token + 1) for token in ids}
        shape = self._tensor(_EMBEDDING).shape
        # numpy's zeros take no memory until they are written to: only rows that are looked up are.
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

    def _loaded_layers(self, opened: ByteSource, first: int) -> Iterator[Any]:
        """Each layer with its weights as the source has them; the next one's are read meanwhile."""
        import torch

        count = self._config.num_hidden_layers

        def read(number: int) -> dict[str, Any]:
            return read_tensors(opened, self._index.format, layer_tensors(self._index, number, 1), torch.float32)

        with ThreadPoolExecutor(1, "layer") as pool:
            if first < count:
                coming = pool.submit(read, first)
            for number in range(first, count):
                state = coming.result()
                if number + 1 < count:
                    coming = pool.submit(read, number + 1)
                part = load_layers(self._class, self._config, number, 1, state, torch.float32)
                del state
                layer = self._frame.layers[number]
                layer.load_state_dict(part.model.layers[0].state_dict(), assign=True)
                del part
                yield layer

    def _changed(self, number: int, layer: Any) -> list[Any]:
        """Parameters of a layer that rounding changes."""
        import torch

        tensors = layer_tensors(self._index, number, 1).values()
        if not any(self._may_change(tensor) for tensor in tensors):
            return []
        kept = {_of_layer(name) for name in self._exact if f".layers.{number}." in name}
        parameters = dict(layer.named_parameters())
        if missing := sorted(kept - parameters.keys()):
            raise ToolError(f"this version of transformers has no parameter {missing[0]} in layer {number}")
        return [
            parameter
            for name, parameter in parameters.items()
            if name not in kept and not torch.equal(self._rounded(parameter), parameter)
        ]

    def _pass(self, number: int, layer: Any, stream: Calls, arguments: Arguments) -> None:
        """All calls through a layer."""
        import transformers

        for hidden, of_calls in zip(stream, arguments, strict=True):
            cache = transformers.DynamicCache(config=self._config)
            for call, of_layers in enumerate(of_calls):
                given = of_layers[number]
                if given.get("past_key_values") is not None:
                    given = {**given, "past_key_values": cache}
                hidden[call] = layer(hidden[call], **given)

    def _finish(
        self, calls: Calls, rounded: Calls, own: Calls | None, opened: ByteSource
    ) -> tuple[list[Floats], list[Floats] | None]:
        """Last norm, head in blocks of rows, and what the model does with logits."""
        import torch

        norm = self._rows(opened, _NORM, 0, self._tensor(_NORM).shape[0])
        name = _EMBEDDING if self._config.tie_word_embeddings else _HEAD
        vocabulary, hidden_size = self._tensor(name).shape
        block = max(_HEAD_BLOCK_BYTES // (4 * hidden_size), 1)
        streams = [(rounded, 0)]
        if own is not None or not torch.equal(*norm):
            own = own if own is not None else [list(sequence) for sequence in rounded]
            streams.append((own, 1))
        inputs = [self._frame.head_inputs(calls, stream, norm[which]) for stream, which in streams]
        raw: list[list[list[Any]]] = [[[] for _ in calls] for _ in streams]
        for begin in range(0, vocabulary, block):
            rows = self._rows(opened, name, begin, min(begin + block, vocabulary))
            if len(streams) == 1 and not torch.equal(*rows):
                streams.append((rounded, 1))
                inputs.append(inputs[0])
                raw.append([list(parts) for parts in raw[0]])
            for number, (_, which) in enumerate(streams):
                for sequence, values in enumerate(inputs[number]):
                    raw[number][sequence].append(values @ rows[which].T)
        found = [self._frame.finished(calls, [torch.cat(parts, dim=-1) for parts in of_stream]) for of_stream in raw]
        return found[0], found[1] if len(found) > 1 else None


def _of_layer(name: str) -> str:
    """A source tensor's name within its layer, as transformers' layer calls it."""
    local = name.split(".", 3)[3]
    for theirs, ours in _RENAMED.items():
        local = local.replace(theirs, ours)
    return local


def _joined(stream: Calls) -> Floats:
    """[positions, hidden] of all sequences and calls."""
    import torch

    states: Floats = torch.cat([states[0] for sequence in stream for states in sequence]).numpy()
    return states


def _in_calls(states: Floats, like: Calls) -> Calls:
    """[positions, hidden] as sequences and calls of the same lengths as `like`."""
    import torch

    sizes = [call.shape[1] for sequence in like for call in sequence]
    parts = iter(torch.split(torch.from_numpy(np.array(states)), sizes))
    return [[next(parts)[None] for _ in sequence] for sequence in like]


def _split(tokens: Any, decode_steps: int | None) -> list[Any]:
    """Calls of a sequence [1, T]: all of it, or a prefill of at least one token and then one by one."""
    if decode_steps is None:
        return [tokens]
    prefill = max(tokens.shape[1] - decode_steps, 1)
    return [tokens[:, :prefill], *tokens[:, prefill:].split(1, dim=1)]


def _enters(first: Any, number: int, hidden: Any, given: dict[str, Any]) -> Any:
    """A layer that lets hidden states through; the first one brings in others."""
    del given
    return first if number == 0 else hidden


def _returns(products: Any, hidden: Any) -> Any:
    """A head whose products are known."""
    del hidden
    return products


class _Frame:
    """The model without its layers' weights: every layer is a stand-in that calls back."""

    def __init__(self, model_class: Any, config: Any) -> None:
        import torch

        self._config = config
        small = copy.deepcopy(config)
        small.num_hidden_layers, small.vocab_size, small.pad_token_id, small.tie_word_embeddings = 0, _NO_VOCABULARY, None, False
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

            def forward(self, hidden_states: Any, **given: Any) -> Any:
                return frame._on_layer(self.number, hidden_states, given)

        class Head(torch.nn.Module):
            def forward(self, hidden_states: Any) -> Any:
                return frame._on_head(hidden_states)

        self._model.model.layers = torch.nn.ModuleList(Layer(number, real) for number, real in enumerate(self.layers))
        self._model.lm_head = Head()

    def set_embedding(self, table: Any) -> None:
        """Take the table that tokens are looked up in."""
        import torch

        self._model.model.embed_tokens.weight = torch.nn.Parameter(table, requires_grad=False)

    def record(self, calls: Sequence[Any], *, cached: bool) -> tuple[list[Any], list[list[dict[str, Any]]]]:
        """The calls of one sequence: what the first layer gets in each, and what else every layer is called with."""
        import torch
        import transformers

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
        """Undo what dynamic rotary scaling keeps of a longer sequence (transformers 5): each sequence is a text of its own."""
        for module in self._model.modules():
            if hasattr(module, "max_seq_len_cached") and hasattr(module, "original_inv_freq"):
                module.max_seq_len_cached = module.original_max_seq_len
                module.inv_freq = module.original_inv_freq

    def head_inputs(self, calls: Calls, stream: Calls, norm: Any) -> list[Any]:
        """[T, hidden] of each sequence: what its head is called with after the last norm of weight `norm`."""
        import torch

        self._model.model.norm.weight = torch.nn.Parameter(norm, requires_grad=False)
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
        """[T, vocabulary] of each sequence: what the model makes of the head's products, `raw`."""
        import torch

        self._on_layer = lambda number, hidden, given: hidden
        found = []
        for sequence, products in zip(calls, raw, strict=True):
            self._on_head = functools.partial(_returns, products[None])
            tokens = torch.cat(list(sequence), dim=1)
            found.append(self._model(tokens, use_cache=False).logits[0].float().numpy())
        return found
