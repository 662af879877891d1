"""What the report shows of molecules: drawings, the best by score, the best in three dimensions, what else changed.

Everything is HTML that stands alone. Lines and letters take the colour of the page's text, so that drawings suit a
light page and a dark one; the figures are plotly.js's, whose colours ``var(--run)`` are the page's.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from envs.molecules import geometry, solid
from envs.molecules.metrics import summarise
from envs.molecules.reward import need, parse
from envs.molecules.write import smiles

if TYPE_CHECKING:
    from rdkit.Chem import Mol

    from rayft.domain import Panel

NUM_DRAWN, NUM_LISTED, NUM_SOLID = 20, 20, 6
NUM_MEASURED = 500  # molecules a histogram is made of
NUM_BINS = 30
COLOURS = {"pretrained": "before", "fine-tuned": "run"}
INKS = {  # legible on white and on near black; everything else has the colour of the page's text
    7: "#3f78d8", 8: "#d9483b", 9: "#3a9a4b", 15: "#c9761d", 16: "#a88a10", 17: "#3a9a4b", 35: "#a3552f", 53: "#8a4fbf"
}  # fmt: skip
BLACK = "#000000"
USUAL = re.compile(  # what a browser takes for granted, and names of parts that nobody asks for
    r"<!--.*?-->|class='[^']*' |fill-rule:evenodd;|fill-opacity:1;|"
    r"stroke-(?:linecap:butt|linejoin:miter|opacity:1|miterlimit:10);?"
)
MEASURES = {  # title: module, function
    "QED": ("rdkit.Chem.QED", "qed"),
    "log P": ("rdkit.Chem.Crippen", "MolLogP"),
    "rings": ("rdkit.Chem.rdMolDescriptors", "CalcNumRings"),
    "heavy atoms": ("rdkit.Chem.rdMolDescriptors", "CalcNumHeavyAtoms"),
}
TOLD = ("validity", "uniqueness", "diversity", "qed", "synth")


@dataclass(frozen=True)
class Shown:
    """A molecule of a panel."""

    mol: Mol  # as the model made it
    smiles: str
    score: float  # NaN where there is none


def sections(panels: Mapping[str, Panel]) -> dict[str, str]:
    """Title -> HTML, for ``Domain.page``."""
    found = {name: _shown(panel) for name, panel in panels.items()}
    last = list(found)[-1]
    top = best(found[last], NUM_LISTED)
    told = {"Molecules": "".join(_grid(name, found[name], len(panel.samples)) for name, panel in panels.items())}
    if top:
        told["The best molecules"] = _listed(last, top)
        told["The best in three dimensions"] = _solid(top[:NUM_SOLID])
    if any(found.values()):
        told["What else changed"] = _measured(found)
    return told


def numbers(samples: Sequence[Any]) -> dict[str, float]:
    """A few of ``metrics``' numbers of a set, and the share of valid ones whose geometry passes every check."""
    found = summarise(samples)
    sound = geometry.shares([geometry.check(one) for one in samples if one is not None])[-1]
    share = sound.passed / sound.judged if sound.judged else math.nan
    return {**{name: getattr(found, name) for name in TOLD}, "sound_geometry": share}


def _shown(panel: Panel) -> list[Shown]:
    told = zip(panel.samples, panel.rewards.tolist(), strict=True)
    read = [(sample, smiles(sample), score) for sample, score in told if sample is not None]
    return [Shown(*one) for one in read if one[1]]


def best(found: Sequence[Shown], num: int) -> list[Shown]:
    """The highest scores, each molecule once and with its highest."""
    ranked = sorted((one for one in found if np.isfinite(one.score)), key=lambda one: -one.score)
    return list({one.smiles: one for one in reversed(ranked)}.values())[::-1][:num]


# -- drawings


def _grid(name: str, found: Sequence[Shown], num_samples: int) -> str:
    chosen = [found[i] for i in np.random.default_rng(0).permutation(len(found))[:NUM_DRAWN]]
    distinct = len({one.smiles for one in found})
    whole = f"{len(found):,} molecules, {distinct:,} of them different, in {num_samples:,} samples"
    said = f"{len(chosen)} at random of {whole}." if len(chosen) < len(found) else f"{whole}."
    cells = "".join(_cell(one, _score(one.score)) for one in chosen)
    return f'<h3>{_dot(name)}{html.escape(name)}</h3><p class="soft">{said}</p><div class="cells">{cells}</div>'


def _cell(shown: Shown, caption: str) -> str:
    return f"<figure>{draw(shown.smiles)}<figcaption>{caption}</figcaption></figure>"


def draw(text: str, width: int = 150, height: int = 110) -> str:
    """A molecule's graph as one ``<svg>`` without background."""
    chem, drawing = need("rdkit.Chem", "molecules"), need("rdkit.Chem.Draw.rdMolDraw2D", "molecules")
    canvas = drawing.MolDraw2DSVG(width, height)
    options = canvas.drawOptions()
    options.clearBackground = False
    options.useBWAtomPalette()
    options.updateAtomPalette({number: _rgb(ink) for number, ink in INKS.items()})
    options.padding, options.fixedBondLength = 0.08, 26
    options.minFontSize, options.maxFontSize = 8, 14
    options.prepareMolsBeforeDrawing, options.flagCloseContactsDist = False, -1  # no red boxes around what is near
    canvas.DrawMolecule(drawing.PrepareMolForDrawing(chem.MolFromSmiles(text), addChiralHs=False))
    canvas.FinishDrawing()
    drawn = canvas.GetDrawingText().replace(BLACK, "currentColor")
    inside = USUAL.sub("", drawn[drawn.index(">", drawn.index("<svg")) + 1 :])
    label = html.escape(text)
    head = f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-label="{label}">'
    return f"{head}<title>{label}</title>{inside.strip()}"


def _rgb(ink: str) -> tuple[float, ...]:
    return tuple(int(ink[i : i + 2], 16) / 255 for i in (1, 3, 5))


def _dot(name: str) -> str:
    return f'<span class="dot {COLOURS.get(name, "best")}"></span>'


def _score(score: float) -> str:
    return f"<b>{score:.4g}</b>" if np.isfinite(score) else "no score"


# -- the best


def _listed(name: str, top: Sequence[Shown]) -> str:
    codes = (f"<code class=whole>{html.escape(one.smiles)}</code>" for one in top)
    captions = (
        f"{rank}. {_score(one.score)}{code}" for rank, (one, code) in enumerate(zip(top, codes, strict=True), 1)
    )
    cells = "".join(map(_cell, top, captions))
    lines = "\n".join(f"{one.smiles} {one.score:.6g}" for one in top)
    return (
        f'<p class="soft">The highest scores among the {html.escape(name)} samples that the evaluation kept, each '
        f'molecule once. A click selects a whole SMILES.</p><div class="cells">{cells}</div>'
        f"<details><summary>As text</summary><pre class=whole>{html.escape(lines)}</pre></details>"
    )


def _solid(top: Sequence[Shown]) -> str:
    scenes = [solid.scene(one.mol, f"{rank}: {one.score:.4g}") for rank, one in enumerate(top, 1)]
    note = "In the geometry that the model made; hydrogens that it leaves out are placed by RDKit."
    return f'<p class="soft">{note} Drag to turn, scroll to zoom.</p>{figures(scenes, 440)}'


# -- what else changed


def _measured(found: Mapping[str, Sequence[Shown]]) -> str:
    """Histograms of what the reward may have moved beside itself; that which is the reward is left out."""
    cards = ""
    for title, where in MEASURES.items():
        measure = getattr(need(where[0], "molecules"), where[1])
        values = {}
        for name, some in found.items():
            some = some[:NUM_MEASURED]
            values[name] = np.array([float(measure(parse(one.smiles))) for one in some])
            scores = np.array([one.score for one in some])
            if len(some) and np.allclose(values[name], scores, atol=1e-6):
                break
        else:
            cards += f"<div><h3>{html.escape(title)}</h3>{figures([histogram(title, values)], 200)}</div>"
    dots = ", ".join(f"{_dot(name)}{html.escape(name)}" for name in found)
    return f'<p class="soft">Shares of the molecules: {dots}.</p><div class="grid">{cards}</div>'


def histogram(title: str, values: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Shares by value; whole numbers have a bin each."""
    every = np.concatenate(list(values.values()))
    low, high = float(every.min()), float(every.max())
    if (every == every.round()).all() and high - low <= 2 * NUM_BINS:
        edges = np.arange(low - 0.5, high + 1)
    else:
        edges = np.linspace(low, high if high > low else low + 1, NUM_BINS + 1)
    data = []
    for name, column in values.items():
        shares = np.histogram(column, edges)[0] / max(1, len(column))
        colour = f"var(--{COLOURS.get(name, 'best')})"
        line = {"color": colour, "width": 1.5, "shape": "hv"}
        heights = np.append(shares, shares[-1]).round(5).tolist()
        data.append(
            {"type": "scatter", "mode": "lines", "name": name, "x": edges.round(4).tolist(), "y": heights, "line": line}
            | {"fill": "tozeroy", "fillcolor": f"{colour}38", "hoverinfo": "x+y+name"}
        )
    margin, axis = {"t": 6, "r": 8, "b": 28, "l": 40}, {"rangemode": "tozero", "tickformat": ".0%", "nticks": 5}
    return {"name": title, "data": data, "layout": {"margin": margin, "yaxis": axis, "xaxis": {"nticks": 6}}}


def figures(told: Sequence[Mapping[str, Any]], height: int) -> str:
    """The element that the page turns into these figures, one at a time."""
    text = html.escape(json.dumps(list(told), separators=(",", ":")))
    return f'<div style="--height:{height}px" data-figures="{text}"></div>'
