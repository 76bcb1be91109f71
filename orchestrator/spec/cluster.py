"""The cluster file: where to build and with what. Pools of machines, the store, scratch, retries."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from orchestrator.base.urls import PlaceText, holds_secret
from orchestrator.spec.decoding import Frozen
from orchestrator.spec.values import NumBytes

KindName = Literal["miniature", "reference", "calibrate", "convert", "build", "verify", "export"]


_STAND_INS: dict[str, tuple[str, ...]] = {
    "miniature": ("verify", "reference", "convert", "build"),
    "export": ("verify", "build", "convert"),
}
"""Kinds that pools may leave out, with the kinds whose pool they then share, in order."""


class PoolSpec(Frozen):
    """Machines of one kind."""

    nodes: int = Field(default=1, ge=1, le=100_000)
    """Number of nodes, for the simulation. A build uses the nodes that it finds."""
    cpus: int | None = Field(default=None, ge=1)
    """CPU slots per node for the pool's steps; a step takes one or more. Absent: the cores of the machine."""
    gpus: int = Field(default=0, ge=0)
    """GPUs per node."""
    memory: NumBytes | None = None
    """Memory per node that the pool's steps may reserve. Absent: that of the machine."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Ray labels that select the pool's nodes, e.g. ray.io/accelerator-type: H100."""
    fallback: tuple[dict[str, str], ...] = ()
    """Other labels to try, in order, when no node with `labels` has room."""
    scratch: NumBytes | None = None
    """Scratch space per node that steps may reserve. Absent: the free space of the scratch folder."""
    steps: tuple[KindName, ...] = ("miniature", "reference", "calibrate", "convert", "build", "verify", "export")
    """Kinds of step that run here. The first pool that lists a kind takes it. A miniature that no pool lists runs with verify,
    else reference, convert or build; an export with verify, else build or convert."""


class RetrySpec(Frozen):
    """Retries after a lost node, worker or store. A step's own error is never retried."""

    max_attempts: int = Field(default=4, ge=1)
    """Attempts per step."""
    backoff_seconds: float = Field(default=2.0, ge=0)
    """Delay before the second attempt; doubles each time."""
    max_backoff_seconds: float = Field(default=60.0, ge=0)
    """Longest delay."""


class StoreOptions(Frozen):
    """Connection to an S3 store; other stores ignore it. No part of the build's identity.

    Holds no credentials: each machine finds its own, as AWS clients do (environment, profile, web identity, instance role).
    """

    endpoint_url: str | None = None
    """URL of a server other than AWS. Absent: from the environment (AWS_ENDPOINT_URL) or the profile."""
    region: str | None = None
    """Region. Absent: from the environment or the profile."""
    profile: str | None = None
    """Profile in ~/.aws/config of every node. Only the name is sent to nodes."""
    addressing_style: Literal["auto", "path", "virtual"] = "auto"
    """auto: virtual on AWS, path elsewhere."""
    checksums: Literal["auto", "when_supported", "when_required"] = "auto"
    """Checksums that botocore adds to uploads. auto: when_supported on AWS, when_required elsewhere: older servers refuse its
    trailers, and get Content-MD5. obstore sends the CRC64NVME of each part, which servers that do not know it ignore or refuse;
    with when_required it signs the part's SHA-256 over http, and leaves it to TLS over https."""
    transfer: Literal["auto", "s3fs", "obstore"] = "auto"
    """Library that transfers large objects. auto: obstore where it is installed."""
    max_attempts: int = Field(default=10, ge=1)
    """Attempts per request, with doubling delays; the default lasts about two minutes."""
    read_timeout_seconds: float = Field(default=60.0, gt=0)
    """Longest wait for data of a response."""

    @field_validator("endpoint_url")
    @classmethod
    def _plain_endpoint(cls, value: str | None) -> str | None:
        if value is not None and (not value.startswith(("http://", "https://")) or holds_secret(value)):
            raise ValueError("expected http://host:port or https://host:port, without user, password or query")
        return value


class DriverSpec(Frozen):
    """Placement of the driver of a submitted build. All defaults: on the head node, with which it ends."""

    cpus: float = Field(default=0.0, ge=0)
    """CPU slots that the driver holds. A small number such as 0.1 lets it run on any node with CPU slots."""
    memory: NumBytes = 0
    """Memory that the driver reserves."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Ray labels of the driver's node."""
    resources: dict[str, float] = Field(default_factory=dict)
    """Custom Ray resources that the driver holds, e.g. driver: 1."""
    python: str | None = Field(default=None, min_length=1)
    """Python of the driver. Absent: that of Ray on its node if it can import this program, else the first on the PATH."""
    stop_seconds: int = Field(default=30, ge=1)
    """Time to clean up after `orchestrator stop`, before the driver is killed."""


class ProfileSpec(Frozen):
    """Steps to run under Nsight Systems. Their traces go to the store; the last event of each step names its trace."""

    steps: tuple[KindName, ...] = ("build",)
    """Kinds of step to profile."""
    nsys: tuple[str, ...] = ("--trace=cuda,nvtx,osrt",)
    """Options of `nsys profile`."""


class ClusterSpec(Frozen):
    """Where to build, and with what."""

    kind: Literal["local", "ray", "mpi"] = "local"
    """Kind of cluster. local: processes of this machine; ray: actors of a Ray cluster; mpi: ranks of an MPI job (Slurm)."""
    address: PlaceText | None = None
    """Address of the Ray cluster. Absent: start one on this machine."""
    store: PlaceText
    """URL of the store of outputs and releases. Every node must reach it."""
    store_options: StoreOptions = StoreOptions()
    scratch: PlaceText | None = None
    """Folder for temporary files on every node. Absent: the system's."""
    pools: dict[str, PoolSpec] = Field(default_factory=lambda: {"default": PoolSpec()}, min_length=1)
    driver: DriverSpec = DriverSpec()
    retries: RetrySpec = RetrySpec()
    profile: ProfileSpec | None = None
    log_format: Literal["text", "json"] = "text"
    """Format of the steps' logs in the store. json: every line has step, kind, rank or stage, attempt and node."""
    threads_per_step: int = Field(default=1, ge=1)
    """Threads per step (OMP_NUM_THREADS)."""
    schedule_timeout_seconds: float = Field(default=600.0, gt=0)
    """For ray and mpi: longest wait of a step for a node that can take it. Then the build ends and says what is missing."""
    probe_timeout_seconds: float = Field(default=60.0, gt=0)
    """For ray and mpi: longest wait for a node's answer to the probe before the first step."""

    def pool_name_for(self, kind: str) -> str | None:
        """Name of the first pool that lists a kind of step; None when no pool does."""
        wanted = (kind, *_STAND_INS.get(kind, ()))
        return next((name for each in wanted for name, pool in self.pools.items() if each in pool.steps), None)

    def pool_for(self, kind: str) -> PoolSpec | None:
        """The pool that `pool_name_for` names."""
        name = self.pool_name_for(kind)
        return None if name is None else self.pools[name]
