"""What there is to build with: pools of machines, the store, scratch, retries."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from orchestrator.base.urls import PlaceText, holds_secret
from orchestrator.spec.decoding import Frozen
from orchestrator.spec.values import NumBytes

KindName = Literal["miniature", "reference", "calibrate", "convert", "build", "verify"]


_STAND_INS: dict[str, tuple[str, ...]] = {"miniature": ("verify", "reference", "convert", "build")}
"""A kind that pools may leave out -> the kinds in whose pool it runs then."""


class PoolSpec(Frozen):
    """Machines of one kind."""

    nodes: int = Field(default=1, ge=1)
    """How many there are, for the simulation; a build takes those that it finds."""
    cpus: int | None = Field(default=None, ge=1)
    """CPU slots of each node, one per running step; absent: those of the machine."""
    gpus: int = Field(default=0, ge=0)
    """Of each node."""
    memory: NumBytes | None = None
    """Memory of each node that steps may reserve; absent: that of the machine."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Ray labels that select the pool's nodes, e.g. ray.io/accelerator-type: H100."""
    fallback: tuple[dict[str, str], ...] = ()
    """Other labels, in order, for steps that no node with `labels` has room for."""
    scratch: NumBytes | None = None
    """Room in each node's scratch folder that steps may reserve; absent: what the nodes have free."""
    steps: tuple[KindName, ...] = ("miniature", "reference", "calibrate", "convert", "build", "verify")
    """Kinds of step that run here; the first pool that lists a kind takes it. A miniature that no pool lists goes where verify
    does, else reference, else convert, else build."""


class RetrySpec(Frozen):
    """What happens when the machinery fails. A step's own error is never retried."""

    max_attempts: int = Field(default=4, ge=1)
    backoff_seconds: float = Field(default=2.0, ge=0)
    """Before the second attempt; doubles each time."""
    max_backoff_seconds: float = Field(default=60.0, ge=0)


class StoreOptions(Frozen):
    """How the store is reached. It decides nothing of what is built, and holds no credentials: those are found on each machine
    the way every AWS client finds them (environment, profile, web identity, instance role). S3 only; others ignore it.
    """

    endpoint_url: str | None = None
    """Of a server other than AWS; absent: as the environment or the profile says (AWS_ENDPOINT_URL)."""
    region: str | None = None
    profile: str | None = None
    """A name in ~/.aws/config of every node; only the name travels."""
    addressing_style: Literal["auto", "path", "virtual"] = "auto"
    """auto: virtual on AWS, path elsewhere."""
    checksums: Literal["auto", "when_supported", "when_required"] = "auto"
    """Checksums that botocore adds to uploads. auto: when_supported on AWS, when_required elsewhere: older servers refuse its
    trailers, and get Content-MD5. obstore sends the CRC64NVME of each part, which servers that do not know it ignore or refuse;
    with when_required it signs the part's SHA-256 over http, and leaves it to TLS over https."""
    transfer: Literal["auto", "s3fs", "obstore"] = "auto"
    """What carries large objects. auto: obstore where it is installed."""
    max_attempts: int = Field(default=10, ge=1)
    """Of one request, with doubling delays between: the default lasts about two minutes."""
    read_timeout_seconds: float = Field(default=60.0, gt=0)

    @field_validator("endpoint_url")
    @classmethod
    def _plain_endpoint(cls, value: str | None) -> str | None:
        if value is not None and (not value.startswith(("http://", "https://")) or holds_secret(value)):
            raise ValueError("expected http://host:port or https://host:port, without user, password or query")
        return value


class DriverSpec(Frozen):
    """Where the driver of a submitted build runs. Nothing given: on the head, with which it ends."""

    cpus: float = Field(default=0.0, ge=0)
    """CPU slots that it holds; a little, such as 0.1, lets it run on any node that has some."""
    memory: NumBytes = 0
    """Memory that it reserves."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Ray labels that select its node."""
    resources: dict[str, float] = Field(default_factory=dict)
    """Custom Ray resources that it holds, e.g. driver: 1."""
    python: str | None = Field(default=None, min_length=1)
    """Python that runs it; absent: that of the Ray on its node, where it can import this program, else the first on the PATH."""
    stop_seconds: int = Field(default=30, ge=1)
    """How long it may clean up after `orchestrator stop`, before it is killed."""


class ProfileSpec(Frozen):
    """Which steps run under Nsight Systems. Their traces are put into the store, and the last event of each names its own."""

    steps: tuple[KindName, ...] = ("build",)
    nsys: tuple[str, ...] = ("--trace=cuda,nvtx,osrt",)
    """Options of `nsys profile`."""


class ClusterSpec(Frozen):
    """What there is to build with."""

    kind: Literal["local", "ray", "mpi"] = "local"
    """local: processes of this machine; ray: actors of a Ray cluster; mpi: the ranks of an MPI job, for Slurm sites without Ray."""
    address: PlaceText | None = None
    """Of the Ray cluster; absent: start one on this machine."""
    store: PlaceText
    """URL of the store that keeps steps' outputs and releases; every node must reach it."""
    store_options: StoreOptions = StoreOptions()
    scratch: PlaceText | None = None
    """Folder for temporary files on every node; absent: the system's."""
    pools: dict[str, PoolSpec] = Field(default_factory=lambda: {"default": PoolSpec()}, min_length=1)
    driver: DriverSpec = DriverSpec()
    retries: RetrySpec = RetrySpec()
    profile: ProfileSpec | None = None
    log_format: Literal["text", "json"] = "text"
    """Of the log that each step leaves in the store. json: every line has step, kind, rank or stage, attempt and node."""
    threads_per_step: int = Field(default=1, ge=1)
    """OMP_NUM_THREADS of every step."""
    schedule_timeout_seconds: float = Field(default=600.0, gt=0)
    """How long a step may wait for a node that could take it (ray only): then the build ends and says what was missing."""
    probe_timeout_seconds: float = Field(default=60.0, gt=0)
    """How long a node may take to say what it has, before the first step (ray only)."""

    def pool_name_for(self, kind: str) -> str | None:
        """The first pool that lists a kind of step takes it; None when none does."""
        wanted = (kind, *_STAND_INS.get(kind, ()))
        return next((name for each in wanted for name, pool in self.pools.items() if each in pool.steps), None)

    def pool_for(self, kind: str) -> PoolSpec | None:
        """The pool that `pool_name_for` names."""
        name = self.pool_name_for(kind)
        return None if name is None else self.pools[name]
