"""Where draws are made: a domain, the policy being trained and the pretrained one, on one device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rayft.chain import Policy
from rayft.domain import Domain
from rayft.space import Context


@dataclass(frozen=True)
class Bench:
    """All random numbers are drawn on the CPU, the same for every device."""

    domain: Domain
    policy: Policy
    reference: Policy
    device: torch.device
    dtype: torch.dtype

    def start(self, num_chains: int, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """x_T and the context of new chains."""
        context = self.contexts(num_chains, generator)
        return self.noise(num_chains, context, generator), context

    def contexts(self, num: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """What stays fixed along each of ``num`` new chains."""
        return {k: v.to(self.device) for k, v in self.domain.context(num, generator).items()}

    def noise(self, num_chains: int, context: Context, generator: torch.Generator) -> torch.Tensor:
        """x_T of chains whose context is known."""
        shape = torch.empty(num_chains, *self.domain.event_shape, dtype=self.dtype, device=self.device)
        return self.policy.noise(shape, context, generator)
