"""What the toys' rewards are given: the real points of each set."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def points(x_0: np.ndarray, context: Mapping[str, np.ndarray]) -> list[np.ndarray | None]:
    """Each event without its padding; ``None`` where it is not finite."""
    real = context["mask"].astype(bool)
    return [event[keep] if np.isfinite(event).all() else None for event, keep in zip(x_0, real, strict=True)]
