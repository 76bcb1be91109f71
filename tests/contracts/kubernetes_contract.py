"""What builds on a Kubernetes cluster with a KubeRay operator come to, whatever answers for the API.

A subclass gives the fixture `bed`. Its operator plays the transitions of RayJobs, at work whenever somebody waits.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from orchestrator.base.errors import (
    CancelledError,
    ClusterError,
    DeadlineError,
    DriverLostError,
    NotStartedError,
    SourceCorruptError,
    UnknownSubmissionError,
    VerificationError,
)
from orchestrator.events import Errored, Event, Published
from orchestrator.spec.build import BuildSpec
from orchestrator.submit.kubernetes.api import RAY_JOB, Kind, KubernetesApi
from orchestrator.submit.kubernetes.builds import KubernetesSubmission, Timing, list_builds, submit
from orchestrator.submit.kubernetes.manifests import Fields
from orchestrator.submit.kubernetes.render import Rendered, overlay_cluster, render
from orchestrator.submit.kubernetes.states import Phase, State
from orchestrator.submit.protocol import Notice
from tests.submit.kubernetes.overlays import overlay
from tests.support.kuberay_operator import Driver, Operator, error_line, ray_failure

CONFIG_MAP = Kind("v1", "ConfigMap")
SPEC = {"source": {"path": "s3://mine/llama"}, "topology": {"tp": 2}, "release": {"name": "llama", "version": "1"}}


@dataclass
class Bed:
    """A cluster with an operator."""

    api: KubernetesApi
    operator: Operator
    timing: Timing
    namespace: str
    fit: Callable[[list[Fields]], list[Fields]] = copy.deepcopy
    """Objects as this cluster takes them."""

    def render(self, sections: Fields | None = None, *, name: str | None = None, **job: Any) -> Rendered:
        """A build of the CPU overlay; `job` replaces fields of the RayJob's spec."""
        objects = overlay("cpu-aot")
        place = overlay_cluster(objects).model_copy(update={"store": "s3://mine/builds"})
        made = render(BuildSpec.model_validate({**SPEC, **(sections or {})}), place, objects, name=name, namespace=self.namespace)
        made.job["spec"].update(job)
        return dataclasses.replace(made, owned=tuple(self.fit([*made.owned])), shared=tuple(self.fit([*made.shared])))

    def submit(self, made: Rendered, driver: Driver | None = None) -> bool:
        """Whether it was there already."""
        self.operator.drivers[made.name] = driver or Driver()
        return submit(self.api, made, self.timing).attached

    def submission(self, made: Rendered, progress: Any = None) -> KubernetesSubmission:
        """The build, found by its name."""
        return KubernetesSubmission(self.api, self.namespace, made.name, timing=self.timing, progress=progress or Script([]))

    def follow(self, made: Rendered, recorder: Recorder | None = None, progress: Any = None) -> State:
        """To its end; returns its last state, or raises its error."""
        found = self.submission(made, progress)
        for item in found.events():
            (recorder or Recorder()).take(item)
        assert found.result().manifest == "s3://mine/builds/releases/llama/1/manifest.json"
        return found.status()

    def stop(self, made: Rendered) -> State:
        return self.submission(made).cancel()

    def job(self, made: Rendered) -> Fields:
        found = self.api.get(RAY_JOB, self.namespace, made.name)
        assert found is not None
        return found

    def owners(self, made: Rendered) -> set[str]:
        """Uids that own the objects of a build."""
        there = [self.api.get(Kind.of(obj), self.namespace, obj["metadata"]["name"]) for obj in made.owned]
        return {owner["uid"] for obj in there if obj is not None for owner in obj["metadata"]["ownerReferences"]}


@dataclass
class Recorder:
    """Keeps what it is given, and may act at a phase."""

    at_phase: dict[Phase, Callable[[], object]] = field(default_factory=dict)
    states: list[Fields] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)

    def take(self, item: Event | Notice) -> None:
        if not isinstance(item, Notice):
            self.events.append(item)
        elif item.kind == "trouble":
            self.troubles.append(item.text)
        else:
            self.states.append(item.fields)
            self.at_phase.pop(Phase(item.fields["state"]), lambda: None)()

    @property
    def phases(self) -> list[Phase]:
        """Each once in a row; those that passed between two looks are missing."""
        found = [Phase(state["state"]) for state in self.states]
        return [phase for number, phase in enumerate(found) if number == 0 or found[number - 1] is not phase]


@dataclass
class Script:
    """A driver's events, all at the first look."""

    events: list[Event]

    def poll(self, attempt: int) -> list[Event]:
        found, self.events = self.events, []
        return found


class KubernetesContract:
    """Run against a fake and against a real API server."""

    def test_follow_build_that_succeeds_returns_its_state(self, bed: Bed) -> None:
        made, seen = bed.render(), Recorder()
        assert not bed.submit(made)
        last = bed.follow(made, seen)
        assert (last.phase, last.attempt) == (Phase.SUCCEEDED, 1)
        assert seen.phases[-1] is Phase.SUCCEEDED
        assert seen.phases == sorted(set(seen.phases), key=list(Phase).index)
        assert len(seen.phases) > 1

    def test_submit_objects_of_the_build_belong_to_its_job(self, bed: Bed) -> None:
        made = bed.render()
        bed.submit(made)
        config = bed.api.get(CONFIG_MAP, bed.namespace, made.name)
        assert config is not None
        assert set(config["data"]) == {"spec.yaml", "cluster.yaml", "build.sh"}
        assert bed.owners(made) == {bed.job(made)["metadata"]["uid"]}
        account = bed.api.get(Kind("v1", "ServiceAccount"), bed.namespace, "trt-orchestrator")
        assert account is not None
        assert "ownerReferences" not in account["metadata"]

    def test_follow_build_that_fails_raises_its_own_error(self, bed: Bed) -> None:
        made = bed.render(backoffLimit=0)
        last_word = error_line("VerificationError", 24, "rank 1 is wrong")
        bed.submit(made, Driver("fails", ray_failure(24, "INFO a library speaks", last_word)))
        with pytest.raises(VerificationError, match=r"^rank 1 is wrong") as error:
            bed.follow(made)
        assert error.value.advice == "what to do"

    def test_follow_driver_without_a_last_word_is_told_by_its_exit_code(self, bed: Bed) -> None:
        made = bed.render(backoffLimit=0)
        bed.submit(made, Driver("fails", ray_failure(14, "the end of a log")))
        with pytest.raises(SourceCorruptError, match="exit code 14\nthe end of a log"):
            bed.follow(made)

    def test_follow_driver_that_was_killed_is_lost(self, bed: Bed) -> None:
        made = bed.render(backoffLimit=0)
        bed.submit(made, Driver("fails", ray_failure(-9)))
        with pytest.raises(DriverLostError, match="exit code -9"):
            bed.follow(made)

    def test_follow_events_of_the_driver_are_passed_on_and_its_last_word_counts(self, bed: Bed) -> None:
        made, seen = bed.render(backoffLimit=0), Recorder()
        bed.submit(made, Driver("fails", "nothing of use"))
        events: list[Event] = [Errored(error="SourceCorruptError", message="model.safetensors", exit_code=14)]
        with pytest.raises(SourceCorruptError, match=r"model\.safetensors"):
            bed.follow(made, seen, Script([*events]))
        assert seen.events == events

    def test_follow_driver_that_published_but_failed_in_an_attempt_before_succeeds(self, bed: Bed) -> None:
        made, seen = bed.render(backoffLimit=2), Recorder()
        bed.submit(made, Driver("succeeds", ray_failure(22), fails_first=2))
        last = bed.follow(made, seen, Script([Published(manifest="s3://mine/manifest.json")]))
        assert (last.phase, last.attempt) == (Phase.SUCCEEDED, 3)
        assert {state["attempt"] for state in seen.states} == {1, 2, 3}

    def test_follow_retries_that_are_used_up_raise_the_last_error(self, bed: Bed) -> None:
        made = bed.render(backoffLimit=1)
        bed.submit(made, Driver("fails", ray_failure(22, error_line("ClusterError", 22))))
        with pytest.raises(ClusterError, match="what is wrong"):
            bed.follow(made)
        assert bed.job(made)["status"]["failed"] == 2

    def test_follow_build_past_its_deadline_says_so(self, bed: Bed) -> None:
        made = bed.render(activeDeadlineSeconds=1)
        bed.submit(made, Driver("runs"))
        with pytest.raises(DeadlineError, match="activeDeadlineSeconds"):
            bed.follow(made)

    def test_follow_build_that_never_starts_ends_with_its_deadline(self, bed: Bed) -> None:
        made = bed.render(preRunningDeadlineSeconds=1)
        bed.submit(made, Driver("never starts"))
        with pytest.raises(NotStartedError, match="preRunningDeadlineSeconds"):
            bed.follow(made)

    def test_follow_without_an_operator_ends_with_the_patience(self, bed: Bed) -> None:
        bed.operator.asleep = True
        made = bed.render()
        bed.submit(made)
        bed.timing = dataclasses.replace(bed.timing, patience=1.0)
        with pytest.raises(NotStartedError, match="no operator has touched it"):
            bed.follow(made)

    def test_stop_build_that_runs_is_gone_with_all_that_it_owns(self, bed: Bed) -> None:
        made = bed.render()
        bed.submit(made, Driver("runs"))
        seen = Recorder({Phase.RUNNING: lambda: bed.stop(made)})
        with pytest.raises(CancelledError, match="deleted while it ran"):
            bed.follow(made, seen)
        assert bed.api.get(RAY_JOB, bed.namespace, made.name) is None
        bed.operator.step()
        assert bed.owners(made) == set()

    def test_stop_without_an_operator_says_that_nobody_takes_it_away(self, bed: Bed) -> None:
        made = bed.render()
        bed.submit(made, Driver("runs"))

        def fall_asleep() -> None:
            bed.operator.asleep = True
            raise InterruptedError

        with pytest.raises(InterruptedError):
            bed.follow(made, Recorder({Phase.RUNNING: fall_asleep}))
        bed.timing = dataclasses.replace(bed.timing, patience=1.0)
        with pytest.raises(ClusterError, match="still being deleted"):
            bed.stop(made)
        bed.operator.asleep = False

    def test_submit_of_the_same_build_attaches_while_it_runs(self, bed: Bed) -> None:
        made, attached = bed.render(), []
        bed.submit(made, Driver("runs"))
        uid = bed.job(made)["metadata"]["uid"]
        seen = Recorder({Phase.RUNNING: lambda: attached.append(bed.submit(made))})  # now its driver succeeds
        assert bed.follow(made, seen).phase is Phase.SUCCEEDED
        assert attached == [True]
        assert bed.job(made)["metadata"]["uid"] == uid

    def test_submit_of_a_build_that_succeeded_attaches_to_its_end(self, bed: Bed) -> None:
        made = bed.render()
        bed.submit(made)
        bed.follow(made)
        assert bed.submit(made)
        assert bed.follow(made).phase is Phase.SUCCEEDED

    def test_submit_of_a_build_that_failed_makes_it_anew(self, bed: Bed) -> None:
        made = bed.render(backoffLimit=0)
        bed.submit(made, Driver("fails", ray_failure(22)))
        with pytest.raises(ClusterError):
            bed.follow(made)
        first = bed.job(made)["metadata"]["uid"]
        assert not bed.submit(made)
        assert bed.follow(made).phase is Phase.SUCCEEDED
        second = bed.job(made)["metadata"]["uid"]
        assert second != first
        bed.operator.step()
        assert bed.owners(made) == {second}

    def test_submit_that_was_cut_off_is_completed_by_the_next(self, bed: Bed) -> None:
        made = bed.render()
        bed.operator.drivers[made.name] = Driver("runs")
        bed.api.create(made.job)  # and the submitter vanished
        assert bed.submit(made)
        assert bed.owners(made) == {bed.job(made)["metadata"]["uid"]}

    def test_submit_name_of_another_build_is_refused(self, bed: Bed) -> None:
        bed.submit(bed.render(name="mine"), Driver("runs"))
        with pytest.raises(ClusterError, match=r"RayJob mine in .* is another build"):
            bed.submit(bed.render({"dtype": "float16"}, name="mine"))

    def test_follow_build_that_nobody_submitted_is_unknown(self, bed: Bed) -> None:
        made = bed.render()
        with pytest.raises(UnknownSubmissionError):
            bed.follow(made)
        with pytest.raises(UnknownSubmissionError):
            bed.submission(made).status()
        with pytest.raises(UnknownSubmissionError):
            bed.stop(made)

    def test_list_builds_names_those_of_the_namespace_and_their_releases(self, bed: Bed) -> None:
        first, second = bed.render(), bed.render({"dtype": "float16"})
        for made in (first, second):
            bed.submit(made)
        bed.follow(first)
        found = list_builds(bed.api, bed.namespace)
        assert {state.name for state in found} == {first.name, second.name}
        assert {state.release for state in found} == {"s3://mine/builds/releases/llama/1"}
        assert bed.submission(first).status().phase is Phase.SUCCEEDED

    def test_follow_pods_that_cannot_run_are_told_once(self, bed: Bed) -> None:
        made, seen = bed.render(preRunningDeadlineSeconds=2), Recorder()
        bed.submit(made, Driver("never starts"))
        self.add_pod(bed, f"{made.name}-0", "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.")
        with pytest.raises(NotStartedError):
            bed.follow(made, seen)
        assert seen.troubles == [f"{made.name}-0-head: Unschedulable: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu."]

    @staticmethod
    def add_pod(bed: Bed, cluster: str, message: str) -> None:
        """A head pod of a Ray cluster that no node takes."""
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": f"{cluster}-head", "namespace": bed.namespace, "labels": {"ray.io/cluster": cluster}},
            "spec": {"containers": [{"name": "ray", "image": "image"}]},
        }
        made = bed.api.create(pod)
        condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
        bed.operator.admin.set_status(made, {"phase": "Pending", "conditions": [condition]})
