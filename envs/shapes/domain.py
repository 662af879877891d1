"""Shapes as a Domain: clouds of points with the latent that they are drawn from, in R's schedule of a hundred steps.

    event [8 + n, 3] = (LATENT_SCALE z, points of zero mean and unit variance),    beta_t from 1e-4 to 0.05

n may differ from what a model was trained with: its points know nothing of each other but z.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from envs.shapes.critic import CloudCritic
from envs.shapes.latent import ROWS, fit
from envs.shapes.model import ShapeDenoiser
from envs.shapes.source import STORED_POINTS, Source, open_source, upright
from rayft.domain import Denoiser, Domain, Panel, load_weights
from rayft.schedule import Schedule, linear
from rayft.space import Context

FOLDER = Path(__file__).parent / "weights"
NUM_STEPS, BETA_1, BETA_T = 100, 1e-4, 0.05  # R Sec. 5.1
LATENT_SCALE = 2.0  # z is settled before its points: four times their signal over noise; more would show at T
LATENT_BLUR = 0.25  # deviations: a few hundred shapes are a kernel density in z, not a few hundred z to be remembered
NUM_POINTS = 512
REWARDS = {
    "symmetry": "envs.shapes.geometric:Symmetry",
    "extent": "envs.shapes.geometric:Extent",
    "hull_volume": "envs.shapes.geometric:HullVolume",
    "log_probability": "envs.shapes.reward:LogProbability",
    "margin": "envs.shapes.reward:Margin",
}


class Shapes(Domain):
    """Point clouds of one kind of thing. Weights: ``rayft pretrain shapes_pretrain``.

    ``data``: "generated", a folder of meshes, an npz or an h5 file; ``group`` and ``classes`` choose among what it has,
    all of it where neither is given, and of what is generated the aircraft.
    """

    rewards: Mapping[str, str] = REWARDS
    decoder = "envs.shapes.decode:clouds"
    formats: Mapping[str, str] = {
        ".ply": "envs.shapes.write:ply",
        ".obj": "envs.shapes.write:obj",
        ".zip": "envs.shapes.write:archive",
        ".npz": "envs.shapes.write:npz",
    }
    metrics = "envs.shapes.metrics:numbers"
    training = "shapes_pretrain"  # the config that makes its weights

    def __init__(
        self,
        num_points: int = NUM_POINTS,
        weights: str | None = str(FOLDER / "generated-aircraft.safetensors"),
        data: str = "generated",
        group: str | None = None,
        classes: list[str] | None = None,
    ) -> None:
        if not isinstance(num_points, int) or not 1 <= num_points <= STORED_POINTS:
            raise ValueError(f"num_points is {num_points!r}; a cloud has 1 to {STORED_POINTS} points")
        self.num_points, self.weights = num_points, weights
        self.source, self.group, self.classes = data, group, classes
        self.event_shape = (ROWS + num_points, 3)

    def schedule(self) -> Schedule:
        return linear(NUM_STEPS, BETA_1, BETA_T)

    def denoiser(self) -> Denoiser:
        return self._net(0)

    def critic(self) -> nn.Module:
        return CloudCritic(NUM_STEPS)

    def data(self, num_events: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        return self._drawn("train", num_events, generator)

    def held_out(self, num_events: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]] | None:
        return self._drawn("valid", num_events, generator) if len(self.shapes.table["valid"]) else None

    def page(self, panels: Mapping[str, Panel]) -> dict[str, str]:
        from envs.shapes.render import sections

        return sections(panels, upright(self.source))

    @property
    def shapes(self) -> Source:
        """The data."""
        return open_source(self.source, self.group, self.classes)

    def _net(self, num_classes: int) -> ShapeDenoiser:
        ab = self.schedule().alpha_bar
        net = ShapeDenoiser(1 - torch.cat([ab[:1], ab[1:] / ab[:-1]]), num_classes)
        if self.weights is None:
            net.remember(fit(self.shapes.embeddings["train"]))
        elif Path(self.weights).is_file():
            load_weights(net, Path(self.weights))
        else:
            remedy = f"`rayft pretrain {self.training}`, then domain.weights=runs/{self.training}/weights.safetensors"
            raise ValueError(f"there are no weights in {self.weights}: make them with {remedy}")
        return net

    @cached_property
    def _events(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Latents as rows, and all points, by split."""
        net = self.denoiser()
        assert isinstance(net, ShapeDenoiser)
        told, shapes = {}, self.shapes
        for name, phi in shapes.embeddings.items():
            z = LATENT_SCALE * torch.from_numpy(net.latents.of(phi))
            told[name] = z.unflatten(1, (ROWS, 3)), torch.from_numpy(shapes.clouds[name])
        return told

    def _drawn(self, part: str, num_events: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Random shapes, each with some of its points."""
        z, points = self._events[part]
        chosen = torch.randint(len(z), (num_events,), generator=generator)
        order = torch.rand(num_events, points.shape[1], generator=generator).argsort(1)[:, : self.num_points]
        blur = LATENT_SCALE * LATENT_BLUR * torch.randn(num_events, *z.shape[1:], generator=generator)
        return torch.cat([z[chosen] + blur, points[chosen.unsqueeze(1), order]], 1), self._told(part, chosen)

    def _told(self, part: str, chosen: Tensor) -> dict[str, Tensor]:
        """The contexts of these shapes."""
        return {}


class ConditionalShapes(Shapes):
    """The baseline "3D-DDPM": told a shape's class, its own in training; ``label`` when sampling, or as they occur.

    Weights: ``rayft pretrain shapes_conditional_pretrain``.
    """

    training = "shapes_conditional_pretrain"

    def __init__(
        self,
        label: str | None = None,
        num_points: int = NUM_POINTS,
        weights: str | None = str(FOLDER / "generated-aircraft-by-class.safetensors"),
        data: str = "generated",
        group: str | None = None,
        classes: list[str] | None = None,
    ) -> None:
        super().__init__(num_points, weights, data, group, classes)
        self.label = label

    def denoiser(self) -> Denoiser:
        return self._net(len(self.shapes.classes))

    def critic(self) -> nn.Module:
        return CloudCritic(NUM_STEPS, len(self.shapes.classes))

    def context(self, num_chains: int, generator: torch.Generator) -> dict[str, Tensor]:
        if self.label is None:
            labels = torch.from_numpy(self.shapes.table["train"].label)
            return {"label": labels[torch.randint(len(labels), (num_chains,), generator=generator)].int()}
        known = self.shapes.classes
        if self.label not in known:
            raise ValueError(f"label is {self.label!r}; the classes are {', '.join(known)}")
        return {"label": torch.full((num_chains,), known.index(self.label), dtype=torch.int32)}

    def groups(self, context: Context) -> Tensor:
        return context["label"].long()

    def _told(self, part: str, chosen: Tensor) -> dict[str, Tensor]:
        return {"label": torch.from_numpy(self.shapes.table[part].label)[chosen].int()}
