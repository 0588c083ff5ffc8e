"""Charts as inline SVG: the timeline of the units, and curves. Colors come from the style sheet of the page."""

from collections.abc import Mapping, Sequence
from html import escape
from math import floor, log10

from .runs import SavedRun

ROW = 20  # pixels of the row of a unit
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


class _Rows:
    """
    A chart with a row of bars for each unit.

    Args:
        width (`int`): of the chart, in pixels.
    """

    def __init__(self, width: int):
        self.wide = width > 500
        self.left, self.right = (190, width - 74) if self.wide else (84, width - 44)
        self.parts: list[str] = []
        self.bottom = 2

    def add(self, unit: str, froze_at: int | None) -> None:
        """Begin the row of a unit."""
        y = self.bottom
        at = "–" if froze_at is None else f"step {froze_at:,}" if self.wide else f"{froze_at:,}"
        self.parts += [
            _text(self.left - 8, y + 13, short(unit, 26 if self.wide else 11), "end"),
            f'<rect class="trains" x="{self.left}" y="{y}" width="{self.right - self.left}" height="{ROW - 2}"/>',
            _text(self.right + 6, y + 13, at, "start"),
        ]
        self.bottom += ROW

    def bar(self, kind: str, x: float, width: float, title: str, opacity: float = 1.0) -> None:
        """Add a bar to the last row."""
        self.parts.append(
            f'<rect class="{kind}" x="{x:.1f}" y="{self.bottom - ROW}" width="{width:.1f}" height="{ROW - 2}" '
            f'fill-opacity="{opacity:.3f}"><title>{escape(title)}</title></rect>'
        )


def timeline(run: SavedRun, width: int) -> str:
    """
    The units over the steps: the probability that the predictor gave each unit at each freezing stage, and when it froze.

    Args:
        run ([`SavedRun`]): with a state of SmartFRZ.
        width (`int`): of the chart, in pixels.
    """
    assert run.state is not None
    records, spans, froze_at = run.ledger.get("records") or [], run.frozen_spans, run.freeze_steps
    rows = _Rows(width)
    left, scale = rows.left, (rows.right - rows.left) / run.steps
    for i, unit in enumerate(run.state["units"]):
        rows.add(unit, froze_at.get(unit))
        for record, following in zip(records, [*records[1:], None], strict=True):
            scores, place, step = record["probabilities"], i - record["depth"], record["step"]
            if scores and 0 <= place < len(scores):
                steps = (following["step"] if following else run.steps) - step
                title = f"{unit}, step {step}: probability {scores[place]:.3f}"
                rows.bar("score", left + step * scale, max(steps * scale, 1), title, scores[place] ** 2)
        for begin, end in spans.get(unit, ()):
            title = f"{unit}: frozen from step {begin} to {end}"
            rows.bar("frozen", left + begin * scale, max((end - begin) * scale, 2), title)
    axis = _x_axis(left, rows.right, rows.bottom, run.steps, "optimizer step", 8 if rows.wide else 4)
    return _svg(width, rows.bottom + 40, "Units over the steps of the run", [*rows.parts, *axis])


def attention(run: SavedRun, width: int) -> str:
    """
    For each unit that the predictor froze, its attention to each snapshot of the weight history: one row of cells, oldest first.

    Args:
        run ([`SavedRun`]): with attentions.
        width (`int`): of the chart, in pixels.
    """
    rows = _Rows(width)
    for row in run.attentions:
        rows.add(row.unit, row.step)
        cell, most = (rows.right - rows.left) / len(row.weights), max(row.weights) or 1.0
        for j, (step, weight) in enumerate(zip(row.steps, row.weights, strict=True)):
            title = f"{row.unit}, snapshot of step {step}: attention {weight:.3f}"
            rows.bar("score", rows.left + j * cell, max(cell - 1, 1), title, weight / most)
    ends = [
        _text(rows.left, rows.bottom + 16, "oldest snapshot", "start"),
        _text(rows.right, rows.bottom + 16, "newest", "end"),
    ]
    return _svg(width, rows.bottom + 24, "Attention to the snapshots of the weight history", [*rows.parts, *ends])


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
