"""Picture of the plan: a box per kind and stage with a square for each step, and arrows for needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from orchestrator.events import stage_of
from orchestrator.planning.plan import Plan
from orchestrator.planning.steps import Kind, Step
from orchestrator.report.html.svg import element, picture, shorten, text, title
from orchestrator.report.tables import format_bytes, format_seconds

_COLUMNS = {Kind.MINIATURE: 0, Kind.REFERENCE: 1, Kind.CALIBRATE: 0, Kind.CONVERT: 1, Kind.BUILD: 2, Kind.VERIFY: 2, Kind.EXPORT: 2}
_RELEASE = 3
_WIDTH, _GAP, _ROW_GAP = 210, 62, 18
_SQUARE, _SQUARES, _MOST_SQUARES = 13, 14, 42
_MOST_ROWS = 8
"""Most stages to draw separately. More are drawn as one."""


@dataclass
class _Box:
    """A box of the picture."""

    kind: Kind
    row: int
    steps: list[Step] = field(default_factory=list)
    x: float = 0
    y: float = 0

    @property
    def height(self) -> float:
        lines = -(-min(len(self.steps), _MOST_SQUARES) // _SQUARES)
        return 46 + lines * (_SQUARE + 2) + 8


def plan_picture(plan: Plan, state_of: Callable[[str], str], seconds: Mapping[str, float]) -> str:
    """Draw the plan. `state_of`: run, cached, failed or waiting, for a digest; `seconds`: duration of ended steps by digest."""
    boxes, merged = _boxes(plan)
    width, height = _place(boxes)
    release = (width - _WIDTH, height / 2 - 27)
    content = [
        *_arrows(plan, boxes, release),
        *(_draw(box, merged, state_of, seconds) for box in boxes.values()),
        _release(plan, *release),
    ]
    told = "; ".join(f"{box.kind.value}: {len(box.steps)} steps" for box in boxes.values())
    return picture(width, height, "Plan", f"The steps of the build and what they need. {told}.", content)


def _boxes(plan: Plan) -> tuple[dict[tuple[Kind, int], _Box], bool]:
    """Return the boxes by kind and row, and whether stages were merged."""
    merged = max((_stage(step) for step in plan.steps), default=0) >= _MOST_ROWS
    found: dict[tuple[Kind, int], _Box] = {}
    for step in plan.steps:
        key = _key(step, merged)
        found.setdefault(key, _Box(*key)).steps.append(step)
    return found, merged


def _key(step: Step, merged: bool) -> tuple[Kind, int]:
    return step.kind, 0 if merged else _stage(step)


def _stage(step: Step) -> int:
    stage = step.options.get("stage")
    if isinstance(stage, dict):
        return int(stage.get("pp_rank", 0))
    return stage_of(step.name) or 0


def _place(boxes: Mapping[tuple[Kind, int], _Box]) -> tuple[float, float]:
    """Place every box; returns the picture's width and height in pixels."""
    used = sorted({_COLUMNS[box.kind] for box in boxes.values()} | {_RELEASE})
    x_of = {column: number * (_WIDTH + _GAP) for number, column in enumerate(used)}
    y = 4.0
    for row in sorted({box.row for box in boxes.values()}):
        bottoms = []
        for column in used:
            at = y
            for box in boxes.values():
                if box.row == row and _COLUMNS[box.kind] == column:
                    box.x, box.y = x_of[column], at
                    at += box.height + _ROW_GAP
            bottoms.append(at)
        y = max(bottoms) + 8
    return x_of[_RELEASE] + _WIDTH, max(y - 8 - _ROW_GAP + 4, 66.0)


def _arrows(plan: Plan, boxes: Mapping[tuple[Kind, int], _Box], release: tuple[float, float]) -> Iterator[str]:
    of = {step.digest: key for key, box in boxes.items() for step in box.steps}
    pairs = {(of[need], of[step.digest]): None for step in plan.steps for need in step.needs if of[need] != of[step.digest]}
    for begin, end in pairs:
        yield _arrow(boxes[begin], boxes[end])
    needed = {begin for begin, _ in pairs}
    for key, box in boxes.items():
        if key not in needed:
            yield _curve(box.x + _WIDTH, box.y + box.height / 2, release[0], release[1] + 27)


def _arrow(begin: _Box, end: _Box) -> str:
    if begin.x < end.x:
        return _curve(begin.x + _WIDTH, begin.y + begin.height / 2, end.x, end.y + end.height / 2)
    x, top, bottom = begin.x + _WIDTH, begin.y + begin.height * 0.7, end.y + end.height * 0.3  # along the right side
    return _head(x, bottom, -1) + element(
        "path", class_="arrow", d=f"M{x:.0f} {top:.0f}C{x + 40:.0f} {top:.0f} {x + 40:.0f} {bottom:.0f} {x:.0f} {bottom:.0f}"
    )


def _curve(x: float, y: float, to_x: float, to_y: float) -> str:
    middle = to_x - _GAP / 2
    return _head(to_x, to_y, 1) + element(
        "path",
        class_="arrow",
        d=f"M{x:.0f} {y:.0f}H{middle - 24:.0f}C{middle:.0f} {y:.0f} {middle:.0f} {to_y:.0f} {to_x:.0f} {to_y:.0f}",
    )


def _head(x: float, y: float, direction: int) -> str:
    back = -7 * direction
    return element("path", class_="head", d=f"M{x:.0f} {y:.0f}l{back} -4v8z")


def _draw(box: _Box, merged: bool, state_of: Callable[[str], str], seconds: Mapping[str, float]) -> str:
    frame = element("rect", x=box.x + 0.5, y=box.y + 0.5, width=_WIDTH - 1, height=box.height - 1, rx=8, class_="box")
    band = element("rect", x=box.x + 0.5, y=box.y + 0.5, width=5, height=box.height - 1, rx=2.5, class_=f"fill {box.kind.value}")
    numbered = box.kind not in (Kind.MINIATURE, Kind.REFERENCE) and not merged
    word = "part" if box.kind is Kind.CALIBRATE else "stage"
    name = f"{box.kind.value} · {word} {box.row}" if numbered else box.kind.value
    took = sum(seconds.get(step.digest, 0.0) for step in box.steps)
    count = f"{len(box.steps)} step{'s' if len(box.steps) != 1 else ''}"
    note = f"{count}, {format_seconds(took)}" if took else count
    squares = [_square(box, number, step, state_of) for number, step in enumerate(box.steps[:_MOST_SQUARES])]
    rest = len(box.steps) - _MOST_SQUARES
    more = text(f"+{rest:,}", box.x + _WIDTH - 10, box.y + 36, "small", "end") if rest > 0 else ""
    names = text(name, box.x + 16, box.y + 19, "strong") + text(note, box.x + 16, box.y + 36, "small")
    return element("g", frame + band + names + more + "".join(squares))


def _square(box: _Box, number: int, step: Step, state_of: Callable[[str], str]) -> str:
    line, place = divmod(number, _SQUARES)
    state = state_of(step.digest)
    told = f"{step.name}: {state}, reads {format_bytes(step.estimate.read_bytes)}, writes {format_bytes(step.estimate.write_bytes)}"
    return element(
        "rect", title(told), x=box.x + 16 + place * _SQUARE, y=box.y + 45 + line * (_SQUARE + 2), width=_SQUARE - 3,
        height=_SQUARE - 3, rx=2, class_=f"{box.kind.value} {state}",
    )  # fmt: skip


def _release(plan: Plan, x: float, y: float) -> str:
    spec = plan.spec.release
    frame = element("rect", x=x + 0.5, y=y + 0.5, width=_WIDTH - 1, height=53, rx=8, class_="box release")
    name = text("release", x + 16, y + 20, "strong")
    return element("g", frame + name + text(shorten(f"{spec.name} {spec.version}", _WIDTH - 30), x + 16, y + 40, "small"))
