"""Memory, bytes and seconds that the steps of each kind need, from headers alone.

The formulas follow from what the steps hold at once. Their constants are measured: peaks of resident memory stay below the
estimate and above half of it (tests/integration/test_estimates.py).
"""

from __future__ import annotations

from collections import defaultdict

from orchestrator.base.dtypes import ITEM_BITS, MODEL_DTYPES
from orchestrator.model.checkpoint import CheckpointIndex
from orchestrator.model.weight_map import WeightMap
from orchestrator.planning.calibration import layer_of
from orchestrator.planning.kinds import Kind
from orchestrator.planning.steps import Estimate
from orchestrator.spec.rates import STEP_RATES

MINIATURE_MEMORY_BYTES = 700_000_000
"""torch, transformers and ONNX Runtime. The model is nothing beside them."""
_TORCH_BYTES = 700_000_000
"""torch and transformers, and a block of the head's rows with its products."""
_VERIFY_BYTES = 200_000_000
"""ONNX Runtime, the graphs of a stage's ranks and the values of all calls."""
_CONVERT_BYTES = 300_000_000
_BUILD_BYTES = 500_000_000
"""TensorRT, and the workspace of its tactics."""


def reference_memory(index: CheckpointIndex, dtype: str) -> int:
    """Memory of the reference: a layer in float32, the next one as it is stored, three experts, one tensor while it is rounded."""
    dense: dict[int, int] = defaultdict(int)
    stored: dict[int, int] = defaultdict(int)
    experts: dict[str, int] = defaultdict(int)
    largest = 0
    for name, tensor in index.tensors.items():
        if ".layers." not in name:
            continue
        if ".experts." in name:
            prefix, _, rest = name.partition(".experts.")
            experts[f"{prefix}.{rest.split('.')[0]}"] += tensor.num_elements * 4
            continue
        dense[layer_of(name)] += tensor.num_elements * 4
        stored[layer_of(name)] += tensor.num_elements * ITEM_BITS[tensor.dtype] // 8
        if tensor.dtype != MODEL_DTYPES[dtype]:
            largest = max(largest, tensor.num_elements * 6)
    layer = max((dense[number] + stored[number] for number in dense), default=0)
    return _TORCH_BYTES + layer + largest + 3 * max(experts.values(), default=0)


def verify_memory(weights: WeightMap, pp_rank: int) -> int:
    """Memory of a verification: one slice of one rank in float32, the next one, and one of them while it is made."""
    return _VERIFY_BYTES + 3 * weights.largest_layer_bytes(pp_rank)


def build_memory(rank_bytes: int) -> int:
    """Memory of an engine build: TensorRT holds up to two and a half times the rank's weights."""
    return _BUILD_BYTES + rank_bytes * 5 // 2


def convert_memory(largest_tensor_bytes: int) -> int:
    """Memory of a conversion: blocks of a tensor on their way from the source to the shards."""
    return _CONVERT_BYTES + 2 * largest_tensor_bytes


def calibrate_memory(part_bytes: int, hidden_bytes: int) -> int:
    """Memory of a calibration: the layers of a part, read and loaded, and the hidden states that come in and go out."""
    return _TORCH_BYTES + 2 * part_bytes + 2 * hidden_bytes


def estimate(kind: Kind, *, read_bytes: int, work_bytes: int, write_bytes: int = 0) -> Estimate:
    """Bytes and seconds of a step, from its work and the default rates."""
    seconds = STEP_RATES[kind.value].of(work_bytes)
    return Estimate(read_bytes=read_bytes, write_bytes=write_bytes, work_bytes=work_bytes, seconds=seconds)
