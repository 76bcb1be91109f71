"""Kubernetes' pod security standard, profile `restricted` (which includes `baseline`): what a namespace that enforces it admits.

The operator only makes the pods: in such a namespace a RayJob is taken, and then waits for pods that are never made.
"""

from __future__ import annotations

from typing import Any

from orchestrator.submit.kubernetes.manifests import Fields, Pod, at
from orchestrator.submit.kubernetes.rules.rule import AnyRule, Found, rule

_VOLUMES = frozenset({"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"})
_SYSCTLS = frozenset(
    {
        "kernel.shm_rmid_forced", "net.ipv4.ip_local_port_range", "net.ipv4.ip_unprivileged_port_start", "net.ipv4.tcp_syncookies",
        "net.ipv4.ping_group_range", "net.ipv4.ip_local_reserved_ports", "net.ipv4.tcp_keepalive_time", "net.ipv4.tcp_fin_timeout",
        "net.ipv4.tcp_keepalive_intvl", "net.ipv4.tcp_keepalive_probes", "net.ipv4.tcp_rmem", "net.ipv4.tcp_wmem",
    }
)  # fmt: skip
_SELINUX_TYPES = frozenset({None, "", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"})
_PROFILES = frozenset({"RuntimeDefault", "Localhost"})
_CONTEXT = "securityContext"


@rule("PS01", Pod, "Set securityContext.runAsNonRoot: true for the pod or for each container; no container may say false.")
def pods_run_as_non_root(pod: Pod) -> Found:
    """Every container runs as a user other than root, and says so."""
    default = pod.get(f"{_CONTEXT}.runAsNonRoot")
    if default is False:
        yield f"{_CONTEXT}.runAsNonRoot", "is false"
    for path, container in pod.containers:
        if at(container, f"{_CONTEXT}.runAsNonRoot", default) is not True:
            yield f"{path}.{_CONTEXT}.runAsNonRoot", "is not true"


@rule("PS02", Pod, "Set a number other than 0, such as 10001, or leave it to the image.")
def pods_have_no_user_zero(pod: Pod) -> Found:
    """runAsUser is not 0."""
    for path, value in _everywhere(pod, "runAsUser"):
        if value == 0:
            yield path, "is 0"


@rule("PS03", Pod, "Set securityContext.allowPrivilegeEscalation: false in each container.")
def containers_do_not_escalate(pod: Pod) -> Found:
    """No container may gain more privileges than its parent process."""
    for path, container in pod.containers:
        if at(container, f"{_CONTEXT}.allowPrivilegeEscalation") is not False:
            yield f"{path}.{_CONTEXT}.allowPrivilegeEscalation", "is not false"


@rule("PS04", Pod, "Set securityContext.capabilities: {drop: [ALL]} in each container, and add NET_BIND_SERVICE at most.")
def containers_drop_capabilities(pod: Pod) -> Found:
    """Every container drops all capabilities and adds none but NET_BIND_SERVICE."""
    for path, container in pod.containers:
        if "ALL" not in (at(container, f"{_CONTEXT}.capabilities.drop") or []):
            yield f"{path}.{_CONTEXT}.capabilities.drop", "does not hold ALL"
        added = sorted(set(at(container, f"{_CONTEXT}.capabilities.add") or []) - {"NET_BIND_SERVICE"})
        if added:
            yield f"{path}.{_CONTEXT}.capabilities.add", f"holds {', '.join(added)}"


@rule("PS05", Pod, "Set securityContext.seccompProfile: {type: RuntimeDefault} for the pod.")
def system_calls_are_filtered(pod: Pod) -> Found:
    """Every container runs under a seccomp profile: the runtime's, or one of the host."""
    default = pod.get(f"{_CONTEXT}.seccompProfile.type")
    if default is not None and default not in _PROFILES:
        yield f"{_CONTEXT}.seccompProfile.type", f"is {default}"
    for path, container in pod.containers:
        kind = at(container, f"{_CONTEXT}.seccompProfile.type", default)
        if kind not in _PROFILES:
            yield f"{path}.{_CONTEXT}.seccompProfile.type", f"is {kind or 'not set'}"


@rule("PS06", Pod, "Leave privileged out.")
def containers_are_unprivileged(pod: Pod) -> Found:
    """No container is privileged, and none runs as a process of the host."""
    for path, value in _everywhere(pod, "privileged"):
        if value:
            yield path, "is true"
    for path, value in _everywhere(pod, "windowsOptions.hostProcess"):
        if value:
            yield path, "is true"


@rule("PS07", Pod, "Leave them out: pods reach each other over the cluster's network.")
def host_namespaces_are_not_shared(pod: Pod) -> Found:
    """No pod shares the host's network, processes or memory segments."""
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(key):
            yield key, "is true"


@rule("PS08", Pod, "Leave hostPort out; a Service or `kubectl port-forward` reaches the port.")
def host_ports_are_not_taken(pod: Pod) -> Found:
    """No container takes a port of the host, and no probe or hook is sent to another host."""
    for path, container in pod.containers:
        for number, port in enumerate(container.get("ports") or []):
            if port.get("hostPort"):
                yield f"{path}.ports[{number}].hostPort", f"is {port['hostPort']}"
        for hook in ("livenessProbe", "readinessProbe", "startupProbe", "lifecycle.postStart", "lifecycle.preStop"):
            for action in ("httpGet", "tcpSocket"):
                host = at(container, f"{hook}.{action}.host")
                if host:
                    yield f"{path}.{hook}.{action}.host", f"is {host}"


@rule("PS09", Pod, "Use emptyDir, ephemeral or persistentVolumeClaim instead.")
def volumes_are_of_the_cluster(pod: Pod) -> Found:
    """Volumes are of the kinds that do not reach into the host."""
    for number, volume in enumerate(pod.get("volumes", []) or []):
        for kind in sorted(volume.keys() - _VOLUMES - {"name"}):
            yield f"volumes[{number}]", f"{volume.get('name')} is of kind {kind}"


@rule("PS10", Pod, "Leave procMount and sysctls out, or use sysctls that Kubernetes calls safe.")
def kernel_settings_are_safe(pod: Pod) -> Found:
    """/proc is masked as usual, and only safe sysctls are set."""
    for path, value in _everywhere(pod, "procMount"):
        if value not in {None, "", "Default"}:
            yield path, f"is {value}"
    for number, setting in enumerate(pod.get(f"{_CONTEXT}.sysctls", []) or []):
        if setting.get("name") not in _SYSCTLS:
            yield f"{_CONTEXT}.sysctls[{number}]", f"sets {setting.get('name')}"


@rule("PS11", Pod, "Leave them out, or use RuntimeDefault for AppArmor and a type of containers for SELinux.")
def confinement_is_not_weakened(pod: Pod) -> Found:
    """AppArmor is not switched off, and SELinux' type is one of containers, without a user or role."""
    for path, value in _everywhere(pod, "appArmorProfile.type"):
        if value is not None and value not in _PROFILES:
            yield path, f"is {value}"
    for path, value in _everywhere(pod, "seLinuxOptions"):
        options: Fields = value or {}
        if options.get("type") not in _SELINUX_TYPES or options.get("user") or options.get("role"):
            yield path, f"is {options}"


def _everywhere(pod: Pod, key: str) -> list[tuple[str, Any]]:
    """Path and value of a field of the security contexts of the pod and of each container, where it is given."""
    places = [(f"{_CONTEXT}.{key}", pod.fields)] + [(f"{path}.{_CONTEXT}.{key}", container) for path, container in pod.containers]
    return [(path, value) for path, fields in places if (value := at(fields, f"{_CONTEXT}.{key}")) is not None]


RULES: tuple[AnyRule, ...] = (
    pods_run_as_non_root, pods_have_no_user_zero, containers_do_not_escalate, containers_drop_capabilities,
    system_calls_are_filtered, containers_are_unprivileged, host_namespaces_are_not_shared, host_ports_are_not_taken,
    volumes_are_of_the_cluster, kernel_settings_are_safe, confinement_is_not_weakened,
)  # fmt: skip
