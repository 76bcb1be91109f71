"""GGUF files of the llama architecture: one file with metadata and tensors, plain or quantized.

Quantized tensors are presented as float32 and dequantized while they are read. Names and the order of the rows of attn_q and
attn_k are llama.cpp's (convert_hf_to_gguf.py, `LlamaModel`): the rows of a head lie as in Meta's files.
"""

from __future__ import annotations

import functools
import math
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from orchestrator.base.errors import (
    ArchitectureError,
    LfsPointerError,
    QuantizationError,
    SourceCorruptError,
    SourceMissingError,
    ToolError,
)
from orchestrator.checkpoints.assembly import assembled, paired_order, read_assembled_rows
from orchestrator.model.checkpoint import Assembly, CheckpointIndex, Piece, TensorInfo
from orchestrator.stores.source import ByteSource, LocalFolder, SourceFolder

if TYPE_CHECKING:
    import gguf

_PLAIN = {"F32", "F16", "BF16"}
_LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
"""llama.cpp's name within a block -> transformers' name within a layer."""
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_ROPE_FACTORS = "rope_freqs.weight"
"""What Llama 3.1's scaling divides each frequency by."""
_LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_LLAMA_3_FACTORS = (8.0, 32.0)


def matches(names: list[str]) -> bool:
    """A .gguf file, and no weights of Hugging Face's, which are preferred."""
    top = [name for name in names if "/" not in name]
    return any(name.endswith(".gguf") for name in top) and not any(name.endswith((".safetensors", ".bin")) for name in top)


def read_index(folder: SourceFolder) -> CheckpointIndex:
    """Read the metadata of the one .gguf file at `folder`, a folder of this machine.

    Raises SourceMissingError, SourceCorruptError, LfsPointerError, ToolError without the gguf package, QuantizationError for
    a kind that it cannot dequantize, ArchitectureError for other models than Llama.
    """
    name, reader = _open(folder)
    config = _config(reader)
    tensors: dict[str, TensorInfo] = {}
    for entry in reader.tensors:
        if entry.name != _ROPE_FACTORS:
            made = _tensor(entry, config["head_dim"])
            tensors[made.name] = made
    if "model.embed_tokens.weight" not in tensors:
        raise SourceCorruptError(f"{folder.url}/{name} lacks token_embd.weight")
    config["vocab_size"] = tensors["model.embed_tokens.weight"].shape[0]
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors
    return CheckpointIndex("gguf", (folder.source_file(name),), tensors, config)


def read_rows(source: ByteSource, tensor: TensorInfo, begin: int, end: int, out: memoryview) -> None:
    """`Format.read_rows`: what is quantized becomes float32."""
    assembly = tensor.assembly
    if assembly is None or not assembly.encoding:
        read_assembled_rows(source, tensor, begin, end, out)
    elif begin < end:
        order = paired_order(begin, end, assembly.paired_rows) if assembly.paired_rows else np.arange(begin, end)
        first, last = int(order.min()), int(order.max()) + 1
        stored = _dequantized(source, assembly.pieces[0], assembly.encoding, first, last)
        wanted = np.frombuffer(out, np.float32, (end - begin) * tensor.shape[1]).reshape(end - begin, -1)
        np.take(stored, order - first, axis=0, out=wanted, mode="clip")


def _dequantized(source: ByteSource, piece: Piece, encoding: str, begin: int, end: int) -> npt.NDArray[np.float32]:
    """Rows [begin, end) of a quantized tensor; a row is a whole number of blocks."""
    import gguf

    kind = gguf.GGMLQuantizationType[encoding]
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    row_bytes = piece.shape[1] // block * block_bytes
    raw = np.empty((end - begin, row_bytes), np.uint8)
    source.read_into(piece.file, piece.offset + begin * row_bytes, raw.reshape(-1).data)
    values: npt.NDArray[np.float32] = gguf.quants.dequantize(raw, kind)
    return values


def _open(folder: SourceFolder) -> tuple[str, gguf.GGUFReader]:
    names = [name for name in folder.names() if name.endswith(".gguf") and "/" not in name]
    if len(names) != 1:
        raise SourceMissingError(f"{folder.url} has {len(names)} .gguf files, one is needed", "Merge split files with gguf-split.")
    if not isinstance(folder, LocalFolder):
        raise SourceMissingError(f"{folder.url}: GGUF is read from folders of this machine only", "Download the file first.")
    if folder.read(names[0], 0, 7) == b"version":
        raise LfsPointerError(f"{folder.url}/{names[0]} is a Git-LFS pointer, not weights")
    try:
        reader = _bounded_reader()
    except ImportError:
        raise ToolError("reading GGUF needs the package gguf", "pip install gguf") from None
    try:
        return names[0], reader(folder.folder / names[0])
    except Exception as error:  # the reader raises nearly anything for a damaged file
        raise SourceCorruptError(f"{folder.url}/{names[0]} is truncated or damaged: {error}") from None


@functools.cache
def _bounded_reader() -> type[gguf.GGUFReader]:
    """The package's reader, which believes every count: it would build the elements of an array that no file could hold."""
    import gguf

    class BoundedReader(gguf.GGUFReader):
        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type == gguf.GGUFValueType.ARRAY:
                count = int(self._get(orig_offs + 4, np.uint64)[0])
                if count > len(self.data) - orig_offs:
                    raise ValueError(f"an array of {count} elements stands in a file of {len(self.data)} bytes")
            return super()._get_field_parts(orig_offs, raw_type)

    return BoundedReader


def _tensor(entry: gguf.ReaderTensor, head_size: int) -> TensorInfo:
    """[rows, columns] under transformers' name. A tensor that Llama does not have keeps its name, so that nobody drops it."""
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", entry.name)
    inner = found[2] if found else ""
    name = _TOP.get(entry.name, entry.name)
    if found and inner in _LAYER:
        name = f"model.layers.{found[1]}.{_LAYER[inner]}.weight"
    kind = entry.tensor_type.name
    if kind not in _PLAIN:
        _check_kind(entry)
    shape = tuple(int(size) for size in reversed(entry.shape.tolist()))
    piece = Piece(0, int(entry.data_offset), shape)
    paired = head_size if inner in ("attn_q", "attn_k") else 0
    plain = kind in _PLAIN
    return assembled(name, kind if plain else "F32", Assembly((piece,), 0, paired, "" if plain else kind))


def _check_kind(entry: gguf.ReaderTensor) -> None:
    """Raises QuantizationError for a kind that the gguf package cannot dequantize."""
    import gguf

    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[entry.tensor_type][1]), np.uint8), entry.tensor_type)
    except NotImplementedError:
        raise QuantizationError(
            f"{entry.name} is {entry.tensor_type.name}, which the gguf package cannot dequantize",
            "Take a file of another GGUF type, e.g. Q8_0.",
        ) from None
    if len(entry.shape) != 2:
        raise SourceCorruptError(f"{entry.name} is quantized but has {len(entry.shape)} axes")


def _config(reader: gguf.GGUFReader) -> dict[str, Any]:
    """What config.json of the same model says, less what the tensors tell. Raises ArchitectureError, SourceCorruptError."""

    def get(key: str, default: Any = None) -> Any:
        field = reader.get_field(key)
        value = default if field is None else field.contents()
        # float32 as it was meant: 1e-05, not 9.99999974e-06
        return float(str(np.float32(value))) if isinstance(value, float) else value

    architecture = get("general.architecture")
    if architecture != "llama" or get("llama.expert_count"):
        what = "llama with experts" if architecture == "llama" else architecture
        raise ArchitectureError(f"GGUF of the architecture {what!r}", "Only dense llama is read; use the Hugging Face checkpoint.")
    needed = ("embedding_length", "feed_forward_length", "block_count", "attention.head_count", "context_length")
    for key in needed:
        if not isinstance(get(f"llama.{key}"), int):
            raise SourceCorruptError(f"the GGUF file's metadata lacks llama.{key}, or it differs between layers")
    hidden, inter, layers, heads, positions = (get(f"llama.{key}") for key in needed)
    head_size = get("llama.attention.key_length") or get("llama.rope.dimension_count") or hidden // heads
    base = get("llama.rope.freq_base", 10000.0)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inter,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": get("llama.attention.head_count_kv", heads),
        "head_dim": head_size,
        "hidden_act": "silu",
        "rms_norm_eps": get("llama.attention.layer_norm_rms_epsilon", 1e-5),
        "max_position_embeddings": positions,
        "rope_theta": base,
        "rope_scaling": _rotary_scaling(reader, get("llama.rope.scaling.type"), get("llama.rope.scaling.factor"), head_size, base),
    }


def _rotary_scaling(
    reader: gguf.GGUFReader, kind: str | None, factor: float | None, size: int, base: float
) -> dict[str, Any] | None:
    """transformers' dictionary. Llama 3's is known by the factors that it gives, which is all that the file holds."""
    stored = next((entry.data for entry in reader.tensors if entry.name == _ROPE_FACTORS), None)
    if stored is not None:
        for candidate in _LLAMA_3_FACTORS:
            if np.allclose(stored, llama3_factors(candidate, size, base), rtol=1e-4):
                return {"rope_type": "llama3", "factor": candidate, **_LLAMA_3}
        raise ArchitectureError("the GGUF file's rope_freqs.weight is no known rotary scaling", "Use the Hugging Face checkpoint.")
    if kind in (None, "none"):
        return None
    if kind == "linear" and factor:
        return {"rope_type": "linear", "factor": factor}
    raise ArchitectureError(f"the GGUF file has the rotary scaling {kind!r}", "Use the Hugging Face checkpoint.")


def llama3_factors(factor: float, size: int, base: float) -> npt.NDArray[np.float32]:
    """[size / 2]: what each frequency is divided by (`LlamaModel.generate_extra_tensors` of convert_hf_to_gguf.py)."""
    low, high = _LLAMA_3["low_freq_factor"], _LLAMA_3["high_freq_factor"]
    turns = _LLAMA_3["original_max_position_embeddings"] / (2 * math.pi * base ** (np.arange(0, size, 2) / size))
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
