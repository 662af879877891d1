"""Low-rank adapters and partial fine-tuning: which weights of a network a run may move, and in how many directions.

    W' = W + scale B A,    A [r, in] random, B [out, r] = 0 at first,    r = min(rank, out, in)

The network stays as it is and is called with W' in W's place, so every kind of layer can be adapted. Outside the
learner nobody knows of it: checkpoints, exports and averages hold W' under the network's own names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from rayft.domain import Denoiser
from rayft.imports import nearest
from rayft.space import Context

SCALE = 16.0  # over the rank: with it, an lr that suits the whole network suits adapters of any rank


class LowRank(nn.Module):
    """A and B of each of the named weights; ``num_sets`` of them, one beside the other."""

    def __init__(self, weights: Mapping[str, Tensor], rank: int, scale: float | None = None, num_sets: int = 1) -> None:
        super().__init__()
        self.scale, self.names = SCALE / rank if scale is None else scale, list(weights)
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        generator = torch.Generator().manual_seed(0)  # alike in every process
        for name, weight in weights.items():
            rows, columns = sides(weight)
            own = min(rank, rows, columns)
            drawn = torch.randn(num_sets, own, columns, generator=generator) / columns**0.5
            self.down[_key(name)] = nn.Parameter(drawn.to(weight))
            self.up[_key(name)] = nn.Parameter(weight.new_zeros(num_sets, rows, own))

    def merged(self, weights: Mapping[str, Tensor], which: int = 0) -> dict[str, Tensor]:
        """W' of every adapted weight, with set ``which``; in full precision also where the network runs in half."""
        told = {name: (weights[name], self.down[_key(name)][which], self.up[_key(name)][which]) for name in self.names}
        return {name: merge(*each, self.scale) for name, each in told.items()}

    def forget(self) -> None:
        """W' = W again."""
        with torch.no_grad():
            for up in self.up.values():
                up.zero_()


class Adapted(Denoiser):
    """A frozen network with adapters on some of its weights. It begins as exactly that network."""

    def __init__(self, base: Denoiser, names: Iterable[str], rank: int, scale: float | None = None) -> None:
        super().__init__()
        self.base, self.prediction = base.requires_grad_(False), base.prediction
        self.adapters = LowRank({name: base.get_parameter(name) for name in names}, rank, scale)

    def forward(self, x_t: Tensor, timestep: Tensor, context: Context) -> Tensor:
        merged = self.adapters.merged(dict(self.base.named_parameters()))
        return functional_call(self.base, merged, (x_t, timestep, context))

    def weights(self) -> dict[str, Tensor]:
        """All parameters of the network, W' in W's place, in the network's order."""
        own = dict(self.base.named_parameters())
        return {**own, **self.adapters.merged(own)}


def sides(weight: Tensor) -> tuple[int, int]:
    """(out, in) of a weight as a matrix: all axes but the first are one."""
    return weight.shape[0], weight[0].numel()


def merge(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """W + scale B A."""
    with torch.autocast(weight.device.type, enabled=False):
        return torch.addmm(weight.flatten(1), up, down, alpha=scale).view_as(weight)


def adapted(net: Denoiser, rank: int, scale: float | None, trainable: Sequence[str] | None) -> Denoiser:
    """``net`` as it is to be trained: with adapters where ``rank`` is above 0, all of it or a part of it otherwise."""
    names = chosen(net, trainable)
    if rank and any(isinstance(part, LowRank) for part in net.modules()):
        raise ValueError(
            f"training.lora_rank is {rank}, but this domain's network is trained by adapters already: leave it out, "
            "and set the rank of those, domain.rank"
        )
    if rank:
        return Adapted(net, _matrices(net, names, rank), rank, scale)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name in names)
    return net


def chosen(net: Denoiser, patterns: Sequence[str] | None) -> list[str]:
    """The parameters that the patterns mean, by the names that an export has; without any, all that ``net`` trains."""
    if patterns is None:
        return [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    told = {id(parameter): name for name, parameter in net.exported().named_parameters()}
    known = {name: told.get(id(parameter), name) for name, parameter in net.named_parameters()}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known.values()):
            hint = nearest(pattern, known.values()) or f" (there is {next(iter(known.values()), 'none at all')})"
            raise ValueError(f"training.trainable: no parameter of the network is named like {pattern!r}{hint}")
    return [name for name, said in known.items() if any(fnmatchcase(said, pattern) for pattern in patterns)]


def _matrices(net: Denoiser, names: Sequence[str], rank: int) -> list[str]:
    found = [name for name in names if net.get_parameter(name).ndim >= 2]
    if not found:
        raise ValueError("training.lora_rank is for weights of two or more axes, and training.trainable names none")
    largest = max(found, key=lambda name: min(sides(net.get_parameter(name))))
    if rank > (most := min(sides(net.get_parameter(largest)))):
        raise ValueError(
            f"training.lora_rank is {rank}, more than the smaller side of every adapted weight ({largest} has "
            f"{most}): lower it, or leave it out and train the weights themselves"
        )
    return found


def parameters(net: nn.Module) -> Iterable[Tensor]:
    """What a moving average follows."""
    return net.weights().values() if isinstance(net, Adapted) else net.parameters()


def plain(net: nn.Module, state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A state dict of ``net`` as one of the network itself: W' where W was. One weight may have several names."""
    if not isinstance(net, Adapted):
        return dict(state)
    found = {k.removeprefix("base."): v for k, v in state.items() if k.startswith("base.")}
    names = {id(parameter): name for name, parameter in net.base.named_parameters()}
    for alias, parameter in net.base.named_parameters(remove_duplicate=False):
        if (name := names[id(parameter)]) in net.adapters.names:
            told = (found[alias], *(state[f"adapters.{which}.{_key(name)}"][0] for which in ("down", "up")))
            found[alias] = merge(*(torch.from_numpy(np.array(one)) for one in told), net.adapters.scale).numpy()
    return found


def put(net: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Makes ``net`` the network with these weights; adapters begin anew from there."""
    if isinstance(net, Adapted):
        net.adapters.forget()
        net = net.base
    net.load_state_dict(dict(state))


def _key(name: str) -> str:
    return name.replace(".", "/")  # a ParameterDict takes no dots
