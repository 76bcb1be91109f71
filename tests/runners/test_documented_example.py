"""The example of docs/releases.md for one rank, as it stands there, on the fake of TensorRT and one of CUDA's runtime."""

from __future__ import annotations

import ctypes
import enum
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.runners.test_engine_runner import expected
from tests.support.fake_nccl import FakeDevice
from tests.support.fake_tensorrt import FakeTensorRT

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "releases.md").read_text()
(EXAMPLE,) = [
    block for block in re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL) if "set_tensor_address" in block
]
PROMPT = [1, 17, 99, 3, 42]


class Error(enum.Enum):
    cudaSuccess = 0  # noqa: N815


class Kind(enum.Enum):
    cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost = 1, 2  # noqa: N815


def fake_cuda(device: FakeDevice) -> ModuleType:
    """`cuda.bindings.runtime` on memory of this process."""

    def copy(target: int, source: int, num_bytes: int, kind: Kind) -> tuple[Error]:
        device.view(target if kind is Kind.cudaMemcpyHostToDevice else source, num_bytes)  # it is the device's, and large enough
        ctypes.memmove(target, source, num_bytes)
        return (Error.cudaSuccess,)

    module = ModuleType("cuda.bindings.runtime")
    functions: dict[str, Any] = {
        "cudaError_t": Error,
        "cudaMemcpyKind": Kind,
        "cudaStreamCreate": lambda: (Error.cudaSuccess, device.stream),
        "cudaStreamSynchronize": lambda stream: (Error.cudaSuccess,),
        "cudaMalloc": lambda num_bytes: (Error.cudaSuccess, device.allocate(num_bytes)),
        "cudaMemset": lambda address, value, num_bytes: (Error.cudaSuccess,),
        "cudaMemcpy": copy,
    }
    module.__dict__.update(functions)
    return module


def run_example(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[int]:
    """The tokens that the example prints for the pulled release."""
    device = FakeDevice()
    cuda, bindings = ModuleType("cuda"), ModuleType("cuda.bindings")
    bindings.runtime = fake_cuda(device)  # type: ignore[attr-defined]
    for name, module in {"cuda": cuda, "cuda.bindings": bindings, "cuda.bindings.runtime": bindings.runtime}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", FakeTensorRT(device))  # type: ignore[arg-type]
    monkeypatch.chdir(folder.parent)
    exec(text.replace("engines/", f"{folder.name}/").replace('"tokens": 256', '"tokens": 8'), {})
    return [int(line) for line in capsys.readouterr().out.split()]


def test_example_generates_the_tokens_of_transformers(
    release: Callable[..., Path], tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"prompt = {PROMPT}" in EXAMPLE
    assert run_example(release(1, 1), EXAMPLE, monkeypatch, capsys) == expected(tiny_llama, PROMPT, 16)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        pytest.param("memory[source] if source else int", "int", id="cache-not-shared"),
        pytest.param('"write_indices": [first]', '"write_indices": [0]', id="wrong-slot"),
        pytest.param("assert context.set_optimization_profile_async(profile, stream)", "pass", id="no-profile"),
    ],
)
def test_example_with_a_step_left_out_fails_here_too(
    right: str,
    wrong: str,
    release: Callable[..., Path],
    tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert right in EXAMPLE
    try:
        found = run_example(release(1, 1), EXAMPLE.replace(right, wrong), monkeypatch, capsys)
    except AssertionError:
        return
    assert found != expected(tiny_llama, PROMPT, 16)
