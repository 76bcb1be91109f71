"""Reader of Megatron-Core's distributed checkpoints (`torch_dist`), as Megatron-Bridge and NeMo 2 write them.

Presents whole tensors under Hugging Face's names. Megatron-Core stores a tensor of all layers under one key, with the layer as
first axis (the expert as second), or one key per layer; tensor-parallel ranks store chunks of it. Query, key and value are fused,
interleaved by query group, gate and up one after the other. Source: `sharded_state_dict` of megatron/core/transformer
(transformer_block.py, mlp.py, moe/experts.py) and the mappings of Megatron-Bridge (models/conversion/param_mapping.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.base.dtypes import MODEL_DTYPES
from orchestrator.base.errors import QuantizationError, SourceCorruptError, SourceMissingError, abbreviated
from orchestrator.checkpoints.assembly import assembled, read_assembled_rows
from orchestrator.checkpoints.megatron_chunks import Blocks
from orchestrator.checkpoints.megatron_config import read_config
from orchestrator.checkpoints.megatron_layout import TOKENIZER_FOLDERS, iterations, layout_of
from orchestrator.checkpoints.torch_dist import METADATA, StoredTensor, read_metadata
from orchestrator.model.checkpoint import Assembly, CheckpointIndex, TensorInfo
from orchestrator.stores.source import SourceFolder

_TOP = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
"""Name outside of the layers -> transformers' name. The vocabulary of the first and the last may be padded."""
_LAYER = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}
"""Name within a layer -> transformers' name, of tensors that are stored as they are."""
PUBLISHED = {
    folder + name: name
    for folder in TOKENIZER_FOLDERS
    for name in (
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "vocab.json", "merges.txt",
        "added_tokens.json", "chat_template.jinja", "chat_template.json",
    )
} | {"context/artifacts/generation_config.json": "generation_config.json"}  # fmt: skip
"""Tokenizer files and the generation config -> names under which they are published with a release."""
_OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")

read_rows = read_assembled_rows


def matches(names: list[str]) -> bool:
    """Whether `.metadata` and `.distcp` files stand in the folder, its `weights`, or a folder of an iteration."""
    return layout_of(names) is not None or bool(iterations(names))


def read_index(folder: SourceFolder) -> CheckpointIndex:
    """Read the run's config, `.metadata` and the heads of the chunks, without running pickled code.

    Raises SourceMissingError, SourceCorruptError, LfsPointerError, UnsafePickleError; ArchitectureError for a model that is not one
    of the families, QuantizationError for weights that are not floating-point numbers of 16 bits or more.
    """
    names = folder.names()
    layout = layout_of(names)
    if layout is None:
        found = iterations(names)
        if found:
            raise SourceMissingError(f"{folder.url} holds {len(found)} iterations of a run", f"Give one: {folder.url}/{found[-1]}.")
        raise SourceMissingError(
            f"{folder.url} has no {METADATA} beside .distcp files", "Give the folder of a torch_dist checkpoint."
        )
    config = read_config(folder, layout, names)
    stored = _weights(read_metadata(folder, layout.weights + METADATA), folder.url)
    warnings = _with_vocabulary(config, stored)
    blocks = Blocks(folder, layout.weights, stored.values(), names)
    tensors = {part.name: part.made(blocks, folder.url) for part in _parts(stored, config, folder.url)}
    files = tuple(folder.source_file(name) for name in blocks.files)
    return CheckpointIndex("megatron", files, tensors, config, warnings)


def _with_vocabulary(config: dict[str, Any], weights: Mapping[str, StoredTensor]) -> tuple[str, ...]:
    """Take vocab_size from the embedding if the run does not record it. Returns a warning then: rows may be padding."""
    if "vocab_size" in config:
        return ()
    config["vocab_size"] = max((*weights[next(iter(_TOP))].shape[:1], 1))
    return (
        f"the run's config has no vocab_size: the embedding's {config['vocab_size']} rows are taken, which may include padding",
    )


def _weights(stored: Mapping[str, StoredTensor], url: str) -> dict[str, StoredTensor]:
    """Return the model's tensors by name, without the prefix of the trainer's module."""
    name = next(iter(_TOP))
    prefixes = [key.removesuffix(name) for key in stored if key.endswith(name) and not _OPTIMIZER.match(key)]
    if len(prefixes) != 1:
        raise SourceCorruptError(
            f"{url} has {len(prefixes)} tensors called {name}, one was expected",
            "Megatron's format is read for decoder-only language models.",
        )
    found = {}
    for key, tensor in stored.items():
        if not _OPTIMIZER.match(key):
            if tensor.dtype not in MODEL_DTYPES:
                raise QuantizationError(
                    f"{url}: {abbreviated(key, 100)} is stored as {tensor.dtype}, which is no dtype of weights here",
                    f"Save the checkpoint with weights in {', '.join(MODEL_DTYPES)}.",
                )
            if not all(tensor.shape):
                raise SourceCorruptError(f"{url}: {abbreviated(key, 100)} is empty, of shape {list(tensor.shape)}")
            found[key.removeprefix(prefixes[0])] = tensor
    return found


@dataclass(frozen=True, slots=True)
class _Part:
    """A tensor under Hugging Face's name, as rows of a block of a stored tensor."""

    name: str
    stored: StoredTensor
    place: tuple[int, ...]
    """Layer, and expert, on the first axes of the stored tensor."""
    rows: tuple[tuple[int, int], ...]
    """Ranges of the block's rows, in order."""

    def made(self, blocks: Blocks, url: str) -> TensorInfo:
        """Return the tensor. Raises SourceCorruptError."""
        if not 1 <= len(self.stored.shape) - len(self.place) <= 2:
            raise SourceCorruptError(
                f"{url}: {abbreviated(self.stored.name, 100)} has shape {list(self.stored.shape)}, fewer axes expected"
            )
        pieces, axis = blocks.pieces(self.stored, self.place, self.rows, url)
        return assembled(self.name, MODEL_DTYPES[self.stored.dtype], Assembly(pieces, axis))


def _parts(weights: Mapping[str, StoredTensor], config: Mapping[str, Any], url: str) -> Iterable[_Part]:
    for key, stored in weights.items():
        if key in _TOP:
            rows = stored.shape[0] if stored.shape else 0
            if not key.startswith("decoder."):  # the rest of the rows is padding
                rows = min(rows, config["vocab_size"])
            yield _Part(_TOP[key], stored, (), ((0, rows),))
        else:
            yield from _layer_parts(key, stored, config, url)


def _layer_parts(key: str, stored: StoredTensor, config: Mapping[str, Any], url: str) -> Iterable[_Part]:
    """Yield the tensors of a key of the layers. One that no family has keeps its name, and the weight map refuses it."""
    found = re.fullmatch(r"decoder\.layers\.(?:(\d+)\.)?(.+)", key)
    cuts = _cuts(found[2], stored, config, url) if found else None
    if not found or not cuts:
        yield _Part(key, stored, (0,) * max(len(stored.shape) - 2, 0), ((0, stored.shape[-2] if stored.shape[1:] else 1),))
        return
    layers = [int(found[1])] if found[1] else range(_axis(stored, 0, config["num_hidden_layers"], "layers", url))
    for layer in layers:
        for cut in cuts:
            place = cut.expert if found[1] else (layer, *cut.expert)
            yield _Part(f"model.layers.{layer}.{cut.name}", stored, place, cut.rows)


@dataclass(frozen=True, slots=True)
class _Cut:
    """A tensor of a layer: its name, where it lies in the layer's block, its rows there."""

    name: str
    rows: tuple[tuple[int, int], ...]
    expert: tuple[int, ...] = ()


def _cuts(name: str, stored: StoredTensor, config: Mapping[str, Any], url: str) -> list[_Cut]:
    """Return how a layer's tensor is cut into transformers' tensors; empty: no family has it."""
    attention = re.fullmatch(r"self_attention\.linear_qkv\.(weight|bias)", name)
    flat = name.endswith(("layernorm.weight", "layer_norm_weight", ".bias"))
    if len(stored.shape) < (1 if flat else 2):
        return []
    rows = stored.shape[-1] if flat else stored.shape[-2]
    if attention:
        return _attention_cuts(attention[1], rows, config, f"{url}: {stored.name}")
    if name in _LAYER:
        return [_Cut(_LAYER[name], ((0, rows),))]
    linear = re.fullmatch(r"mlp\.linear_fc1\.weight(|_w|_v)", name)
    if linear:
        return [_Cut(f"mlp.{part}_proj.weight", span) for part, span in _gated(linear[1], rows)]
    return _expert_cuts(name, stored, rows, config, url)


def _axis(stored: StoredTensor, axis: int, expected: int, what: str, url: str) -> int:
    """Return the size of an axis over layers or experts. Raises SourceCorruptError if the config says another number."""
    if len(stored.shape) < 2 or stored.shape[axis] != expected:
        raise SourceCorruptError(
            f"{url}: {abbreviated(stored.name, 100)} has shape {list(stored.shape)}, the config says {expected} {what}"
        )
    return expected


def _attention_cuts(kind: str, rows: int, config: Mapping[str, Any], where: str) -> list[_Cut]:
    """Return q, k and v of a fused tensor: of each query group its queries, its key, its value."""
    groups = config["num_key_value_heads"]
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    queries = config["num_attention_heads"] // groups * head
    stride = queries + 2 * head
    if rows != groups * stride:
        raise SourceCorruptError(f"{where} has {rows} rows, {groups} query groups of {stride} were expected")
    spans = {"q_proj": (0, queries), "k_proj": (queries, queries + head), "v_proj": (queries + head, stride)}
    return [
        _Cut(f"self_attn.{name}.{kind}", tuple((group * stride + begin, group * stride + end) for group in range(groups)))
        for name, (begin, end) in spans.items()
    ]


def _gated(half: str, rows: int) -> list[tuple[str, tuple[tuple[int, int], ...]]]:
    """Return gate and up of a fused tensor; of `_w` and `_v`, which hold one half each, that one."""
    if half:
        return [({"_w": "gate", "_v": "up"}[half], ((0, rows),))]
    return [("gate", ((0, rows // 2),)), ("up", ((rows // 2, rows),))]


def _expert_cuts(name: str, stored: StoredTensor, rows: int, config: Mapping[str, Any], url: str) -> list[_Cut]:
    """Return the router or the experts of a mixture; empty: neither."""
    mixtral = config["architectures"] == ["MixtralForCausalLM"]
    block = "block_sparse_moe" if mixtral else "mlp"
    if name == "mlp.router.weight":
        return [_Cut(f"{block}.gate.weight", ((0, rows),))]
    found = re.fullmatch(r"mlp\.experts\.experts\.(?:(\d+)\.)?linear_fc([12])\.weight(|_w|_v)", name)
    if not found or (found[2] == "2" and found[3]):
        return []
    names = {"gate": "w1", "up": "w3", "down": "w2"} if mixtral else {part: f"{part}_proj" for part in ("gate", "up", "down")}
    parts = _gated(found[3], rows) if found[2] == "1" else [("down", ((0, rows),))]
    experts: list[tuple[int, tuple[int, ...]]]
    if found[1]:
        experts = [(int(found[1]), ())]
    else:
        total = config.get("num_local_experts") or config.get("num_experts") or 0
        experts = [(number, (number,)) for number in range(_axis(stored, max(len(stored.shape) - 3, 0), total, "experts", url))]
    return [
        _Cut(f"{block}.experts.{number}.{names[part]}.weight", span, place) for number, place in experts for part, span in parts
    ]
