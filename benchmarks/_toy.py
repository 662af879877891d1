"""``python -m benchmarks._toy RUN``: the README's picture, samples of a toy run before, after and at the optimum.

Writes benchmarks/results/toy.svg from the run's own files; the optimum is p_pre resampled with exp(r/alpha).
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from rayft.spec import open_folder
from rayft.verdict import Samples

OUT = Path(__file__).parent / "results" / "toy.svg"
SIDE, REACH, NUM_POINTS = 240, 2.8, 700


def panels(run: Path) -> dict[str, np.ndarray]:
    """Title -> points in the plane."""
    before = Samples.load(run / "evaluations" / "pretrained.npz")
    after = Samples.load(sorted((run / "evaluations").glob("iteration_*.npz"))[-1])
    alpha = open_folder(run).checked().evaluation_alpha()
    assert alpha is not None, "the optimum of a picture needs an alpha"
    rewards = before.rewards[: len(before.x_0)]
    weight = np.exp((rewards - rewards.max()) / alpha)
    chosen = np.random.default_rng(0).choice(len(weight), NUM_POINTS, p=weight / weight.sum())
    return {"pretrained": before.x_0, "fine-tuned": after.x_0, "optimum p*": before.x_0[chosen]}


def draw(found: dict[str, np.ndarray]) -> str:
    """An SVG readable on light and dark pages."""
    parts = []
    for number, (title, points) in enumerate(found.items()):
        left = number * (SIDE + 16)
        parts.append(f'<text x="{left + SIDE / 2}" y="16" text-anchor="middle">{title}</text>')
        parts.append(f'<rect x="{left}" y="26" width="{SIDE}" height="{SIDE}" rx="6" fill="none" stroke="#8896a3"/>')
        shown = points[:NUM_POINTS][np.abs(points[:NUM_POINTS]).max(1) < REACH]
        for x, y in (shown / REACH + 1) * SIDE / 2:
            parts.append(f'<circle cx="{left + x:.1f}" cy="{26 + SIDE - y:.1f}" r="1.6"/>')
    size = f'width="{3 * SIDE + 32}" height="{SIDE + 30}"'
    style = 'font-family="sans-serif" font-size="14" fill="#2a7fb0" fill-opacity="0.75"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><g {style}>\n' + "\n".join(parts) + "\n</g></svg>\n"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("give the folder of a finished toy run: python -m benchmarks._toy runs/toy_ppo")
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(draw(panels(Path(sys.argv[1]))))
    print(OUT)
