"""The progress of a transfer, by a clock that the test turns."""

from __future__ import annotations

import io

from rich.console import Console

from orchestrator.releases.manifest import Chunks, FileRecord
from orchestrator.report.transfer import TransferView


class _Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def _view(*, terminal: bool, names: bool = False) -> tuple[TransferView, _Clock, io.StringIO]:
    clock, text = _Clock(), io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=120, color_system=None)
    return TransferView(console, names=names, clock=clock), clock, text


def test_transfer_without_terminal_prints_bytes_rate_and_time_left_at_intervals() -> None:
    view, clock, text = _view(terminal=False)
    with view:
        view.on_begin(3, 10_000_000_000)
        for _ in range(25):  # 25 s at 100 MB/s
            clock.now += 1.0
            view.on_bytes(100_000_000)
    assert text.getvalue().splitlines() == [
        "0 of 3 files  1.0 GB of 10.0 GB  100.0 MB/s  90 s left",
        "0 of 3 files  2.0 GB of 10.0 GB  100.0 MB/s  80 s left",
    ]


def test_transfer_that_slows_down_shows_the_new_rate() -> None:
    view, clock, _ = _view(terminal=False)
    view.on_begin(1, 10_000_000_000)
    for rate in (100_000_000, 10_000_000):
        for _ in range(40):
            clock.now += 1.0
            view.on_bytes(rate)
    assert view.note() == "4.4 GB of 10.0 GB  10.0 MB/s  9 min 20 s left"


def test_transfer_on_a_terminal_draws_a_bar_and_clears_it() -> None:
    view, clock, text = _view(terminal=True)
    with view:
        view.on_begin(2, 4_000_000)
        clock.now += 2.0
        view.on_bytes(1_000_000)
        view._progress.refresh()
        shown = text.getvalue()
    assert "0 of 2 files" in shown
    assert "1.0 MB of 4.0 MB  500.0 kB/s  6.0 s left" in shown
    assert text.getvalue().endswith("\x1b[2K") or "\x1b[?25h" in text.getvalue()


def test_transfer_that_ends_within_the_interval_prints_names_alone() -> None:
    view, clock, text = _view(terminal=False, names=True)
    file = FileRecord(
        path="a[/b].bin", key="k", role="engine", media_type="x", num_bytes=5, sha256="ab" * 32, chunks=Chunks(sha256=("ab" * 32,))
    )
    with view:
        view.on_begin(1, 5)
        clock.now += 100.0
        view.on_bytes(5)
        view.on_file(file)
    assert text.getvalue() == f"  {'ab' * 8}  a[/b].bin\n"


def test_transfer_before_anything_has_come_shows_no_rate() -> None:
    view, clock, _ = _view(terminal=False)
    view.on_begin(1, 5_000)
    clock.now += 60.0
    view.on_bytes(0)
    assert view.note() == "0 B of 5.0 kB"
