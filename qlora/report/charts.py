"""Charts as SVG text: no script, no network, coloured by the page's style in light and dark."""

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH = 460
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 34


def lines(series: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str) -> str:
    """Curves of (x, y) by their class, `base` or `tuned`."""
    points = [point for curve in series.values() for point in curve]
    if not points:
        return "<p>nothing was logged</p>"
    height = 240
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_ticks = _ticks(0.0, max(y for _, y in points))
    y_high = max(y_ticks[-1], max(y for _, y in points))

    def x_of(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (x - x_low) / ((x_high - x_low) or 1)

    def y_of(y: float) -> float:
        return height - BOTTOM - (height - TOP - BOTTOM) * y / (y_high or 1)

    parts = [_y_grid(y_of(tick), f"{tick:g}") for tick in y_ticks]
    parts += [_text(x_of(tick), height - BOTTOM + 15, f"{tick:g}", "middle") for tick in _ticks(x_low, x_high)]
    for kind, curve in series.items():
        path = " ".join(f"{'L' if place else 'M'}{x_of(x):.1f} {y_of(y):.1f}" for place, (x, y) in enumerate(curve))
        parts.append(f'<path class="{kind}" d="{path}"/>')
        if len(curve) < 8:
            parts += [f'<circle class="{kind}" cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="3"/>' for x, y in curve]
    return _svg(height, [*parts, *_labels(height, x_label, y_label)])


def bars(pairs: Mapping[str, tuple[float, float]], high: float) -> str:
    """For each name a bar of the base and one of the tuned model, from 0 to `high`."""
    step, left = 34, 130
    height = step * len(pairs) + 24
    scale = (WIDTH - left - 44) / (high or 1)
    parts = []
    for place, (name, values) in enumerate(pairs.items()):
        y = place * step + 4
        shown = name if len(name) <= 18 else name[:17] + "…"
        parts.append(f'<text class="name" x="{left - 8}" y="{y + 17}" text-anchor="end">{escape(shown)}<title>{escape(name)}</title></text>')
        for kind, value, top in zip(("base", "tuned"), values, (y, y + 13), strict=True):
            length = max(value, 0.0) * scale
            parts.append(f'<rect class="{kind}" x="{left}" y="{top}" width="{max(length, 1):.1f}" height="11" rx="2"/>')
            parts.append(_text(left + length + 5, top + 9.5, f"{value:.3g}"))
    return _svg(height, parts)


def histogram(base: Sequence[float], tuned: Sequence[float], x_label: str, bins: int = 20) -> str:
    """How many turns have a value in each bin, the two models one over the other."""
    values = [*base, *tuned]
    if not values:
        return "<p>nothing was answered</p>"
    height = 220
    low, high = min(0.0, *values), max(values)
    width = (high - low) / bins or 1.0
    counts = {kind: [0] * bins for kind in ("base", "tuned")}
    for kind, row in (("base", base), ("tuned", tuned)):
        for value in row:
            counts[kind][min(int((value - low) / width), bins - 1)] += 1
    most = max(max(row) for row in counts.values())
    bar = (WIDTH - LEFT - RIGHT) / bins
    scale = (height - TOP - BOTTOM) / most
    parts = [_y_grid(height - BOTTOM - tick * scale, f"{tick:g}") for tick in _ticks(0, most) if tick == int(tick)]
    for kind, row in counts.items():
        for place, count in enumerate(row):
            x, y = LEFT + place * bar, height - BOTTOM - count * scale
            parts.append(f'<rect class="{kind} half" x="{x + 1:.1f}" y="{y:.1f}" width="{bar - 2:.1f}" height="{count * scale:.1f}"/>')
    for tick in _ticks(low, low + width * bins):
        parts.append(_text(LEFT + (tick - low) / width * bar, height - BOTTOM + 15, f"{tick:g}", "middle"))
    return _svg(height, [*parts, *_labels(height, x_label, "turns")])


def interval(delta: float, low: float, high: float, verdict: str) -> str:
    """A difference and its interval around 0, as wide as the larger side."""
    width, height = 130, 20
    reach = max(abs(low), abs(high), abs(delta)) or 1.0

    def x_of(value: float) -> float:
        return width / 2 + value / reach * (width / 2 - 5)

    colour = {"better": "--good", "worse": "--bad"}.get(verdict, "--muted")
    return (
        f'<svg viewBox="0 0 {width} {height}" style="width:{width}px" role="img" aria-label="{delta:.4g}, from {low:.4g} to {high:.4g}">'
        f'<line class="zero" x1="{width / 2}" y1="1" x2="{width / 2}" y2="{height - 1}"/>'
        f'<rect x="{x_of(low):.1f}" y="7" width="{max(x_of(high) - x_of(low), 2):.1f}" height="6" rx="3" style="fill:var({colour});opacity:.45"/>'
        f'<circle cx="{x_of(delta):.1f}" cy="10" r="4" style="fill:var({colour})"/></svg>'
    )


def _svg(height: float, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img">{"".join(parts)}</svg>'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _y_grid(y: float, label: str) -> str:
    return f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>' + _text(LEFT - 6, y + 4, label, "end")


def _labels(height: float, x_label: str, y_label: str) -> list[str]:
    middle = (height - BOTTOM) / 2
    return [
        _text((WIDTH + LEFT) / 2, height - 4, x_label, "middle"),
        f'<text x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})">{escape(y_label)}</text>',
    ]


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from low to high.

    >>> _ticks(0, 6.3)
    [0.0, 2.0, 4.0, 6.0]
    """
    span = (high - low) or 1.0
    magnitude = 10 ** math.floor(math.log10(span / count))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if span / (factor * magnitude) <= count)
    return [round(number * step, 10) for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
