"""NCCL communicators of a rank, and how their ids travel.

A release has one communicator per stage, which its engines use, one per pair of ranks that hand on hidden states, and one of all
ranks. The first rank of a group makes its id, the others get it through a rendezvous.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from orchestrator.base.errors import EngineRunError
from orchestrator.runners.tensorrt.device import Device

_POLL_SECONDS = 0.05
_ABORT_SECONDS = 5.0
Make = Callable[[], bytes]
_CAPSULE_NAME = b"ncclComm_t"
"""Lives as long as the program: a capsule keeps only the address of its name."""


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks of a communicator, in its order."""

    name: str
    ranks: tuple[int, ...]


WORLD = "world"


def stage_name(pp_rank: int) -> str:
    """Return the name of the group inside a stage, in the order of tp_rank."""
    return f"stage{pp_rank}"


def pair_name(sender: int) -> str:
    """Return the name of the group of a rank and the one that gets its hidden states."""
    return f"pair{sender}"


def groups_of(tp: int, pp: int) -> tuple[Group, ...]:
    """Return all groups with more than one rank, in the one order in which every rank joins its own."""
    stages = [Group(stage_name(stage), tuple(range(stage * tp, (stage + 1) * tp))) for stage in range(pp)]
    pairs = [Group(pair_name(rank), (rank, rank + tp)) for rank in range(tp * (pp - 1))]
    found = [*stages, *pairs, Group(WORLD, tuple(range(tp * pp)))]
    return tuple(group for group in found if len(group.ranks) > 1)


class Rendezvous(Protocol):
    """The way of a group's id from the rank that makes it to the others."""

    def exchange(self, name: str, make: Make | None) -> bytes:
        """Return the id of a group. Its first rank can `make` it, the others wait. Raises EngineRunError when it does not come."""
        ...


class KnownIds:
    """Ids that a driver has collected and handed out."""

    def __init__(self, ids: Mapping[str, bytes]) -> None:
        self._ids = ids

    def exchange(self, name: str, make: Make | None) -> bytes:
        return self._ids[name]


class FileRendezvous:
    """Ids as files of a folder that all ranks see, new for every run."""

    def __init__(self, folder: Path, seconds: float = 300.0) -> None:
        self._folder, self._seconds = folder, seconds

    def exchange(self, name: str, make: Make | None) -> bytes:
        path = self._folder / f"{name}.id"
        if make is not None:
            made = make()
            temporary = self._folder / f".{name}.{os.getpid()}"
            temporary.write_bytes(made)
            try:
                path.hardlink_to(temporary)  # never a file half written, never another run's file replaced
            except FileExistsError:
                raise EngineRunError(f"{path} is left from an earlier run", "Give every run a new, empty folder.") from None
            finally:
                temporary.unlink()
            return made
        end = time.monotonic() + self._seconds
        while not path.exists():
            if time.monotonic() > end:
                raise EngineRunError(f"no id of {name} came to {self._folder} within {self._seconds:g} seconds")
            time.sleep(_POLL_SECONDS)
        return path.read_bytes()


class StoreRendezvous:
    """Ids through a store of torch.distributed, which `torchrun` has already started."""

    def __init__(self, store: Any = None) -> None:
        """`store`: None: that of the environment (MASTER_ADDR, MASTER_PORT)."""
        if store is None:
            import torch.distributed

            store, _, _ = next(torch.distributed.rendezvous("env://"))  # type: ignore[attr-defined]
        self._store = store

    def exchange(self, name: str, make: Make | None) -> bytes:
        if make is not None:
            made = make()
            self._store.set(name, made)
            return made
        try:
            return bytes(self._store.get(name))
        except RuntimeError as error:
            raise EngineRunError(f"no id of {name} came: {error}") from error


class Communicators:
    """The communicators of one rank."""

    def __init__(self, nccl: Any, groups: tuple[Group, ...], rank: int, rendezvous: Rendezvous | None, device: Device) -> None:
        """Join every group of the rank. Blocks until all its ranks have. Raises EngineRunError."""
        if groups and (nccl is None or rendezvous is None):
            raise EngineRunError("this release has several ranks", "Give NCCL and a rendezvous, by which they find each other.")
        self._device = device
        self._joined: dict[str, tuple[Group, Any]] = {}
        for group in groups:
            if rank in group.ranks and rendezvous is not None:
                make = (lambda: bytes(nccl.get_unique_id())) if group.ranks[0] == rank else None
                unique_id = nccl.UniqueId.from_bytes(rendezvous.exchange(group.name, make))
                device.use()
                with _explained(f"joining {group.name}"):
                    joined = nccl.Communicator.init(nranks=len(group.ranks), rank=group.ranks.index(rank), unique_id=unique_id)
                self._joined[group.name] = group, joined

    def has(self, name: str) -> bool:
        return name in self._joined

    def capsule(self, name: str) -> Any:
        """Return a PyCapsule around the ncclComm_t of a group, for TensorRT. The communicator outlives it."""
        new: Callable[..., Any] = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
            ("PyCapsule_New", ctypes.pythonapi)
        )
        return new(self._joined[name][1].ptr, _CAPSULE_NAME, None)

    def send(self, sender: int, address: int, num_bytes: int) -> None:
        """Send memory of the GPU to the other rank of the pair of `sender`, this rank."""
        with _explained(f"sending to {pair_name(sender)}"):
            self._joined[pair_name(sender)][1].send(self._device.buffer(address, num_bytes), 1, stream=self._device.stream)

    def receive(self, sender: int, address: int, num_bytes: int) -> None:
        """Receive into memory of the GPU from `sender`."""
        with _explained(f"receiving from {pair_name(sender)}"):
            self._joined[pair_name(sender)][1].recv(self._device.buffer(address, num_bytes), 0, stream=self._device.stream)

    def broadcast(self, sender: int, address: int, num_bytes: int) -> None:
        """Give all ranks the memory of `sender`, at the same size."""
        memory = self._device.buffer(address, num_bytes)
        with _explained("broadcasting the token ids"):
            self._joined[WORLD][1].broadcast(memory, memory, sender, stream=self._device.stream)

    def close(self, *, failed: bool) -> None:
        """Leave all groups. After a failure without waiting for the others: kernels that wait for them are stopped."""
        leaving = [joined.abort if failed else joined.destroy for _, joined in reversed(list(self._joined.values()))]
        self._joined = {}
        if not failed:
            for leave in leaving:
                leave()
            return
        # At once, because each waits for the GPU, which waits for a kernel of another.
        threads = [threading.Thread(target=_quietly, args=(leave,), daemon=True) for leave in leaving]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(_ABORT_SECONDS)


def _quietly(leave: Callable[[], object]) -> None:
    with suppress(Exception):  # the reason for the end matters more
        leave()


@contextmanager
def _explained(doing: str) -> Iterator[None]:
    """Turn an error of NCCL into an EngineRunError."""
    try:
        yield
    except Exception as error:  # nccl4py's errors have no public base class
        raise EngineRunError(f"NCCL failed while {doing}: {error}") from error
