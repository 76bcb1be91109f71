"""Upload and download of a 2 GB object through a real S3 server on loopback, against the public clients in the same run.

    python -m benchmarks.stores [--folder DIR] [--rounds N] [--gigabytes N]

Ours computes and checks sha256 on the way; the others do not. Every download ends on disk. Clients that are not installed
(boto3, s5cmd) are left out. Each transfer is a process of its own: wall seconds (best of the rounds), CPU seconds of
the client per GB, and its peak memory. Client and server share the machine's cores.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator.base.programs import find_program
from orchestrator.spec.cluster import StoreOptions
from orchestrator.stores import open_store
from orchestrator.work.context import HashingWriter, download
from tests.support.s3_server import BUCKET, S3Server
from tests.support.seaweed import run_seaweed

GB = 10**9
PIECE_BYTES = 16 * 2**20
OURS = {
    "ours-obstore": StoreOptions(transfer="obstore"),
    "ours-signed": StoreOptions(transfer="obstore", checksums="when_required"),
    "ours-s3fs": StoreOptions(transfer="s3fs"),
}
"""Our stores: as they are (CRC64NVME of each part), with the parts' SHA-256 in the signature instead, and without obstore."""
MEMORY_LIMIT_BYTES = 200 * 10**6
RATIO_GOAL = 0.9


@dataclass(frozen=True)
class Measured:
    """One transfer."""

    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int


def main() -> None:
    """Run the rounds, or one transfer of one client."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".cache/bench"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--one", nargs=4, metavar=("CLIENT", "UP_OR_DOWN", "KEY", "FILE"))
    arguments = parser.parse_args()
    if arguments.one:
        client, way, key, file = arguments.one
        transfer(client, way, key, Path(file))
        return
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder, run_seaweed(Path(folder)) as server:
        compare(server, Path(folder), int(arguments.gigabytes * GB), arguments.rounds)


def compare(server: S3Server, folder: Path, num_bytes: int, rounds: int) -> None:
    """Every client in turn, `rounds` times; prints the table."""
    source = folder / "source"
    write_random(source, num_bytes)
    clients = [*OURS, *installed()]
    os.environ.update(server.environment())
    store = open_store(f"s3://{BUCKET}", StoreOptions(transfer="s3fs"))
    found: dict[tuple[str, str], list[Measured]] = {}
    for number in range(rounds):
        for client in clients:
            key = f"{client}-{number}"
            target = folder / key
            found.setdefault((client, "up"), []).append(measure(server, client, "up", key, source))
            found.setdefault((client, "down"), []).append(measure(server, client, "down", key, target))
            if target.stat().st_size != num_bytes:
                raise SystemExit(f"{client} brought back {target.stat().st_size:,} bytes")
            target.unlink()
            store.delete(key)
    show(found, num_bytes)


def show(found: dict[tuple[str, str], list[Measured]], num_bytes: int) -> None:
    """Print the table and the ratios."""
    print(f"{num_bytes / GB:.1f} GB, best of {len(next(iter(found.values())))} rounds")
    for way in ("up", "down"):
        best = {client: min(runs, key=lambda run: run.wall_seconds) for (client, its_way), runs in found.items() if its_way == way}
        public = min(run.wall_seconds for client, run in best.items() if client not in OURS)
        for client, run in sorted(best.items(), key=lambda item: item[1].wall_seconds):
            speed = f"{num_bytes / 1e6 / run.wall_seconds:7.0f} MB/s   {public / run.wall_seconds:5.2f} of the best public"
            print(
                f"{way:4} {client:14} {speed}   {run.cpu_seconds / (num_bytes / GB):5.2f} CPU s/GB   {run.peak_bytes / 1e6:5.0f} MB"
            )
        ours = best["ours-obstore"]
        met = public / ours.wall_seconds >= RATIO_GOAL and ours.peak_bytes <= MEMORY_LIMIT_BYTES
        print(f"{way:4} goal ({RATIO_GOAL} or more, {MEMORY_LIMIT_BYTES / 1e6:.0f} MB or less): {'met' if met else 'MISSED'}")


def measure(server: S3Server, client: str, way: str, key: str, file: Path) -> Measured:
    """One transfer in a process of its own."""
    environment = {**os.environ, "AWS_REGION": "us-east-1"}
    words = [sys.executable, "-m", "benchmarks.stores", "--one", client, way, key, str(file)]
    if client == "s5cmd":
        url = f"s3://{BUCKET}/{key}"
        words = [
            find_program("s5cmd") or "s5cmd",
            "--endpoint-url",
            server.endpoint,
            "cp",
            *((str(file), url) if way == "up" else (url, str(file))),
        ]
    os.sync()  # what the last one left in the page cache
    began = time.monotonic()
    process_id = os.posix_spawn(find_program(words[0]) or words[0], words, environment)
    _, status, usage = os.wait4(process_id, 0)
    if way == "down" and not status:
        with file.open("rb") as written:
            os.fsync(written.fileno())
    wall = time.monotonic() - began
    if status:
        raise SystemExit(f"{client} {way} failed")
    return Measured(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def installed() -> Iterator[str]:
    """The public clients of this environment."""
    yield "obstore"
    if importlib.util.find_spec("boto3"):
        yield "boto3"
    if find_program("s5cmd"):
        yield "s5cmd"


def transfer(client: str, way: str, key: str, file: Path) -> None:
    """One transfer by one client, configured as its documentation advises."""
    if client in OURS:
        _transfer_ours(OURS[client], way, key, file)
    elif client == "obstore":
        _transfer_obstore(way, key, file)
    else:
        import boto3

        s3 = boto3.client("s3")
        if way == "up":
            s3.upload_file(str(file), BUCKET, key)
        else:
            s3.download_file(BUCKET, key, str(file))


def _transfer_ours(options: StoreOptions, way: str, key: str, file: Path) -> None:
    store = open_store(f"s3://{BUCKET}", options)
    if way == "up":
        with store.writer(key, file.stat().st_size) as raw, file.open("rb", buffering=0) as source:
            writer = HashingWriter(raw)
            piece = bytearray(PIECE_BYTES)
            while count := source.readinto(piece):
                writer.write(memoryview(piece)[:count])
        store.put(f"{key}.sha256", writer.sha256.encode())
    else:
        size = store.size(key)
        assert size is not None
        download(store, key, size, store.get(f"{key}.sha256").decode(), file)


def _transfer_obstore(way: str, key: str, file: Path) -> None:
    import obstore
    from obstore.store import S3Store

    store = S3Store(
        BUCKET,
        endpoint=os.environ["AWS_ENDPOINT_URL"],
        client_options={"allow_http": True},
        unsigned_payload=True,
        region="us-east-1",
    )
    if way == "up":
        obstore.put(store, key, file, chunk_size=PIECE_BYTES, max_concurrency=4)
        return
    with file.open("wb", buffering=0) as target:
        for block in obstore.get(store, key).stream(min_chunk_size=PIECE_BYTES):
            target.write(block)


def write_random(path: Path, num_bytes: int) -> None:
    """Bytes that do not compress."""
    block = os.urandom(PIECE_BYTES)
    with path.open("wb") as file:
        for begin in range(0, num_bytes, PIECE_BYTES):
            file.write(begin.to_bytes(8, "little") + block[8 : min(PIECE_BYTES, num_bytes - begin)])


if __name__ == "__main__":
    main()
