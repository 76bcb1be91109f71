"""Compile one rank: graph, memory-mapped weights, and the engine straight to the store."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from orchestrator.engines import EngineRequest, backend, installed_version, require_collectives, require_version
from orchestrator.engines.device import visible_gpus
from orchestrator.engines.experts import require_expert_layer
from orchestrator.engines.profiles import rank_profiles
from orchestrator.engines.record import EngineRecord
from orchestrator.networks import Rendering, decoder_network
from orchestrator.planning.facts import BuildFacts
from orchestrator.planning.options import BuildOptions
from orchestrator.planning.steps import Task
from orchestrator.work.binding import bind
from orchestrator.work.context import Context
from orchestrator.work.shards import Weight, map_shards, rank_shards, release


def build(task: Task, context: Context) -> BuildFacts:
    """Write rank{N}.engine. Facts: the engine's record, the options, the network's digest. Raises EngineBuildError, ToolError."""
    options = BuildOptions.model_validate(task.step.options)
    require_version(options.engine.backend, options.tensorrt_version)
    context.tools[options.engine.backend] = installed_version(options.engine.backend) or ""
    weights = map_shards(rank_shards(task, context, options.rank))
    with context.output(f"rank{options.rank}.engine", chunked=True) as writer:
        record = compile_rank(
            options, weights, writer.write, lambda phase, done, total: context.report(phase, done, total, "steps"), context.log
        )
    return BuildFacts(engine=record, options=options, network=options.network.digest(options.tp_rank))


def compile_rank(
    options: BuildOptions,
    weights: Mapping[str, Weight],
    write: Callable[[memoryview], object],
    progress: Callable[[str, int, int], None],
    log: Callable[[str], None],
) -> EngineRecord:
    """Compile a rank from its converted weights, streaming the engine to `write`."""
    require_collectives(options.engine.backend, installed_version(options.engine.backend), options.stage.tp)
    for gpu in visible_gpus()[:1]:
        require_expert_layer(options.network.experts, gpu.compute_capability)
    network = decoder_network(options.network, options.tp_rank, Rendering.compiled(options.network, not options.engine.for_triton))
    request = EngineRequest(
        model=network.model.SerializeToString(),
        weights=bind(network, weights, options.stage.config.dtype),
        profiles=rank_profiles(options.network, options.engine),
        config=options.engine,
        release=lambda: release(weights),
    )
    return backend(options.engine.backend).build_engine(request, write, progress, log)
