"""Check whether a machine can run the engines of a release. Asks packages and the driver; loads nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator.base.errors import MachineError
from orchestrator.engines import BACKENDS, LEAN, installed_version, version_numbers
from orchestrator.engines.device import Gpu, visible_gpus
from orchestrator.engines.record import EngineRecord
from orchestrator.releases.manifest import Manifest, RankRecord


@dataclass(frozen=True, slots=True)
class Machine:
    """Resources of a machine that engines need."""

    gpus: tuple[Gpu, ...]
    """GPUs, one for each rank, in the order of the ranks."""
    tensorrt: Mapping[str, str] = field(default_factory=dict)
    """Installed version of TensorRT's libraries: those of BACKENDS, and LEAN."""


def this_machine() -> Machine:
    """Return the machine of this process."""
    versions = {name: version for name in (*BACKENDS, LEAN) if (version := installed_version(name)) is not None}
    return Machine(visible_gpus(), versions)


def check_machine(manifest: Manifest, ranks: Sequence[int], machine: Machine) -> None:
    """Check that `machine` can run these ranks, one GPU each. Raises MachineError with every reason against it."""
    found = problems(manifest, ranks, machine)
    if found:
        raise MachineError(f"this machine cannot run {manifest.name} {manifest.version}: " + "; ".join(found))


def problems(manifest: Manifest, ranks: Sequence[int], machine: Machine) -> list[str]:
    """Return every reason why the machine cannot run the ranks; empty when it can."""
    records = [manifest.rank(rank) for rank in ranks]
    found = list(dict.fromkeys(_version_problems(records, machine)))
    if not machine.gpus:
        return [*found, "it has no NVIDIA GPU, or no driver for it"]
    if len(machine.gpus) < len(records):
        found.append(f"it has {len(machine.gpus)} GPUs, but {len(records)} ranks need one each")
    for record, gpu in zip(records, machine.gpus, strict=False):
        found.extend(_gpu_problems(record, gpu))
    return found


def _version_problems(records: Sequence[RankRecord], machine: Machine) -> Iterator[str]:
    for engine in (record.engine for record in records):
        names = (engine.backend, LEAN) if engine.version_compatible else (engine.backend,)
        installed = {name: machine.tensorrt[name] for name in names if name in machine.tensorrt}
        if any(loads(engine, version) for version in installed.values()):
            continue
        if not installed:
            yield f"{' or '.join(names)} {engine.tensorrt_version} is not installed"
        elif engine.version_compatible:
            has = " and ".join(f"{name} {version}" for name, version in installed.items())
            major = engine.tensorrt_version.partition(".")[0]
            yield f"it has {has}, the engines load from {engine.tensorrt_version} on, within version {major}"
        else:
            has = f"{engine.backend} {installed[engine.backend]}"
            yield f"it has {has}, the engines load only in {engine.tensorrt_version}, which built them"


def loads(engine: EngineRecord, version: str) -> bool:
    """Whether TensorRT of a version loads an engine."""
    if not engine.version_compatible:
        return version == engine.tensorrt_version
    built, found = version_numbers(engine.tensorrt_version), version_numbers(version)
    return built[:1] == found[:1] and found >= built


def _gpu_problems(record: RankRecord, gpu: Gpu) -> Iterator[str]:
    targets = record.engine.compute_capabilities
    if targets and gpu.compute_capability not in targets:
        built = f" ({record.engine.gpu_name})" if record.engine.gpu_name else ""
        yield (
            f"rank {record.rank} was built for compute capability {', '.join(targets)}{built}, "
            f"{gpu.name} has {gpu.compute_capability}"
        )
    if record.memory.total_bytes > gpu.memory_bytes:
        yield (
            f"rank {record.rank} needs {record.memory.total_bytes:,} bytes of GPU memory at its largest batch and sequence, "
            f"{gpu.name} has {gpu.memory_bytes:,}"
        )
