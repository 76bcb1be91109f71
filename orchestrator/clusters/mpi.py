"""The ranks of an MPI job, for Slurm sites without Ray: `mpiexec -n N+1 python -m mpi4py.futures -m orchestrator.cli build ...`.

Rank 0 drives. Every other rank is one node: a single task of mpi4py's pool serves there until the build is over. It starts steps as
processes, as many as its pools have room for, so that a crash of native code fails a step and not the MPI job. Tasks, events and
heartbeats travel as MPI messages of a few kilobytes; no shared folder is needed.

MPI does not survive the loss of a process. Most launchers end the whole job when one dies. Where they do not, a node without
heartbeats ends the build with an error. Either way, the same command resumes from the committed steps.
"""

from __future__ import annotations

import contextlib
import os
import platform
import queue
import re
import threading
import time
from collections.abc import Iterable
from typing import Any

from orchestrator.base.errors import ClusterError
from orchestrator.clusters.processes import StepProcesses
from orchestrator.events import STEP_EVENT, StepEvent, StepFailed, StepSucceeded
from orchestrator.events.nodes import NodeFacts
from orchestrator.planning.steps import Resources, Task
from orchestrator.scheduling.cluster import machine_cpus, machine_memory_bytes
from orchestrator.scheduling.placement import Node, Placement, check_pools
from orchestrator.spec.cluster import ClusterSpec
from orchestrator.work.launcher import check_launcher
from orchestrator.work.probe import probe_here

LABELS_VARIABLE = "ORCHESTRATOR_NODE_LABELS"
"""Variable with additional labels of a node: name=value, separated by commas."""
_LAUNCH = "Start it as: mpiexec -n N+1 python -m mpi4py.futures -m orchestrator.cli build ..., one process per node and one more."
_TAG_HELLO, _TAG_COMMAND, _TAG_EVENT, _TAG_ALIVE, _TAG_BYE, _TAG_FACTS = range(701, 707)
_LOST_SECONDS = 60.0
_ALIVE_SECONDS = 2.0
_POLL_SECONDS = 0.01
_CLOSE_SECONDS = 30.0
"""Time for a node to end its steps and say goodbye."""
_ABORT_SECONDS = 3.0
"""Delay between the error of a lost node and the end of the job, to print the error."""


class MpiCluster:
    """See Cluster, and Probing."""

    def __init__(self, spec: ClusterSpec, *, lost_seconds: float = _LOST_SECONDS) -> None:
        """Make every other rank of this MPI job a node. Raises ClusterError outside of an MPI job, or when a pool finds no node."""
        self._spec = spec
        self._lost_seconds = lost_seconds
        self._comm, self._executor = _open_pool()
        ranks = range(1, self._comm.Get_size())
        self._served = [self._executor.submit(serve, spec.threads_per_step) for _ in ranks]
        self._ended: set[int] = set()
        self._seen = dict.fromkeys(ranks, time.monotonic())
        self._sending: list[Any] = []
        """Commands being sent. A blocking send could wait for a node that waits for us."""
        self._broken = False
        self._closed = False
        self.pids: dict[int, int] = {}
        """Process id of each node's rank, on its host."""
        self._placement = Placement(spec)
        try:
            self._nodes = self._greet()
            check_pools(spec, self._nodes.values())
        except BaseException:
            self.close()
            raise
        self._placement.update(self._nodes.values())

    def start(self, task: Task) -> None:
        self._placement.add(task, self.now())

    def events(self, timeout_seconds: float | None) -> list[StepEvent]:
        """Return events as Cluster says. Raises ClusterError when a node was lost, because MPI cannot continue without it."""
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        self._begin()
        while not self._closed:
            found = self._receive()
            if not self._placement.running:
                found.extend(self._placement.overdue(self.now()))
            if found:
                return found
            self._check_alive()
            if deadline is not None and time.monotonic() >= deadline:
                return []
            time.sleep(_POLL_SECONDS)
        return []

    def now(self) -> float:
        return time.monotonic()

    def probe(self, paths: Iterable[str]) -> list[NodeFacts]:
        """Ask every node. A node without an answer in time gets an error. Raises ClusterError when a node was lost."""
        spec = self._spec
        question = [spec.store, spec.store_options.model_dump_json(), spec.scratch, list(paths)]
        for rank in self._nodes:
            self._send(rank, {"probe": question})
        answers: dict[int, NodeFacts] = {}
        deadline = time.monotonic() + spec.probe_timeout_seconds
        while len(answers) < len(self._nodes) and time.monotonic() < deadline:
            self._receive()
            rank, said = self._next(_TAG_FACTS)
            if rank:
                answers[rank] = NodeFacts.model_validate_json(said)
                continue
            self._check_alive()
            time.sleep(_POLL_SECONDS)
        silent = NodeFacts(node="", error=f"silent for {spec.probe_timeout_seconds:.0f} s")
        found = [answers.get(rank, silent).model_copy(update=node.offer()) for rank, node in self._nodes.items()]
        self._placement.learn(found)
        return found

    def rank_of(self, digest: str) -> int:
        """Return the rank that runs a step. Raises KeyError."""
        return int(self._placement.running[digest].node.node_id)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._broken:
            self._abort_soon()
            return
        for rank in self._seen:
            self._send(rank, None)
        deadline = time.monotonic() + _CLOSE_SECONDS
        while self._ended != set(self._seen):
            # Pending messages of the nodes are received, or the nodes could not finish sending them.
            self._receive()
            if time.monotonic() >= deadline:
                self._abort_soon()
                return
            time.sleep(_POLL_SECONDS)
        self._executor.shutdown()

    def _greet(self) -> dict[int, Node]:
        """Receive every node's description. Ranks of one host are distinguished by their number."""
        found: dict[int, dict[str, Any]] = {}
        while len(found) < len(self._seen):
            rank, said = self._next(_TAG_HELLO)
            if rank:
                found[rank] = said
                self.pids[rank] = said["pid"]
                continue
            self._check_alive()
            time.sleep(_POLL_SECONDS)
        hosts = [said["host"] for said in found.values()]
        nodes = {}
        for rank, said in found.items():
            name = said["host"] if hosts.count(said["host"]) == 1 else f"{said['host']}/{rank}"
            nodes[rank] = Node(str(rank), name, Resources.model_validate(said["capacity"]), said["labels"])
        return nodes

    def _begin(self) -> None:
        if self._closed:
            return
        for placed in self._placement.begin(self.now()):
            command = {"task": placed.task.model_dump_json(), "gpus": placed.gpus, "node": placed.node.name}
            self._send(int(placed.node.node_id), command)

    def _send(self, rank: int, command: dict[str, Any] | None) -> None:
        self._sending = [request for request in self._sending if not request.Test()]
        self._sending.append(self._comm.isend(command, dest=rank, tag=_TAG_COMMAND))

    def _receive(self) -> list[StepEvent]:
        """Receive all events that have arrived; final events free their room."""
        while (rank := self._next(_TAG_ALIVE)[0]) or (rank := self._next(_TAG_BYE)[0]):
            self._seen[rank] = time.monotonic()
        events: list[StepEvent] = []
        while (received := self._next(_TAG_EVENT))[0]:
            event = STEP_EVENT.validate_json(received[1])
            if isinstance(event, (StepSucceeded, StepFailed)):
                self._placement.end(event.digest, self.now(), event.failure if isinstance(event, StepFailed) else None)
            events.append(event)
        return events

    def _next(self, tag: int) -> tuple[int, Any]:
        """Return one message and the rank that sent it; rank 0 when there is no message."""
        from mpi4py import MPI

        status = MPI.Status()
        if not self._comm.iprobe(source=MPI.ANY_SOURCE, tag=tag, status=status):
            return 0, None
        rank = status.Get_source()
        if tag == _TAG_BYE:
            self._ended.add(rank)
        return rank, self._comm.recv(source=rank, tag=tag)

    def _check_alive(self) -> None:
        """Check the heartbeats. Raises ClusterError when a node failed or was silent for too long."""
        problem = next((str(future.exception()) for future in self._served if future.done() and future.exception()), "")
        now = time.monotonic()
        silent = [rank for rank, seen in self._seen.items() if now - seen > self._lost_seconds]
        if silent:
            problem = ", ".join(self._name(rank) for rank in silent) + f" silent for more than {self._lost_seconds:.0f} s"
        if problem:
            self._broken = True
            raise ClusterError(
                f"a node of the MPI job was lost: {problem}",
                "An MPI job cannot continue without it. Run the same command again: committed steps are not repeated.",
            )

    def _name(self, rank: int) -> str:
        node = getattr(self, "_nodes", {}).get(rank)
        return f"rank {rank}" + (f" ({node.name})" if node else "")

    def _abort_soon(self) -> None:
        """End the job once the error could be printed: MPI would wait for a lost node without end."""
        timer = threading.Timer(_ABORT_SECONDS, self._comm.Abort, [ClusterError.exit_code])
        timer.daemon = True
        timer.start()


def _open_pool() -> tuple[Any, Any]:
    """Return the job's communicator and its pool of workers.

    Raises ClusterError when this process was started without them, ToolError when launcher and library are of different MPIs.
    """
    from mpi4py import MPI
    from mpi4py.futures import MPIPoolExecutor, _core

    comm = MPI.COMM_WORLD
    check_launcher(os.environ, MPI.Get_library_version(), comm.Get_size())
    if comm.Get_size() < 2:
        raise ClusterError("kind: mpi needs an MPI job of at least two processes", _LAUNCH)
    if getattr(_core, "SharedPool", None) is None:
        raise ClusterError("this MPI job has no pool of workers: every process runs the build", _LAUNCH)
    executor = MPIPoolExecutor(main=False)
    executor.bootup()
    return comm, executor


def serve(threads_per_step: int) -> None:
    """Serve as a node until the driver ends the build. Runs in every rank but 0."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    events: queue.SimpleQueue[StepEvent] = queue.SimpleQueue()
    processes = StepProcesses(threads_per_step, events.put)
    comm.send(describe_node(), dest=0, tag=_TAG_HELLO)
    try:
        _serve(comm, processes, events)
    finally:
        processes.close()
    comm.send(None, dest=0, tag=_TAG_BYE)


def _serve(comm: Any, processes: StepProcesses, events: queue.SimpleQueue[StepEvent]) -> None:
    facts: queue.SimpleQueue[str] = queue.SimpleQueue()
    alive = time.monotonic()
    while True:
        while comm.iprobe(source=0, tag=_TAG_COMMAND):
            command = comm.recv(source=0, tag=_TAG_COMMAND)
            if command is None:
                return
            if "probe" in command:
                # A store may answer late, but this rank must keep sending heartbeats.
                threading.Thread(target=lambda asked: facts.put(probe_here(*asked)), args=(command["probe"],), daemon=True).start()
            else:
                processes.start(Task.model_validate_json(command["task"]), tuple(command["gpus"]), command["node"])
        with contextlib.suppress(queue.Empty):
            comm.send(facts.get_nowait(), dest=0, tag=_TAG_FACTS)
        with contextlib.suppress(queue.Empty):
            event = events.get(timeout=_POLL_SECONDS)
            while True:
                if isinstance(event, (StepSucceeded, StepFailed)):
                    processes.forget(event.digest)
                comm.send(event.model_dump_json(), dest=0, tag=_TAG_EVENT)
                event = events.get_nowait()
        if time.monotonic() - alive >= _ALIVE_SECONDS:
            alive = time.monotonic()
            comm.send(None, dest=0, tag=_TAG_ALIVE)


def describe_node() -> dict[str, Any]:
    """Return this rank's host, capacity, and labels. Labels have Ray's names, so that one cluster file serves both."""
    from orchestrator.engines.device import visible_gpus

    gpus = visible_gpus()
    labels = {"host": platform.node()}
    if gpus:
        labels["ray.io/accelerator-type"] = accelerator_type(gpus[0].name)
    for item in filter(None, os.environ.get(LABELS_VARIABLE, "").split(",")):
        name, _, value = item.partition("=")
        labels[name.strip()] = value.strip()
    capacity = Resources(cpus=machine_cpus(), gpus=len(gpus), memory_bytes=machine_memory_bytes())
    return {"host": platform.node(), "pid": os.getpid(), "capacity": capacity.model_dump(), "labels": labels}


def accelerator_type(name: str) -> str:
    """Return Ray's name of a GPU model: NVIDIA H100 80GB HBM3 -> H100, Tesla V100-SXM2-16GB -> V100, NVIDIA GeForce RTX 4090 ->
    GeForce-RTX-4090.
    """
    kept: list[str] = []
    for word in name.split()[1:]:
        head = word.partition("-")[0]
        if not re.fullmatch(r"[A-Z0-9]+", head):
            break
        kept.append(head)
        if any(character.isdigit() for character in head):
            return "-".join(kept)
    return name.removeprefix("NVIDIA ").replace(" ", "-")
