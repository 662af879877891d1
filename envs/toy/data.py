"""The toy's data: p(x_0) = sum_k weight_k N(x_0; centre_k, spread^2 I), four corners of a square, unequally likely."""

from __future__ import annotations

import torch
from torch import Tensor

from envs.toy import mixture

CENTRES, WEIGHTS = torch.tensor(mixture.CENTRES), torch.tensor(mixture.WEIGHTS)
SPREAD = mixture.SPREAD


def draw(num_events: int, generator: torch.Generator) -> Tensor:
    """Events of the mixture."""
    corner = torch.multinomial(WEIGHTS, num_events, replacement=True, generator=generator)
    return CENTRES[corner] + SPREAD * torch.randn(num_events, 2, generator=generator)
