"""An API server in memory: objects, versions, watches, finalizers. Its clock jumps, and an operator acts while somebody watches."""

from __future__ import annotations

import copy
import datetime
from collections.abc import Callable, Iterator

from orchestrator.submit.kubernetes.api import ConflictError, ExpiredError, Kind
from orchestrator.submit.kubernetes.manifests import Fields, at

Key = tuple[str, str, str]


class FakeKubernetes:
    """See orchestrator.submit.kubernetes.api.Api; also the Admin of an operator."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.idle: Callable[[], None] = lambda: None
        """Called while a watch waits: what others do meanwhile."""
        self.refuse: dict[tuple[str, str], Exception] = {}
        """Error of (method, kind); of a watch when it is begun."""
        self.objects: dict[Key, Fields] = {}
        self._version = 0
        self._history: list[tuple[int, Key, Fields | None]] = []
        self._forgotten = 0

    def now(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds
        self.idle()

    def forget(self) -> None:
        """As etcd's compaction: watches cannot go on from versions before this moment."""
        self._version += 1
        self._forgotten = self._version

    def get(self, kind: Kind, namespace: str, name: str) -> Fields | None:
        self._check("get", kind.kind)
        found = self.objects.get((kind.kind, namespace, name))
        return copy.deepcopy(found)

    def list(self, kind: Kind, namespace: str, selector: str) -> list[Fields]:
        self._check("list", kind.kind)
        label, _, value = selector.partition("=")
        return [
            copy.deepcopy(obj)
            for (found, where, _), obj in self.objects.items()
            if (found, where) == (kind.kind, namespace) and (at(obj, "metadata.labels", {}) or {}).get(label) == value
        ]

    def create(self, obj: Fields) -> Fields:
        self._check("create", obj["kind"])
        key = self._key(obj)
        if key in self.objects:
            raise ConflictError
        made = copy.deepcopy(obj)
        made["metadata"] |= {"uid": f"uid-{self._version}", "creationTimestamp": self._stamp()}
        return copy.deepcopy(self._put(key, made))

    def apply(self, obj: Fields) -> None:
        self._check("patch", obj["kind"])
        there = self.objects.get(self._key(obj), {"metadata": {"uid": f"uid-{self._version}"}})
        self._put(self._key(obj), {**there, **copy.deepcopy(obj), "metadata": {**there["metadata"], **obj["metadata"]}})

    def delete(self, kind: Kind, namespace: str, name: str) -> bool:
        self._check("delete", kind.kind)
        key = (kind.kind, namespace, name)
        if key not in self.objects:
            return False
        obj = self.objects[key]
        if at(obj, "metadata.finalizers"):
            self._put(key, {**obj, "metadata": {**obj["metadata"], "deletionTimestamp": "2026-01-01T00:00:00Z"}})
        else:
            self._drop(key)
        return True

    def watch(self, kind: Kind, namespace: str, name: str, version: str, seconds: float) -> Iterator[Fields | None]:
        self._check("watch", kind.kind)
        seen, deadline = int(version), self.seconds + seconds
        while True:
            if seen < self._forgotten:
                raise ExpiredError
            for number, key, obj in [event for event in self._history if event[0] > seen]:
                seen = number
                if key == (kind.kind, namespace, name):
                    yield copy.deepcopy(obj)
            if self.seconds >= deadline:
                return
            self.seconds += 0.25
            self.idle()

    def jobs(self) -> list[Fields]:
        return [copy.deepcopy(obj) for (kind, _, _), obj in self.objects.items() if kind == "RayJob"]

    def owned(self) -> list[Fields]:
        return [copy.deepcopy(obj) for obj in self.objects.values() if at(obj, "metadata.ownerReferences")]

    def set_status(self, job: Fields, status: Fields) -> None:
        key = self._key(job)
        if key in self.objects:
            self._put(key, {**self.objects[key], "status": status})

    def set_finalizers(self, job: Fields, finalizers: list[str]) -> None:
        key = self._key(job)
        if key in self.objects:
            obj = self.objects[key]
            self._put(key, {**obj, "metadata": {**obj["metadata"], "finalizers": finalizers}})
            if not finalizers and at(obj, "metadata.deletionTimestamp"):
                self._drop(key)

    def remove(self, obj: Fields) -> None:
        self.objects.pop(self._key(obj), None)

    def _check(self, verb: str, kind: str) -> None:
        if (verb, kind) in self.refuse:
            raise self.refuse[verb, kind]

    @staticmethod
    def _key(obj: Fields) -> Key:
        return str(obj["kind"]), str(at(obj, "metadata.namespace", "")), str(obj["metadata"]["name"])

    def _stamp(self) -> str:
        """The moment of its clock, in whole seconds as Kubernetes has them."""
        moment = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC) + datetime.timedelta(seconds=self.seconds)
        return f"{moment:%Y-%m-%dT%H:%M:%SZ}"

    def _put(self, key: Key, obj: Fields) -> Fields:
        self._version += 1
        obj = {**obj, "metadata": {**obj["metadata"], "resourceVersion": str(self._version)}}
        self.objects[key] = obj
        self._history.append((self._version, key, obj))
        return obj

    def _drop(self, key: Key) -> None:
        self._version += 1
        del self.objects[key]
        self._history.append((self._version, key, None))
