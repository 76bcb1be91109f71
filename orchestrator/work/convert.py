"""Convert one layer group: the shards of all tensor-parallel ranks of a stage, in TensorRT-LLM's format."""

from __future__ import annotations

import resource
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from orchestrator.checkpoints.blocks import ByteSource, FileSource
from orchestrator.checkpoints.safetensors import encode_header
from orchestrator.core.options import ConvertOptions
from orchestrator.core.step import Task
from orchestrator.work.context import Context
from orchestrator.work.cutting import Cutter


def convert(task: Task, context: Context) -> dict[str, Any]:
    """Write the shards as outputs. Facts: source bytes read, peak resident memory of the process."""
    options = ConvertOptions.model_validate(task.step.options)
    names = tuple(file.name for file in options.files)
    with FileSource(Path(task.step.places["source"]), names) as source:
        write_shards(options, source, context)
        return {
            "source_bytes_read": source.bytes_read,
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }


def write_shards(options: ConvertOptions, source: ByteSource, context: Context) -> None:
    """Stream every shard of the group. Raises SourceCorruptError, DtypeError, StoreError; then no shard appears."""
    header = encode_header(
        ((target.name, target.dtype, target.shape) for target in options.targets), {"format": "pt"}
    )
    shard_bytes = sum(target.num_bytes for target in options.targets)
    total = sum({read.tensor.name: read.tensor.num_bytes for target in options.targets for read in target.reads}.values())
    done = 0
    lock = threading.Lock()

    def progress(num_bytes: int) -> None:
        nonlocal done
        with lock:
            done += num_bytes
            context.report("convert", done, total, "bytes")

    with ExitStack() as stack:
        sinks = [stack.enter_context(context.output(name, len(header) + shard_bytes)) for name in options.shards]
        for sink in sinks:
            sink.write(header)
        Cutter(source, sinks, progress).run(options.targets)
