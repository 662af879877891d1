"""Trains a classifier of shapes, and says on its card what it is worth on shapes that it has not seen.

    python -m envs.shapes.recognise FILE.safetensors --network pointnet --data generated --group aircraft

Five folds over all shapes give every shape an answer by a network that was not shown it: accuracy, confusion matrix,
and the temperature that makes the answers' probabilities honest, as far as their errors can tell. The network that is
kept knows the training split.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, one_hot

from envs.shapes.classifier import NETWORKS, Classifier, standard
from envs.shapes.data import Shapes, normalised, split
from envs.shapes.formats import read
from envs.shapes.source import STORED_POINTS, group_of

NUM_FOLDS, NUM_BINS = 5, 10
TEMPERATURES = torch.logspace(-0.3, 1, 131).tolist()  # from 0.5 to 10
SMOOTHING = 0.05  # of the labels: log p stays within reach of the wrong class
JITTER, STRETCH, TURN = 0.08, 0.15, 0.17  # deviations, share, radians about the vertical


@dataclass(frozen=True)
class Recipe:
    """How long, and on what."""

    epochs: int = 60
    batch_size: int = 32
    points: int = 256
    lr: float = 2e-3

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs is {self.epochs}; give at least 1")


def train(
    clouds: Tensor, label: Tensor, network: str, classes: tuple[str, ...], recipe: Recipe, seed: int
) -> Classifier:
    """A classifier of these clouds [shape, point, 3]; classes count alike, however many shapes they have."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net = Classifier(network, classes).train()
    optimizer = torch.optim.AdamW(net.parameters(), recipe.lr, weight_decay=0.01)
    steps = recipe.epochs * math.ceil(len(clouds) / recipe.batch_size)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, steps)
    share = 1 / torch.bincount(label, minlength=len(classes)).clamp(min=1).sqrt()
    for _ in range(steps):
        chosen = torch.multinomial(share[label], recipe.batch_size, replacement=True, generator=generator)
        seen = distorted(clouds[chosen], recipe.points, generator)
        loss = cross_entropy(net.network(standard(seen)), label[chosen], label_smoothing=SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        plan.step()
    return net.eval()


def distorted(clouds: Tensor, num_points: int, generator: torch.Generator) -> Tensor:
    """Some of each cloud's points, turned a little, stretched a little, and blurred as generated ones are."""
    size = len(clouds)
    order = torch.rand(clouds.shape[:2], generator=generator).argsort(1)[:, :num_points, None]
    points = clouds.gather(1, order.expand(-1, -1, 3))
    angle = TURN * torch.randn(size, generator=generator)
    cos, sin, zero, one = angle.cos(), angle.sin(), torch.zeros(size), torch.ones(size)
    turn = torch.stack([cos, -sin, zero, sin, cos, zero, zero, zero, one], 1).unflatten(1, (3, 3))
    points = points @ turn * (1 + STRETCH * (2 * torch.rand(size, 1, 3, generator=generator) - 1))
    blur = JITTER * torch.rand(size, 1, 1, generator=generator)
    return points + blur * torch.randn(points.shape, generator=generator)


@torch.no_grad()
def logits(net: Classifier, clouds: Tensor, num_points: int, seed: int = 0) -> Tensor:
    """Of each cloud, without the temperature, as a generated one with so many points would be seen."""
    order = torch.rand(clouds.shape[:2], generator=torch.Generator().manual_seed(seed)).argsort(1)[:, :num_points, None]
    points = clouds.gather(1, order.expand(-1, -1, 3))
    return torch.cat([net.network(standard(part)) for part in points.split(64)])


def folds(label: np.ndarray, seed: int) -> np.ndarray:
    """A fold for every shape, each class spread evenly over them."""
    rng, fold = np.random.default_rng(seed), np.empty(len(label), int)
    for k in np.unique(label):
        rows = rng.permutation(np.flatnonzero(label == k))
        fold[rows] = (np.arange(len(rows)) + rng.integers(NUM_FOLDS)) % NUM_FOLDS
    return fold


def best_temperature(found: Tensor, label: Tensor) -> float:
    """Of TEMPERATURES the one at which the answers' likelihood is largest.

    Answers without an error are likelier the lower it is, and it ends at the lowest: a bound of ours, no finding.
    """
    return min(TEMPERATURES, key=lambda t: float(cross_entropy(found / t, label)))


def measured(found: Tensor, label: Tensor, num_classes: int) -> dict[str, Any]:
    """Accuracy, likelihood, and how far confidence is from being right, over ten equal parts of it."""
    log_p = log_softmax(found, -1)
    sure, said = log_p.exp().max(-1)
    right = (said == label).float()
    part = (sure * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    gaps = [(right[part == k].sum() - sure[part == k].sum()).abs() / len(label) for k in part.unique()]
    confusion = one_hot(label * num_classes + said, num_classes**2).sum(0).reshape(num_classes, num_classes)
    accuracy, num = float(right.mean()), len(label)
    return {
        "num": num,
        "accuracy": accuracy,
        "standard_error": math.sqrt(accuracy * (1 - accuracy) / max(num, 1)),
        "log_likelihood": -float(cross_entropy(found, label)),
        "calibration_error": float(torch.stack(gaps).sum()) if gaps else math.nan,
        "confusion": confusion.tolist(),
    }


def card(shapes: Shapes, network: str, recipe: Recipe, num_points: int, seed: int) -> tuple[Classifier, dict[str, Any]]:
    """The classifier of the training split, and its card."""
    start, classes = time.monotonic(), shapes.classes
    if not 1 <= num_points <= shapes.points.shape[1]:
        raise ValueError(f"points is {num_points}; give 1 to {shapes.points.shape[1]}")
    if len(classes) < 2 or len(shapes) == len(classes):
        what = f"{len(shapes)} shape{'s' if len(shapes) > 1 else ''} of {', '.join(classes)}"
        raise ValueError(f"there is nothing to tell apart in {what}; give two classes, and two shapes of one of them")
    clouds, label = tensors(shapes)
    fold, found = torch.from_numpy(folds(shapes.label, seed)), torch.zeros(len(shapes), len(classes))
    for k in range(NUM_FOLDS):
        seen, unseen = fold != k, fold == k
        if not unseen.any():
            continue
        net = train(clouds[seen], label[seen], network, classes, recipe, seed + k + 1)
        found[unseen] = logits(net, clouds[unseen], num_points)
        print(f"fold {k + 1} of {NUM_FOLDS}, {time.monotonic() - start:.0f} s", file=sys.stderr)
    parts = split(shapes)
    net = train(*tensors(parts["train"]), network, classes, recipe, seed)
    temperature = best_temperature(found, label)
    net.temperature.fill_(temperature)
    told: dict[str, Any] = {"network": network, "classes": list(classes), "num_points": num_points, "seed": seed}
    told |= {"temperature": temperature, "temperature_bounded": temperature in (TEMPERATURES[0], TEMPERATURES[-1])}
    told |= {"recipe": vars(recipe), "parameters": sum(p.numel() for p in net.parameters())}
    told["folds"] = measured(found / temperature, label, len(classes))
    told["folds_uncalibrated"] = {k: v for k, v in measured(found, label, len(classes)).items() if k != "confusion"}
    told["test"] = tested(net, parts["test"], num_points)
    return net, told | {"seconds": time.monotonic() - start}


def tested(net: Classifier, part: Shapes, num_points: int) -> dict[str, Any]:
    """The kept network on the test split."""
    if not len(part):
        return {"num": 0}
    clouds, label = tensors(part)
    return measured(logits(net, clouds, num_points) / net.temperature, label, len(part.classes))


def tensors(shapes: Shapes) -> tuple[Tensor, Tensor]:
    """Clouds as the networks see them, and their labels."""
    return torch.from_numpy(normalised(shapes.points)), torch.from_numpy(shapes.label).long()


def usable(out: Path) -> Path:
    """The file, once it is sure that it and its card can be written: training takes a while."""
    if out.suffix.lower() != ".safetensors":
        raise ValueError(f"OUT is {out}; give FILE.safetensors, beside which its card is written as FILE.json")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out.parent).close()
        for path in (out, out.with_suffix(".json")):
            if path.exists():
                path.open("ab").close()
    except OSError as error:
        raise ValueError(f"cannot write {out}: {error.strerror or error}; give another OUT") from None
    return out


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m envs.shapes.recognise", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("out", type=Path, help="FILE.safetensors; its card is written beside it, as FILE.json")
    parser.add_argument("--network", choices=list(NETWORKS), default="pointnet")
    parser.add_argument("--data", default="generated", help='"generated", a folder of meshes, npz or h5')
    parser.add_argument("--group", help="a group of its classes, as aircraft")
    parser.add_argument("--classes", nargs="+", help="these classes only")
    parser.add_argument("--epochs", type=int, default=Recipe.epochs)
    parser.add_argument("--points", type=int, default=512, help="points of the clouds that it is measured on")
    parser.add_argument("--seed", type=int, default=0)
    told = parser.parse_args(arguments)
    try:
        out, recipe = usable(told.out), Recipe(told.epochs)
        shapes = read(told.data, STORED_POINTS, group_of(told.data, told.group), told.classes)
        net, found = card(shapes, told.network, recipe, told.points, told.seed)
    except ValueError as error:
        sys.exit(f"recognise: {error}")
    found = {"data": told.data if told.data == "generated" else Path(told.data).name, "group": told.group} | found
    net.save(out)
    out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    fold = found["folds"]
    print(f"{out}: {fold['accuracy']:.3f} of shapes it has not seen are told right")


if __name__ == "__main__":
    main()
