"""Charts as inline SVG: text that scales, colours that follow the page's theme, nothing to download.

Colours are CSS custom properties defined in `page.css` (`--series-0` … `--series-9`, `--quiet`, `--ink`,
`--line`), so the same markup serves the light and the dark page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 460, 270  # a phone shows it at 3/4 of its size, where 12 px labels are still 9 px
LEFT, RIGHT, TOP, BOTTOM = 48, 14, 32, 40
ROW, NAME_WIDTH, VALUE_WIDTH = 34, 148, 110  # of the bar and dot charts


@dataclass(frozen=True)
class Series:
    """One line of a chart."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: str = "var(--series-0)"


@dataclass(frozen=True)
class Bar:
    """One bar: value in the chart's unit, with a standard deviation or None."""

    name: str
    value: float
    sd: float | None = None
    color: str = "var(--quiet)"


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten apart) that lie within low … high."""
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"axis range {low} … {high}: need two finite numbers, the lower first")
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * unit for unit in (1, 2, 5, 10) if power * unit >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def label(value: float) -> str:
    """A tick's text: 1500 as 1.5k, at most four digits."""
    return f"{value / 1000:g}k" if abs(value) >= 1000 else f"{value:.4g}"


def thin(series: Series, points: int = 160) -> Series:
    """The series averaged in equal runs, so that a noisy curve of 10,000 steps stays small and readable."""
    size = math.ceil(len(series.x) / points)
    if size <= 1:
        return series

    def means(values: Sequence[float]) -> list[float]:
        runs = [values[at : at + size] for at in range(0, len(values), size)]
        return [sum(run) / len(run) for run in runs]

    return Series(series.name, means(series.x), means(series.y), series.color)


def _svg(body: list[str], title: str, width: float = WIDTH, height: float = HEIGHT, name: str = "chart") -> Markup:
    head = f'<svg class="{name}" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}">'
    return Markup("\n".join([head, *body, "</svg>"]))


def _text(x: float, y: float, text: str, name: str = "tick", anchor: str = "middle", extra: str = "") -> str:
    return f'<text class="{name}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{escape(text)}</text>'


def line_chart(
    lines: Sequence[Series], *, x_label: str, y_label: str, y_range: tuple[float, float] | None = None
) -> Markup:
    """Lines over a shared x axis, with a legend. Points that are not finite are left out.

    Raises:
        ValueError: no finite point at all.
    """
    kept = []
    for series in lines:
        pairs = [(x, y) for x, y in zip(series.x, series.y, strict=True) if math.isfinite(x) and math.isfinite(y)]
        if pairs:
            xs, ys = zip(*pairs, strict=True)
            kept.append(thin(Series(series.name, xs, ys, series.color)))
    if not kept:
        raise ValueError(f"chart {y_label}: no finite point; need at least one")
    x0, x1 = min(min(s.x) for s in kept), max(max(s.x) for s in kept)
    y0, y1 = y_range or (min(min(s.y) for s in kept), max(max(s.y) for s in kept))
    x1, y1 = (x1 if x1 > x0 else x0 + 1), (y1 if y1 > y0 else y0 + 1)
    if y_range is None:
        y0, y1 = y0 - 0.05 * (y1 - y0), y1 + 0.05 * (y1 - y0)

    def px(x: float) -> float:
        return LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - (min(max(y, y0), y1) - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)

    body = []
    for tick in nice_ticks(y0, y1):
        body.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(tick):.1f}" y2="{py(tick):.1f}"/>')
        body.append(_text(LEFT - 7, py(tick) + 4, label(tick), anchor="end"))
    for tick in nice_ticks(x0, x1, 6):
        body.append(_text(px(tick), HEIGHT - BOTTOM + 17, label(tick)))
    body.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5, x_label, "axis"))
    body.append(_text(2, 12, y_label, "axis", "start"))
    for series in kept:
        points = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in zip(series.x, series.y, strict=True))
        end = f'cx="{px(series.x[-1]):.1f}" cy="{py(series.y[-1]):.1f}"'
        hint = f"<title>{escape(series.name)}: {series.y[-1]:.4g} at {label(series.x[-1])}</title>"
        body.append(f'<polyline class="line" style="stroke:{series.color}" points="{points}"/>')
        body.append(f'<circle r="3.5" {end} style="fill:{series.color}">{hint}</circle>')
    chart = _svg(body, f"{y_label} against {x_label}")
    names = [f'<span><i style="background:{s.color}"></i>{escape(s.name)}</span>' for s in kept]
    return chart + Markup(f'<p class="legend">{"".join(names)}</p>' if len(names) > 1 else "")


def bar_chart(bars: Sequence[Bar], *, unit: str) -> Markup:
    """Horizontal bars from zero, with the value at the end."""
    left, scale = NAME_WIDTH, (WIDTH - NAME_WIDTH - VALUE_WIDTH) / (max(bar.value for bar in bars) or 1.0)
    body = []
    for index, bar in enumerate(bars):
        y, width = 6 + index * ROW, max(0.0, bar.value) * scale
        body.append(_text(left - 10, y + 17, bar.name, "name", "end"))
        size = f'width="{width:.1f}" height="{ROW - 13}"'
        body.append(f'<rect x="{left}" y="{y + 3}" {size} rx="3" style="fill:{bar.color}"/>')
        body.append(_text(left + width + 7, y + 17, f"{bar.value:.1f} {unit}", "value", "start"))
    return _svg(body, ", ".join(f"{bar.name} {bar.value:.1f} {unit}" for bar in bars), height=6 + ROW * len(bars))


def dot_chart(bars: Sequence[Bar], *, unit: str, high: float) -> Markup:
    """A dot for each value with a whisker of ± one standard deviation, on an axis that need not start at zero.

    Dots, because the length of a cut bar would lie about the ratio.
    """
    left, right, top = NAME_WIDTH, VALUE_WIDTH, 8
    least = min(bar.value - (bar.sd or 0.0) for bar in bars)
    low = min(10.0 * math.floor((least - 2.0) / 10.0), high - 10.0)
    bottom = top + ROW * len(bars)

    def px(value: float) -> float:
        return left + (value - low) / (high - low) * (WIDTH - left - right)

    body = []
    for tick in nice_ticks(low, high, 4):
        body.append(f'<line class="grid" x1="{px(tick):.1f}" x2="{px(tick):.1f}" y1="{top}" y2="{bottom}"/>')
        body.append(_text(px(tick), bottom + 16, label(tick)))
    for index, bar in enumerate(bars):
        y = top + (index + 0.5) * ROW
        body.append(_text(left - 10, y + 4, bar.name, "name", "end"))
        text = f"{bar.value:.1f}"
        if bar.sd is not None:
            ends = f'x1="{px(bar.value - bar.sd):.1f}" x2="{px(bar.value + bar.sd):.1f}" y1="{y}" y2="{y}"'
            body.append(f'<line class="whisker" {ends} style="stroke:{bar.color}"/>')
            text += f" ± {bar.sd:.1f}"
        body.append(f'<circle cx="{px(bar.value):.1f}" cy="{y}" r="6" style="fill:{bar.color}"/>')
        body.append(_text(WIDTH - right + 12, y + 4, f"{text} {unit}", "value", "start"))
    names = ", ".join(f"{bar.name} {bar.value:.1f} {unit}" for bar in bars)
    return _svg(body, names, height=bottom + 22)


def confusion(matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> Markup:
    """Rows are the true classes, columns the predicted ones; the shade is the share of the row.

    Counts are printed up to 20 classes; beyond that the cells are too small and carry a tooltip alone.
    """
    count = len(classes)
    longest = max(len(name) for name in classes)
    left = min(110, 14 + 7 * longest)
    size = (WIDTH - left - 6) / count
    slanted = longest > 2
    top = 18 if not slanted else min(90, 16 + 5.2 * longest)
    body = []
    for index, name in enumerate(classes):
        if count <= 40:
            middle = (index + 0.5) * size
            body.append(_text(left - 6, top + middle + 4, name, anchor="end"))
            if slanted:
                turn = f' transform="rotate(-45 {left + middle:.1f} {top - 6:.1f})"'
                body.append(_text(left + middle, top - 6, name, anchor="start", extra=turn))
            else:
                body.append(_text(left + middle, top - 6, name))
    for i, row in enumerate(matrix):
        total = sum(row) or 1
        for j, value in enumerate(row):
            share = value / total
            x, y = left + j * size, top + i * size
            # A wrong cell starts at a visible shade: one mistake in 40 must be seen.
            shade = 0.0 if value == 0 else (12 + 88 * share if i == j else 25 + 75 * share)
            color = "var(--series-0)" if i == j else "var(--series-1)"
            hint = f"<title>{escape(classes[i])} taken for {escape(classes[j])}: {value} of {total}</title>"
            body.append(
                f'<rect class="cell" x="{x:.1f}" y="{y:.1f}" width="{size - 1:.1f}" height="{size - 1:.1f}" '
                f'style="fill:color-mix(in srgb, {color} {shade:.0f}%, var(--empty))">{hint}</rect>'
            )
            if value and count <= 20:
                name = "on" if shade > 55 else "off"
                body.append(_text(x + size / 2, y + size / 2 + 4, str(value), f"count {name}"))
    return _svg(body, "confusion matrix", height=top + count * size + 4)


def scatter(points: Sequence[tuple[float, float]], labels: Sequence[int], classes: Sequence[str]) -> Markup:
    """A 2-D embedding; each class has its colour and, at its median, its name. Ten colours, used in turn."""
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
    side, pad = WIDTH, 16

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x = pad + (point[0] - x0) / ((x1 - x0) or 1) * (side - 2 * pad)
        return x, pad + (y1 - point[1]) / ((y1 - y0) or 1) * (side - 2 * pad)

    radius = 3.4 if len(points) <= 800 else 2.2
    body, names = [], []
    for label_, name in enumerate(classes):
        mine = [place(point) for point, other in zip(points, labels, strict=True) if other == label_]
        if not mine:
            continue
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>' for x, y in mine)
        body.append(f'<g class="dots" style="fill:var(--series-{label_ % 10})">{dots}<title>{escape(name)}</title></g>')
        middle = [sorted(axis)[len(mine) // 2] for axis in zip(*mine, strict=True)]
        names.append(_text(middle[0], middle[1] + 5, name, "place"))
    return _svg(body + (names if len(classes) <= 40 else []), "2-D embedding of the test set", height=side)
