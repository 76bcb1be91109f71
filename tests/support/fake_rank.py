"""The command of the engines' runner on the fakes: what torchrun starts in a test, and the libraries of a Ray actor there."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from orchestrator.engines.record import EngineRecord
from orchestrator.runners.tensorrt.__main__ import main
from orchestrator.runners.tensorrt.libraries import Libraries
from tests.support import fake_nccl
from tests.support.fake_nccl import FakeDevice
from tests.support.fake_tensorrt import FakeTensorRT


def open_fakes(engine: EngineRecord, local_rank: int = 0, *, alone: bool = False) -> Libraries:
    """As `open_libraries`."""
    device = FakeDevice()
    return Libraries(FakeTensorRT(device), None if alone else fake_nccl, device)


def open_fakes_or_die(engine: EngineRecord, local_rank: int = 0, *, alone: bool = False) -> Libraries:
    """As `open_fakes`; the first process that makes the folder DYING ends in the midst of a generation."""
    libraries = open_fakes(engine, local_rank, alone=alone)
    upload, count = libraries.device.upload, [0]

    def counted(address: int, array: object) -> None:
        count[0] += 1
        if count[0] == 13:
            os._exit(3)
        upload(address, array)

    with contextlib.suppress(FileExistsError):
        Path(os.environ["DYING"]).mkdir()
        libraries.device.upload = counted  # type: ignore[method-assign]
    return libraries


if __name__ == "__main__":
    sys.exit(main(open_rank=open_fakes))
