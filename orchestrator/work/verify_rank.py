"""The MPI program that executes one stage: `mpiexec -n tp python -m orchestrator.work.verify_rank job.json`.

Every rank runs its own graph in ONNX Runtime, in float32, with its own weights; TensorRT's DistCollective is answered by
MPI. Nothing is simulated: a wrong shard, a wrong graph or a missing all-reduce changes the numbers.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from orchestrator.core.errors import ToolError
from orchestrator.networks import Network, Rendering, decoder_network
from orchestrator.networks.kv_cache import past_name, present_name
from orchestrator.networks.shape import RankShape
from orchestrator.work.binding import bind_portable
from orchestrator.work.calls import Call, make_calls
from orchestrator.work.failures import cause_of
from orchestrator.work.lost import TOOL, say_failed, say_started
from orchestrator.work.shards import Weight, map_shards
from orchestrator.work.verify import RankJob

Array = npt.NDArray[Any]
_CUSTOM_DOMAIN = "ai.onnx.contrib"
"""Of onnxruntime_extensions, which lets ONNX Runtime call Python."""


def main(path: str) -> None:
    """Run this MPI rank's part of the job in the JSON file at `path`."""
    job = RankJob.model_validate_json(Path(path).read_bytes())
    world, library = _world()
    if world.size != len(job.shards):
        raise ToolError(f"a rank sees {world.size} of {len(job.shards)} ranks: mpiexec is not of mpi4py's {library}")
    say_started()
    weights = map_shards(Path(shard) for shard in job.shards[world.rank])
    results = _run_calls(job, weights, world)
    worst = max(float(np.abs(value - world.bcast(value, root=0)).max(initial=0.0)) for value in results)
    if max(world.allgather(worst)) > 1e-5 * max(float(np.abs(value).max(initial=0.0)) for value in results):
        raise SystemExit(f"tensor-parallel ranks disagree on the stage's output by {worst:g}")
    if world.rank == 0:
        from safetensors.numpy import save_file

        save_file({f"call{number}": np.ascontiguousarray(value) for number, value in enumerate(results)}, job.output)


def _world() -> tuple[Any, str]:
    """The ranks that the launcher started together, and the MPI that connects them. Raises ToolError when there is none."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ToolError(f"mpi4py does not find an MPI: {error}") from error
    return MPI.COMM_WORLD, MPI.Get_library_version().strip("\0").partition("\n")[0]


def _run_calls(job: RankJob, weights: dict[str, Weight], world: Any) -> list[Array]:
    from safetensors.numpy import load_file

    reference = load_file(job.reference)
    calls = make_calls(reference["tokens"], reference["lengths"], job.decode_steps)
    previous = load_file(job.hidden_states) if job.hidden_states else {}
    runner = StageRunner(job, weights, world, len(reference["lengths"]), int(reference["lengths"].max()))
    results = []
    for number, call in enumerate(calls):
        result = runner.run(call, previous.get(f"call{number}"))
        if job.stage.is_last and not job.network.gather_logits:
            result = np.concatenate(world.allgather(result), axis=-1)[..., : job.stage.config.vocab_size]
        results.append(result)
        if world.rank == 0:
            print("call", number + 1, len(calls), flush=True)
    return results


class StageRunner:
    """One rank's graph in ONNX Runtime and its KV cache."""

    def __init__(self, job: RankJob, weights: dict[str, Weight], world: Any, batch: int, slots: int) -> None:
        network = decoder_network(job.network, world.rank, Rendering.executed())
        self._stage = job.stage
        self._bound = {name: _ort_value(value, kind) for name, (value, kind) in bind_portable(network, weights).items()}
        self._session = _session(network, self._bound, world)
        shape = RankShape(job.stage, "float32", world.rank, portable=True)
        self._cache = _empty_cache(shape, job.stage.num_layers, batch, slots)

    def run(self, call: Call, hidden_states: Array | None) -> Array:
        """Execute a call; the cache moves on. Returns hidden states, or logits on the last stage."""
        feeds: dict[str, Array] = {"position_ids": call.position_ids, "write_indices": call.write_indices}
        if hidden_states is None:
            feeds["input_ids"] = call.input_ids
        else:
            feeds["hidden_states"] = hidden_states
        if self._stage.is_last:
            feeds["logit_indices"] = call.logit_indices
        values = {name: _ort_value(value) for name, value in feeds.items()}
        names = [output.name for output in self._session.get_outputs()]
        outputs = dict(zip(names, self._session.run_with_ort_values(names, {**values, **self._cache}), strict=True))
        for layer in range(self._stage.num_layers):
            for what in ("key", "value"):
                self._cache[past_name(layer, what)] = outputs[present_name(layer, what)]
        result: Array = outputs["logits" if self._stage.is_last else "hidden_states_out"].numpy()
        return result


_LARGE: dict[str, tuple[Any, int, int]] = {
    "float32": (np.float32, 10_000, onnx.TensorProto.FLOAT),
    "int8": (np.int8, 127, onnx.TensorProto.INT8),
    "float8": (np.uint8, 0x7E, onnx.TensorProto.FLOAT8E4M3FN),  # 448
}
"""numpy's dtype of a cache, the bits of a large number, ONNX's dtype."""


def _empty_cache(shape: RankShape, num_layers: int, batch: int, slots: int) -> dict[str, Any]:
    """Filled with a large number, so that reading an unwritten slot cannot pass for right."""
    size = (batch, shape.num_kv_heads, slots, shape.config.head_size)
    dtype, value, kind = _LARGE[shape.cache_dtype]
    names = [past_name(layer, what) for layer in range(num_layers) for what in ("key", "value")]
    return {name: _ort_value(np.full(size, value, dtype), kind) for name in names}


def _ort_value(value: Array, kind: int = onnx.TensorProto.UNDEFINED) -> Any:
    """For ONNX Runtime; `kind` where numpy has no dtype of its own for the elements."""
    import onnxruntime

    packed = {onnx.TensorProto.FLOAT8E4M3FN, onnx.TensorProto.INT4}
    if kind in packed:
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(value, kind)
    return onnxruntime.OrtValue.ortvalue_from_numpy(value)


def _session(network: Network, bound: dict[str, Any], world: Any) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    # Sequential execution keeps the collectives in graph order, the same on every rank.
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    # Otherwise a weight-only MatMul is fused into one that rounds its input to int8, which nobody asked for.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    if world.size > 1:
        options.register_custom_ops_library(_collectives(world))
    options.add_external_initializers(list(bound), list(bound.values()))
    model = _answer_collectives(network.model)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _answer_collectives(model: onnx.ModelProto) -> onnx.ModelProto:
    """Replace TensorRT's DistCollective by operators that ONNX Runtime passes to MPI."""
    replaced = False
    for node in model.graph.node:
        if node.op_type == "DistCollective":
            operation = next(item.s.decode() for item in node.attribute if item.name == "collective_operation")
            node.op_type = {"all_reduce": "MpiAllReduce", "all_gather": "MpiAllGather"}[operation]
            node.domain = _CUSTOM_DOMAIN
            del node.attribute[:]
            replaced = True
    if replaced:
        model.opset_import.append(onnx.helper.make_opsetid(_CUSTOM_DOMAIN, 1))
    return model


def _collectives(world: Any) -> str:
    """Register the two operators with onnxruntime_extensions; returns the path of its library."""
    with _without("torch", "transformers"):
        from onnxruntime_extensions import PyCustomOpDef, get_library_path, onnx_op

    @onnx_op(op_type="MpiAllReduce", inputs=[PyCustomOpDef.dt_float], outputs=[PyCustomOpDef.dt_float])  # type: ignore[untyped-decorator]
    def all_reduce(x: Array) -> Array:
        total = np.empty_like(x)
        world.Allreduce(np.ascontiguousarray(x), total)
        return total

    @onnx_op(op_type="MpiAllGather", inputs=[PyCustomOpDef.dt_float], outputs=[PyCustomOpDef.dt_float])  # type: ignore[untyped-decorator]
    def all_gather(x: Array) -> Array:
        gathered = np.empty((world.size * x.shape[0], *x.shape[1:]), x.dtype)
        world.Allgather(np.ascontiguousarray(x), gathered)
        return gathered

    path: str = get_library_path()
    return path


@contextlib.contextmanager
def _without(*names: str) -> Iterator[None]:
    """Packages that are not loaded yet cannot be imported in the block.

    onnxruntime_extensions loads torch and transformers for its tokenizers where they are installed: four seconds in every rank
    for what is not used here.
    """
    kept_out = [name for name in names if name not in sys.modules]
    blocked: dict[str, Any] = dict.fromkeys(kept_out)  # None stands for "there is no such package"
    sys.modules.update(blocked)
    try:
        yield
    finally:
        for name in kept_out:
            del sys.modules[name]


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except BaseException as error:
        say_failed(TOOL if isinstance(error, ToolError) else cause_of(error).value)
        raise
