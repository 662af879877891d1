"""What a user implements to bring a world: its events, its pretrained denoiser, and how a finished event is read.

The engine knows no domain; a domain knows no Ray. Built-in domains are found by short name (entry-point group
``rayft.domains``), others by import path.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rayft import imports
from rayft.schedule import NAMED, Schedule, from_betas
from rayft.space import Context, FullSpace, Space


class Denoiser(nn.Module, ABC):
    """A network that predicts noise, x_0 or v. ``timestep`` counts 1..T of the schedule it was trained on."""

    prediction: str = "eps"

    @abstractmethod
    def forward(self, x_t: Float[Tensor, "batch *event"], timestep: Int[Tensor, " batch"], context: Context) -> Tensor:
        """The prediction, shaped like x_t."""

    def exported(self) -> nn.Module:
        """The module whose state dict the user gave and gets back."""
        return self


class Domain(ABC):
    """A world of events. Subclasses set the class attributes and implement the two abstract methods."""

    event_shape: tuple[int, ...]
    space: Space = FullSpace()
    rewards: Mapping[str, str] = {}  # short name -> import path of a reward
    decoder: str = "rayft.reward:as_arrays"  # (x_0, context) -> one sample per event, None where there is none

    @abstractmethod
    def schedule(self) -> Schedule:
        """The schedule the denoiser was trained with."""

    @abstractmethod
    def denoiser(self) -> Denoiser:
        """The pretrained network; a fresh one where nothing is trained yet."""

    def context(self, num_chains: int, generator: torch.Generator) -> dict[str, Tensor]:
        """What stays fixed along each new chain (mask, size, class). Drawn by the domain, stored with the chain."""
        return {}

    def groups(self, context: Context) -> Tensor | None:
        """An integer per chain for c, all that the policy cannot change (math: J* is averaged over c)."""
        return None

    def data(self, num_events: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]] | None:
        """Random training events and their contexts; ``None`` where the domain has no data set."""
        return None

    def picture(self, panels: Mapping[str, np.ndarray]) -> Any:
        """A plotly figure of events side by side (before, after, optimum), for the report; ``None`` to leave it out."""
        return None


class PlainDenoiser(Denoiser):
    """A user's own ``net(x, t)`` as a Denoiser; its state dict stays the user's."""

    def __init__(self, net: nn.Module, prediction: str = "eps", first_timestep: int = 0) -> None:
        super().__init__()
        self.net, self.prediction, self.shift = net, prediction, 1 - first_timestep

    def forward(self, x_t: Tensor, timestep: Tensor, context: Context) -> Tensor:
        return self.net(x_t, timestep - self.shift)

    def exported(self) -> nn.Module:
        return self.net


class Plain(Domain):
    """A domain from four things every diffusion user has: a module, its weights, its betas and the shape of an event.

    ``betas`` is a list, or a schedule by name: ``{name: linear, num_steps: 1000, beta_1: 1e-4, beta_T: 0.02}``.
    ``first_timestep`` is the smallest t the network was trained with (0 in DDPM's code, 1 in its paper).
    """

    def __init__(
        self,
        network: Any,
        event_shape: list[int],
        betas: list[float] | dict[str, Any],
        weights: str | None = None,
        prediction: str = "eps",
        first_timestep: int = 0,
        network_arguments: dict[str, Any] | None = None,
    ) -> None:
        self.network, self.weights, self.arguments = network, weights, network_arguments or {}
        self.event_shape, self.betas = tuple(event_shape), betas
        self.prediction, self.first_timestep = prediction, first_timestep

    def schedule(self) -> Schedule:
        if not isinstance(self.betas, dict):
            return from_betas(torch.tensor(self.betas, dtype=torch.float64))
        arguments = dict(self.betas)
        name = arguments.pop("name", "linear")
        if name not in NAMED:
            raise ValueError(f"no schedule {name!r}{imports.nearest(name, NAMED)}; choose {', '.join(NAMED)}")
        imports.check_arguments(NAMED[name], arguments, f"schedule {name!r}")
        return NAMED[name](**arguments)

    def denoiser(self) -> Denoiser:
        factory = imports.load(self.network) if isinstance(self.network, str) else self.network
        imports.check_arguments(factory, self.arguments, str(self.network))
        net = factory(**self.arguments)
        if not isinstance(net, nn.Module):
            raise ValueError(f"{self.network} gives {type(net).__name__}; a network is a torch.nn.Module net(x, t)")
        if self.weights is not None:
            load_weights(net, Path(self.weights))
        return PlainDenoiser(net, self.prediction, self.first_timestep)


def load_weights(net: nn.Module, path: Path) -> None:
    """A state dict from ``.safetensors`` or ``.pt``, never unpickling anything but tensors."""
    if not path.is_file():
        raise ValueError(f"no weights at {path}; give a .safetensors or .pt state dict")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        net.load_state_dict(state)
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise ValueError(f"{path} does not fit {type(net).__name__} or is damaged: {reason}") from None


def builtin() -> dict[str, str]:
    """Short name -> import path of every installed domain."""
    return {"plain": "rayft.domain:Plain"} | {e.name: e.value for e in entry_points(group="rayft.domains")}


def find(path: Any) -> type[Domain]:
    """The Domain class behind a short name, an import path, or the class itself."""
    if not isinstance(path, str):
        found = path
    elif ":" in path:
        found = imports.load(path)
    else:
        known = builtin()
        if path not in known:
            hint = imports.nearest(path, known)
            raise ValueError(f"no domain {path!r}{hint}; there are {', '.join(sorted(known))}, or an import path")
        found = imports.load(known[path])
    if not (inspect.isclass(found) and issubclass(found, Domain)):
        raise ValueError(f"{path} is not a Domain: make it a subclass of rayft.domain.Domain")
    return found


def build(path: Any, kwargs: Mapping[str, Any]) -> Domain:
    """The domain, with its arguments checked by name first."""
    found = find(path)
    imports.check_arguments(found, kwargs, f"domain {path if isinstance(path, str) else found.__name__!r}")
    return found(**kwargs)
