"""A line plot with two logarithmic axes, as SVG written by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

COLOURS = ("#0b6e4f", "#1f77b4", "#d95f02", "#7570b3", "#666666")
LABEL_GAP = 15.0
"pixels between the names of two lines"
Points = Sequence[tuple[float, float]]


def find_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten within [low, high]."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    ticks = [step * 10.0**power for power in range(first, last + 1) for step in (1, 2, 5)]
    return [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]


def scale(value: float, low: float, high: float, *, start: float, stop: float) -> float:
    """Place a value of [low, high] between two pixels, logarithmically."""
    return start + (stop - start) * math.log(value / low) / math.log(high / low)


def spread(places: Sequence[float], *, gap: float) -> list[float]:
    """Move places apart, downwards and in their order, until neighbours are `gap` from each other."""
    moved = [0.0] * len(places)
    before = -math.inf
    for number in sorted(range(len(places)), key=lambda number: places[number]):
        before = moved[number] = max(places[number], before + gap)
    return moved


class LogPlot:
    """Lines over lengths: the x ticks are the lengths themselves, the y ticks 1, 2, 5 times powers of ten."""

    width, height, left, right, top, bottom = 760, 440, 74, 200, 24, 52

    def __init__(self, lines: Mapping[str, Points], *, x_title: str, y_title: str) -> None:
        self._lines = lines
        self._titles = x_title, y_title
        self._ticks = sorted({x for points in lines.values() for x, _ in points})
        values = [y for points in lines.values() for _, y in points]
        self._low, self._high = min(values) / 1.25, max(values) * 1.25

    def draw(self) -> str:
        """Return the picture."""
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            'font-family="sans-serif" font-size="12">'
            f'<rect width="{self.width}" height="{self.height}" fill="white"/>'
            + "".join([*self._draw_axes(), *self._draw_lines()])
            + "</svg>\n"
        )

    def _x(self, value: float) -> float:
        ticks = self._ticks
        return scale(value, ticks[0], ticks[-1], start=self.left, stop=self.width - self.right)

    def _y(self, value: float) -> float:
        return scale(value, self._low, self._high, start=self.height - self.bottom, stop=self.top)

    def _draw_axes(self) -> list[str]:
        end, floor = self.width - self.right, self.height - self.bottom
        parts = []
        for value in find_ticks(self._low, self._high):
            y = self._y(value)
            parts.append(f'<path d="M{self.left} {y:.1f}H{end}" stroke="#e4e4e4"/>')
            parts.append(f'<text x="{self.left - 8}" y="{y + 4:.1f}" text-anchor="end">{value:,.0f}</text>')
        for value in self._ticks:
            x = self._x(value)
            parts.append(f'<path d="M{x:.1f} {self.top}V{floor}" stroke="#f2f2f2"/>')
            parts.append(f'<text x="{x:.1f}" y="{floor + 18}" text-anchor="middle">{value:,.0f}</text>')
        middle = (self.top + floor) / 2
        across, up = map(escape, self._titles)
        parts += [
            f'<path d="M{self.left} {self.top}V{floor}H{end}" fill="none" stroke="#888"/>',
            f'<text x="{(self.left + end) / 2:.0f}" y="{self.height - 12}" text-anchor="middle">{across}</text>',
            f'<text transform="translate(16 {middle:.0f}) rotate(-90)" text-anchor="middle">{up}</text>',
        ]
        return parts

    def _draw_lines(self) -> list[str]:
        parts = []
        names = spread([self._y(points[-1][1]) for points in self._lines.values()], gap=LABEL_GAP)
        for number, (label, points) in enumerate(self._lines.items()):
            colour = COLOURS[number % len(COLOURS)]
            placed = [(self._x(x), self._y(y)) for x, y in points]
            path = "L".join(f"{x:.1f} {y:.1f}" for x, y in placed)
            parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in placed]
            at = f'x="{self.width - self.right + 10}" y="{names[number] + 4:.1f}"'
            parts.append(f'<text {at} fill="{colour}">{escape(label)}</text>')
        return parts
