"""Molecules as a Domain: atoms with a place and an element, padded to the largest molecule, their drift removed.

    event [n, 3 + elements] = (x in Angstrom, one-hot / 4),    x_t by EDM's polynomial schedule of 1,000 steps, respaced

Heavy atoms only by default: RDKit adds the hydrogens that valences ask for. The number of atoms is drawn from QM9's
histogram, stays fixed along a chain, and is what J* is averaged over.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from envs.molecules.data import Molecules as Table
from envs.molecules.light import FEATURE_SCALE, SPACE, LightCritic, LightEGNN
from rayft.domain import Denoiser, Domain, Panel, load_weights
from rayft.schedule import Schedule, polynomial
from rayft.space import Context

FOLDER = Path(__file__).parent / "weights"
TRAINED_STEPS = 1000  # of the schedule the weights know; chains are respaced to fewer
MAX_ATOMS = 9
SYMBOLS, ELEMENTS = "CNOF", (6, 7, 8, 9)
NUM_OF_SIZE = (0, 3, 5, 9, 31, 127, 608, 3138, 17879, 109031)  # QM9's molecules by their heavy atoms
REWARDS = {
    "qed": "envs.molecules.reward:QED",
    "sa": "envs.molecules.reward:SA",
    "synth": "envs.molecules.reward:Synth",
    "logp": "envs.molecules.reward:LogP",
    "weight": "envs.molecules.reward:Weight",
    "lipinski": "envs.molecules.reward:Lipinski",
    "similarity": "envs.molecules.reward:Similarity",
    "substructure": "envs.molecules.reward:Substructure",
    "gap": "envs.molecules.quantum:Gap",
    "dipole": "envs.molecules.quantum:Dipole",
    "formation": "envs.molecules.quantum:FormationEnergy",
    "docking": "envs.molecules.docking:Docking",
}


def denser_near_data(schedule: Schedule, num_steps: int) -> Schedule:
    """``num_steps`` of a schedule's timesteps, k-th at T (k / num_steps)^2: the last ones settle bond lengths."""
    if not 1 <= num_steps <= schedule.num_steps:
        raise ValueError(f"num_steps is {num_steps}; this model's schedule allows 1 to {schedule.num_steps}")
    k = torch.arange(num_steps + 1)
    kept = torch.maximum(k, (schedule.num_steps * (k.double() / num_steps) ** 2).round().long())
    return Schedule(schedule.alpha_bar[kept], schedule.timestep[kept])


class Molecules(Domain):
    """Molecules of C, N, O, F as their heavy atoms. Weights: ``rayft pretrain molecules_pretrain``.

    ``data`` is "qm9", or an SDF, XYZ or npz file, folder or archive of one's own; sizes are drawn as they occur there.
    """

    space = SPACE
    rewards: Mapping[str, str] = REWARDS
    decoder = "envs.molecules.decode:heavy"
    canonical = "envs.molecules.reward:canonical"
    formats: Mapping[str, str] = {
        ".sdf": "envs.molecules.write:sdf",
        ".smi": "envs.molecules.write:smi",
        ".csv": "envs.molecules.write:csv",
        ".parquet": "envs.molecules.write:parquet",
    }
    metrics = "envs.molecules.render:numbers"
    num_properties = 0  # that a chain is told

    def __init__(
        self,
        num_steps: int = 50,
        weights: str | None = str(FOLDER / "qm9-heavy.safetensors"),
        data: str = "qm9",
        max_atoms: int = MAX_ATOMS,
        width: int = 96,
        num_layers: int = 6,
    ) -> None:
        if not isinstance(max_atoms, int) or max_atoms < 1:
            raise ValueError(f"max_atoms is {max_atoms!r}; give the heavy atoms of the largest molecule, 1 or more")
        self.num_steps, self.weights, self.source = num_steps, weights, data
        self.max_atoms, self.width, self.num_layers = max_atoms, width, num_layers
        self.event_shape = (max_atoms, 3 + len(ELEMENTS))

    def schedule(self) -> Schedule:
        return denser_near_data(polynomial(TRAINED_STEPS), self.num_steps)

    def denoiser(self) -> Denoiser:
        net = LightEGNN(self.max_atoms, len(ELEMENTS), TRAINED_STEPS, self.width, self.num_layers)
        if self.weights is not None:
            load_weights(net, Path(self.weights))
        return net

    def critic(self) -> nn.Module:
        told = self.max_atoms, self.event_shape[1] - 3, int(self.schedule().timestep[-1])
        return LightCritic(*told, num_properties=self.num_properties)

    def context(self, num_chains: int, generator: torch.Generator) -> dict[str, Tensor]:
        size = torch.multinomial(self._num_of_size, num_chains, replacement=True, generator=generator)
        return {"mask": (torch.arange(self.max_atoms) < size.unsqueeze(1)).float()}

    def groups(self, context: Context) -> Tensor:
        return context["mask"].sum(-1).long()

    def data(self, num_events: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        events, mask = self._events
        chosen = torch.randint(len(events), (num_events,), generator=generator)
        return events[chosen], {"mask": mask[chosen]}

    def held_out(self, num_events: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]] | None:
        """Of QM9's validation split; nothing of other data, which has none."""
        if self._unseen is None:
            return None
        events, mask = self._unseen
        chosen = torch.randint(len(events), (num_events,), generator=generator)
        return events[chosen], {"mask": mask[chosen]}

    def page(self, panels: Mapping[str, Panel]) -> dict[str, str]:
        from envs.molecules.render import sections

        return sections(panels)

    @cached_property
    def _num_of_size(self) -> Tensor:
        if self.source == "qm9" and self.max_atoms == MAX_ATOMS:
            return torch.tensor(NUM_OF_SIZE).double()
        return torch.bincount(self._events[1].sum(1).long(), minlength=self.max_atoms + 1).double()

    @cached_property
    def _events(self) -> tuple[Tensor, Tensor]:
        """The training molecules, as events."""
        made = events_of(trained_on(self.source, self.max_atoms), self.max_atoms)
        return torch.from_numpy(made[0]), torch.from_numpy(made[1])

    @cached_property
    def _unseen(self) -> tuple[Tensor, Tensor] | None:
        if self.source != "qm9":
            return None
        made = events_of(trained_on("qm9", self.max_atoms, "valid"), self.max_atoms)
        return torch.from_numpy(made[0]), torch.from_numpy(made[1])


def trained_on(source: str, max_atoms: int, split: str = "train") -> Table:
    """The heavy atoms of a split of QM9, or of the user's own file, as far as a model of this size takes them."""
    from envs.molecules.files import fitting, read
    from envs.molecules.qm9 import qm9

    table = (qm9(split) if source == "qm9" else read(source)).heavy()
    return fitting(table, source, max_atoms, SYMBOLS)


def events_of(table: Table, max_atoms: int = MAX_ATOMS) -> tuple[np.ndarray, np.ndarray]:
    """Molecules without hydrogens as (events [N, n, 3 + 4], mask [N, n]), float32."""
    positions, numbers, mask = table.padded(max_atoms)
    one_hot = (numbers[..., None] == np.array(ELEMENTS)) / FEATURE_SCALE
    return np.concatenate([positions, one_hot], -1).astype(np.float32), mask.astype(np.float32)
