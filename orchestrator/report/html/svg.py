"""SVG as a string, escaped where it is put together. Pictures carry classes, not colours: the page's style has those."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

CHARACTER = 7.3
"""Pixels of one character of the pictures' text, on average."""


def element(name: str, content: str = "", **attributes: object) -> str:
    """An element. `content` is markup already; attributes are escaped, '_' in their names stands for '-', `class_` for class."""
    pairs = [(key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items() if value is not None]
    written = "".join(f' {key}="{escape(_plain(value))}"' for key, value in pairs)
    return f"<{name}{written}>{content}</{name}>" if content else f"<{name}{written}/>"


def text(content: str, x: float, y: float, class_: str = "", anchor: str | None = None) -> str:
    """Escaped text whose baseline is at `y`; `anchor` is start, middle or end."""
    return element("text", escape(content), x=x, y=y, class_=class_ or None, text_anchor=anchor)


def title(content: str) -> str:
    """What a pointer and a screen reader are told of the element around it."""
    return element("title", escape(content))


def picture(width: float, height: float, name: str, told: str, content: Iterable[str]) -> str:
    """A whole picture of so many pixels; `name` and `told` say to a screen reader what it shows."""
    identity = "".join(letter if letter.isalnum() else "-" for letter in name.lower())
    head = element("title", escape(name), id=f"{identity}-title") + element("desc", escape(told), id=f"{identity}-desc")
    return element(
        "svg", head + "".join(content), xmlns="http://www.w3.org/2000/svg", width=width, height=height,
        viewBox=f"0 0 {_plain(width)} {_plain(height)}", role="img", aria_labelledby=f"{identity}-title {identity}-desc",
    )  # fmt: skip


def shorten(content: str, pixels: float) -> str:
    """As much of a text as has room, its end where a name tells most; nothing when not even a few letters have."""
    room = int(pixels / CHARACTER)
    if len(content) <= room:
        return content
    return "…" + content[len(content) - room + 1 :] if room >= 4 else ""


def ticks(most: float, about: int = 6) -> list[float]:
    """Round values from 0 to at most `most`."""
    if most <= 0:
        return [0.0]
    step = 10.0 ** _floor_log(most / about)
    for factor in (1, 2, 5, 10):
        if most / (step * factor) <= about:
            step *= factor
            break
    return [round(number * step, 10) for number in range(int(most / step + 1e-9) + 1)]


def _floor_log(value: float) -> int:
    import math

    return math.floor(math.log10(value))


def _plain(value: object) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
