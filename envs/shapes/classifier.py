"""Networks that tell the sub-category of a cloud: the reward's PointNet, and another one to hold against it.

    p(class | cloud) = softmax(network((x - mean) / std) / temperature)

Both see a cloud at zero mean and unit variance, so its place and size do not count, in the pose that the data are in.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import log_softmax, relu

GRID, REACH = 24, 3.0  # cells along an axis of VoxNet's box, and half its length in deviations


class PointNet(nn.Module):
    """Qi et al. (2017) without the two alignment networks: a maximum over points of a perceptron of each.

    The data come in one pose, which leaves nothing to align; held-out accuracy is on the card.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.points, self.point_norms = _stack((3, 64, 64, 64, 128, 1024))
        self.whole, self.whole_norms = _stack((1024, 512, 256))
        self.drop, self.out = nn.Dropout(0.3), nn.Linear(256, num_classes)

    def forward(self, clouds: Float[Tensor, "batch n 3"]) -> Float[Tensor, "batch classes"]:
        h = clouds
        for layer, norm in zip(self.points, self.point_norms, strict=True):
            h = relu(norm(layer(h).flatten(0, 1)).unflatten(0, clouds.shape[:2]))
        h = h.amax(1)
        for layer, norm in zip(self.whole, self.whole_norms, strict=True):
            h = relu(norm(layer(h)))
        return self.out(self.drop(h))


class VoxNet(nn.Module):
    """Maturana and Scherer (2015): convolutions over a grid of how many points each cell holds, spread to its corners.

    It has no maximum over points that a few of them could win: what deceives a PointNet does not deceive it.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList([nn.Conv3d(1, 16, 5, 2), nn.Conv3d(16, 32, 3), nn.Conv3d(32, 32, 3, 2)])
        self.norms = nn.ModuleList(nn.BatchNorm3d(size) for size in (16, 32, 32))
        self.whole, self.drop, self.out = nn.Linear(32 * 27, 128), nn.Dropout(0.4), nn.Linear(128, num_classes)

    def forward(self, clouds: Float[Tensor, "batch n 3"]) -> Float[Tensor, "batch classes"]:
        h = occupancy(clouds).log1p().unsqueeze(1)
        for layer, norm in zip(self.convolutions, self.norms, strict=True):
            h = relu(norm(layer(h)))
        return self.out(self.drop(relu(self.whole(h.flatten(1)))))


NETWORKS = {"pointnet": PointNet, "voxnet": VoxNet}


class Classifier(nn.Module):
    """A network with the names of its classes, and the temperature that makes its probabilities honest."""

    temperature: Tensor

    def __init__(self, network: str, classes: Sequence[str]) -> None:
        super().__init__()
        if network not in NETWORKS:
            raise ValueError(f"there is no network {network!r}; choose {', '.join(NETWORKS)}")
        self.kind, self.classes = network, tuple(classes)
        self.network = NETWORKS[network](len(self.classes))
        self.register_buffer("temperature", torch.ones(()))

    def forward(self, clouds: Float[Tensor, "batch n 3"]) -> Float[Tensor, "batch classes"]:
        """log p of every class."""
        return log_softmax(self.network(standard(clouds)) / self.temperature, -1)

    def place(self, label: str) -> int:
        """Which class is meant."""
        if label not in self.classes:
            raise ValueError(f"label is {label!r}; this classifier tells {', '.join(self.classes)} apart")
        return self.classes.index(label)

    def save(self, path: str | Path) -> None:
        told = {"network": self.kind, "classes": json.dumps(self.classes)}
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, path, told)


def load(path: str | Path) -> Classifier:
    """A classifier as ``save`` left it, for use and not for training."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no classifier at {path}; train one with `python -m envs.shapes.recognise`")
    try:
        with safe_open(path, "pt") as file:
            told = file.metadata() or {}
        found = Classifier(told["network"], json.loads(told["classes"]))
        found.load_state_dict(load_file(path))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception:  # a damaged or foreign file fails in many ways
        raise ValueError(f"{path} is no classifier of shapes, or is damaged; train one again") from None
    return found.eval().requires_grad_(False)


def standard(clouds: Float[Tensor, "batch n 3"]) -> Tensor:
    """Each cloud at zero mean and unit variance."""
    centred = clouds - clouds.mean(1, keepdim=True)
    return centred / centred.square().mean((1, 2), keepdim=True).sqrt().clamp(min=1e-6)


def occupancy(clouds: Float[Tensor, "batch n 3"]) -> Float[Tensor, "batch x y z"]:
    """Points per cell, as a density around 1; each point is shared by the eight cells around it, by nearness."""
    place = ((clouds / REACH + 1) / 2 * (GRID - 1)).clamp(0, GRID - 1 - 1e-4)
    low = place.floor()
    near = place - low
    low = low.long()
    grid = clouds.new_zeros(len(clouds), GRID**3)
    for corner in torch.cartesian_prod(*[torch.tensor([0, 1], device=clouds.device)] * 3):
        share = torch.where(corner.bool(), near, 1 - near).prod(-1)
        cell = low + corner
        grid = grid.scatter_add(1, (cell[..., 0] * GRID + cell[..., 1]) * GRID + cell[..., 2], share)
    return (grid * (GRID**3 / clouds.shape[1] / 64)).unflatten(1, (GRID,) * 3)


def _stack(widths: Sequence[int]) -> tuple[nn.ModuleList, nn.ModuleList]:
    pairs = list(pairwise(widths))
    return nn.ModuleList(nn.Linear(i, o) for i, o in pairs), nn.ModuleList(nn.BatchNorm1d(o) for _, o in pairs)
