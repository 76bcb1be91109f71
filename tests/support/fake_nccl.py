"""`nccl.core` and a GPU without a GPU: memory of this process, and collectives that block until every rank has come.

A communicator's id is the address of a hub, a thread of the process that made the id, as NCCL's is. So ranks may be threads or
processes. An operation is one message from every rank; a rank that never sends its own leaves the others waiting, for SECONDS.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
SECONDS = 20.0
_ID_BYTES = 128


class NCCLError(Exception):
    """As nccl4py's: it has no public base class."""


class FakeDevice:
    """Memory of this process; every copy is done at once."""

    def __init__(self) -> None:
        self.stream = 4711
        self.allocations: dict[int, Array] = {}

    def allocate(self, num_bytes: int) -> int:
        memory = np.zeros(num_bytes + 16, np.uint8)  # red zone
        self.allocations[memory.ctypes.data] = memory
        return int(memory.ctypes.data)

    def upload(self, address: int, array: Array) -> None:
        self.view(address, array.nbytes)[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)

    def download(self, address: int, array: Array) -> None:
        array.reshape(-1).view(np.uint8)[:] = self.view(address, array.nbytes)

    def buffer(self, address: int, num_bytes: int) -> Array:
        return self.view(address, num_bytes)

    def view(self, address: int, num_bytes: int) -> Array:
        """Memory at an address that was allocated, at its beginning."""
        memory = self.allocations[address]
        assert num_bytes <= memory.size - 16, "beyond the allocation"
        return memory[:num_bytes]

    def wait(self) -> None: ...

    def use(self) -> None: ...

    def close(self) -> None:
        assert all(not memory[-16:].any() for memory in self.allocations.values()), "written beyond an allocation"
        self.allocations.clear()


class _Hub(threading.Thread):
    """Meets the ranks of one communicator."""

    def __init__(self, listener: Listener) -> None:
        super().__init__(daemon=True)
        self._listener = listener

    def run(self) -> None:
        first = self._listener.accept()
        num_ranks, rank = first.recv()
        ranks = {rank: first}
        while len(ranks) < num_ranks:
            connection = self._listener.accept()
            ranks[connection.recv()[1]] = connection
        for connection in ranks.values():
            connection.send(None)
        try:
            while True:
                answers = _answers([ranks[number].recv() for number in range(num_ranks)])
                # Rank 0 last: this thread is of its process, which may end as soon as it has its answer.
                for number in reversed(range(num_ranks)):
                    ranks[number].send(answers[number])
        except (EOFError, OSError):  # a rank has left: the others get no answer, as in NCCL, until they leave too
            for connection in ranks.values():
                with contextlib.suppress(EOFError, OSError):
                    while True:
                        connection.recv()
                connection.close()
            self._listener.close()


def _answers(said: list[tuple[str, Any, Array]]) -> list[Any]:
    """The answer to every rank, or one error for all."""
    operations, arrays = [name for name, _, _ in said], [array for _, _, array in said]
    if operations in (["send", "recv"], ["recv", "send"]):
        if arrays[0].size != arrays[1].size:
            return [NCCLError(f"{arrays[0].size} and {arrays[1].size} bytes")] * 2
        data = arrays[operations.index("send")]
        return [data, data]
    if len(set(operations)) > 1 or len({(array.shape, array.dtype) for array in arrays}) > 1:
        return [NCCLError(f"ranks differ: {operations}, {[array.shape for array in arrays]}")] * len(said)
    match operations[0]:
        case "all_reduce":
            return [sum(arrays[1:], arrays[0])] * len(said)
        case "all_gather":
            return [np.concatenate(arrays)] * len(said)
        case "broadcast":
            return [arrays[said[0][1]]] * len(said)
        case "meet":
            return [arrays[0]] * len(said)
    return [NCCLError(f"{operations[0]} without its other half")] * len(said)


class UniqueId:
    def __init__(self, data: bytes) -> None:
        assert len(data) == _ID_BYTES
        self.data = data

    def __bytes__(self) -> bytes:
        return self.data

    @staticmethod
    def from_bytes(data: bytes) -> UniqueId:
        return UniqueId(data)


def get_unique_id() -> UniqueId:
    """Start a hub and return its address."""
    address = str(Path(tempfile.mkdtemp(prefix="nccl")) / "hub")
    _Hub(Listener(address)).start()
    return UniqueId(address.encode().ljust(_ID_BYTES, b"\0"))


class Communicator:
    """A rank in a communicator. `device` is found by the memory that is sent, so that ranks may be threads of one process."""

    all: ClassVar[dict[int, Communicator]] = {}
    """By `ptr`, for the fake of TensorRT, which gets a pointer."""
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, connection: Connection, rank: int) -> None:
        self.connection, self.rank, self.user = connection, rank, None
        with Communicator._lock:
            self.ptr = 0x7F00_0000_0000 + os.getpid() * 4096 + len(Communicator.all)
            Communicator.all[self.ptr] = self

    @classmethod
    def init(cls, nranks: int, rank: int, unique_id: UniqueId) -> Communicator:
        connection = Client(bytes(unique_id).rstrip(b"\0").decode())
        connection.send((nranks, rank))
        made = cls(connection, rank)
        made._answer("init")
        return made

    def exchange(self, operation: str, detail: Any, array: Array) -> Array:
        """Send this rank's part of an operation, and wait for the result."""
        self.connection.send((operation, detail, array))
        result: Array = self._answer(operation)
        return result

    def _answer(self, operation: str) -> Any:
        if not self.connection.poll(SECONDS):
            raise NCCLError(f"rank {self.rank} waited {SECONDS:g} seconds in {operation}: another rank did not come")
        answer = self.connection.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def send(self, sendbuf: Array, peer: int, *, stream: int) -> None:
        assert (peer, stream) == (1 - self.rank, 4711)
        self.exchange("send", peer, sendbuf.copy())

    def recv(self, recvbuf: Array, peer: int, *, stream: int) -> None:
        assert (peer, stream) == (1 - self.rank, 4711)
        recvbuf[:] = self.exchange("recv", peer, recvbuf.copy())

    def broadcast(self, sendbuf: Array, recvbuf: Array, root: int, *, stream: int) -> None:
        assert stream == 4711
        recvbuf[:] = self.exchange("broadcast", root, sendbuf.copy())

    def destroy(self) -> None:
        self.connection.close()

    abort = destroy
