"""What a user implements to bring a world: its events, its pretrained denoiser, and how a finished event is read.

The engine knows no domain; a domain knows no Ray. Built-in domains are found by short name (entry-point group
``rayft.domains``), others by import path.
"""

from __future__ import annotations

import inspect
import reprlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rayft import imports
from rayft.chain import Prediction, expand
from rayft.critic import Critic
from rayft.schedule import NAMED, Schedule, from_betas
from rayft.space import Context, FullSpace, Space

VELOCITIES = ("velocity", "velocity_to_data")


class Denoiser(nn.Module, ABC):
    """A network that predicts noise, x_0 or v. ``timestep`` counts 1..T of the schedule it was trained on."""

    prediction: Prediction = "eps"

    @abstractmethod
    def forward(self, x_t: Float[Tensor, "batch *event"], timestep: Int[Tensor, " batch"], context: Context) -> Tensor:
        """The prediction, shaped like x_t."""

    def exported(self) -> nn.Module:
        """The module whose state dict the user gave and gets back."""
        return self

    def loss_weight(self, timestep: Int[Tensor, " batch"]) -> Tensor | float:
        """What a level's squared error counts in pretraining."""
        return 1.0


@dataclass(frozen=True)
class Panel:
    """Samples of one model as the report has them."""

    x_0: np.ndarray  # [sample, *event]
    context: Mapping[str, np.ndarray]  # [sample, ...]
    rewards: np.ndarray  # [sample], NaN where scoring failed
    samples: Sequence[Any]  # as the decoder gives them; None where it finds none, or scoring failed


class Domain(ABC):
    """A world of events. Subclasses set the class attributes and implement the two abstract methods."""

    event_shape: tuple[int, ...]
    space: Space = FullSpace()
    rewards: Mapping[str, str] = {}  # short name -> import path of a reward
    decoder: str = "rayft.reward:as_arrays"  # (x_0, context) -> one sample per event, None where there is none
    canonical: str = "rayft.reward:itself"  # sample -> all that tells it from others, as str, number or array
    # columns[name] has a row per sample: index, reward, part/NAME; of an .npz also x_0 and context/NAME
    formats: Mapping[str, str] = {}  # file suffix -> import path of write(path, samples, columns) -> how many it wrote
    metrics: str | None = None  # import path of (samples) -> {name: number}, beside every evaluation

    @abstractmethod
    def schedule(self) -> Schedule:
        """The schedule the denoiser was trained with."""

    @abstractmethod
    def denoiser(self) -> Denoiser:
        """The pretrained network; a fresh one where nothing is trained yet."""

    def critic(self) -> nn.Module:
        """A fresh value network: ``critic(x_t, timestep, context)`` gives a number per chain. See ``rayft.critic``."""
        told = self.context(1, torch.Generator().manual_seed(0))
        numbers = sum(entry[0].numel() for entry in told.values())
        return Critic(self.event_shape, int(self.schedule().timestep[-1]), numbers)

    def context(self, num_chains: int, generator: torch.Generator) -> dict[str, Tensor]:
        """What stays fixed along each new chain (mask, size, class). Drawn by the domain, stored with the chain."""
        return {}

    def groups(self, context: Context) -> Tensor | None:
        """An integer per chain for c, all that the policy cannot change (math: J* is averaged over c)."""
        return None

    def data(self, num_events: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]] | None:
        """Random training events and their contexts; ``None`` where the domain has no data set."""
        return None

    def held_out(self, num_events: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]] | None:
        """Like ``data``, of events that are never trained on: pretraining tells the loss on them."""
        return None

    def measure(self, samples: list[Any], x_0: np.ndarray, context: Mapping[str, np.ndarray]) -> Mapping[str, float]:
        """``metrics`` of the samples that these events were decoded to; to be overridden where events say more."""
        return {} if self.metrics is None else imports.load(self.metrics)(samples)

    def measures(self) -> bool:
        """Whether ``measure`` tells anything."""
        return self.metrics is not None or type(self).measure is not Domain.measure

    def picture(self, panels: Mapping[str, np.ndarray]) -> Any:
        """A plotly figure of events side by side (before, after, optimum), for the report; ``None`` to leave it out."""
        return None

    def page(self, panels: Mapping[str, Panel]) -> dict[str, str]:
        """Title -> HTML of sections for the report, of "pretrained" and, once evaluated, "fine-tuned" samples.

        Each stands alone: no file, no network, no script, and every user's word escaped. An element with
        ``data-figures``, a JSON list of {name, data, layout} as plotly.js reads them, becomes those figures, one at a
        time and chosen by name; ``var(--run)`` in them is a colour of the page, as in page.css.
        """
        return {}


class PlainDenoiser(Denoiser):
    """A user's own ``net(x, t)`` as a Denoiser; its state dict stays the user's."""

    def __init__(self, net: nn.Module, prediction: Prediction = "eps", first_timestep: int = 0) -> None:
        super().__init__()
        self.net, self.prediction, self.shift = net, prediction, 1 - first_timestep

    def forward(self, x_t: Tensor, timestep: Tensor, context: Context) -> Tensor:
        return self.net(x_t, timestep - self.shift)

    def exported(self) -> nn.Module:
        return self.net


class FlowDenoiser(Denoiser):
    """A rectified flow's velocity ``net(x_s, s)`` on a chain of the same marginals (T Sec. 9).

        x_s = (1 - s) x_0 + s noise,    net = noise - x_0,    x0_hat = x_s - s net(x_s, s)

    A chain's x_t is x_s / c: s = c sqrt(1 - alpha_bar_t) and c = 1 / (sqrt(alpha_bar_t) + sqrt(1 - alpha_bar_t)).
    ``to_data`` is for networks whose time runs the other way: net(x, 1 - s) = x_0 - noise.
    """

    prediction = "x0"
    time: Tensor
    scale: Tensor

    def __init__(self, net: nn.Module, schedule: Schedule, to_data: bool = False) -> None:
        super().__init__()
        self.net, self.to_data = net, to_data
        signal, noise = schedule.alpha_bar.sqrt(), (1 - schedule.alpha_bar).sqrt()
        self.register_buffer("scale", 1 / (signal + noise), persistent=False)
        self.register_buffer("time", noise / (signal + noise), persistent=False)

    def forward(self, x_t: Tensor, timestep: Tensor, context: Context) -> Tensor:
        s, x_s = self.time[timestep].to(x_t.dtype), expand(self.scale[timestep], x_t) * x_t
        velocity = -self.net(x_s, 1 - s) if self.to_data else self.net(x_s, s)
        return x_s - expand(s, x_t) * velocity

    def exported(self) -> nn.Module:
        return self.net

    def loss_weight(self, timestep: Tensor) -> Tensor:
        """1 / s^2: even in the velocity, which is flow matching's own loss."""
        return self.time[timestep].float() ** -2


class Plain(Domain):
    """A domain from four things every diffusion user has: a module, its weights, its betas and the shape of an event.

    ``betas`` is a list, or a schedule by name: ``{name: linear, num_steps: 1000, beta_1: 1e-4, beta_T: 0.02}``.
    ``first_timestep`` is the smallest t the network was trained with (0 in DDPM's code, 1 in its paper).

    ``prediction`` is eps, x0 or v, or that of a rectified flow, with betas ``{name: rectified, num_steps: 50}``:
    ``velocity``, net(x, s) = noise - x_0 with noise at s = 1, or ``velocity_to_data``, x_0 - noise with noise at 0.
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
        if not event_shape or not all(isinstance(size, int) and size > 0 for size in event_shape):
            raise ValueError(f"event_shape is {event_shape!r}; give the shape of one event, for example [1, 28, 28]")
        if first_timestep not in (0, 1):
            raise ValueError(f"first_timestep is {first_timestep!r}; the network counts from 0 or from 1")
        known = (*get_args(Prediction), *VELOCITIES)
        if prediction not in known:
            what = f"prediction is {prediction!r}{imports.nearest(prediction, known)}"
            raise ValueError(f"{what}; a network predicts {', '.join(known)}")
        if prediction in VELOCITIES and first_timestep != 0:
            raise ValueError(f"first_timestep is {first_timestep}, and a velocity's time is a number from 0 to 1")
        self.prediction = prediction
        self.network, self.weights, self.arguments = network, weights, network_arguments or {}
        self.event_shape, self.betas = tuple(event_shape), betas
        self.first_timestep = first_timestep

    def schedule(self) -> Schedule:
        if not isinstance(self.betas, dict):
            try:
                betas = torch.tensor(self.betas, dtype=torch.float64)
            except (TypeError, ValueError, RuntimeError):
                raise ValueError(f"betas is {self.betas!r}; give numbers, or {{name: {' | '.join(NAMED)}}}") from None
            return from_betas(betas)
        arguments = dict(self.betas)
        name = arguments.pop("name", "linear")
        if name not in NAMED:
            raise ValueError(f"no schedule {name!r}{imports.nearest(name, NAMED)}; choose {', '.join(NAMED)}")
        return imports.construct(NAMED[name], arguments, f"schedule {name!r}")

    def denoiser(self) -> Denoiser:
        factory = imports.load(self.network) if isinstance(self.network, str) else self.network
        if not callable(factory):
            raise ValueError(f"{self.network} is {type(factory).__name__}; a network is a torch.nn.Module net(x, t)")
        net = imports.construct(factory, self.arguments, str(self.network))
        if not isinstance(net, nn.Module):
            raise ValueError(f"{self.network} gives {type(net).__name__}; a network is a torch.nn.Module net(x, t)")
        if self.weights is not None:
            load_weights(net, Path(self.weights))
        if self.prediction in VELOCITIES:
            return FlowDenoiser(net, self.schedule(), self.prediction == "velocity_to_data")
        return PlainDenoiser(net, cast("Prediction", self.prediction), self.first_timestep)


def pretrained(domain: Domain) -> Denoiser:
    """The domain's network, alike in every process even where it is not trained yet."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return domain.denoiser().eval()


def try_out(domain: Domain, weights: str | None = None) -> None:
    """Builds the network and calls it once, at both ends of the chain: what only that shows is known before a run."""
    net, space = pretrained(domain), domain.space
    if net.prediction not in get_args(Prediction):
        raise ValueError(f"prediction is {net.prediction!r}; a network predicts {', '.join(get_args(Prediction))}")
    if weights is not None:
        load_weights(net, weights)
    context = domain.context(2, torch.Generator().manual_seed(0))
    x_t = space.project(torch.zeros(2, *domain.event_shape), context)
    try:
        with torch.no_grad():
            out = net(x_t, domain.schedule().timestep[[1, -1]], context)
    except Exception as error:
        raise ValueError(f"the network fails on x_t of shape {tuple(x_t.shape)}: {imports.reason(error)}") from error
    if not isinstance(out, Tensor) or out.shape != x_t.shape:
        given = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"the network gives {given} for x_t of shape {tuple(x_t.shape)}; it should keep the shape")


def value_network(domain: Domain) -> nn.Module:
    """A fresh critic of the domain's that has been asked once, at both ends of the chain: the number of each chain."""
    critic, what = domain.critic(), f"the value network of {type(domain).__name__}"
    context = domain.context(2, torch.Generator().manual_seed(0))
    x_t = domain.space.project(torch.zeros(2, *domain.event_shape), context)
    try:
        with torch.no_grad():
            found = critic(x_t, domain.schedule().timestep[[0, -1]], context)
    except Exception as error:
        raise ValueError(f"{what} fails on x_t of shape {tuple(x_t.shape)}: {imports.reason(error)}") from error
    if not isinstance(found, Tensor) or found.shape != (2,):
        given = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"{what} gives {given} for 2 chains; it should give one number for each, of shape (2,)")
    return critic


def decoded(domain: Domain, x_0: np.ndarray, context: Mapping[str, np.ndarray]) -> list[Any]:
    """The samples as rewards are given them, decoded in this process; ``None`` where there is none."""
    found = list(imports.load(domain.decoder)(x_0, context))
    if len(found) != len(x_0):
        raise ValueError(f"{domain.decoder} returned {len(found)} samples for {len(x_0)} events; return one for each")
    return found


def load_weights(net: nn.Module, path: str | Path) -> None:
    """A state dict from ``.safetensors`` or ``.pt``, never unpickling anything but tensors."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no weights at {path}; give a .safetensors or .pt state dict")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            with warnings.catch_warnings():  # torch tells its own developers about protocols it has not seen
                warnings.simplefilter("ignore")
                state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # a damaged file fails in many ways, and torch's words for one with code in it advise to run it
        raise ValueError(
            f"{path} is damaged or holds more than tensors; write it with torch.save(net.state_dict(), ...)"
        ) from None
    fit(net, state, str(path))


def fit(net: nn.Module, state: Any, source: str) -> None:
    """Puts a state dict into a network, or names the first entry that is not as the network has it.

    A Denoiser takes its own state dict or that of the module it was made from, as ``rayft export`` writes it.
    """
    if isinstance(net, Denoiser) and isinstance(state, Mapping) and set(state) == set(net.exported().state_dict()):
        net = net.exported()
    own, given = _shapes(net.state_dict()), _shapes(state if isinstance(state, Mapping) else {"": state})
    for key in [*own, *given]:
        if own.get(key) != given.get(key):
            has, needs = given.get(key, "missing"), own.get(key, "absent")
            raise ValueError(f"{source} does not fit {type(net).__name__}: {key!r} is {has}, it should be {needs}")
    net.load_state_dict(state)


def _shapes(state: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__ for k, v in state.items()}


def builtin() -> dict[str, str]:
    """Short name -> import path of every installed domain."""
    own = {"plain": "rayft.domain:Plain", "conditioned": "rayft.conditioned:Conditioned"}
    return own | {e.name: e.value for e in entry_points(group="rayft.domains")}


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
    """The domain, with its arguments checked by name and kind first."""
    found = find(path)
    what = f"domain {path if isinstance(path, str) else found.__name__}"
    imports.check_plain(found, kwargs, what)
    domain = imports.construct(found, kwargs, what)
    given = f" with {reprlib.repr(dict(kwargs))}" if kwargs else ""
    imports.construct(domain.schedule, {}, f"the schedule of {what}{given}")
    return domain
