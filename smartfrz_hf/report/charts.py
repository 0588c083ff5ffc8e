"""Charts as inline SVG: the timeline of the units, and curves. Colors come from the style sheet of the page."""

from collections.abc import Mapping, Sequence
from html import escape
from math import floor, log10

from .runs import SavedRun

Curve = Sequence[tuple[float, float]]


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers from `low` to `high`."""
    span = (high - low) or 1.0
    step = 10 ** floor(log10(span / count))
    step *= next((factor for factor in (1, 2, 5) if span / (step * factor) <= count), 10)
    first = -(-low // step)
    return [round(step * (first + i), 12) for i in range(int((high - first * step) / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A short number for an axis."""
    return f"{value:,.0f}" if abs(value) >= 999.5 or value == int(value) else f"{value:.3g}"  # never "1e+03"


def _svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg role="img" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _x_axis(left: float, right: float, y: float, high: float, label: str, count: int) -> list[str]:
    scale = (right - left) / high
    marks = [_text(left + tick * scale, y + 16, number(tick)) for tick in ticks(0, high, count)]
    return [*marks, _text((left + right) / 2, y + 32, label)]


def short(unit: str, length: int) -> str:
    """The end of a unit's name, which is what tells units apart."""
    return unit if len(unit) <= length else f"…{unit[1 - length :]}"


def timeline(run: SavedRun, width: int) -> str:
    """
    The units over the steps: the probability that the predictor gave each unit at each freezing stage, and when it froze.

    Args:
        run ([`SavedRun`]): with a state of SmartFRZ.
        width (`int`): of the chart, in pixels.
    """
    assert run.state is not None
    units, records, spans = run.state["units"], run.ledger.get("records") or [], run.frozen_spans
    wide = width > 500
    left, right, row = (190 if wide else 84), width - (74 if wide else 44), 20
    high, scale = run.steps, (right - left) / run.steps
    parts = []
    for i, unit in enumerate(units):
        y = i * row + 2
        parts.append(_text(left - 8, y + 13, short(unit, 26 if wide else 11), "end"))
        parts.append(f'<rect class="trains" x="{left}" y="{y}" width="{right - left}" height="{row - 2}"/>')
        for record, following in zip(records, [*records[1:], None], strict=True):
            scores, place = record["probabilities"], i - record["depth"]
            if not scores or not 0 <= place < len(scores):
                continue
            x, end = left + record["step"] * scale, left + (following["step"] if following else high) * scale
            parts.append(
                f'<rect class="score" x="{x:.1f}" y="{y}" width="{max(end - x, 1):.1f}" height="{row - 2}" '
                f'fill-opacity="{scores[place] ** 2:.3f}"><title>{escape(unit)}, step {record["step"]}: probability '
                f"{scores[place]:.3f}</title></rect>"
            )
        for begin, end in spans.get(unit, ()):
            parts.append(
                f'<rect class="frozen" x="{left + begin * scale:.1f}" y="{y}" width="{max((end - begin) * scale, 2):.1f}" '
                f'height="{row - 2}"><title>{escape(unit)}: frozen from step {begin} to {end}</title></rect>'
            )
        step = run.freeze_steps.get(unit)
        at = "–" if step is None else f"step {step:,}" if wide else f"{step:,}"
        parts.append(_text(right + 6, y + 13, at, "start"))
    bottom = len(units) * row + 2
    parts += _x_axis(left, right, bottom, high, "optimizer step", 8 if wide else 4)
    return _svg(width, bottom + 40, "Units over the steps of the run", parts)


def attention(run: SavedRun, width: int) -> str:
    """
    For each unit that the predictor froze, its attention to each snapshot of the weight history: one row of cells, oldest first.

    Args:
        run ([`SavedRun`]): with a state of SmartFRZ.
        width (`int`): of the chart, in pixels.

    Returns:
        `str`: SVG; empty if no attention was recorded.
    """
    rows = run.attentions
    if not rows:
        return ""
    wide = width > 500
    left, right, height = (190 if wide else 84), width - (74 if wide else 44), 20
    parts = []
    for i, row in enumerate(rows):
        y, cell, most = i * height + 2, (right - left) / len(row.weights), max(row.weights) or 1.0
        parts.append(_text(left - 8, y + 13, short(row.unit, 26 if wide else 11), "end"))
        parts.append(f'<rect class="trains" x="{left}" y="{y}" width="{right - left}" height="{height - 2}"/>')
        for j, (step, weight) in enumerate(zip(row.steps, row.weights, strict=True)):
            parts.append(
                f'<rect class="score" x="{left + j * cell:.1f}" y="{y}" width="{max(cell - 1, 1):.1f}" height="{height - 2}" '
                f'fill-opacity="{weight / most:.3f}"><title>{escape(row.unit)}, snapshot of step {step}: attention '
                f"{weight:.3f}</title></rect>"
            )
        parts.append(_text(right + 6, y + 13, f"step {row.step:,}" if wide else f"{row.step:,}", "start"))
    bottom = len(rows) * height + 2
    parts.append(_text(left, bottom + 16, "oldest snapshot", "start"))
    parts.append(_text(right, bottom + 16, "newest", "end"))
    return _svg(width, bottom + 24, "Attention to the snapshots of the weight history", parts)


def curves(named: Mapping[str, Curve], width: int, x_label: str, y_label: str) -> str:
    """
    One line for each name.

    Args:
        named (`dict[str, Curve]`): up to two curves; the first is drawn in the strong color.
        width (`int`): of the chart, in pixels.
        x_label (`str`): below the chart.
        y_label (`str`): the name of the chart.
    """
    points = [point for curve in named.values() for point in curve]
    high = max((x for x, _ in points), default=1.0) or 1.0
    bottom_value, top_value = min(y for _, y in points), max(y for _, y in points)
    margin = (top_value - bottom_value) * 0.06 or abs(top_value) * 0.1 or 1.0
    bottom_value, top_value = bottom_value - margin, top_value + margin
    left, right, top, bottom = 56, width - 12, 8, 190
    x_scale, y_scale = (right - left) / high, (bottom - top) / (top_value - bottom_value)
    parts = []
    for tick in ticks(bottom_value, top_value, 5):
        y = bottom - (tick - bottom_value) * y_scale
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(left - 6, y + 4, number(tick), "end"))
    for index, (name, curve) in reversed(list(enumerate(named.items()))):
        line = " ".join(f"{left + x * x_scale:.1f},{bottom - (y - bottom_value) * y_scale:.1f}" for x, y in curve)
        parts.append(f'<polyline class="line{index}" points="{line}"><title>{escape(name)}</title></polyline>')
        if len(curve) <= 30:
            for x, y in curve:
                parts.append(
                    f'<circle class="dot{index}" cx="{left + x * x_scale:.1f}" '
                    f'cy="{bottom - (y - bottom_value) * y_scale:.1f}" r="3">'
                    f"<title>{escape(name)}: {number(y)} at {number(x)}</title></circle>"
                )
    parts += _x_axis(left, right, bottom, high, x_label, 6 if width > 500 else 4)
    return _svg(width, bottom + 38, y_label, parts)
