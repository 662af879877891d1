"""Where draws are made: a domain, the policy being trained and the pretrained one, on one device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rayft.chain import Policy
from rayft.domain import Domain


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
        context = {k: v.to(self.device) for k, v in self.domain.context(num_chains, generator).items()}
        shape = torch.empty(num_chains, *self.domain.event_shape, dtype=self.dtype, device=self.device)
        return self.policy.noise(shape, context, generator), context
