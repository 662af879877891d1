"""Where events live: all of R^n, or a linear subspace of it (padded atoms are zero, coordinates have no drift).

Noise is drawn in the subspace and every squared norm is taken in it, so log-probabilities and KLs are exact there:

    log N(x; mu, sigma^2 I) = -|P(x - mu)|^2 / (2 sigma^2) - dim (log sigma + log(2 pi) / 2),    dim = rank of P
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

Context = Mapping[str, Tensor]


@runtime_checkable
class Space(Protocol):
    """An orthogonal projector P and its rank, per chain."""

    def project(self, x: Float[Tensor, "batch *event"], context: Context) -> Float[Tensor, "batch *event"]:
        """P x."""
        ...

    def dim(self, x: Float[Tensor, "batch *event"], context: Context) -> Float[Tensor, " batch"] | float:
        """The rank of P for each chain."""
        ...


@dataclass(frozen=True)
class FullSpace:
    """Every axis is free."""

    def project(self, x: Tensor, context: Context) -> Tensor:
        return x

    def dim(self, x: Tensor, context: Context) -> float:
        return float(x[0].numel())


@dataclass(frozen=True)
class MaskedSpace:
    """Events [batch, item, feature] whose items ``context["mask"]`` [batch, item] are real; the rest is zero.

    The first ``num_centred`` features (coordinates) have zero mean over the real items.
    """

    num_centred: int = 0

    def project(self, x: Tensor, context: Context) -> Tensor:
        mask = context["mask"].to(x.dtype).unsqueeze(-1)
        x = x * mask
        if self.num_centred == 0:
            return x
        drift = x[..., : self.num_centred].sum(-2, keepdim=True) / mask.sum(-2, keepdim=True).clamp(min=1)
        return torch.cat([x[..., : self.num_centred] - drift * mask, x[..., self.num_centred :]], -1)

    def dim(self, x: Tensor, context: Context) -> Tensor:
        items = context["mask"].to(x.dtype).sum(-1)
        return (items * x.shape[-1] - self.num_centred).clamp(min=0)


def squared_norm(x: Float[Tensor, "batch *event"]) -> Float[Tensor, " batch"]:
    """|x|^2 over the event axes."""
    return x.flatten(1).square().sum(1)
