"""Muon (Jordan et al. 2024): momentum whose singular values are all made about 1, for the matrices of a network.

    W <- W - lr sqrt(max(1, rows / cols)) NS(momentum),    NS(M) ~ U V^T  where  M = U S V^T

NS is five Newton-Schulz steps X <- a X + (b A + c A^2) X, A = X X^T, which bring every singular value above 0.0015
of the norm to 0.7 .. 1.2. They run in float32, where torch's own Muon takes bfloat16: there the rounding of a gradient,
which depends on the number of learners, would come back as large as the update.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

A, B, C = 3.4445, -4.7750, 2.0315  # the paper's, steepest at 0
NUM_STEPS = 5
TINY = 1e-7


def orthogonal(matrices: Float[Tensor, "matrix rows cols"]) -> Float[Tensor, "matrix rows cols"]:
    """U S' V^T with S' between about 0.7 and 1.2, for the U S V^T of each matrix."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=TINY)
    for _ in range(NUM_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, made orthogonal, and weight decay that does not pass through it."""

    def __init__(self, params: Iterable[Any], lr: float, weight_decay: float = 0.0, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update; matrices of one shape are treated together."""
        assert closure is None
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in shapes.items():
                updates = orthogonal(torch.stack([self._momentum(p, group["momentum"]) for p in parameters]))
                size = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=size)

    def _momentum(self, parameter: Tensor, momentum: float) -> Tensor:
        """The running mean of gradients, looked ahead."""
        state = self.state[parameter]
        if not state:
            state["mean"] = torch.zeros_like(parameter)
        state["mean"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(state["mean"], momentum)  # type: ignore[union-attr]
