"""Plot of errors by layer: a point for each series and layer, a line along the worst."""

from __future__ import annotations

import re
from collections.abc import Mapping

from orchestrator.report.html.svg import element, picture, text, ticks, title

_LEFT, _RIGHT, _TOP, _HEIGHT, _BOTTOM = 62, 16, 14, 250, 40
_LEAST_WIDTH, _MOST_WIDTH, _PER_LAYER = 560, 1080, 30
_LAYER = re.compile(r"\.layers\.(\d+)\.(.+)$")
_SERIES = 8


def by_layer(errors: Mapping[str, float]) -> dict[str, dict[int, float]]:
    """Return |stored - weight| / |weight| by kind of linear, e.g. mlp.fc, and layer; the worst expert counts."""
    found: dict[str, dict[int, float]] = {}
    for name, error in errors.items():
        match = _LAYER.search(name)
        if match:
            layers = found.setdefault(re.sub(r"\.\d+(?=\.|$)", "", match.group(2)), {})
            layers[int(match.group(1))] = max(error, layers.get(int(match.group(1)), 0.0))
    return dict(sorted(found.items(), key=lambda item: -max(item[1].values())))


def _scale(top: float, bottom: float) -> tuple[float, float]:
    """Return both ends of the axis: from zero, or near the values when they differ little for their size."""
    base = 0.0 if bottom < 0.6 * top or bottom == top else max(bottom - 2 * (top - bottom), 0.6 * top, 0.0)
    return base, top + (top - base) * 0.08 or 1.0


def errors_picture(series: Mapping[str, Mapping[int, float]], name: str, what: str) -> str:
    """Draw errors by series and layer under the title `name`; empty without any. `what`: a plural noun for their number."""
    if not series:
        return ""
    layers = sorted({layer for values in series.values() for layer in values})
    worst = {layer: max(values.get(layer, 0.0) for values in series.values()) for layer in layers}
    base, most = _scale(max(worst.values()), min(error for values in series.values() for error in values.values()))
    width = min(max(_LEAST_WIDTH, _LEFT + _RIGHT + _PER_LAYER * len(layers)), _MOST_WIDTH)
    inner = width - _LEFT - _RIGHT

    def x(layer: int) -> float:
        return _LEFT + (layer - layers[0] + 0.5) / (layers[-1] - layers[0] + 1) * inner

    def y(error: float) -> float:
        return _TOP + (1 - (error - base) / (most - base)) * _HEIGHT

    content = []
    for tick in (base + step for step in ticks(most - base, 5)):
        content.append(element("line", x1=_LEFT, x2=width - _RIGHT, y1=y(tick), y2=y(tick), class_="grid"))
        content.append(text(f"{tick:.3g}", _LEFT - 8, y(tick) + 4, "small", "end"))
    every = max(1, -(-len(layers) // 16))
    content += [text(str(layer), x(layer), _TOP + _HEIGHT + 18, "small", "middle") for layer in layers[::every]]
    content.append(
        text(
            "layer" if base == 0 else f"layer (the scale begins at {base:.3g})",
            _LEFT + inner / 2,
            _TOP + _HEIGHT + 36,
            "small",
            "middle",
        )
    )
    line = "L".join(f"{x(layer):.1f} {y(worst[layer]):.1f}" for layer in layers)
    content.append(element("path", d=f"M{line}", class_="worst"))
    for number, (label, values) in enumerate(series.items()):
        aside = (number - (len(series) - 1) / 2) / len(series) * 0.6 * inner / (layers[-1] - layers[0] + 1)
        for layer, error in values.items():
            told = f"layer {layer}, {label}: {error:.3g}"
            content.append(
                element("circle", title(told), cx=x(layer) + aside, cy=y(error), r=4, class_=f"series s{min(number, _SERIES - 1)}")
            )
    count = sum(map(len, series.values()))
    told = f"Relative error of {count} {what} in {len(layers)} layers; the largest is {max(worst.values()):.3g}."
    return picture(width, _TOP + _HEIGHT + _BOTTOM, name, told, content)
