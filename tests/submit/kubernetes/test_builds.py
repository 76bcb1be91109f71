"""Builds on Kubernetes against an API server in memory, whose clock jumps; and what only a fake can be made to do."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from orchestrator.base.errors import AuthenticationError, UnreachableError
from orchestrator.submit.kubernetes.api import ConflictError
from orchestrator.submit.kubernetes.builds import Timing
from orchestrator.submit.kubernetes.manifests import Fields
from orchestrator.submit.kubernetes.states import Phase
from orchestrator.submit.protocol import Clock
from tests.contracts.kubernetes_contract import Bed, KubernetesContract, Recorder
from tests.support.fake_kubernetes import FakeKubernetes
from tests.support.kuberay_operator import Driver, Operator

AWAY, FORBIDDEN = UnreachableError("away"), AuthenticationError("forbidden")


@pytest.fixture
def fake() -> FakeKubernetes:
    return FakeKubernetes()


@pytest.fixture
def bed(fake: FakeKubernetes) -> Bed:
    operator = Operator(fake, fake.now)
    fake.idle = operator.step
    return Bed(fake, operator, Timing(clock=Clock(fake.now, fake.sleep)), "builds")


class TestFake(KubernetesContract):
    """The contract."""


def test_follow_watch_that_has_expired_is_begun_again(bed: Bed, fake: FakeKubernetes) -> None:
    made = bed.render()
    bed.submit(made)
    seen = Recorder({Phase.WAITING: fake.forget, Phase.RUNNING: fake.forget})
    assert bed.follow(made, seen).phase is Phase.SUCCEEDED


def test_follow_server_that_is_away_for_a_while_is_waited_for(bed: Bed, fake: FakeKubernetes) -> None:
    made = bed.render()
    bed.submit(made)
    seen = Recorder({Phase.RUNNING: lambda: fake.refuse.update({("watch", "RayJob"): AWAY, ("get", "RayJob"): AWAY})})
    step = fake.idle

    def come_back() -> None:
        step()
        if fake.now() > 100:
            fake.refuse.clear()

    fake.idle = come_back
    bed.timing = dataclasses.replace(bed.timing, window=0.5)
    assert bed.follow(made, seen).phase is Phase.SUCCEEDED
    assert set(seen.troubles) == {"away"}


def test_follow_server_that_stays_away_longer_than_the_patience_is_an_error(bed: Bed, fake: FakeKubernetes) -> None:
    made = bed.render()
    bed.submit(made)
    fake.refuse[("get", "RayJob")] = AWAY
    with pytest.raises(UnreachableError):
        bed.follow(made)
    assert bed.timing.patience <= fake.now() < bed.timing.patience + 10


def test_submit_beside_a_faster_one_attaches_to_it(bed: Bed, fake: FakeKubernetes, monkeypatch: pytest.MonkeyPatch) -> None:
    made, create = bed.render(), fake.create

    def late(obj: Fields) -> Any:
        if obj["kind"] == "RayJob":
            monkeypatch.setattr(fake, "create", create)
            create(obj)
            raise ConflictError
        return create(obj)

    monkeypatch.setattr(fake, "create", late)
    assert bed.submit(made)
    assert len(bed.owners(made)) == 1


def test_submit_whoever_may_not_make_shared_objects_needs_them_to_be_there(bed: Bed, fake: FakeKubernetes) -> None:
    fake.refuse[("patch", "NetworkPolicy")] = FORBIDDEN
    with pytest.raises(AuthenticationError):
        bed.submit(bed.render())
    del fake.refuse[("patch", "NetworkPolicy")]
    bed.submit(bed.render())
    fake.refuse[("patch", "NetworkPolicy")] = FORBIDDEN
    assert not bed.submit(bed.render({"dtype": "float16"}))


def test_submit_what_an_administrator_has_changed_stays(bed: Bed, fake: FakeKubernetes) -> None:
    fake.refuse[("patch", "NetworkPolicy")] = ConflictError()
    made = bed.render()
    assert not bed.submit(made)
    assert bed.follow(made).phase is Phase.SUCCEEDED


def test_follow_whoever_may_not_list_pods_hears_nothing_of_them(bed: Bed, fake: FakeKubernetes) -> None:
    fake.refuse[("list", "Pod")] = FORBIDDEN
    made, seen = bed.render(), Recorder()
    bed.submit(made, Driver())
    assert bed.follow(made, seen).phase is Phase.SUCCEEDED
    assert seen.troubles == []
