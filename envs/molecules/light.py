"""An EGNN made small: one message per pair and layer serves features and coordinates, and pairs are one dense block.

    m_ij = silu(M silu(A h_i + B h_j + C rbf(d_ij, d_ij(0)))),    h_i += phi(h_i, sum_j g(m_ij) m_ij)
    x_i += sum_j (x_i - x_j) / (d_ij + 1) tanh(w m_ij),           h normalised before each layer

For molecules of about ten atoms, where padding costs little and a chain has to be cheap. It predicts v, the mixture of
noise and x_0 of equal variance at every t, so that neither end of the chain is badly scaled.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import one_hot, silu

from rayft.domain import Denoiser
from rayft.space import Context, MaskedSpace

SPACE = MaskedSpace(num_centred=3)
FEATURE_SCALE = 4.0  # one-hot features are stored as a quarter
REACH = 6.0  # Angstrom, the last Gaussian's centre
COORDS_RANGE = 2.0  # Angstrom, the most one atom moves another in one layer
NUM_WAVES = 8


class Layer(nn.Module):
    """One round of messages."""

    def __init__(self, width: int, num_distances: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.receiver, self.sender = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.pair = nn.Linear(num_distances, width, bias=False)
        self.message = nn.Linear(width, width)
        self.read = nn.Linear(width, 2)  # how much the message counts, how far it moves
        self.first, self.second = nn.Linear(2 * width, 2 * width), nn.Linear(2 * width, width)
        nn.init.normal_(self.second.weight, std=0.02)
        with torch.no_grad():
            self.read.weight[1].zero_()

    def forward(
        self,
        h: Float[Tensor, "batch n width"],
        x: Float[Tensor, "batch n 3"],
        distances: Float[Tensor, "batch n n num_distances"],
        real: Float[Tensor, "batch n n 1"],
    ) -> tuple[Tensor, Tensor]:
        g = self.norm(h)
        message = silu(self.receiver(g).unsqueeze(2) + self.sender(g).unsqueeze(1) + self.pair(distances))
        message = silu(self.message(message))
        gate, length = self.read(message).split(1, -1)
        gate, length = gate.sigmoid() * real, length.to(x.dtype).tanh() * real
        told = (message * gate.to(message.dtype)).sum(2) / 4
        h = h + self.second(silu(self.first(torch.cat([g, told], -1))))
        gap = x.unsqueeze(2) - x.unsqueeze(1)
        x = x + COORDS_RANGE * (gap / (length_of(gap) + 1) * length).sum(2)
        return h, x


class LightEGNN(Denoiser):
    """Predicted v of molecules ``[batch, n, 3 + num_features]``, padded as ``context["mask"]`` [batch, n] says.

    E(3)-equivariant in the coordinates, and a permutation of atoms permutes the answer. Where ``num_properties`` is not
    0, ``context["property"]`` [batch, num_properties] is told to every atom.
    """

    prediction = "v"
    centres: Tensor
    waves: Tensor

    def __init__(
        self,
        max_atoms: int,
        num_features: int,
        num_steps: int,
        width: int = 96,
        num_layers: int = 6,
        num_distances: int = 16,
        num_properties: int = 0,
    ) -> None:
        super().__init__()
        self.max_atoms, self.num_steps, self.num_properties = max_atoms, num_steps, num_properties
        self.register_buffer("centres", torch.linspace(0, REACH, num_distances), persistent=False)
        self.register_buffer("waves", torch.pi / 8 * 2.0 ** torch.arange(NUM_WAVES), persistent=False)
        self.embed = nn.Linear(num_features + 1 + max_atoms + num_properties, width)
        self.time = nn.Linear(2 * NUM_WAVES, width)
        self.layers = nn.ModuleList(Layer(width, 2 * num_distances) for _ in range(num_layers))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, num_features)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x_t: Tensor, timestep: Tensor, context: Context) -> Tensor:
        h, x = self.atoms(x_t, timestep, context)
        out = torch.cat([x - x_t[..., :3], self.out(self.norm(h)).to(x.dtype)], -1)
        return SPACE.project(out, context)

    def atoms(self, x_t: Tensor, timestep: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """What each atom knows after the last layer, and where it has moved."""
        mask = context["mask"].to(x_t.dtype)
        start, features = x_t[..., :3], x_t[..., 3:]
        h = self.embed(torch.cat([FEATURE_SCALE * features, *self._told(mask, context)], -1))
        h = h + self.time(self._waves(timestep))
        real = mask.unsqueeze(1) * mask.unsqueeze(2) * (1 - torch.eye(mask.shape[1], device=mask.device))
        x, first = start, self._gaussians(start)
        for layer in self.layers:
            h, x = layer(h, x, torch.cat([first, self._gaussians(x)], -1), real.unsqueeze(-1))
        return h, x

    def _told(self, mask: Tensor, context: Context) -> list[Tensor]:
        """What is the same for all atoms of a molecule: how many there are, and what it shall be like."""
        told = [one_hot(mask.sum(1).long().clamp(min=1) - 1, self.max_atoms).to(mask.dtype)]
        told += [context["property"].to(mask.dtype)] if self.num_properties else []
        return [mask.unsqueeze(-1), *(row.unsqueeze(1).expand(-1, mask.shape[1], -1) for row in told)]

    def _waves(self, timestep: Tensor) -> Float[Tensor, "batch 1 waves"]:
        angle = (timestep.to(self.waves.dtype) / self.num_steps).unsqueeze(-1) * self.waves
        return torch.cat([angle.sin(), angle.cos()], -1).unsqueeze(1)

    def _gaussians(self, x: Float[Tensor, "batch n 3"]) -> Float[Tensor, "batch n n num_distances"]:
        spacing = REACH / (len(self.centres) - 1)
        return torch.exp(-((length_of(x.unsqueeze(2) - x.unsqueeze(1)) - self.centres) / (2 * spacing)).square())


class LightCritic(nn.Module):
    """A value of molecules under noise, from the mean over their atoms: turning or renaming them changes nothing.

    ``num_distances`` and the rest as in ``LightEGNN``. It begins as 0 everywhere.
    """

    def __init__(
        self,
        max_atoms: int,
        num_features: int,
        num_steps: int,
        width: int = 64,
        num_layers: int = 3,
        num_properties: int = 0,
    ) -> None:
        super().__init__()
        self.body = LightEGNN(max_atoms, num_features, num_steps, width, num_layers, num_properties=num_properties)
        del self.body.out  # learners that share a network want every weight used
        self.hidden, self.last = nn.Linear(width, width), nn.Linear(width, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x_t: Tensor, timestep: Tensor, context: Context) -> Float[Tensor, " batch"]:
        mask = context["mask"].to(x_t.dtype).unsqueeze(-1)
        h, _ = self.body.atoms(x_t, timestep, context)
        mean = (self.body.norm(h) * mask).sum(1) / mask.sum(1).clamp(min=1)
        return self.last(silu(self.hidden(mean))).squeeze(-1).to(x_t.dtype)


def length_of(gap: Float[Tensor, "*pair 3"]) -> Float[Tensor, "*pair 1"]:
    """|gap|, with a finite gradient where two atoms lie on one spot."""
    return (gap.square().sum(-1, keepdim=True) + 1e-8).sqrt()
