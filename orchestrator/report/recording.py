"""What is kept of a build besides its release: its events in the store while it runs, and the report of it at the end."""

from __future__ import annotations

import errno
import html
import os
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import Self

from orchestrator.base.errors import OrchestratorError, StoreError, store_error
from orchestrator.events.builds import BuildEvent, Published
from orchestrator.planning.plan import Plan
from orchestrator.releases.manifest import Manifest
from orchestrator.report import EventListener
from orchestrator.report.html import REPORT, Told, render
from orchestrator.report.journal import Journal
from orchestrator.report.lines import Clock
from orchestrator.report.story import Story
from orchestrator.run.driver import Result
from orchestrator.stores.store import ObjectMissingError, Store


class Recording:
    """Of one run. A build that raises inside the block leaves its error to those who watch, and a report at `report` if given."""

    def __init__(self, store: Store, plan: Plan, report: Path | None, clock: Clock = time.time) -> None:
        self.listener = EventListener(self._tell, clock)
        self._plan = plan
        self._report = report
        self._clock = clock
        self._story = Story()
        self._journal = Journal(store, plan.build_key, clock)
        self._result: Result | None = None

    def ended(self, result: Result) -> None:
        """No step is left to run."""
        self._result = result

    def page(self, manifest: Manifest) -> bytes:
        """The report of a build that is going to be published with this manifest and the report itself."""
        data = drawn(self._told(manifest))
        if self._report is not None:
            write_report(self._report, data)
        return data

    def published(self, address: str, manifest: Manifest) -> None:
        """The last word."""
        numbers = manifest.verification.model_dump() if manifest.verification else None
        self._journal.tell(Published(address, len(self._result.ran) if self._result else 0, numbers, self._clock()))

    def __enter__(self) -> Self:
        self._journal.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._journal.__exit__(kind, error, trace)
        if error is not None and self._report is not None:
            write_report(self._report, drawn(self._told(None, error)))

    def _told(self, manifest: Manifest | None, error: BaseException | None = None) -> Told:
        problem = error.message if isinstance(error, OrchestratorError) else type(error).__name__ if error else ""
        result = self._result
        if result is None:
            return Told(self._plan, {}, frozenset(), self._story, manifest, problem=problem)
        return Told(
            self._plan, result.outcomes, result.ran, self._story, manifest, result.failures, result.lost, problem
        )  # fmt: skip

    def _tell(self, event: BuildEvent) -> None:
        self._story.tell(event)
        self._journal.tell(event)


def drawn(told: Told) -> bytes:
    """The report. Should it fail to draw, a page that says so: engines that took hours are not to be lost for a picture."""
    try:
        return render(told)
    except Exception:
        words = html.escape(traceback.format_exc())
        page = (
            f"<!DOCTYPE html><title>Build report</title><p>The report could not be drawn. Please report this bug:<pre>{words}</pre>"
        )
        return page.encode()


def check_report(path: Path) -> None:
    """Raises StoreError when no report can be written there: before the build, not after it."""
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise StoreError(f"cannot write the report to {path}", "Give --report a file in a folder that exists.")
    if not os.access(path if path.exists() else path.resolve().parent, os.W_OK, effective_ids=True):
        raise store_error(f"cannot write the report to {path}", PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def write_report(path: Path, data: bytes) -> None:
    """Raises StoreError when it cannot be written there."""
    try:
        path.write_bytes(data)
    except OSError as error:
        raise store_error(f"cannot write the report to {path}", error) from None


def fetch_report(store: Store, prefix: str, manifest: Manifest, path: Path) -> None:
    """The published report of an earlier build. Raises StoreError when it has none."""
    for file in manifest.documents:
        if file.path == REPORT:
            try:
                write_report(path, store.get(prefix + file.key))
            except ObjectMissingError:
                break
            return
    raise StoreError(f"{manifest.name} {manifest.version} was published without a report", "Leave --report out.")
