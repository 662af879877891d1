"""Conditional fine-tuning: a model that knew no condition learns to answer one (T Sec. 8.2).

    max E_{y ~ Pi} [ E_{p(.|y)} r(x_0, y) - alpha KL(p(.|y) || p_pre) ]

With r = log p(y | x_0) and alpha = 1 the optimum is p_pre(x_0 | y).

The network stays frozen; every y has adapters of its own on it, which begin as none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from rayft.adapt import LowRank
from rayft.domain import Denoiser, Domain, Panel, build, load_weights
from rayft.imports import nearest
from rayft.schedule import Schedule
from rayft.space import Context


class ConditionedDenoiser(Denoiser):
    """A frozen network with one set of adapters for each ``context["y"]``. It begins as exactly that network."""

    def __init__(self, base: Denoiser, num_classes: int, rank: int) -> None:
        super().__init__()
        self.base, self.prediction, self.num_classes = base.requires_grad_(False), base.prediction, num_classes
        weights = {name: value for name, value in base.named_parameters() if value.ndim >= 2}
        self.adapters = LowRank(weights, rank, num_sets=num_classes)

    def weights(self, y: int) -> dict[str, Tensor]:
        """The adapted weights of one y."""
        return self.adapters.merged(dict(self.base.named_parameters()), y)

    def forward(self, x_t: Tensor, timestep: Tensor, context: Context) -> Tensor:
        y, told = context["y"], {k: v for k, v in context.items() if k != "y"}
        outs, rows = [], []
        for label in y.unique().tolist():
            if not 0 <= label < self.num_classes:
                raise ValueError(f"y is {label}; this network knows the conditions 0 to {self.num_classes - 1}")
            mine = (y == label).nonzero().squeeze(-1)
            given = x_t[mine], timestep[mine], {k: v[mine] for k, v in told.items()}
            outs.append(functional_call(self.base, self.weights(label), given))
            rows.append(mine)
        return torch.cat(outs)[torch.cat(rows).argsort()]

    def loss_weight(self, timestep: Tensor) -> Tensor | float:
        return self.base.loss_weight(timestep)


class Conditioned(Domain):
    """Another domain with a condition ``y``: the place of its class in ``classes``, drawn anew for every chain.

    ``domain`` is a name, or a mapping of name and arguments. ``probabilities`` has a number for each class that is to
    be drawn (evenly where none are given), ``rank`` is that of the adapters.
    """

    def __init__(
        self,
        domain: str | Mapping[str, Any],
        classes: Sequence[str | int],
        probabilities: Mapping[str, float] | None = None,
        rank: int = 8,
        weights: str | None = None,
    ) -> None:
        named = {"name": domain} if isinstance(domain, str) else dict(domain)
        if "name" not in named:
            raise ValueError("conditioned: domain has no name; write domain: {name: conditioned, domain: NAME, ...}")
        self.inner = build(named.pop("name"), named)
        self.classes = [str(name) for name in classes] if not isinstance(classes, str) else []
        if len(self.classes) < 2 or len(set(self.classes)) < len(self.classes):
            raise ValueError(f"classes is {classes!r}; give the names of two or more classes, each once")
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(f"rank is {rank!r}; adapters have a rank of 1 or more")
        self.shares, self.rank, self.weights = self._shares(probabilities), rank, weights
        for name in ("event_shape", "space", "rewards", "decoder", "canonical", "formats", "metrics"):
            setattr(self, name, getattr(self.inner, name))

    def _shares(self, told: Mapping[str, float] | None) -> Tensor:
        given = dict.fromkeys(self.classes, 1.0) if told is None else {str(k): v for k, v in told.items()}
        for name, share in given.items():
            if name not in self.classes:
                known = ", ".join(self.classes)
                raise ValueError(f"probabilities has no class {name!r}{nearest(name, self.classes)}; there are {known}")
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < np.inf:
                raise ValueError(f"probabilities.{name} is {share!r}; it should be a number of 0 or more")
        shares = torch.tensor([float(given.get(name, 0.0)) for name in self.classes], dtype=torch.float64)
        if not shares.any():
            raise ValueError("probabilities are all 0, so no class would ever be drawn; give one of them more")
        return shares / shares.sum()

    def schedule(self) -> Schedule:
        return self.inner.schedule()

    def denoiser(self) -> Denoiser:
        net = ConditionedDenoiser(self.inner.denoiser(), len(self.classes), self.rank)
        if self.weights is not None:
            load_weights(net, self.weights)
        return net

    def context(self, num_chains: int, generator: torch.Generator) -> dict[str, Tensor]:
        return self._with_y(self.inner.context(num_chains, generator), num_chains, generator)

    def groups(self, context: Context) -> Tensor:
        """Those of the inner domain, each parted by y."""
        own, y = self.inner.groups({k: v for k, v in context.items() if k != "y"}), context["y"]
        return y if own is None else own * len(self.classes) + y

    def data(self, num_events: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]] | None:
        """Events of the inner domain beside a y that says nothing of them: p_pre(x_0) Pi(y)."""
        return self._beside(self.inner.data(num_events, generator), generator)

    def held_out(self, num_events: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]] | None:
        return self._beside(self.inner.held_out(num_events, generator), generator)

    def measure(self, samples: list[Any], x_0: np.ndarray, context: Mapping[str, np.ndarray]) -> Mapping[str, float]:
        return self.inner.measure(samples, x_0, context)

    def measures(self) -> bool:
        return self.inner.measures()

    def picture(self, panels: Mapping[str, np.ndarray]) -> Any:
        return self.inner.picture(panels)

    def page(self, panels: Mapping[str, Panel]) -> dict[str, str]:
        return self.inner.page(panels)

    def _beside(
        self, found: tuple[Tensor, dict[str, Tensor]] | None, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]] | None:
        return None if found is None else (found[0], self._with_y(found[1], len(found[0]), generator))

    def _with_y(self, context: dict[str, Tensor], num: int, generator: torch.Generator) -> dict[str, Tensor]:
        if "y" in context:
            raise ValueError(f"{type(self.inner).__name__} has a condition y of its own; it needs no other")
        return {**context, "y": torch.multinomial(self.shares, num, replacement=True, generator=generator)}
