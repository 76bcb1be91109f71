"""Memory, bytes and seconds that the steps of each kind need, from headers alone.

The formulas follow from what the steps hold at once. Their constants are measured: peaks of resident memory stay below the
estimate and above half of it (tests/integration/test_estimates.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from orchestrator.base.dtypes import ITEM_BITS, MODEL_DTYPES
from orchestrator.checkpoints.transposed import SLAB_BYTES, STRIP_BYTES
from orchestrator.model.checkpoint import CheckpointIndex, Packing, TensorInfo
from orchestrator.model.targets import Target
from orchestrator.model.weight_map import WeightMap
from orchestrator.planning.calibration import layer_of
from orchestrator.planning.kinds import Kind
from orchestrator.planning.steps import Estimate
from orchestrator.spec.rates import STEP_RATES

MINIATURE_MEMORY_BYTES = 700_000_000
"""Memory of torch, transformers and ONNX Runtime. The miniature model itself is negligible."""
_TORCH_BYTES = 760_000_000
"""Memory of torch and transformers, and of a block of the head's rows with its products."""
_VERIFY_BYTES = 200_000_000
"""Memory of ONNX Runtime, the graphs of a stage's ranks and the values of all calls."""
_EXPORT_BYTES = 150_000_000
"""Memory of ONNX Runtime, the portable graph and the values of all calls."""
_CONVERT_BYTES = 100_000_000
"""Memory of the interpreter and numpy; blocks in flight take at most as much again."""
_DEQUANTIZE_BYTES = 210_000_000
"""Memory of the codes of a block, and of a stretch of elements in float32."""
_STAGING_BYTES = 80_000_000
"""Memory of a stream of chunks being decompressed, and of a block computed in float32."""
_ROUNDING_BYTES = 320_000_000
"""Memory of torch where it only rounds, and of blocks of rows being rounded."""
_PACKING_BYTES = 420_000_000
"""Memory of torch, and of blocks of rows in float32."""
_BUILD_BYTES = 500_000_000
"""Memory of TensorRT and the workspace of its tactics."""
_BUILD_LAYER_BYTES = 25_000_000
"""Memory of TensorRT per layer of the network."""


def reference_memory(index: CheckpointIndex, dtype: str, num_layers: int) -> int:
    """Return the memory of a reference: a layer in float32, the next one as stored, three experts, and a tensor being rounded.

    Layers from `num_layers` on, which predict further tokens, are not read.
    """
    dense: dict[int, int] = defaultdict(int)
    stored: dict[int, int] = defaultdict(int)
    experts: dict[str, int] = defaultdict(int)
    largest = 0
    for name, tensor in index.tensors.items():
        if ".layers." not in name or layer_of(name) >= num_layers:
            continue
        if ".experts." in name:
            prefix, _, rest = name.partition(".experts.")
            number = rest.split(".")[0]
            if number.isdigit():
                experts[f"{prefix}.{number}"] += tensor.num_elements * 4
            else:  # a tensor of all experts, which are read one by one
                experts[prefix] += tensor.num_elements * 4 // tensor.shape[0]
            continue
        num_bytes = tensor.num_elements * ITEM_BITS[tensor.dtype] // 8
        dense[layer_of(name)] += tensor.num_elements * 4
        stored[layer_of(name)] += num_bytes
        # While it is widened, and where its elements change, while it is rounded too.
        largest = max(largest, 2 * num_bytes + (6 * tensor.num_elements if tensor.dtype != MODEL_DTYPES[dtype] else 0))
    layer = max((dense[number] + stored[number] for number in dense), default=0)
    return _TORCH_BYTES + layer + largest + 3 * max(experts.values(), default=0)


def verify_memory(weights: WeightMap, pp_rank: int) -> int:
    """Return the memory of a verification: a slice of a rank in float32, the next slice, and a slice being loaded."""
    return _VERIFY_BYTES + weights.largest_layer_bytes(pp_rank) * 10 // 3


def export_memory(weights: WeightMap, pp_rank: int) -> int:
    """Return the memory of an export: a slice of a rank as stored, in float32, and transposed."""
    return _EXPORT_BYTES + 3 * weights.largest_layer_bytes(pp_rank)


def build_memory(rank_bytes: int, num_layers: int, *, repacked: bool) -> int:
    """Memory of an engine build: TensorRT's copies of the rank's weights, and what it knows of each layer.

    The factor is measured by benchmarks/engine_memory.py: 1.5 to 1.7 for dense models, 1.2 for mixtures. The mapped weights do not
    count: their pages are released. `repacked`: INT4, whose nibbles are packed anew for TensorRT, in memory of the process.
    """
    return _BUILD_BYTES + rank_bytes * (11 if repacked else 7) // 4 + num_layers * _BUILD_LAYER_BYTES


def convert_memory(largest_tensor_bytes: int, *, quantized: bool) -> int:
    """Memory of a conversion. Blocks of bounded size pass through it; torch packs whole blocks of rows."""
    if quantized:
        return _PACKING_BYTES + 2 * largest_tensor_bytes
    return _CONVERT_BYTES + min(largest_tensor_bytes, _CONVERT_BYTES)


def dequantization_memory(tensors: Iterable[TensorInfo]) -> int:
    """Return the memory that dequantizing adds to a conversion: a block's codes, a stretch in float32, and what is kept whole.

    Kept are scales that several rows share, and codes that are stored by columns. Rows of experts are experts: three in flight.
    """
    encoded = [(tensor, tensor.encoding) for tensor in tensors if tensor.encoding is not None]
    if not encoded:
        return 0
    kept = [encoding.codes.num_bytes if encoding.is_transposed else 0 for _, encoding in encoded]
    experts = [tensor.num_bytes // tensor.shape[0] for tensor, encoding in encoded if encoding.packing is Packing.EXPERTS]
    return _DEQUANTIZE_BYTES + max(kept) + 3 * max(experts, default=0)


def transposition_memory(tensors: Iterable[TensorInfo]) -> int:
    """Return the memory that storage as [in, out] and chunks add to a conversion: a strip, a slab of it, a chunk's stream."""
    found = list(tensors)
    largest = max((tensor.num_bytes for tensor in found if tensor.is_transposed), default=0)
    staging = _STAGING_BYTES if any(tensor.array is not None for tensor in found) else 0
    return min(largest, STRIP_BYTES) + min(largest, SLAB_BYTES) + staging


def rounding_memory(targets: Iterable[Target]) -> int:
    """Return the memory that rounding to another dtype adds to a conversion: torch, and a block in float32 and rounded."""
    rounds = any(read.tensor.dtype != target.dtype for target in targets if target.quantized is None for read in target.reads)
    return _ROUNDING_BYTES if rounds else 0


def calibrate_memory(part_bytes: int, hidden_bytes: int, *, searches_whole_part: bool = False) -> int:
    """Return the memory of a calibration: the layers of a part, read and loaded, and their input and output hidden states.

    `searches_whole_part`: AWQ tries its scales on all layers of the part at once, which took up to twice the part's weights more.
    """
    return _TORCH_BYTES + 2 * part_bytes + 2 * hidden_bytes + (5 * part_bytes // 2 if searches_whole_part else 0)


def estimate(kind: Kind, *, read_bytes: int, work_bytes: int, write_bytes: int = 0) -> Estimate:
    """Return the bytes and seconds of a step, from its work and the default rates."""
    seconds = STEP_RATES[kind.value].of(work_bytes)
    return Estimate(read_bytes=read_bytes, write_bytes=write_bytes, work_bytes=work_bytes, seconds=seconds)
