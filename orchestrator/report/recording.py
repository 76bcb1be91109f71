"""Records of a build besides its release: its events in the store while it runs, and its report at the end."""

from __future__ import annotations

import contextlib
import errno
import html
import os
import traceback
from collections.abc import Iterator
from pathlib import Path

from orchestrator.base.errors import OrchestratorError, StoreError, store_error
from orchestrator.events import Event
from orchestrator.planning.plan import Plan
from orchestrator.releases.manifest import Manifest
from orchestrator.report.html import REPORT, Told, render
from orchestrator.report.journal import Journal
from orchestrator.report.story import Story
from orchestrator.scheduling.driver import Result
from orchestrator.stores.store import ObjectMissingError, Store


class Recording:
    """Record of one run: a listener that stores its events and collects the content of its report."""

    def __init__(self, plan: Plan, journal: Journal, report: Path | None) -> None:
        self.result: Result | None = None
        """Result of the steps; None while they run."""
        self._plan = plan
        self._journal = journal
        self._report = report
        self._story = Story()

    def tell(self, event: Event) -> None:
        """Record an event."""
        self._story.tell(event)
        self._journal.tell(event)

    def page(self, manifest: Manifest | None, error: BaseException | None = None) -> bytes:
        """Render the report of a build that will be published with this manifest and the report, or that has failed."""
        problem = error.message if isinstance(error, OrchestratorError) else type(error).__name__ if error else ""
        result = self.result or Result({}, frozenset())
        told = Told(self._plan, result.outcomes, result.ran, self._story, manifest, result.failures, result.lost, problem)
        data = drawn(told)
        if self._report is not None:
            write_report(self._report, data)
        return data


@contextlib.contextmanager
def recorded(store: Store, plan: Plan, report: Path | None) -> Iterator[Recording]:
    """Record one run. An error inside the block goes to watchers and, if given, into a report at `report`."""
    journal = Journal(store, plan.build_key)
    recording = Recording(plan, journal, report)
    try:
        with journal:
            yield recording
    except BaseException as error:
        if report is not None:
            recording.page(None, error)
        raise


def drawn(told: Told) -> bytes:
    """Render the report, or a page about its failure: an error in a picture must not lose engines that took hours."""
    try:
        return render(told)
    except Exception:
        words = html.escape(traceback.format_exc())
        page = (
            f"<!DOCTYPE html><title>Build report</title><p>The report could not be drawn. Please report this bug:<pre>{words}</pre>"
        )
        return page.encode()


def check_report(path: Path) -> None:
    """Check before the build that a report can be written to `path`. Raises StoreError."""
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise StoreError(f"cannot write the report to {path}", "Give --report a file in a folder that exists.")
    if not os.access(path if path.exists() else path.resolve().parent, os.W_OK, effective_ids=True):
        raise store_error(f"cannot write the report to {path}", PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def write_report(path: Path, data: bytes) -> None:
    """Write a report. Raises StoreError."""
    try:
        path.write_bytes(data)
    except OSError as error:
        raise store_error(f"cannot write the report to {path}", error) from None


def fetch_report(store: Store, prefix: str, manifest: Manifest, path: Path) -> None:
    """Copy the published report of an earlier build to `path`. Raises StoreError when it has none."""
    for file in manifest.documents:
        if file.path == REPORT:
            try:
                write_report(path, store.get(prefix + file.key))
            except ObjectMissingError:
                break
            return
    raise StoreError(f"{manifest.name} {manifest.version} was published without a report", "Omit --report.")
