"""Rewards that a classifier gives: how sure it is that a cloud is of one sub-category.

LogProbability: log p(label | x)        Margin: log p(label | x) - log(1 - p(label | x))

torch is imported where it is used: listing these rewards costs nothing.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from envs.shapes.latent import ROWS
from rayft.reward import DifferentiableReward

FOLDER = Path(__file__).parent / "weights"
SHIPPED = {name: f"{name}-generated-aircraft.safetensors" for name in ("pointnet", "voxnet")}
WORST = -15.0  # what scores a cloud that is none


class Recognised(DifferentiableReward):
    """A classifier and the class that is wanted; ``classifier`` is a file, or one that is shipped: pointnet, voxnet.

    The network runs on the GPU where its actor has a share of one: ``scoring: {num_gpus_per_actor: 0.25}``.
    """

    undecodable = WORST
    batch_size = 64

    def __init__(self, label: str, classifier: str = "pointnet") -> None:
        import torch

        from envs.shapes.classifier import load

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.classifier = load(FOLDER / SHIPPED[classifier] if classifier in SHIPPED else classifier)
        self.classifier.to(self.device)
        self.place = self.classifier.place(label)

    def __call__(self, samples: Sequence[np.ndarray]) -> np.ndarray:
        import torch

        found = np.empty(len(samples))
        sizes = np.array([len(cloud) for cloud in samples])
        with torch.no_grad():
            for size in np.unique(sizes):
                rows = np.flatnonzero(sizes == size)
                clouds = torch.from_numpy(np.stack([samples[int(row)] for row in rows]).astype(np.float32))
                found[rows] = self.read(self.classifier(clouds.to(self.device))).cpu().numpy()
        return found

    def value(self, x_0: Any, context: Mapping[str, Any]) -> Any:
        """The same of events, which begin with their latents."""
        self.classifier.to(x_0.device)
        return self.read(self.classifier(x_0[:, ROWS:].float()))

    @abstractmethod
    def read(self, log_p: Any) -> Any:
        """The reward, from log p of every class."""


class LogProbability(Recognised):
    """log p(label | x)."""

    def read(self, log_p: Any) -> Any:
        return log_p[:, self.place]


class Margin(Recognised):
    """How much likelier the label is than all others together: unlike log p, it does not level off at certainty."""

    def read(self, log_p: Any) -> Any:
        others = [k for k in range(log_p.shape[1]) if k != self.place]
        return log_p[:, self.place] - log_p[:, others].logsumexp(1)
