"""Algorithms under the reward-KL frontier, as SVG by hand: it needs no package and shows in any browser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from rayft.evaluate import Frontier
from rayft.store import write_text

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 760, 460, 70, 60, 50, 190
COLOURS = ("#444444", "#e377c2", "#8c564b", "#1f77b4", "#d62728", "#2ca02c", "#9467bd")


@dataclass(frozen=True)
class Point:
    """One policy; ``label`` stands beside it, ``series`` in the legend."""

    series: str
    kl: float
    reward: float
    label: str = ""


@dataclass(frozen=True)
class _Axes:
    """From numbers to places; the KL on a square-root scale, or all would crowd at the left."""

    max_kl: float
    reward: tuple[float, float]

    def x(self, kl: float) -> float:
        return LEFT + (max(kl, 0.0) / self.max_kl) ** 0.5 * (WIDTH - LEFT - RIGHT)

    def y(self, reward: float) -> float:
        return HEIGHT - BOTTOM - (reward - self.reward[0]) / (self.reward[1] - self.reward[0]) * (HEIGHT - BOTTOM - TOP)

    def holds(self, point: Point) -> bool:
        return point.kl <= self.max_kl and self.reward[0] <= point.reward <= self.reward[1]


def write(path: Path, title: str, frontier: Frontier, points: Sequence[Point], max_kl: float = 10.0) -> None:
    """The frontier, dashed past what the samples vouch for, and the points; those outside are only counted."""
    top = frontier.reward_at(max_kl)
    span = top - frontier.baseline
    axes = _Axes(max_kl, (frontier.baseline - 0.1 * span, top + 0.05 * span))
    known = min(frontier.trusted_kl, max_kl)
    curves = [np.linspace(0, known**0.5, 100) ** 2, np.linspace(known, max_kl, 20)]
    lines = [" ".join(f"{axes.x(kl):.1f},{axes.y(frontier.reward_at(kl)):.1f}" for kl in curve) for curve in curves]
    drawn = [point for point in points if axes.holds(point)]
    parts = _frame(axes, title)
    for line, dash in zip(lines, ("none", "4 4"), strict=True):
        parts.append(f'<polyline points="{line}" fill="none" stroke="black" stroke-dasharray="{dash}"/>')
    series = list(dict.fromkeys(point.series for point in points))
    for point in drawn:
        x, y, colour = axes.x(point.kl), axes.y(point.reward), COLOURS[series.index(point.series) % len(COLOURS)]
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')
        parts.append(_text(x + 6, y + 12, point.label, size=10, colour=colour))
    legend = [
        ("frontier (dashed: a bound)", "black"),
        *((name, COLOURS[i % len(COLOURS)]) for i, name in enumerate(series)),
    ]
    for row, (name, colour) in enumerate(legend):
        parts.append(_text(WIDTH - RIGHT + 15, TOP + 15 + 20 * row, name, colour=colour))
    if len(drawn) < len(points):
        told = f"{len(points) - len(drawn)} outside the picture"
        parts.append(_text(WIDTH - RIGHT + 15, TOP + 15 + 20 * len(legend), told, size=11, colour="gray"))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">'
    write_text(path, "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>"]) + "\n")
    print(f"wrote {path}")


def _frame(axes: _Axes, title: str) -> list[str]:
    left, right, low, high = axes.x(0.0), axes.x(axes.max_kl), axes.y(axes.reward[0]), axes.y(axes.reward[1])
    box = f'<rect x="{left}" y="{high}" width="{right - left}" height="{low - high}" fill="none" stroke="gray"/>'
    parts = [box, _text(left, 28, title, size=15)]
    kls = [kl for kl in (0, 0.1, 0.5, 1, 2, 4, 6, 8, 10) if kl <= axes.max_kl]
    rewards = np.arange(np.ceil(axes.reward[0] * 2) / 2, axes.reward[1], 0.5)
    parts += [_text(axes.x(kl), low + 18, f"{kl:g}", anchor="middle") for kl in kls]
    parts += [_text(left - 8, axes.y(reward) + 4, f"{reward:g}", anchor="end") for reward in rewards]
    parts.append(_text((left + right) / 2, HEIGHT - 15, "chain KL to the pretrained model (nats)", anchor="middle"))
    return [*parts, _text(left, high - 7, "mean reward", size=11, colour="gray")]


def _text(x: float, y: float, words: str, size: int = 12, colour: str = "black", anchor: str = "start") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}" text-anchor="{anchor}"'
    return f"<text {place}>{escape(words)}</text>"
