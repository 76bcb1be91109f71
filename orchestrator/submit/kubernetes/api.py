"""The calls to a Kubernetes API server that a build needs, by the official client. Its errors become ours, with advice."""

from __future__ import annotations

import json
import os
import re
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from orchestrator.base.errors import (
    AuthenticationError,
    ClusterError,
    ManifestError,
    OrchestratorError,
    UnreachableError,
)
from orchestrator.base.extras import require
from orchestrator.submit.kubernetes.manifests import Fields, at

_TIMEOUT_SECONDS = (5.0, 30.0)
"""Timeouts in seconds: to connect, and between two bytes of an answer."""
_NO_CACHE = "/dev/null/none"
"""Unwritable path of the library's cache of a cluster's resources, which would outlive the cluster's changes."""
FIELD_MANAGER = "trt-orchestrator"


class ConflictError(Exception):
    """An object of this name already exists, or was changed meanwhile."""


class ExpiredError(Exception):
    """The server has dropped the version that a watch should continue from: read again, then watch from there."""


@dataclass(frozen=True)
class Kind:
    """Names of a kind in manifests."""

    api_version: str
    kind: str

    @classmethod
    def of(cls, obj: Fields) -> Kind:
        return cls(str(obj.get("apiVersion", "")), str(obj.get("kind", "")))


RAY_JOB, POD = Kind("ray.io/v1", "RayJob"), Kind("v1", "Pod")


class KubernetesApi:
    """Objects of a cluster. `namespace` is ignored for kinds that have none. Every method raises the errors of `explain`."""

    def __init__(self, context: str | None = None) -> None:
        """Connect as kubectl does (KUBECONFIG, its context), or as a pod inside a cluster.

        Raises ToolError without the `kubernetes` extra, UnreachableError, AuthenticationError.
        """
        require("kubernetes")
        from kubernetes.dynamic import DynamicClient

        client = _client(context)
        self.host = str(client.configuration.host)
        weakref.finalize(self, client.rest_client.pool_manager.clear)  # else its connections would wait for the garbage collector
        with self._explained("reach", "the API server"):
            self._client = DynamicClient(client, cache_file=_NO_CACHE)

    def get(self, kind: Kind, namespace: str, name: str) -> Fields | None:
        from kubernetes.dynamic.exceptions import NotFoundError

        with self._explained("get", f"{kind.kind}/{name}"), suppress(NotFoundError):
            return self._plain(self._resource(kind).get(name=name, **self._in(kind, namespace)))
        return None

    def list(self, kind: Kind, namespace: str, selector: str) -> list[Fields]:
        with self._explained("list", kind.kind):
            found = self._resource(kind).get(label_selector=selector, **self._in(kind, namespace))
            return [*self._plain(found).get("items", [])]

    def create(self, obj: Fields) -> Fields:
        """Create an object and return it. Raises ConflictError when its name is taken."""
        with self._explained("create", f"{obj.get('kind')}/{at(obj, 'metadata.name')}"):
            return self._plain(self._resource(Kind.of(obj)).create(**self._body(obj)))

    def apply(self, obj: Fields) -> None:
        """Create the object, or change the fields in `obj` (server-side apply). Raises ConflictError when others own a field."""
        with self._explained("patch", f"{obj.get('kind')}/{at(obj, 'metadata.name')}"):
            self._resource(Kind.of(obj)).server_side_apply(**self._body(obj))

    def delete(self, kind: Kind, namespace: str, name: str) -> bool:
        """Delete the object with its dependents, in the background. False when it is missing."""
        from kubernetes.dynamic.exceptions import NotFoundError

        with self._explained("delete", f"{kind.kind}/{name}"), suppress(NotFoundError):
            self._resource(kind).delete(name=name, propagation_policy="Background", **self._in(kind, namespace))
            return True
        return False

    def watch(self, kind: Kind, namespace: str, name: str, version: str, seconds: float) -> Iterator[Fields | None]:
        """Yield changes of one object after a resourceVersion until the timeout; None: deleted. Raises ExpiredError."""
        from kubernetes.watch import Watch

        with self._explained("watch", f"{kind.kind}/{name}"):
            fields = self._in(kind, namespace) | {"_request_timeout": (_TIMEOUT_SECONDS[0], seconds + _TIMEOUT_SECONDS[1])}
            stream = Watch().stream(
                self._resource(kind).get, field_selector=f"metadata.name={name}", resource_version=version,
                timeout_seconds=max(round(seconds), 1), serialize=False, **fields,
            )  # fmt: skip
            for event in stream:
                if event["type"] in ("ADDED", "MODIFIED"):
                    yield event["raw_object"]
                elif event["type"] == "DELETED":
                    yield None

    def _resource(self, kind: Kind) -> Any:
        from kubernetes.dynamic.exceptions import ResourceNotFoundError

        try:
            return self._client.resources.get(api_version=kind.api_version, kind=kind.kind)
        except ResourceNotFoundError:
            raise ClusterError(
                f"the cluster at {self.host} knows no {kind.kind} of {kind.api_version}", _missing_advice(kind.api_version)
            ) from None

    def _in(self, kind: Kind, namespace: str) -> dict[str, Any]:
        where: dict[str, Any] = {"_request_timeout": _TIMEOUT_SECONDS}
        return where | {"namespace": namespace} if self._resource(kind).namespaced else where

    def _body(self, obj: Fields) -> dict[str, Any]:
        where = self._in(Kind.of(obj), str(at(obj, "metadata.namespace", "")))
        return {"body": obj, "field_manager": FIELD_MANAGER, **where}

    @staticmethod
    def _plain(answer: Any) -> Fields:
        found: Fields = answer.to_dict()
        return found

    @contextmanager
    def _explained(self, verb: str, what: str) -> Iterator[None]:
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        try:
            yield
        except ApiException as error:
            if error.status == 409 and verb in ("create", "patch"):
                raise ConflictError from None
            if error.status == 410:
                raise ExpiredError from None
            raise explain(error.status, _message(error), verb, what) from None
        except (HTTPError, OSError) as error:
            raise UnreachableError(f"the Kubernetes API at {self.host} does not answer: {_short(error)}") from None


def explain(status: int, message: str, verb: str, what: str) -> OrchestratorError:
    """Return the error for a refused request. `message` is the server's own."""
    if status == 401:
        return AuthenticationError(
            f"the Kubernetes API does not accept the credentials to {verb} {what}",
            "Log in again, or choose another --context of your kubeconfig.",
        )
    if status == 403:
        return AuthenticationError(f"may not {verb} {what}: {message}", _role_advice(message))
    missing = re.search(r'namespaces "([^"]+)" not found', message)
    if status == 404 and missing:
        return ClusterError(
            f"there is no namespace {missing.group(1)}",
            "Have an administrator make it: `kubectl apply -k deploy/kuberay/namespace`. Or name another with --namespace.",
        )
    if status in (400, 422):
        return ManifestError(
            f"the API server refuses to {verb} {what}: {message}", "Correct the overlay, or the operator's version."
        )
    return UnreachableError(
        f"the Kubernetes API failed to {verb} {what}: {status} {message}", "Try again; ask who runs the cluster."
    )


def _role_advice(message: str) -> str:
    """Return advice naming the missing rule and role, from RBAC's message."""
    found = re.search(r'cannot (\S+) resource "([^"]+)" in API group "([^"]*)"(?: in the namespace "([^"]+)")?', message)
    if found is None:
        return "Ask an administrator of the cluster for the right to do this."
    verb, resource, group, namespace = found.groups()
    kind = f"Role in {namespace}" if namespace else "ClusterRole"
    return f'Ask an administrator for a {kind} with apiGroups: ["{group}"], resources: ["{resource}"], verbs: ["{verb}"].'


_OPERATORS = {
    "ray.io": "Have an administrator install the KubeRay operator with its CRDs (deploy/README.md).",
    "kueue.x-k8s.io": "Have an administrator install Kueue, or take an overlay without it.",
    "scheduling.volcano.sh": "Have an administrator install Volcano, or take an overlay without it.",
    "monitoring.coreos.com": "Have an administrator install the Prometheus operator, or take an overlay without monitoring.",
}


def _missing_advice(api_version: str) -> str:
    return _OPERATORS.get(api_version.partition("/")[0], "Install what defines it, or take an overlay without it.")


def _message(error: Any) -> str:
    try:
        return str(json.loads(error.body)["message"])
    except (ValueError, KeyError, TypeError):
        return str(error.reason or "").strip()


def _short(error: BaseException) -> str:
    reason = getattr(error, "reason", None) or error
    return re.sub(r"<[^>]*>[:,]? ?", "", str(reason)).strip() or type(error).__name__


def _client(context: str | None) -> Any:
    from kubernetes import config
    from kubernetes.client import ApiClient, Configuration

    settings = Configuration()
    try:
        config.load_kube_config(os.environ.get("KUBECONFIG") or None, context, settings)
    except (config.ConfigException, OSError) as error:
        if context is not None:
            raise UnreachableError(
                f"no way to a cluster: {error}", "`kubectl config get-contexts` lists those of your kubeconfig."
            ) from None
        try:
            config.load_incluster_config(client_configuration=settings)
        except config.ConfigException:
            raise UnreachableError(
                f"no way to a cluster: {error}", "Set KUBECONFIG, or make ~/.kube/config as your cluster's provider says."
            ) from None
    settings.retries = False  # `follow` retries, and reports it
    return ApiClient(configuration=settings)
