"""The E(3)-equivariant denoiser of molecules, as in EDM (Hoogeboom et al. 2022), computed on real edges only.

    h_i += phi_h(h_i, sum_{j != i} a_ij m_ij),    m_ij = phi_e(h_i, h_j, d_ij^2, D_ij^2),    a_ij = sigmoid(w m_ij + b)
    x_i += sum_{j != i} (x_i - x_j) / (d_ij + 1) phi_x(h_i, h_j, d_ij^2, D_ij^2),    D = d at the network's input

The first linear map of phi_e and phi_x is taken per atom (A h_i + B h_j + C (d^2, D^2)), never per edge.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from rayft.domain import Denoiser
from rayft.space import Context, MaskedSpace

SPACE = MaskedSpace(num_centred=3)
COORDS_RANGE = 15.0  # what tanh is multiplied by; EDM's code does not divide it by the number of layers
EDGES_AT_ONCE = 4096  # on a CPU: 4 MB of messages at 256 features, which its caches hold between two operations
KEPT_BY_GLIBC = 24 << 20  # bytes; must be under 32 MB


@dataclass(frozen=True)
class Part:
    """Some of a batch's edges: whom each tells, and from whom."""

    receiver: Int[Tensor, " edge"]
    sender: Int[Tensor, " edge"]


@dataclass(frozen=True)
class Packing:
    """The real atoms of a batch, one after the other, and all pairs of two in one molecule."""

    real: Bool[Tensor, "batch n"]
    place: Int[Tensor, " atom"]  # of each atom in the flattened [batch, n]
    parts: tuple[Part, ...]


def pack(real: Bool[Tensor, "batch n"], at_once: int) -> Packing:
    """The atoms and edges of a mask, ``at_once`` edges in a part."""
    number = (real.flatten().cumsum(0) - 1).view_as(real)
    itself = torch.eye(real.shape[1], dtype=torch.bool, device=real.device)
    molecule, i, j = (real.unsqueeze(2) & real.unsqueeze(1) & ~itself).nonzero(as_tuple=True)
    ends = zip(number[molecule, i].split(at_once), number[molecule, j].split(at_once), strict=True)
    return Packing(real, real.flatten().nonzero().squeeze(1), tuple(Part(*pair) for pair in ends))


@dataclass(frozen=True)
class Edges:
    """What the sublayers of a layer know of the edges, a tensor for each part."""

    parts: tuple[Part, ...]
    distances: list[Float[Tensor, "edge d"]]
    directions: list[Float[Tensor, "edge 3"]]
    low: torch.dtype  # of the large matrix products; positions, distances and sums keep their own


def product(x: Tensor, layer: nn.Linear, low: torch.dtype) -> Tensor:
    """A linear layer in the precision of the large matrix products."""
    return linear(x.to(low), layer.weight.to(low), None if layer.bias is None else layer.bias.to(low))


class Pairs(nn.Module):
    """phi(h_i, h_j, distances) of every edge: two linear maps with SiLU after each."""

    def __init__(self, width: int, num_distances: int) -> None:
        super().__init__()
        self.first = nn.Linear(2 * width + num_distances, width)
        self.second = nn.Linear(width, width)

    def forward(self, h: Float[Tensor, "atom width"], edges: Edges) -> Iterator[tuple[Part, Tensor]]:
        """Part after part, so that what is made of an edge is used while it is still in the cache."""
        width, low = h.shape[1], edges.low
        a, b, c = self.first.weight.split([width, width, self.first.in_features - 2 * width], 1)
        receiver = linear(h.to(low), a.to(low)).to(h.dtype) + self.first.bias
        sender = linear(h.to(low), b.to(low)).to(h.dtype)
        c, weight, bias = c.T.contiguous(), self.second.weight.to(low), self.second.bias.to(low)
        for part, distance in zip(edges.parts, edges.distances, strict=True):
            pair = receiver.index_select(0, part.receiver).add_(sender.index_select(0, part.sender))
            pair = silu(pair.addmm_(distance, c), inplace=True)
            yield part, silu(linear(pair.to(low), weight, bias), inplace=True)


class Message(nn.Module):
    """An invariant sublayer: h_i + phi_h(h_i, sum_j a_ij m_ij); a_ij is 1 without attention."""

    def __init__(self, width: int, num_distances: int, attention: bool, divisor: float) -> None:
        super().__init__()
        self.divisor = divisor
        self.pairs = Pairs(width, num_distances)
        self.node_first, self.node_second = nn.Linear(2 * width, width), nn.Linear(width, width)
        self.attention = nn.Linear(width, 1) if attention else None

    def forward(self, h: Tensor, edges: Edges) -> Float[Tensor, "atom width"]:
        low, total = edges.low, torch.zeros_like(h)
        for part, message in self.pairs(h, edges):
            if self.attention is not None:
                share = product(message, self.attention, low).to(h.dtype).sigmoid()
                message = message * share
            total = total.index_add_(0, part.receiver, message.to(h.dtype))
        hidden = silu(product(torch.cat([h, total / self.divisor], 1), self.node_first, low), inplace=True)
        return h + product(hidden, self.node_second, low)


class Move(nn.Module):
    """The equivariant sublayer: how far each atom goes along the directions to the others."""

    def __init__(self, width: int, num_distances: int, tanh: bool, divisor: float) -> None:
        super().__init__()
        self.tanh, self.divisor = tanh, divisor
        self.pairs = Pairs(width, num_distances)
        self.last = nn.Linear(width, 1, bias=False)
        nn.init.xavier_uniform_(self.last.weight, gain=0.001)

    def forward(self, h: Tensor, edges: Edges) -> Float[Tensor, "atom 3"]:
        total = h.new_zeros(len(h), 3)
        for (part, pair), direction in zip(self.pairs(h, edges), edges.directions, strict=True):
            length = product(pair, self.last, edges.low).to(h.dtype)
            length = length.tanh() * COORDS_RANGE if self.tanh else length
            total = total.index_add_(0, part.receiver, direction * length)
        return total / self.divisor


class Layer(nn.Module):
    """Invariant sublayers, then one move, all seeing the distances at the layer's start and at the network's."""

    def __init__(self, messages: list[Message], move: Move) -> None:
        super().__init__()
        self.messages, self.move = nn.ModuleList(messages), move

    def forward(self, h: Tensor, edges: Edges) -> tuple[Float[Tensor, "atom width"], Float[Tensor, "atom 3"]]:
        for message in self.messages:
            h = message(h, edges)
        return h, self.move(h, edges)


class Waves(nn.Module):
    """Sines and cosines of a distance at six frequencies, each four times the last, the longest period 15."""

    frequencies: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", 2 * math.pi / 15 * 4.0 ** torch.arange(6), persistent=False)

    def forward(self, squared: Float[Tensor, "edge 1"]) -> Float[Tensor, "edge 12"]:
        angle = (squared + 1e-8).sqrt() * self.frequencies
        return torch.cat([angle.sin(), angle.cos()], -1)


class EGNN(Denoiser):
    """Predicted noise of molecules ``[batch, n, 3 + num_features]``, of which ``context["mask"]`` [batch, n] are real.

    Rotates, reflects and permutes as its input does, and is blind to shifts. Gradients flow through everything, the
    sine embedding too (where EDM's training cuts them off).
    """

    prediction = "eps"

    def __init__(
        self,
        num_features: int,
        num_steps: int,
        num_properties: int = 0,
        width: int = 256,
        num_layers: int = 9,
        num_inv_sublayers: int = 1,
        attention: bool = True,
        tanh: bool = True,
        sin_embedding: bool = False,
        norm_constant: float = 1.0,
        normalization_factor: float = 1.0,
    ) -> None:
        """EDM's settings; what it calls nf and n_layers are ``width`` and ``num_layers``.

        num_features: one-hot elements, plus one where the charge is a feature.
        num_steps: T; the network is told t/T.
        num_properties: numbers in ``context["property"]`` [batch, num_properties], told to every atom.
        num_inv_sublayers: rounds of messages before each move.
        attention: whether a message is weighted by what it says.
        tanh: bounds how far one edge moves an atom in a layer, to 15.
        sin_embedding: tells waves of the distances in place of their squares.
        norm_constant: c in the directions (x_i - x_j) / (d_ij + c).
        normalization_factor: what sums over edges are divided by.
        """
        super().__init__()
        counts = {"num_features": num_features, "num_steps": num_steps, "width": width, "num_layers": num_layers}
        for name, count in (counts | {"num_inv_sublayers": num_inv_sublayers}).items():
            if not isinstance(count, int) or count < 1:
                raise ValueError(f"{name} is {count!r}; an EGNN needs a whole number of at least 1")
        self.num_features, self.num_steps, self.num_properties = num_features, num_steps, num_properties
        self.norm_constant = norm_constant
        self.waves = Waves() if sin_embedding else nn.Identity()
        told, pairwise = num_features + 1 + num_properties, 24 if sin_embedding else 2
        self.embed, self.read = nn.Linear(told, width), nn.Linear(width, told)
        self.layers = nn.ModuleList()
        for _ in range(num_layers):
            messages = [Message(width, pairwise, attention, normalization_factor) for _ in range(num_inv_sublayers)]
            self.layers.append(Layer(messages, Move(width, pairwise, tanh, normalization_factor)))
        self._packing: Packing | None = None

    def forward(self, x_t: Tensor, timestep: Tensor, context: Context) -> Tensor:
        """Under autocast the large matrix products take its precision, all else that of x_t."""
        device = x_t.device.type
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_t.dtype
        packing = self._packed(context["mask"] != 0)
        with torch.autocast(device, enabled=False):
            rows = x_t.flatten(0, 1)[packing.place]
            told = self._told(x_t, timestep, context)[packing.place // x_t.shape[1]]
            noise = self._noise(rows[:, :3], torch.cat([rows[:, 3:], told], 1), packing.parts, low)
            out = x_t.new_zeros(x_t.shape).flatten(0, 1).index_copy(0, packing.place, noise)
            return SPACE.project(out.view_as(x_t), context)

    def _noise(self, start: Tensor, told: Tensor, parts: tuple[Part, ...], low: torch.dtype) -> Tensor:
        """[atom, 3 + num_features]: how far each atom went, and its features."""
        h, x, first = self.embed(told), start, None
        for layer in self.layers:
            squared, directions = self._geometry(x, parts)
            now = [self.waves(s) for s in squared]
            first = now if first is None else first
            distances = [torch.cat(both, -1) for both in zip(now, first, strict=True)]
            h, moved = layer(h, Edges(parts, distances, directions, low))
            x = x + moved
        return torch.cat([x - start, self.read(h)[:, : self.num_features]], 1)

    def _told(self, x_t: Tensor, timestep: Tensor, context: Context) -> Float[Tensor, "batch told"]:
        """What all atoms of a molecule are told alike: t/T and the properties asked for."""
        told = (timestep.to(x_t.dtype) / self.num_steps).unsqueeze(1)
        if not self.num_properties:
            return told
        given, needed = context.get("property"), (len(x_t), self.num_properties)
        if given is None or given.shape != needed:
            shape = "absent" if given is None else f"of shape {tuple(given.shape)}"
            raise ValueError(f'context["property"] is {shape}; this network is told {needed} normalised properties')
        return torch.cat([told, given.to(x_t.dtype)], 1)

    def _geometry(self, x: Tensor, parts: tuple[Part, ...]) -> tuple[list[Tensor], list[Tensor]]:
        """Squared distances [edge, 1] and directions [edge, 3]; finite where two atoms coincide, as are gradients."""
        squared, directions = [], []
        for part in parts:
            gap = x.index_select(0, part.receiver) - x.index_select(0, part.sender)
            squared.append(gap.square().sum(-1, keepdim=True))
            directions.append(gap / ((squared[-1] + 1e-8).sqrt() + self.norm_constant))
        return squared, directions

    def _packed(self, real: Bool[Tensor, "batch n"]) -> Packing:
        """Made once for all steps of a chain: kept until another mask comes."""
        last = self._packing
        if last is None or last.real.device != real.device or not torch.equal(last.real, real):
            on_cpu = real.device.type == "cpu"
            if on_cpu:  # once a large block is freed, glibc keeps smaller ones, instead of faulting them in every time
                torch.empty(KEPT_BY_GLIBC, dtype=torch.uint8)
            last = self._packing = pack(real, EDGES_AT_ONCE if on_cpu else 1 << 20)
        return last
