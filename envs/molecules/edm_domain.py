"""EDM's network as a Domain, from a checkpoint or fresh: its own events, its own schedule, respaced.

    event [n, 3 + elements] = (x / norm_x, one-hot / norm_h),    and one more, Z / norm_Z, where the model has charges

Atoms are all those of QM9, or its heavy ones, as the model was trained; decoding reads off x and the elements alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from envs.molecules import bonds, decode, edm, edm_files
from envs.molecules.data import Molecules as Table
from envs.molecules.domain import NUM_OF_SIZE, Molecules, denser_near_data
from envs.molecules.edm import HYDROGEN, EDMModel
from rayft.domain import Denoiser, load_weights
from rayft.schedule import Schedule

SYMBOLS = {1: "H", 6: "C", 7: "N", 8: "O", 9: "F"}
NUM_OF_FULL_SIZE = (  # QM9's molecules by their atoms, hydrogens among them
    *(0, 0, 0, 2, 4, 5, 12, 20, 65, 172, 483, 1053, 2189, 4027, 6758, 10216, 13824, 16969, 17442, 18146, 12403, 13166),
    *(4428, 6362, 712, 1923, 59, 356, 0, 35),
)


class EDMMolecules(Molecules):
    """Molecules of an EDM checkpoint: ``model`` is EDM's folder, or a file that ``rayft import edm`` made of it.

    ``model`` null is a fresh network of ``num_layers`` and ``width``, with ``hydrogens`` or of heavy atoms: EDM's
    published one of QM9 where nothing else is told. Weights: ``rayft pretrain molecules_full_pretrain``.

    ``num_steps``: of the model's timesteps, closer together near the data; None takes them all.
    ``at``: for a conditional model the value of each property, as (value - mean) / mean absolute deviation over QM9.
    ``weights``: a state dict of the same network in place of the model's own, such as a fine-tuned one.
    ``data``: "qm9", or a file of one's own, from which sizes are then drawn and which pretraining reads.
    ``max_atoms``: of the largest molecule; QM9's by default.
    """

    def __init__(
        self,
        model: str | None,
        num_steps: int | None = 100,
        at: Mapping[str, float] | None = None,
        weights: str | None = None,
        data: str = "qm9",
        max_atoms: int | None = None,
        hydrogens: bool | None = None,
        width: int | None = None,
        num_layers: int | None = None,
    ) -> None:
        told = {"hydrogens": hydrogens, "width": width, "num_layers": num_layers}
        found = _fresh(**told) if model is None else _read(model, told)
        self.trained, self.arguments, self.elements = found.schedule, found.arguments, found.elements
        self.norm_values, self.include_charges = found.norm_values, found.include_charges
        self.conditioning, self.at, self.model = found.conditioning, _asked(at, found.conditioning), model
        self.num_of_size = NUM_OF_SIZE if found.remove_h else NUM_OF_FULL_SIZE
        super().__init__(
            found.schedule.num_steps if num_steps is None else num_steps,
            weights,
            data,
            len(self.num_of_size) - 1 if max_atoms is None else max_atoms,
            self.arguments["nf"],
            self.arguments["n_layers"],
        )
        self.event_shape = (self.max_atoms, 3 + found.denoiser.num_features)
        self.num_properties = len(self.conditioning)
        self.decoder = f"envs.molecules.decode:{'heavy' if found.remove_h else 'full'}"

    def schedule(self) -> Schedule:
        return denser_near_data(self.trained, self.num_steps)

    def denoiser(self) -> Denoiser:
        net = edm.network(self.arguments) if self.model is None else edm_files.read(self.model).denoiser
        if self.weights is not None:
            load_weights(net, self.weights)
        return net

    def model_of(self, network: Any) -> EDMModel:
        """A network of this domain as the checkpoint it came from."""
        return EDMModel(network, self.trained, self.arguments)

    def context(self, num_chains: int, generator: torch.Generator) -> dict[str, Tensor]:
        context = super().context(num_chains, generator)
        return self._told(context["mask"], torch.tensor(self.at).expand(num_chains, -1))

    def data(self, num_events: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        events, mask = self._events
        chosen = torch.randint(len(events), (num_events,), generator=generator)
        return events[chosen], self._told(mask[chosen], self._values[chosen])

    def held_out(self, num_events: int, generator: torch.Generator) -> None:
        """Nothing: all of ``data`` is trained on."""

    def measure(self, samples: list[Any], x_0: np.ndarray, context: Mapping[str, np.ndarray]) -> dict[str, float]:
        """With EDM's stability of all samples, decodable or not; of heavy atoms alone nothing is said."""
        told = dict(super().measure(samples, x_0, context))
        if HYDROGEN in self.elements and len(x_0):
            atoms = decode.atoms(x_0, context)
            stable, num_stable = bonds.stability(atoms.positions, atoms.numbers, atoms.mask)
            told |= {"atom_stability": num_stable.sum() / atoms.mask.sum(), "molecule_stability": stable.mean()}
        return {name: float(value) for name, value in told.items()}

    def _told(self, mask: Tensor, values: Tensor) -> dict[str, Tensor]:
        """What stays fixed along chains of these masks."""
        context = {"mask": mask}
        if self.conditioning:
            context["property"] = values.clone()
        if self.norm_values[0] != 1:  # the decoder is told
            context["angstrom"] = torch.full((len(mask),), self.norm_values[0])
        return context

    @cached_property
    def _num_of_size(self) -> Tensor:
        if self.source == "qm9" and self.max_atoms == len(self.num_of_size) - 1:
            return torch.tensor(self.num_of_size).double()
        return torch.bincount(self._events[1].sum(1).long(), minlength=self.max_atoms + 1).double()

    @cached_property
    def _events(self) -> tuple[Tensor, Tensor]:
        positions, numbers, mask = self._table().padded(self.max_atoms)
        x, one_hot, charge = self.norm_values
        columns = [positions / x, (numbers[..., None] == np.array(self.elements)) / one_hot]
        columns += [numbers[..., None] / charge] if self.include_charges else []
        events = np.concatenate(columns, -1).astype(np.float32)
        return torch.from_numpy(events), torch.from_numpy(mask.astype(np.float32))

    @cached_property
    def _values(self) -> Tensor:
        """[N, properties] of the training molecules, standardised over them as EDM does."""
        table = self._table()
        missing = [name for name in self.conditioning if name not in table.properties]
        if missing:
            raise ValueError(f"{self.source} does not say {missing[0]}, which the model is told; give data that does")
        columns = [table.properties[name] for name in self.conditioning]
        values = np.stack(columns, 1) if columns else np.zeros((len(table), 0))
        values = values - values.mean(0)
        return torch.from_numpy((values / np.maximum(np.abs(values).mean(0), 1e-6)).astype(np.float32))

    def _table(self) -> Table:
        """QM9's training split, or the user's own molecules, as far as the model takes them."""
        from envs.molecules.files import fitting, read
        from envs.molecules.qm9 import qm9

        table = qm9("train") if self.source == "qm9" else read(self.source)
        table = table if HYDROGEN in self.elements else table.heavy()
        return fitting(table, self.source, self.max_atoms, [SYMBOLS[number] for number in self.elements])


def _read(model: str, told: Mapping[str, Any]) -> EDMModel:
    """The checkpoint, which brings its own settings."""
    given = [name for name, value in told.items() if value is not None]
    if given:
        raise ValueError(
            f"{given[0]} is {told[given[0]]}, and {model} has its own; leave it out, or give domain.model=null"
        )
    return edm_files.read(model)


def _fresh(hydrogens: bool | None, width: int | None, num_layers: int | None) -> EDMModel:
    """EDM's published settings with these in their place, and a network without numbers."""
    given = {"remove_h": None if hydrogens is None else not hydrogens, "nf": width, "n_layers": num_layers}
    for name, value in (("width", width), ("num_layers", num_layers)):
        if value is not None and not 1 <= value <= 10_000:
            raise ValueError(f"{name} is {value}; give 1 to 10000, or leave it out for EDM's own")
    arguments = edm.PUBLISHED | {name: value for name, value in given.items() if value is not None}
    return EDMModel(edm.claimed(arguments), edm.schedule_of(arguments), arguments)


def _asked(at: Mapping[str, float] | None, conditioning: tuple[str, ...]) -> list[float]:
    """The value of each property that the model is told, in its order."""
    given = {} if at is None else at
    takes = ", ".join(conditioning) or "no property"
    if not isinstance(given, Mapping):
        raise ValueError(f"at is {at!r}; this model is told {takes}: give a number for each, as in domain.at.NAME=0")
    for name in [*conditioning, *given]:
        if name not in given:
            told = "its distance from QM9's mean in mean absolute deviations"
            raise ValueError(f"at lacks {name}; this model is told {takes}: give {told}, as in domain.at.{name}=0")
        if name not in conditioning:
            raise ValueError(f"at has {name!r}; this model is told {takes}: leave it out")
        if type(given[name]) not in (int, float) or not math.isfinite(given[name]):
            raise ValueError(f"at.{name} is {given[name]!r}; give a number, 0 for QM9's mean")
    return [float(given[name]) for name in conditioning]
