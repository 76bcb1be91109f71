"""GPUs of a machine: as NVML reports them, and as CUDA_VISIBLE_DEVICES chooses among them."""

from __future__ import annotations

import json
import sys

import pytest

from orchestrator.engines.device import Gpu, all_gpus, select, visible_gpus
from orchestrator.work.probe import probe_here
from tests.support.nvml import FakeNvml

GPUS = (Gpu("NVIDIA H200", "9.0", 80 * 2**30, "GPU-a"), Gpu("NVIDIA L4", "9.1", 80 * 2**30, "GPU-b"))


def fake(monkeypatch: pytest.MonkeyPatch, *names: str) -> FakeNvml:
    nvml = FakeNvml([(name, uuid) for name, uuid in zip(names, ("GPU-a", "GPU-b", "GPU-c"), strict=False)])
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    return nvml


def test_gpus_are_those_of_nvml_without_the_lost_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = fake(monkeypatch, "NVIDIA H200", "NVIDIA L4", "")
    assert all_gpus() == GPUS
    assert nvml.opened == 0


def test_visible_gpus_are_those_that_cuda_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, "NVIDIA H200", "NVIDIA L4")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert visible_gpus() == GPUS[1:]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_gpus() == GPUS


def test_machine_without_a_driver_has_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(None))
    assert visible_gpus() == ()


def test_select_stops_at_the_first_unknown_device_as_cuda_does() -> None:
    assert select(GPUS, "1,0") == (GPUS[1], GPUS[0])
    assert select(GPUS, "GPU-b") == (GPUS[1],)
    assert select(GPUS, "0,-1,1") == (GPUS[0],)
    assert select(GPUS, "") == ()


def test_probe_reports_every_gpu_and_the_driver_whatever_cuda_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, "NVIDIA H200", "NVIDIA L4")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = json.loads(probe_here("memory://probe-of-gpus", "{}", None, []))
    assert [gpu["name"] for gpu in found["devices"]] == ["NVIDIA H200", "NVIDIA L4"]
    assert found["driver"] == "580.65"
