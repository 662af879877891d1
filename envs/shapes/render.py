"""What the report shows of shapes: pictures of the best, of typical ones and of some at random, and some to turn.

A picture is a PNG inside the page, drawn by ``splat`` on nothing: it suits a light page and a dark one. The figures are
plotly.js's, in the page's colours. Of two models of 2048 points all this is 0.9 MB, of the noisiest clouds below 1.5.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from envs.shapes import splat

if TYPE_CHECKING:
    from rayft.domain import Panel

NUM_DRAWN, NUM_SOLID = 5, 4  # pictures in a row, and clouds of a model to turn around
MOST_POINTS = 2048  # of a cloud to turn around
SIZES = {"corner": (300, 210), "top": (300, 150)}  # width and height of what a picture of the page shows
COLOURS = {"pretrained": "before", "fine-tuned": "run"}
EYES = {"z": (-1.1, -1.2, 0.75), "y": (-1.2, 0.75, -1.1)}


@dataclass(frozen=True)
class Shown:
    """A cloud of a panel."""

    cloud: np.ndarray
    score: float  # NaN where there is none


def sections(panels: Mapping[str, Panel], up: str = "z") -> dict[str, str]:
    """Title -> HTML, for ``Domain.page``. ``up`` is the axis that stands upright."""
    found = {name: _shown(panel) for name, panel in panels.items()}
    told = {"Shapes": "".join(_model(name, found[name], len(panel.samples), up) for name, panel in panels.items())}
    scenes = [
        scene(one.cloud, f"{name}, {rank}: {_number(one.score)}", _colour(name), up)
        for name, some in reversed(found.items())
        for rank, one in enumerate((best(some) or some)[:NUM_SOLID], 1)
    ]
    if scenes:
        note = '<p class="soft">The highest scores of each model. Drag to turn, scroll to zoom.</p>'
        told["Shapes in three dimensions"] = note + _figures(scenes, 460)
    return told


def _shown(panel: Panel) -> list[Shown]:
    told = zip(panel.samples, panel.rewards.tolist(), strict=True)
    return [Shown(np.asarray(sample), score) for sample, score in told if sample is not None]


def best(found: Sequence[Shown]) -> list[Shown]:
    """All that have a score, the highest first."""
    return sorted((one for one in found if np.isfinite(one.score)), key=lambda one: -one.score)


# -- pictures on the page


def _model(name: str, found: Sequence[Shown], num_samples: int, up: str) -> str:
    ranked = best(found)
    middle = max(0, (len(ranked) - NUM_DRAWN) // 2)
    order = np.random.default_rng(0).permutation(len(found))
    rows = {
        "The highest scores": ranked[:NUM_DRAWN],
        "Typical: the scores in the middle": ranked[middle : middle + NUM_DRAWN],
        "At random": [found[i] for i in order[:NUM_DRAWN]],
    }
    if len(ranked) <= NUM_DRAWN:
        del rows["Typical: the scores in the middle"]
    body = "".join(
        f'<p class="soft">{title}</p><div class="cells">{"".join(_cell(one, name, up) for one in some)}</div>'
        for title, some in rows.items()
        if some
    )
    said = f"{len(found):,} shapes in {num_samples:,} samples, from the corner and from above."
    dot = f'<span class="dot {_colour(name)}"></span>'
    return f'<h3>{dot}{html.escape(name)}</h3><p class="soft">{said}</p>{body}'


def _cell(shown: Shown, name: str, up: str) -> str:
    shots = [splat.draw(shown.cloud, view, *size, up) for view, size in SIZES.items()]
    text = base64.b64encode(splat.png(splat.stacked(shots), _colour(name))).decode()
    width, height = shots[0].light.shape[1], sum(len(shot.light) for shot in shots)
    score = _number(shown.score)
    caption = f"<b>{score}</b>" if np.isfinite(shown.score) else score
    return (
        f'<figure><img src="data:image/png;base64,{text}" width="{width}" height="{height}" '
        f'style="width:100%;height:auto" alt="a shape, {score}"><figcaption>{caption}</figcaption></figure>'
    )


def _colour(name: str) -> str:
    return COLOURS.get(name, "best")


def _number(score: float) -> str:
    return f"{score:.4g}" if np.isfinite(score) else "no score"


# -- clouds to turn around


def scene(cloud: np.ndarray, name: str, colour: str, up: str = "z") -> dict[str, Any]:
    """{name, data, layout} as plotly.js reads them."""
    kept = np.random.default_rng(0).permutation(len(cloud))[:MOST_POINTS]
    places = np.asarray(cloud, dtype=np.float64)[np.sort(kept)]
    places = places - (places.min(0) + places.max(0)) / 2
    places = places / max(float(np.abs(places).max()), 1e-9)
    marker = {"size": 2.6, "color": f"var(--{colour})"}
    told = dict(zip("xyz", places.T.round(3).tolist(), strict=True))
    data = {"type": "scatter3d", "mode": "markers", **told, "marker": marker, "hoverinfo": "skip"}
    eye = dict(zip("xyz", EYES[up], strict=True))
    camera = {"eye": eye, "up": {axis: int(axis == up) for axis in "xyz"}, "projection": {"type": "perspective"}}
    axes = {f"{axis}axis": {"visible": False, "showspikes": False} for axis in "xyz"}
    layout = {
        "scene": {**axes, "aspectmode": "data", "dragmode": "orbit", "camera": camera},
        "margin": {"t": 0, "r": 0, "b": 0, "l": 0},
        "uirevision": name,
    }
    return {"name": name, "data": [data], "layout": layout}


def _figures(told: Sequence[Mapping[str, Any]], height: int) -> str:
    """The element that the page turns into these figures, one at a time."""
    text = html.escape(json.dumps(list(told), separators=(",", ":")))
    return f'<div style="--height:{height}px" data-figures="{text}"></div>'
