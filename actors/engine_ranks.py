"""The ranks of a release's engines as Ray actors, one GPU each.

    with RayEngineRunner(Path("/models/llama"), url="s3://bucket/engines/releases/llama/1") as runner:
        for tokens in runner.generate([[1, 450, 7483]], max_new_tokens=32):
            ...

The ranks of a stage are placed on one node where it has enough GPUs, because they exchange in every layer; the rest as closely as
it fits. NCCL's ids go through the driver. A rank that fails ends them all: the others would wait for it in NCCL.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from orchestrator.base.errors import ClusterError, EngineRunError, OrchestratorError
from orchestrator.releases.manifest import Manifest
from orchestrator.releases.pulling import pull
from orchestrator.releases.reading import open_release
from orchestrator.runners.tensorrt import EngineRunner, KnownIds, Libraries, open_libraries
from orchestrator.runners.tensorrt.communicators import groups_of
from orchestrator.runners.tensorrt.runner import Floats, Limits, Step
from orchestrator.work.verify.inputs import Call

OpenRank = Callable[..., Libraries]


class RankActor:
    """One rank in a process of its own. Wrapped for Ray where it is created."""

    def __init__(self, folder: str, rank: int, manifest: Manifest, url: str | None, open_rank: OpenRank) -> None:
        self._folder, self._rank, self._manifest, self._url, self._open = Path(folder), rank, manifest, url, open_rank

    def prepare(self) -> None:
        """Fetch the rank's files, if there is a URL, and open its GPU and libraries."""
        if self._url is not None:
            pull(self._url, self._folder, ranks=[self._rank])
        self._libraries = self._open(self._manifest.rank(self._rank).engine, alone=len(self._manifest.ranks) == 1)

    def make_id(self) -> bytes:
        """Return a new id of a communicator, of which this rank must be the first."""
        return bytes(self._libraries.nccl.get_unique_id())

    def start(self, ids: Mapping[str, bytes]) -> None:
        """Join the others and load the engine."""
        self._runner = EngineRunner(self._folder, self._rank, self._libraries, KnownIds(ids))

    def generate(self, prompts: Sequence[Sequence[int]], arguments: Mapping[str, Any]) -> Iterator[Step]:
        """Yield every step's tokens, as EngineRunner does."""
        yield from self._runner.generate(prompts, **arguments)

    def logits(self, calls: Sequence[Call]) -> list[Floats]:
        """Return what EngineRunner does; nothing from ranks without logits."""
        found = self._runner.logits(calls)
        return found if self._runner.is_sampling else []


class RayEngineRunner:
    """All ranks of a release on a Ray cluster that this process is connected to (`ray.init`)."""

    def __init__(
        self,
        folder: Path,
        *,
        url: str | None = None,
        gpus_per_rank: float = 1,
        open_rank: OpenRank = open_libraries,
        seconds: float = 600.0,
    ) -> None:
        """Start all ranks and load their engines.

        `folder` on every node holds the pulled release; with `url` each rank first pulls its own files there. `seconds`: time limit
        of the start. Raises ClusterError when the cluster has no room, EngineRunError, and what EngineRunner and `pull` raise.
        """
        self._manifest = open_release(url if url is not None else folder.absolute().as_uri()).manifest
        self._groups: list[Any] = []
        self._actors: list[Any] = []
        try:
            for stage in range(self._manifest.pp):
                self._place(stage, gpus_per_rank, seconds, (str(folder), url, open_rank))
            self._all([actor.prepare.remote() for actor in self._actors], seconds)
            wanted = groups_of(self._manifest.tp, self._manifest.pp)
            ids = [self._actors[group.ranks[0]].make_id.remote() for group in wanted]
            made = dict(zip([group.name for group in wanted], self._all(ids, seconds), strict=True))
            self._all([actor.start.remote(made) for actor in self._actors], seconds)
        except BaseException:
            self.close()
            raise

    def _place(self, stage: int, gpus: float, seconds: float, given: tuple[str, str | None, OpenRank]) -> None:
        """Start the ranks of a stage, on one node if there is one with enough GPUs."""
        manifest, (folder, url, open_rank) = self._manifest, given
        most = max((node["Resources"].get("GPU", 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)
        strategy = "STRICT_PACK" if most >= gpus * manifest.tp else "PACK"
        group = placement_group([{"CPU": 1, "GPU": gpus} if gpus else {"CPU": 1}] * manifest.tp, strategy)
        self._groups.append(group)
        if not group.wait(seconds):
            raise ClusterError(
                f"the cluster has no room for the {manifest.tp} ranks of stage {stage} within {seconds:g} seconds",
                f"Each needs a GPU: {len(manifest.ranks)} in all. `ray status` shows what is free.",
            )
        for tp_rank in range(manifest.tp):
            place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=tp_rank)
            options = {"num_cpus": 1, "num_gpus": gpus, "scheduling_strategy": place, "max_restarts": 0}
            actor = ray.remote(RankActor).options(**options)
            self._actors.append(actor.remote(folder, stage * manifest.tp + tp_rank, manifest, url, open_rank))

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, **arguments: Any) -> Iterator[Step]:
        """Yield every step's tokens. `arguments` are EngineRunner.generate's.

        Raises SpecError for prompts that the engines cannot hold, and EngineRunError; then all ranks are ended.
        """
        Limits.of(self._manifest).check(prompts, max_new_tokens)
        given = {"max_new_tokens": max_new_tokens, **arguments}
        streams = [actor.generate.options(num_returns="streaming").remote(prompts, given) for actor in self._actors]
        waiting = list(streams)
        while waiting:
            (ready, *_), _ = ray.wait(waiting, num_returns=1)
            try:
                tokens = ray.get(next(ready))
            except StopIteration:
                waiting.remove(ready)
                continue
            except RayError as error:
                self._end(error, streams.index(ready))
            if ready is streams[0]:
                yield tokens

    def logits(self, calls: Sequence[Call]) -> list[Floats]:
        """Return the logits [B, S, vocabulary] of each call of a verification. Raises as `generate` does."""
        found = self._all([actor.logits.remote(calls) for actor in self._actors], None)
        return next(part for part in found if part)

    def _all(self, references: list[Any], seconds: float | None) -> list[Any]:
        """Return all results, or end all ranks when the first of them fails."""
        waiting = list(references)
        while waiting:
            ready, waiting = ray.wait(waiting, num_returns=1, timeout=seconds)
            if not ready:
                self._end(TimeoutError(f"nothing came within {seconds:g} seconds"), references.index(waiting[0]))
            try:
                ray.get(ready)
            except RayError as error:
                self._end(error, references.index(ready[0]))
        results: list[Any] = ray.get(references)
        return results

    def _end(self, error: Exception, number: int) -> None:
        """End all ranks and raise the error of rank `number`, ours if it is."""
        self.close()
        cause = error.cause if isinstance(error, RayTaskError) else None
        if isinstance(cause, OrchestratorError):
            raise cause from error
        raise EngineRunError(
            f"rank {number} was lost: {error}", "Its log is in Ray's dashboard, or /tmp/ray on its node."
        ) from error

    def close(self) -> None:
        """End all ranks and give back their GPUs."""
        for actor in self._actors:
            ray.kill(actor, no_restart=True)
        for group in self._groups:
            remove_placement_group(group)
        self._actors, self._groups = [], []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
