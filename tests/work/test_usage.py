"""What a step takes of its node: sampled with a fake clockless reader, a fake NVML, and from this very process."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from orchestrator.work.usage import MachineReader, Sample, Sampler
from tests.support.nvml import FakeNvml


class Scripted:
    """Tells the same samples again and again, and says when it has told all of them."""

    def __init__(self, samples: list[Sample]) -> None:
        self._samples = samples
        self._told = 0
        self._calls = 0
        self.all_told = threading.Event()

    def sample(self) -> Sample:
        found = self._samples[self._told % len(self._samples)]
        self._told += 1
        if self._told >= len(self._samples):
            self.all_told.set()
        return found

    def cpu_seconds(self) -> float:
        self._calls += 1
        return 5.0 * self._calls

    def host_seconds(self) -> tuple[int, int]:
        return 30 * self._calls, 100 * self._calls


def test_sampler_keeps_peaks_and_means() -> None:
    reader = Scripted([Sample(10, (0.5, 0.0), (100, 7)), Sample(30, (1.0, 0.5), (200, 7)), Sample(20, (0.5, 0.5), (50, 7))])
    sampler = Sampler(reader, seconds=0.001)
    with sampler:
        assert reader.all_told.wait(10)
    found = sampler.usage()
    assert (found.peak_memory_bytes, found.peak_gpu_memory_bytes) == (30, 200)
    assert (found.cpu_seconds, found.host_cpu) == (5.0, 0.3)
    assert found.gpu_utilization is not None
    assert 0.2 < found.gpu_utilization < 0.8
    assert found.num_samples >= 3


def test_sampler_whose_reader_fails_does_not_fail_the_step() -> None:
    class Broken(Scripted):
        def sample(self) -> Sample:
            self.all_told.set()
            raise OSError("gone")

    sampler = Sampler(Broken([]), seconds=0.001)
    with sampler:
        pass
    assert sampler.usage().num_samples == 0


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, ((0.4, 0.6), (1000, 1001))),
        ("1", ((0.6,), (1001,))),
        ("GPU-b", ((0.6,), (1001,))),
        ("", ((), ())),
        ("GPU-unknown", ((), ())),
    ],
)
def test_reader_samples_the_devices_that_the_step_sees(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: tuple[tuple[float, ...], tuple[int, ...]]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml([("NVIDIA H200", "GPU-a"), ("NVIDIA L4", "GPU-b")]))
    found = MachineReader().sample()
    assert (found.gpu_utilizations, found.gpu_memory_bytes) == expected


def test_reader_without_a_driver_has_no_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(None))
    found = MachineReader().sample()
    assert (found.gpu_utilizations, found.gpu_memory_bytes) == ((), ())
    assert found.memory_bytes > 10**6


def test_reader_counts_the_memory_of_children() -> None:
    reader = MachineReader()
    before = reader.sample().memory_bytes
    program = "import sys; data = bytearray(b'1') * 200_000_000; print('ready', flush=True); sys.stdin.read()"
    child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        assert reader.sample().memory_bytes - before > 150_000_000
