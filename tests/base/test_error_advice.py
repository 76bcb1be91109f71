"""Every error's advice fits its situation: what is said where nothing more is known, and what the cause decides."""

from __future__ import annotations

import ast
import errno
import os
import re
import tomllib
from pathlib import Path

import pytest

from orchestrator.base import errors
from orchestrator.base.errors import (
    BUG,
    OrchestratorError,
    StepFailedError,
    StoreError,
    StoreFullError,
    VerificationError,
    error_classes,
    store_error,
)
from orchestrator.engines import require_version
from orchestrator.planning.facts import Verification
from orchestrator.planning.steps import Cause, Failure, FailureKind
from orchestrator.spec.build import ToleranceSpec
from orchestrator.stores.file import FileStore
from orchestrator.stores.retrying import refusal
from orchestrator.work.verify import compare

ROOT = Path(__file__).resolve().parents[2]


def test_error_without_an_advice_of_its_own_has_that_of_its_class() -> None:
    without = {name for name, cls in error_classes().items() if not cls.default_advice}
    assert without == {OrchestratorError.__name__}


def test_error_of_no_class_is_raised_with_an_advice() -> None:
    """The base class has none: whoever raises it says what to do."""
    for path in (*(ROOT / "orchestrator").rglob("*.py"), *(ROOT / "actors").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == OrchestratorError.__name__:
                assert len(node.args) == 2, f"{path}:{node.lineno}"


def test_exit_codes_are_of_one_class_each() -> None:
    codes = [cls.exit_code for cls in error_classes().values() if cls.__module__ == errors.__name__]
    assert len(codes) == len(set(codes))


@pytest.mark.parametrize(
    ("number", "cls", "words"),
    [
        (errno.ENOSPC, StoreFullError, "Free space"),
        (errno.EDQUOT, StoreFullError, "Free space"),
        (errno.EACCES, StoreError, "right to read and write"),
        (errno.EROFS, StoreError, "read-only"),
        (errno.EIO, StoreError, "kernel's log"),
        (errno.ENOTDIR, StoreError, "A file stands where a folder is needed"),
        (errno.EMFILE, StoreError, "ulimit -n"),
        (errno.ECONNRESET, StoreError, "store's URL"),
    ],
)
def test_advice_on_a_place_that_cannot_be_written_fits_the_cause(number: int, cls: type[StoreError], words: str) -> None:
    error = store_error("cannot write", OSError(number, os.strerror(number)))
    assert type(error) is cls
    assert words in error.advice


def test_advice_on_a_full_disk_is_no_advice_on_the_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StoreFullError) as caught:
        FileStore(tmp_path.as_uri()).put("key", b"data")
    assert caught.value.exit_code == 34
    assert "Free space" in caught.value.advice
    assert "URL" not in caught.value.advice


@pytest.mark.parametrize(
    ("status", "code", "cls", "words"),
    [
        (403, "QuotaExceeded", StoreFullError, "quota"),
        (507, "XMinioStorageFull", StoreFullError, "quota"),
        (403, "AccessDenied", StoreError, "read, write, list and delete"),
        (404, "NoSuchBucket", StoreError, "Create the bucket"),
    ],
)
def test_advice_on_what_a_server_refuses_fits_its_code(status: int, code: str, cls: type[StoreError], words: str) -> None:
    error = refusal(status, code, "no")
    assert type(error) is cls
    assert words in error.advice


@pytest.mark.parametrize(
    ("cause", "cls", "words"),
    [
        (Cause.DISK, StoreFullError, "scratch"),
        (Cause.MEMORY, StepFailedError, "more memory"),
        (Cause.STORE, StepFailedError, "reaches the store"),
        (Cause.WORKER, StepFailedError, "worker's log"),
        (Cause.NODE, StepFailedError, "node was lost"),
        (Cause.PLACE, StepFailedError, "pools of the cluster file"),
        (Cause.UNKNOWN, StepFailedError, "Mend the cause"),
    ],
)
def test_advice_on_a_step_that_lacked_something_names_it(cause: Cause, cls: type[OrchestratorError], words: str) -> None:
    error = Failure(kind=FailureKind.INFRASTRUCTURE, message="lost", cause=cause).to_error("build/rank0")
    assert type(error) is cls
    assert words in error.advice


def test_advice_of_a_steps_own_error_is_kept() -> None:
    failure = Failure.of(StoreError("no bucket", "Create it."))
    assert failure.to_error("verify").advice == "Create it."


@pytest.mark.parametrize(
    ("quantized", "text", "words", "absent"),
    [
        (False, True, "report it", "quantization"),
        (False, False, "report it", "quantization"),
        (True, True, "raise the tolerance", "config.json"),
        (True, False, "no tokenizer", "config.json"),
    ],
)
def test_advice_on_a_verification_above_tolerance_fits_what_was_verified(
    quantized: bool, text: bool, words: str, absent: str
) -> None:
    found = Verification(num_positions=1, max_absolute_error=1.0, max_relative_error=1.0, mean_kl=1.0, top1_agreement=0.0)
    with pytest.raises(VerificationError) as caught:
        compare.check(found, ToleranceSpec(), compare.advice(quantized=quantized, text=text))
    assert words in caught.value.advice
    assert absent not in caught.value.advice
    assert caught.value.advice.startswith("Nothing was published.")


@pytest.mark.parametrize(("backend", "package"), [("tensorrt", "tensorrt-cu13"), ("tensorrt_rtx", "tensorrt-rtx-cu13")])
def test_advice_on_a_missing_tensorrt_names_the_package_of_our_cuda(
    backend: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.engines.installed_packages", lambda name: {})
    with pytest.raises(OrchestratorError) as caught:
        require_version(backend, None)
    (extra,) = re.findall(r"'trt-orchestrator\[(\w+)\]'", caught.value.advice)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert any(text.startswith(f"{package}>=") for text in extras[extra])


def test_advice_where_no_user_is_at_fault_is_to_report_it() -> None:
    assert "report it" in BUG
