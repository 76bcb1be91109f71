"""Write the portable graph of a pipeline stage, and execute it, as written, on the calls of the verification.

The graph is executed slice by slice, as the verification executes the ranks, from the bytes of the shards that it names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from orchestrator.base.errors import VerificationError
from orchestrator.checkpoints.safetensors import read_header
from orchestrator.model.stage import StageOptions
from orchestrator.networks.portable import StoredTensor, portable_stage
from orchestrator.planning.facts import ExportFacts, VerifyFacts
from orchestrator.planning.options import ExportOptions
from orchestrator.planning.steps import Kind, Output, Task
from orchestrator.work.context import Context
from orchestrator.work.export.execution import SlicedGraph
from orchestrator.work.reference.step import OUTPUT as REFERENCE
from orchestrator.work.shards import Weight, map_shards, rank_shards
from orchestrator.work.verify import compare
from orchestrator.work.verify.inputs import make_calls, repeated
from orchestrator.work.verify.step import HIDDEN_STATES, LOGITS

Array = npt.NDArray[Any]
_BLOCK_BYTES = 2**24
_SAME = 1e-5
"""Largest difference to the verified ranks, relative to the largest value: sums of the ranks in another order."""


def export(task: Task, context: Context) -> ExportFacts:
    """Write stage{pp_rank}.onnx. Facts: digests of the networks, and the difference to the verified ranks.

    Raises VerificationError when the graph, as read from its file, computes something else than the verified ranks.
    """
    options = ExportOptions.model_validate(task.step.options)
    stage = options.network.stage
    shards = [rank_shards(task, context, stage.rank(tp_rank)) for tp_rank in range(stage.tp)]
    stored = [_stored(paths) for paths in shards]
    replicated = _replicated([map_shards(paths) for paths in shards])
    data = portable_stage(options.network, stored, replicated).SerializeToString()
    error = None
    if options.decode_steps is not None:
        files = {path.name: path for paths in shards for path in paths}
        error = _difference(task, context, options, SlicedGraph(onnx.load_from_string(data), files))
    with context.output(graph_name(stage.pp_rank), len(data), chunked=True) as writer:
        writer.write(data)
    return ExportFacts(networks=tuple(options.network.digest(tp_rank) for tp_rank in range(stage.tp)), max_relative_error=error)


def graph_name(pp_rank: int) -> str:
    """Return the file name of a stage's graph."""
    return f"stage{pp_rank}.onnx"


def _stored(paths: Sequence[Path]) -> dict[str, StoredTensor]:
    return {
        entry.name: StoredTensor(path.name, entry.dtype, entry.offset, entry.num_bytes)
        for path in paths
        for entry in read_header(path)[0]
    }


def _replicated(ranks: Sequence[Mapping[str, Weight]]) -> list[str]:
    """Return the names of the tensors that are equal on all ranks."""
    first, *others = ranks
    found = []
    for name, weight in first.items():
        twins = [other[name] for other in others if name in other]
        if len(twins) == len(others) > 0 and all(_is_equal(weight, twin) for twin in twins):
            found.append(name)
        for each in (weight, *twins):
            each.release()
    return found


def _is_equal(weight: Weight, twin: Weight) -> bool:
    """Whether two tensors are equal. Parts of a weight differ in their first block, so no more of them is read."""
    return (twin.dtype, twin.shape) == (weight.dtype, weight.shape) and all(
        np.array_equal(weight.data[begin : begin + _BLOCK_BYTES], twin.data[begin : begin + _BLOCK_BYTES])
        for begin in range(0, weight.data.size, _BLOCK_BYTES)
    )


def _difference(task: Task, context: Context, options: ExportOptions, graph: SlicedGraph) -> float:
    """Execute the graph on all calls; return the largest difference to the verified ranks. Raises VerificationError."""
    from safetensors.numpy import load_file

    stage = options.network.stage
    assert options.decode_steps is not None
    reference = load_file(context.fetch(_outputs(task, Kind.REFERENCE, stage)[REFERENCE]))
    lengths = reference["lengths"]
    calls = make_calls(reference["tokens"], lengths, options.decode_steps, repeated(options.network, len(lengths)))
    handed = None if stage.is_first else load_file(context.fetch(_outputs(task, Kind.VERIFY, stage, -1)[HIDDEN_STATES]))
    expected = load_file(context.fetch(_outputs(task, Kind.VERIFY, stage)[LOGITS if stage.is_last else HIDDEN_STATES]))
    before = [None if handed is None else handed[f"call{number}"] for number in range(len(calls))]
    results = graph.run(stage, calls, before, lambda done, total: context.report("execute", done, total, "steps"))
    worst = 0.0
    for number, (call, result) in enumerate(zip(calls, results, strict=True)):
        wanted = expected[f"call{number}"]
        if not stage.is_last:
            result, wanted = call.last_tokens(result), call.last_tokens(wanted)
        worst = max(worst, compare.relative_error(result, wanted))
    context.log(f"export: {graph_name(stage.pp_rank)} differs from the verified ranks by {worst:.1e}")
    if not worst <= _SAME:
        raise VerificationError(
            f"the portable graph of stage {stage.pp_rank} differs from the verified ranks by {worst:.3g}",
            "Nothing was published. This is a bug: report it, with config.json. Without `portable` in release.include, the "
            "engines can be published.",
        )
    return worst


def _outputs(task: Task, kind: Kind, stage: StageOptions, offset: int = 0) -> Mapping[str, Output]:
    """Return the outputs by name of the needed step of a kind; of verifications, that of this stage plus `offset`."""
    for need in task.step.needs:
        outcome = task.inputs[need]
        if outcome.kind is kind and (kind is not Kind.VERIFY or outcome.facts_as(VerifyFacts).stage == stage.pp_rank + offset):
            return {output.name: output for output in outcome.outputs}
    raise KeyError(kind)
