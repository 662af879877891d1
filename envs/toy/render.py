"""Pictures of the toy: samples as points in the plane, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def scatter(panels: Mapping[str, np.ndarray], num_points: int = 1000) -> Any:
    """One panel per set of events, on equal axes."""
    from plotly.subplots import make_subplots

    figure = make_subplots(cols=len(panels), rows=1, subplot_titles=list(panels), shared_yaxes=True)
    for column, x_0 in enumerate(panels.values(), start=1):
        points = x_0[:num_points]
        marker = {"size": 4, "opacity": 0.5, "color": "#4c9bd1"}
        figure.add_scatter(x=points[:, 0], y=points[:, 1], mode="markers", marker=marker, row=1, col=column)
        figure.update_xaxes(range=[-2.5, 2.5], row=1, col=column)
    figure.update_yaxes(range=[-2.5, 2.5])
    figure.update_layout(showlegend=False, height=360, margin={"t": 40, "b": 20, "l": 20, "r": 20})
    return figure
