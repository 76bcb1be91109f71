"""Convert one layer group: the shards of all tensor-parallel ranks of a stage, in TensorRT-LLM's format."""

from __future__ import annotations

import resource
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

from orchestrator.base.errors import NotFiniteError
from orchestrator.checkpoints.reading import RowReader
from orchestrator.checkpoints.safetensors import encode_header
from orchestrator.planning.facts import ConvertFacts
from orchestrator.planning.options import ConvertOptions
from orchestrator.planning.steps import Task
from orchestrator.stores import open_source
from orchestrator.stores.source import ByteSource, planned_ranges
from orchestrator.work.context import Context
from orchestrator.work.convert.cutting import Cutter, Sink
from orchestrator.work.scales import Scales, scales_for


def convert(task: Task, context: Context) -> ConvertFacts:
    """Write the shards as outputs. Facts: source bytes read, peak resident memory of the process."""
    options = ConvertOptions.model_validate(task.step.options)
    total = task.step.estimate.read_bytes
    done = 0

    def progress(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        context.report("convert", done, total, "bytes")

    planned = planned_ranges(tensor for target in options.targets for tensor in target.tensors())
    with open_source(task.step.locations["source"]).open(options.files, planned) as source:
        scales = scales_for(task, options, context)
        written = write_shards(options, source, context.output, progress, scales, context.scratch)
        for name in written.not_finite:
            context.log(f"warning: {name} holds NaN or infinity")
        return ConvertFacts(
            not_finite=tuple(written.not_finite),
            quantization_errors=written.quantization_errors,
            source_bytes_read=source.bytes_read,
            peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        )


@dataclass(frozen=True, slots=True)
class Written:
    """Findings about the written weights."""

    not_finite: list[str]
    """Source tensors that hold NaN or infinity."""
    quantization_errors: dict[str, float]
    """|stored - weight| / |weight| by linear, in Frobenius norms."""


def write_shards(
    options: ConvertOptions,
    source: ByteSource,
    open_output: Callable[[str, int], AbstractContextManager[Sink]],
    progress: Callable[[int], None],
    scales: Scales | None = None,
    scratch: Path | None = None,
) -> Written:
    """Stream every shard of the group to the sink that `open_output` returns for its name and size.

    `scratch`: folder for arrays of the source that must be unpacked first; None: the system's for temporary files.
    Raises SourceCorruptError, DtypeError, NotFiniteError, QuantizationError and the sinks' errors; the sinks' contexts then discard
    the shards.
    """
    header = encode_header(((target.name, target.dtype, target.shape) for target in options.targets), {"format": "pt"})
    size = len(header) + sum(target.num_bytes for target in options.targets)
    with ExitStack() as stack:
        sinks = [stack.enter_context(open_output(name, size)) for name in options.shards]
        for sink in sinks:
            sink.write(memoryview(header))
        ahead = [tensor for target in options.targets for tensor in target.tensors()]
        cutter = Cutter(RowReader(options.format, source, ahead, scratch).read, sinks, progress, scales)
        cutter.run(options.targets)
        if cutter.not_finite and options.not_finite == "error":
            raise NotFiniteError(f"NaN or infinity in {', '.join(cutter.not_finite[:5])} ({len(cutter.not_finite)} tensors)")
    return Written(cutter.not_finite, cutter.quantization_errors)
