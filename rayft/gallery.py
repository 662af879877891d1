"""What a domain shows of its samples on the page of a run: one figure of raw events, and sections of its own.

Both are made of the events that evaluations kept, with the same decoder that rewards have. Nothing of a domain's is
trusted to work: what raises is a sentence on the page.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from rayft import readout
from rayft.domain import Domain, Panel
from rayft.readout import Found
from rayft.verdict import Samples


def picture(found: Found, domain: Domain | None) -> dict[str, Any] | None:
    """The domain's figure as plotly.js reads it, without the template: the page brings its own, light or dark."""
    if domain is None or found.pretrained is None:
        return None
    panels = {name: samples.x_0 for name, samples in _models(found).items()}
    if found.tilt is not None and found.alpha is not None:
        panels["optimum p*"] = readout.optimum(found.pretrained, found.alpha)
    figure = domain.picture(panels)
    return None if figure is None else json.loads(figure.update_layout(template=None).to_json())


def sections(found: Found, domain: Domain | None) -> str:
    """The domain's own sections; nothing is decoded for a domain that has none."""
    if domain is None or found.pretrained is None or type(domain).page is Domain.page:
        return ""
    told = domain.page({name: panel(domain, samples) for name, samples in _models(found).items()})
    if not isinstance(told, Mapping):
        raise ValueError(f"{type(domain).__name__}.page gives {type(told).__name__}; return a dict of title to HTML")
    parts = ((html.escape(str(title)), body) for title, body in told.items())
    return "".join(f"<section>\n<h2>{title}</h2>\n{body}\n</section>\n" for title, body in parts)


def panel(domain: Domain, samples: Samples) -> Panel:
    """The kept events of a set of samples, decoded; those whose scoring failed are not tried again."""
    scored, found = samples.scored(), np.full(len(samples.x_0), None, dtype=object)
    for position, sample in zip(scored, samples.decoded(domain, scored), strict=True):
        found[position] = sample
    return Panel(samples.x_0, samples.context, samples.rewards[: len(samples.x_0)], found.tolist())


def _models(found: Found) -> dict[str, Samples]:
    told = {"pretrained": found.pretrained, "fine-tuned": found.policy}
    return {name: samples for name, samples in told.items() if samples is not None}
