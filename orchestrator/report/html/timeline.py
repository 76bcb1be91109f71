"""Picture of the attempts over time by node: each as a bar, or, for thousands, how many ran at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from orchestrator.report.html.svg import element, picture, shorten, text, title
from orchestrator.report.story import Attempt
from orchestrator.report.tables import format_seconds

_WIDTH, _LEFT, _RIGHT, _TOP = 1080, 150, 12, 30
_LANE, _BAR, _NODE_GAP = 22, 17, 10
_MOST_BARS, _MOST_NODES = 600, 40
_BINS, _AREA = 180, 30
_STEPS = [
    *(0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30), *(60 * minutes for minutes in (1, 2, 5, 10, 15, 30)),
    *(3600 * hours for hours in (1, 2, 3, 6, 12, 24, 48, 120)),
]  # fmt: skip
_WORDS = {"succeeded": "ran", "failed": "failed", "moved": "went to another node", "running": "did not end"}


def timeline_picture(attempts: Sequence[Attempt], began: float, ended: float) -> str:
    """Draw from `began` to `ended`, in seconds since 1970; empty without attempts."""
    if not attempts:
        return ""
    span = max(ended - began, 1e-3)
    nodes: dict[str, list[Attempt]] = {}
    for attempt in attempts:
        nodes.setdefault(attempt.node or "?", []).append(attempt)
    rows = list(_bars(nodes, began, span) if len(attempts) <= _MOST_BARS else _areas(nodes, began, span))
    height = _TOP + sum(row_height for row_height, _ in rows) + 6
    content = list(_axis(span, height))
    y = float(_TOP)
    for row_height, draw in rows:
        content.append(element("g", draw, transform=f"translate(0 {y:.0f})"))
        y += row_height
    failed = sum(attempt.state == "failed" for attempt in attempts)
    told = f"{len(attempts)} attempts on {len(nodes)} nodes in {format_seconds(span)}, {failed} of them failed."
    return picture(_WIDTH, height, "Timeline", told, content)


def _x(seconds: float, span: float) -> float:
    return _LEFT + seconds / span * (_WIDTH - _LEFT - _RIGHT)


def time_ticks(span: float) -> list[float]:
    """Return at most nine round times from 0 to `span` seconds."""
    step = next((step for step in _STEPS if span / step <= 8), span / 8)
    return [number * step for number in range(int(span / step) + 1)]


def _axis(span: float, height: float) -> Iterator[str]:
    for tick in time_ticks(span):
        x = _x(tick, span)
        yield element("line", x1=x, x2=x, y1=_TOP - 6, y2=height, class_="grid")
        yield text(format_seconds(tick) if tick else "0", x, _TOP - 12, "small", "middle" if tick else "start")


def _bars(nodes: dict[str, list[Attempt]], began: float, span: float) -> Iterator[tuple[float, str]]:
    """Yield height and drawing of each node, with as many lanes as attempts ran at once."""
    for node, mine in nodes.items():
        lanes: list[float] = []
        drawn = []
        for attempt in mine:
            lane = next((number for number, free in enumerate(lanes) if free <= attempt.began + 1e-3), len(lanes))
            lanes[lane : lane + 1] = [attempt.ended]
            drawn.append(_bar(attempt, lane, began, span))
        height = len(lanes) * _LANE + _NODE_GAP
        line = element("line", x1=0, x2=_WIDTH, y1=height - _NODE_GAP / 2, y2=height - _NODE_GAP / 2, class_="grid")
        yield height, line + text(shorten(node, _LEFT - 12), 0, 13, "strong") + "".join(drawn)


def _bar(attempt: Attempt, lane: int, began: float, span: float) -> str:
    x, end = _x(attempt.began - began, span), _x(attempt.ended - began, span)
    again = f", attempt {attempt.number}" if attempt.number > 1 else ""
    told = f"{attempt.step}{again}: {_WORDS[attempt.state]}, {format_seconds(attempt.ended - attempt.began)}"
    state = "retried" if attempt.state == "succeeded" and attempt.number > 1 else attempt.state
    bar = element(
        "rect", title(told + (f": {attempt.message}" if attempt.message else "")), x=x, y=lane * _LANE, width=max(end - x - 1, 2.0),
        height=_BAR, rx=3, class_=f"{attempt.kind} {state}",
    )  # fmt: skip
    label = shorten(attempt.step.partition("/")[2] or attempt.step, end - x - 12)
    return bar + (text(label, x + 6, lane * _LANE + 12.5, f"on {state}") if label else "")


def _areas(nodes: dict[str, list[Attempt]], began: float, span: float) -> Iterator[tuple[float, str]]:
    """Yield height and drawing of each node and kind: the number of simultaneous attempts over time."""
    busiest = sorted(nodes, key=lambda node: -len(nodes[node]))[:_MOST_NODES]
    groups = {node: nodes[node] for node in nodes if node in busiest}
    others = [attempt for node, mine in nodes.items() if node not in busiest for attempt in mine]
    if others:
        groups[f"{len(nodes) - len(busiest)} other nodes"] = others
    for node, mine in groups.items():
        kinds = list(dict.fromkeys(attempt.kind for attempt in mine))
        for number, kind in enumerate(kinds):
            these = [attempt for attempt in mine if attempt.kind == kind]
            name = text(shorten(node, _LEFT - 12), 0, 12, "strong") if number == 0 else ""
            yield _AREA + (_NODE_GAP if number == len(kinds) - 1 else 2), name + _area(kind, these, began, span)


def _area(kind: str, attempts: Sequence[Attempt], began: float, span: float) -> str:
    counts = [0.0] * _BINS
    for attempt in attempts:
        first, last = ((time - began) / span * _BINS for time in (attempt.began, attempt.ended))
        for number in range(max(int(first), 0), min(int(last), _BINS - 1) + 1):
            counts[number] += max(min(last, number + 1) - max(first, number), 0.0)
    most = max(max(counts), 1e-9)
    step = (_WIDTH - _LEFT - _RIGHT) / _BINS
    points = [f"M{_LEFT} {_AREA}"]
    points += [
        f"V{_AREA - count / most * (_AREA - 4):.1f}H{_LEFT + (number + 1) * step:.1f}" for number, count in enumerate(counts)
    ]
    failed = sum(attempt.state == "failed" for attempt in attempts)
    told = f"{kind}: {len(attempts)} attempts, {failed} failed, up to {most:.0f} at once"
    label = f"{kind}, up to {most:.0f}"
    shown = text(label, _LEFT - 10, _AREA - 3, "small", "end") if len(label) < 22 else ""
    return element("path", title(told), d="".join(points) + f"V{_AREA}Z", class_=f"fill {kind}") + shown
