"""Consecutive layers of a model as a small Hugging Face model, with weights read straight from the source.

A part runs like the whole model: transformers' decoder builds masks and positions. A part other than the first gets the hidden
states of the part before in place of embeddings.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.base.dtypes import ARRAY_NAMES, MODEL_DTYPES
from orchestrator.base.errors import QuantizationError, SourceCorruptError
from orchestrator.checkpoints import read_source
from orchestrator.checkpoints.reading import RowReader
from orchestrator.model.checkpoint import CheckpointIndex, TensorInfo
from orchestrator.model.quantized_targets import is_of_expert
from orchestrator.planning.calibration import layer_of
from orchestrator.planning.options import CalibrateOptions
from orchestrator.stores import open_source
from orchestrator.stores.source import planned_ranges
from orchestrator.work.as_hugging_face import LayerNames, causal_class, loadable_config

_EMBEDDING = "model.embed_tokens.weight"
_TINY_VOCABULARY = 8
"""Vocabulary size of a part without an embedding."""
_READ_THREADS = 8


@dataclass
class PartModel:
    """A loaded part of a model."""

    model: Any
    """Causal LM of transformers without a head. Layer-wise calibration must call the whole model."""
    linears: dict[str, str]
    """Source module of each linear, by its path in the model."""
    experts: dict[str, Any]
    """Expert containers by path. Kept here because layer-wise calibration hides finished layers."""

    def unseen(self) -> list[str]:
        """Return the source modules of experts that no token was routed to."""
        found = []
        for path, source in self.linears.items():
            container, _, rest = path.rpartition(".experts.")
            if container and not self.experts[f"{container}.experts"].num_tokens[int(rest.split(".")[0])]:
                found.append(source)
        return found

    def token_counts(self) -> dict[str, list[int]]:
        """Return how many tokens each expert has seen, by the path of the layer's experts."""
        return {path: experts.num_tokens for path, experts in self.experts.items()}

    def add_token_counts(self, counts: dict[str, list[int]]) -> None:
        """Add the token counts of an earlier attempt."""
        for path, seen in counts.items():
            experts = self.experts[path]
            experts.num_tokens = [mine + theirs for mine, theirs in zip(experts.num_tokens, seen, strict=True)]

    def run(self, batch: Any, first: bool) -> None:
        """Pass token ids [B, T] (`first`) or hidden states [B, T, hidden] through the layers."""
        import torch

        with torch.inference_mode():
            if first:
                self.model(input_ids=batch, use_cache=False, logits_to_keep=1)
                return
            with _first_input(self.model.model.layers[0], batch):
                self.model(inputs_embeds=torch.zeros_like(batch), use_cache=False, logits_to_keep=1)


@contextmanager
def _first_input(layer: Any, hidden_states: Any) -> Iterator[None]:
    """Replace the input of the first layer; some families scale their embeddings before it."""

    def replace(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (hidden_states, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden_states}

    handle = layer.register_forward_pre_hook(replace, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def load_part(source: str, options: CalibrateOptions, device: str) -> PartModel:
    """Load the layers of `options`. Raises the source's errors, and SourceCorruptError when it changed since the plan."""
    import torch
    import transformers

    from orchestrator.work.calibrate.experts import unfuse_experts

    index, _ = read_source(source, options.format)
    if index.files != options.files[: options.num_weight_files]:
        raise SourceCorruptError("the source was changed during the build", "Run the build again.")
    index = index.dequantized_to(MODEL_DTYPES[options.config.dtype])
    plain = loadable_config(index)
    whole = transformers.AutoConfig.for_model(**plain)
    tensors = layer_tensors(index, options.first_layer, options.num_layers)
    if options.is_first:
        tensors[_EMBEDDING] = index.tensors[_EMBEDDING]
    dtype = getattr(torch, options.config.dtype)
    with open_source(source).open(index.files, planned_ranges(tensors.values())) as opened:
        state = read_tensors(RowReader(index.format, opened, tensors.values()), tensors, dtype)
    model = load_layers(causal_class(whole), whole, options.first_layer, options.num_layers, state, dtype)
    del state
    model.model.norm, model.lm_head = torch.nn.Identity(), torch.nn.Identity()
    # Module by module, so that the device never holds a tensor twice.
    model = model.eval().requires_grad_(False).to(device)
    names = LayerNames(whole.model_type)
    linears = {_path(module, options.first_layer, names): module for module in options.modules if not is_of_expert(module)}
    linears |= unfuse_experts(model, options)
    experts = {path: module for path, module in model.named_modules() if hasattr(module, "num_tokens")}
    return PartModel(model, linears, experts)


def load_layers(model_class: Any, whole: Any, first: int, count: int, state: dict[str, Any], dtype: Any) -> Any:
    """Load layers first..first+count-1 with transformers' loader, which fuses experts and renames as for a whole model.

    `state`: tensors by `layer_tensors`' names. Without an embedding in `state` the model embeds nothing. Raises QuantizationError
    for weights that the source lacks.
    """
    config = _part_config(whole, first, count, embeds=_EMBEDDING in state)
    with _quiet():
        model, loading = model_class.from_pretrained(None, config=config, state_dict=state, dtype=dtype, output_loading_info=True)
    spared = {f"{module}.{what}" for module in ("model.norm", "lm_head") for what in ("weight", "bias")}
    _check_loaded(loading, spared | ({_EMBEDDING} - state.keys()), first)
    return model


def _check_loaded(loading: dict[str, Any], spared: set[str], first_layer: int) -> None:
    """Check that every weight was loaded; others would be random. Raises QuantizationError."""
    wrong = sorted({*loading["missing_keys"], *(entry[0] for entry in loading["mismatched_keys"])} - spared)
    if wrong:
        example = _local_name(wrong[0], -first_layer)
        raise QuantizationError(
            f"{len(wrong)} weights of the model cannot be loaded from the source, e.g. {example}",
            "Use the complete checkpoint. If its names differ, calibrate elsewhere and set quantization.scales to that folder.",
        )


def _part_config(whole: Any, first: int, count: int, *, embeds: bool) -> Any:
    """Return the config of a part: lists with an entry per layer are cut too."""
    config, layers = copy.deepcopy(whole), whole.num_hidden_layers
    for name, value in vars(whole).items():
        if isinstance(value, list) and len(value) == layers and name not in ("mlp_only_layers", "moe_layers"):
            setattr(config, name, value[first : first + count])
    _shift_experts(config, first, layers)
    config.num_hidden_layers = count
    config.tie_word_embeddings = True  # no memory for a head that never runs
    if not embeds:
        config.vocab_size, config.pad_token_id = _TINY_VOCABULARY, None
    return config


def _shift_experts(config: Any, first: int, layers: int) -> None:
    """Let layer numbers that say which layers have experts count from layer `first`, in place."""
    for name in ("first_k_dense_replace", "num_dense_layers"):
        if getattr(config, name, None) is not None:
            setattr(config, name, max(getattr(config, name) - first, 0))
    if getattr(config, "decoder_sparse_step", None) is not None:
        dense = [layer for layer in range(layers) if (layer + 1) % config.decoder_sparse_step or layer in config.mlp_only_layers]
        config.decoder_sparse_step, config.mlp_only_layers = 1, [layer - first for layer in dense if layer >= first]
    if getattr(config, "moe_layers", None) is not None:
        config.moe_layers = [layer - first for layer in config.moe_layers if layer >= first]
    if getattr(config, "moe_layer_interval", None) is not None:
        if first % config.moe_layer_interval:
            raise QuantizationError(
                f"experts in every {config.moe_layer_interval}th layer cannot be calibrated from layer {first} on",
                "Set quantization.calibration.num_stages to 1.",
            )
        config.moe_layer_start_index = max(config.moe_layer_start_index - first, 0)
        config.moe_layer_end_index -= first


def layer_tensors(index: CheckpointIndex, first: int, count: int) -> dict[str, TensorInfo]:
    """Return the tensors of layers first..first+count-1, by their names in a model of these layers only."""
    mine = [tensor for tensor in index.tensors.values() if ".layers." in tensor.name]
    return {_local_name(tensor.name, first): tensor for tensor in mine if first <= layer_of(tensor.name) < first + count}


def _local_name(name: str, first: int) -> str:
    if ".layers." not in name:
        return name
    layer = layer_of(name)
    return name.replace(f".layers.{layer}.", f".layers.{layer - first}.", 1)


def _path(module: str, first: int, names: LayerNames) -> str:
    """Return the path of a source module in a model of the layers from `first` on, which may have another name there."""
    name = names(f"{module}.weight").removesuffix(".weight")
    return f"model.layers.{layer_of(module) - first}.{name}"


def read_tensors(reader: RowReader, tensors: Mapping[str, TensorInfo], dtype: Any = None) -> dict[str, Any]:
    """Read every tensor as `dtype` (None: the source's), by the given names, several at once."""
    with ThreadPoolExecutor(_READ_THREADS, "read") as pool:

        def read(tensor: TensorInfo) -> Any:
            values = read_tensor_rows(reader, tensor, 0, tensor.shape[0] if tensor.shape else 1)
            return values if dtype is None else values.to(dtype)

        return dict(zip(tensors, pool.map(read, tensors.values()), strict=True))


def read_tensor_rows(reader: RowReader, tensor: TensorInfo, begin: int, end: int) -> Any:
    """Read rows [begin, end) of a tensor, in the source's dtype."""
    import torch

    rows = tensor.shape[0] if tensor.shape else 1
    raw: npt.NDArray[np.uint8] = np.empty(tensor.num_bytes // rows * (end - begin), np.uint8)
    reader.read(tensor, begin, end, raw.data)
    values = torch.from_numpy(raw).view(getattr(torch, ARRAY_NAMES[tensor.dtype]))
    return values.reshape((end - begin, *tensor.shape[1:]) if tensor.shape else ())


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' reports of the head and norm that a part lacks, and its progress bars."""
    from transformers.utils import logging

    level, shows_progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shows_progress:
            logging.enable_progress_bar()
