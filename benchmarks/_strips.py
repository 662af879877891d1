"""Clouds of several methods side by side, a strip of each: SVG by hand around pictures that ``splat`` draws."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from envs.shapes import splat
from rayft.store import write_text

NUM, WIDTH, HEIGHT, LEFT, TOP = 7, 130, 100, 210, 40
INK = 'font-family="sans-serif" fill="#6b7280"'  # seen on white paper and on black


@dataclass(frozen=True)
class Strip:
    """A method and what it drew."""

    name: str
    note: str
    clouds: np.ndarray


def write(path: Path, title: str, strips: Sequence[Strip], up: str = "z") -> None:
    """Of each method clouds at random, the same places of its draw for all: nobody chose them."""
    places = np.sort(np.random.default_rng(0).permutation(min(len(strip.clouds) for strip in strips))[:NUM])
    width, height = LEFT + WIDTH * len(places), TOP + HEIGHT * len(strips)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}">']
    parts.append(f'<text x="10" y="26" font-size="17" font-weight="bold" {INK}>{escape(title)}</text>')
    for row, strip in enumerate(strips):
        y, ramp = TOP + HEIGHT * row, "before" if strip.name == "pretrained" else "run"
        parts.append(f'<text x="10" y="{y + 46}" font-size="15" {INK}>{escape(strip.name)}</text>')
        parts.append(f'<text x="10" y="{y + 65}" font-size="12" {INK}>{escape(strip.note)}</text>')
        for column, place in enumerate(places):
            parts.append(_image(strip.clouds[place], LEFT + WIDTH * column, y, ramp, up))
    write_text(path, "\n".join([*parts, "</svg>"]) + "\n")


def _image(cloud: np.ndarray, x: int, y: int, ramp: str, up: str) -> str:
    shot = splat.draw(np.asarray(cloud, dtype=np.float64), "corner", WIDTH - 6, HEIGHT - 6, up)
    text = base64.b64encode(splat.png(shot, ramp)).decode()
    size = f'width="{WIDTH - 6}" height="{HEIGHT - 6}"'
    return f'<image x="{x + 3}" y="{y + 3}" {size} href="data:image/png;base64,{text}"/>'
