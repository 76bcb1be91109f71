"""NVML without a driver: scripted GPUs, some of which fail to answer."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace


class FakeNvml:
    """The functions of pynvml that the package calls. GPUs by name and UUID; a GPU without a name is lost; None: no driver."""

    class NVMLError(Exception):
        """NVML's base of errors."""

    def __init__(self, gpus: Sequence[tuple[str, str]] | None) -> None:
        self.gpus = gpus
        self.opened = 0

    def nvmlInit(self) -> None:  # noqa: N802
        if self.gpus is None:
            raise self.NVMLError("Driver Not Loaded")
        self.opened += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.opened -= 1

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return "580.65"

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        assert self.opened
        assert self.gpus is not None
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, number: int) -> int:  # noqa: N802
        assert self.gpus is not None
        if not self.gpus[number][0]:
            raise self.NVMLError("GPU is lost")
        return number

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:  # noqa: N802
        assert self.gpus is not None
        return [own for _, own in self.gpus].index(uuid)

    def nvmlDeviceGetName(self, device: int) -> str:  # noqa: N802
        assert self.gpus is not None
        return self.gpus[device][0]

    def nvmlDeviceGetUUID(self, device: int) -> str:  # noqa: N802
        assert self.gpus is not None
        return self.gpus[device][1]

    def nvmlDeviceGetCudaComputeCapability(self, device: int) -> tuple[int, int]:  # noqa: N802
        return 9, device

    def nvmlDeviceGetUtilizationRates(self, device: int) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(gpu=40 + device * 20)

    def nvmlDeviceGetMemoryInfo(self, device: int) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(total=80 * 2**30, used=1000 + device)
