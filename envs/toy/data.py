"""The toy's data: p(x_0) = sum_k weight_k N(x_0; centre_k, spread^2 I), four corners of a square, unequally likely."""

from __future__ import annotations

import torch
from torch import Tensor

CENTRES = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]])
WEIGHTS = torch.tensor([0.1, 0.2, 0.4, 0.3])
SPREAD = 0.5


def draw(num_events: int, generator: torch.Generator) -> Tensor:
    """Events of the mixture."""
    corner = torch.multinomial(WEIGHTS, num_events, replacement=True, generator=generator)
    return CENTRES[corner] + SPREAD * torch.randn(num_events, 2, generator=generator)
