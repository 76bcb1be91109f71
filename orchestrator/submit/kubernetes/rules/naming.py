"""Names and labels: what the operator derives other names from must be short and plain."""

from __future__ import annotations

import re

from orchestrator.submit.kubernetes.manifests import Group, Object
from orchestrator.submit.kubernetes.rules.rule import AnyRule, Found, rule

_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_LABEL_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_DNS_1123_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
MAX_NAME_LENGTH = {"RayCluster": 53, "RayJob": 47, "RayService": 47}
"""The operator appends a suffix to a job's or service's name for its cluster, and another for that one's Service."""


@rule("RN01", Object, "Use lower-case letters, digits and '-', beginning with a letter; at most 47 characters, a RayCluster 53.")
def names_are_short_labels(obj: Object) -> Found:
    """The name of a Ray resource is a DNS-1035 label, short enough for the names that the operator makes of it."""
    limit = MAX_NAME_LENGTH.get(obj.kind)
    name = str(obj.get("metadata.name", ""))
    if limit is None or not str(obj.get("apiVersion", "")).startswith("ray.io/"):
        return
    if len(name) > limit:
        yield "metadata.name", f"{name!r} has {len(name)} characters, more than {limit}"
    if not _DNS_1035.fullmatch(name):
        yield "metadata.name", f"{name!r} is no DNS-1035 label"


@rule("RN02", Group, "Write them under the group's `labels`: the operator hands them to Ray and to the pods.")
def labels_are_fields(group: Group) -> Found:
    """Ray labels stand in a group's labels, not in rayStartParams."""
    if "labels" in (group.get("rayStartParams") or {}):
        yield "rayStartParams.labels", "given"


@rule("RN03", Group, "Use at most 63 letters, digits, '-', '_' and '.'; a key may have a domain and '/' before it.")
def labels_are_kubernetes_labels(group: Group) -> Found:
    """A group's labels are also labels of its pods, so they have Kubernetes' syntax."""
    for key, value in (group.get("labels") or {}).items():
        domain, slash, name = str(key).rpartition("/")
        if not _LABEL_NAME.fullmatch(name) or (slash and (len(domain) > 253 or not _DNS_1123_SUBDOMAIN.fullmatch(domain))):
            yield "labels", f"{key!r} is no key of a label"
        if value and not _LABEL_NAME.fullmatch(str(value)):
            yield f"labels.{key}", f"{value!r} is no value of a label"


RULES: tuple[AnyRule, ...] = (names_are_short_labels, labels_are_fields, labels_are_kubernetes_labels)
