"""SVG as strings, escaped during assembly. Pictures have classes instead of colours; the page's style defines those."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

CHARACTER = 7.3
"""Average width of a character of the pictures' text, in pixels."""


def element(name: str, content: str = "", **attributes: object) -> str:
    """Return an element. `content` is markup; attributes are escaped, '_' in their names becomes '-', `class_` becomes class."""
    pairs = [(key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items() if value is not None]
    written = "".join(f' {key}="{escape(_plain(value))}"' for key, value in pairs)
    return f"<{name}{written}>{content}</{name}>" if content else f"<{name}{written}/>"


def text(content: str, x: float, y: float, class_: str = "", anchor: str | None = None) -> str:
    """Return escaped text with its baseline at `y`. `anchor`: start, middle or end."""
    return element("text", escape(content), x=x, y=y, class_=class_ or None, text_anchor=anchor)


def title(content: str) -> str:
    """Return the description of the enclosing element for pointers and screen readers."""
    return element("title", escape(content))


def picture(width: float, height: float, name: str, told: str, content: Iterable[str]) -> str:
    """Return a whole picture, sizes in pixels. `name` and `told` describe it to screen readers."""
    identity = "".join(letter if letter.isalnum() else "-" for letter in name.lower())
    head = element("title", escape(name), id=f"{identity}-title") + element("desc", escape(told), id=f"{identity}-desc")
    return element(
        "svg", head + "".join(content), xmlns="http://www.w3.org/2000/svg", width=width, height=height,
        viewBox=f"0 0 {_plain(width)} {_plain(height)}", role="img", aria_labelledby=f"{identity}-title {identity}-desc",
    )  # fmt: skip


def shorten(content: str, pixels: float) -> str:
    """Shorten a name to fit, keeping its end, which says most; empty when even a few letters do not fit."""
    room = int(pixels / CHARACTER)
    if len(content) <= room:
        return content
    return "…" + content[len(content) - room + 1 :] if room >= 4 else ""


def ticks(most: float, about: int = 6) -> list[float]:
    """Return round values from 0 to at most `most`."""
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
