"""Charts as SVG text: no script, no network, coloured by the page's style in light and dark.

Markup.format escapes what is filled in, so no name from the data becomes markup.
"""

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from qlora.scoring.bootstrap import Difference

WIDTH = 460
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 34


def lines(series: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str) -> Markup:
    """Curves of (x, y) by their class, `base` or `tuned`; points that are not finite are left out."""
    series = {kind: [(x, y) for x, y in curve if math.isfinite(y)] for kind, curve in series.items()}
    points = [point for curve in series.values() for point in curve]
    if not points:
        return Markup("<p>nothing was logged</p>")
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
        parts.append(Markup('<path class="{}" d="{}"/>').format(kind, path))
        if len(curve) < 8:
            parts += [Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="3"/>').format(kind, x_of(x), y_of(y)) for x, y in curve]
    return _svg(height, [*parts, *_labels(height, x_label, y_label)])


def bars(pairs: Mapping[str, tuple[float | None, float | None]], high: float) -> Markup:
    """For each name a bar of the base and one of the tuned model, from 0 to `high`; a dash for None, a score that is not defined."""
    step, left = 34, 130
    height = step * len(pairs) + 24
    scale = (WIDTH - left - 44) / (high or 1)
    parts = []
    for place, (name, values) in enumerate(pairs.items()):
        y = place * step + 4
        shown = name if len(name) <= 18 else name[:17] + "…"
        label = Markup('<text class="name" x="{}" y="{}" text-anchor="end">{}<title>{}</title></text>')
        parts.append(label.format(left - 8, y + 17, shown, name))
        for kind, value, top in zip(("base", "tuned"), values, (y, y + 13), strict=True):
            length = max(value or 0.0, 0.0) * scale
            if value is not None:
                bar = Markup('<rect class="{}" x="{}" y="{}" width="{:.1f}" height="11" rx="2"/>')
                parts.append(bar.format(kind, left, top, max(length, 1)))
            parts.append(_text(left + length + 5, top + 9.5, "–" if value is None else f"{value:.3g}"))
    return _svg(height, parts)


def histogram(base: Sequence[float], tuned: Sequence[float], x_label: str, bins: int = 20) -> Markup:
    """How many turns have a value in each bin, the two models one over the other."""
    values = [*base, *tuned]
    if not values:
        return Markup("<p>nothing was answered</p>")
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
            column = Markup('<rect class="{} half" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>')
            parts.append(column.format(kind, x + 1, y, bar - 2, count * scale))
    for tick in _ticks(low, low + width * bins):
        parts.append(_text(LEFT + (tick - low) / width * bar, height - BOTTOM + 15, f"{tick:g}", "middle"))
    return _svg(height, [*parts, *_labels(height, x_label, "turns")])


def interval(found: Difference) -> Markup:
    """A difference and its interval around 0, as wide as the larger side; a dash where they are not defined."""
    if found.delta is None or found.low is None or found.high is None:
        return Markup("–")
    width, height = 130, 20
    reach = max(abs(found.low), abs(found.high), abs(found.delta)) or 1.0

    def x_of(value: float) -> float:
        return width / 2 + value / reach * (width / 2 - 5)

    left, right = x_of(found.low), x_of(found.high)
    return Markup(
        '<svg viewBox="0 0 {width} {height}" style="width:{width}px" role="img" aria-label="{delta:.4g}, from {low:.4g} to {high:.4g}">'
        '<line class="zero" x1="{middle}" y1="1" x2="{middle}" y2="{bottom}"/>'
        '<rect x="{left:.1f}" y="7" width="{across:.1f}" height="6" rx="3" style="fill:var({colour});opacity:.45"/>'
        '<circle cx="{x:.1f}" cy="10" r="4" style="fill:var({colour})"/></svg>'
    ).format(
        width=width,
        height=height,
        delta=found.delta,
        low=found.low,
        high=found.high,
        middle=width / 2,
        bottom=height - 1,
        left=left,
        across=max(right - left, 2),
        x=x_of(found.delta),
        colour={"better": "--good", "worse": "--bad"}.get(found.verdict, "--muted"),
    )


def _svg(height: float, parts: Sequence[Markup]) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img">{}</svg>').format(WIDTH, height, Markup("").join(parts))


def _text(x: float, y: float, text: str, anchor: str = "start") -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, text)


def _y_grid(y: float, label: str) -> Markup:
    line = Markup('<line class="grid" x1="{}" y1="{:.1f}" x2="{}" y2="{:.1f}"/>').format(LEFT, y, WIDTH - RIGHT, y)
    return line + _text(LEFT - 6, y + 4, label, "end")


def _labels(height: float, x_label: str, y_label: str) -> list[Markup]:
    middle = (height - BOTTOM) / 2
    upright = Markup('<text x="12" y="{0}" text-anchor="middle" transform="rotate(-90 12 {0})">{1}</text>').format(middle, y_label)
    return [_text((WIDTH + LEFT) / 2, height - 4, x_label, "middle"), upright]


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from low to high.

    >>> _ticks(0, 6.3)
    [0, 2, 4, 6]
    """
    span = (high - low) or 1.0
    magnitude = 10 ** math.floor(math.log10(span / count))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if span / (factor * magnitude) <= count)
    return [round(number * step, 10) for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
