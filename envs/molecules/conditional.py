"""Molecules that are told a property, as EDM's conditional models are: the baseline that fine-tuning is held against.

    p(x_0 | size, c),    c = (property - mean) / sd over the training set, told to every atom at every t

Samples are asked for with one value (``at``), or with the training set's own sizes and values, drawn together.
For QM9's QED mean and sd are known here, so that sampling at a value needs no data.
"""

from __future__ import annotations

import logging
import math
import os
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from envs.molecules.cache import default_folder, once
from envs.molecules.data import Molecules as Table
from envs.molecules.domain import ELEMENTS, FOLDER, MAX_ATOMS, REWARDS, TRAINED_STEPS, Molecules, trained_on
from envs.molecules.light import LightEGNN
from rayft.domain import Denoiser, load_weights
from rayft.reward import build

TRAINED = "runs/molecules_conditional_pretrain/weights.safetensors"
SHIPPED = str(FOLDER / "qm9-heavy-qed.safetensors")  # they were told the QED of QM9
QM9 = {"qed": (0.4664, 0.0779)}  # mean and sd of the training split

logger = logging.getLogger(__name__)


class ConditionalMolecules(Molecules):
    """``Molecules`` conditioned on a reward's number. Weights for QM9's QED are shipped; others are trained first."""

    num_properties = 1

    def __init__(
        self,
        condition: str = "qed",
        at: float | None = 0.6,
        num_steps: int = 50,
        weights: str | None = SHIPPED,
        data: str = "qm9",
        max_atoms: int = MAX_ATOMS,
        width: int = 96,
        num_layers: int = 6,
    ) -> None:
        super().__init__(num_steps, weights, data, max_atoms, width, num_layers)
        if condition not in REWARDS:
            raise ValueError(f"condition is {condition!r}; give one of {', '.join(REWARDS)}")
        if at is not None and (type(at) not in (int, float) or not math.isfinite(at)):
            raise ValueError(f"at is {at!r}; give a number, the {condition} asked for, or null for the data's own")
        self.condition, self.at = condition, at

    def denoiser(self) -> Denoiser:
        net = LightEGNN(self.max_atoms, len(ELEMENTS), TRAINED_STEPS, self.width, self.num_layers, num_properties=1)
        if self.weights is not None:
            other = self.weights == SHIPPED and (self.condition, self.source) != ("qed", "qm9")
            if other or not Path(self.weights).is_file():
                told = f"the shipped weights know the QED of QM9, not {self.condition} of {self.source}"
                what = told if other else f"there are no weights in {self.weights}"
                more = f" domain.condition={self.condition} domain.data={self.source}" * other
                todo = f"make them with `rayft pretrain molecules_conditional_pretrain{more}`"
                raise ValueError(f"{what}: {todo}, then give domain.weights={TRAINED}")
            load_weights(net, Path(self.weights))
        return net

    def context(self, num_chains: int, generator: torch.Generator) -> dict[str, Tensor]:
        if self.at is None:
            return self.data(num_chains, generator)[1]
        asked = torch.full((num_chains, 1), self.at)
        return {**super().context(num_chains, generator), "property": self._standard(asked)}

    def data(self, num_events: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        events, mask = self._events
        chosen = torch.randint(len(events), (num_events,), generator=generator)
        return events[chosen], {"mask": mask[chosen], "property": self._standard(self._values[chosen])}

    def held_out(self, num_events: int, generator: torch.Generator) -> None:
        """Nothing: only the training split's properties are computed."""

    def _standard(self, value: Tensor) -> Tensor:
        mean, sd = self._mean_and_sd
        return ((value - mean) / max(sd, 1e-6)).float()

    @cached_property
    def _mean_and_sd(self) -> tuple[float, float]:
        if self.source == "qm9" and self.max_atoms == MAX_ATOMS and self.condition in QM9:
            return QM9[self.condition]
        return float(self._values.mean()), float(self._values.std())

    @cached_property
    def _values(self) -> Tensor:
        """The property of every training molecule, scored once and kept beside the data."""
        table = trained_on(self.source, self.max_atoms)
        if self.source == "qm9":
            kept = default_folder() / f"qm9_heavy{self.max_atoms}_{self.condition}.npy"
            once(kept, lambda: _save(kept, self._scored(table)))
            values = _load(kept, len(table))
        else:
            values = self._scored(table)
        known = np.isfinite(values)
        if num := int((~known).sum()):
            what = f"{self.condition} is unknown of {num} of {len(table)} molecules in {self.source}"
            logger.warning("%s; in training they are told the mean of the others", what)
        return torch.from_numpy(np.where(known, values, values[known].mean()).astype(np.float32)).unsqueeze(1)

    def _scored(self, table: Table) -> np.ndarray:
        """NaN where unknown."""
        scored = build(REWARDS[self.condition], {})(table.smiles.tolist())
        values = np.array([np.nan if value is None else value for value in scored], np.float32)
        if not np.isfinite(values).any():
            what = f"{self.condition}, which is scored on SMILES, is known of no molecule in {self.source}"
            raise ValueError(f"{what}; .xyz and .npz have none: give an .sdf, or QM9 made of qm9pack")
        return values


def _save(path: Path, values: np.ndarray) -> None:
    """In one piece or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            np.save(file, values)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _load(path: Path, num: int) -> np.ndarray:
    try:
        values = np.load(path, allow_pickle=False)
    except (ValueError, EOFError):
        values = np.zeros(0)
    if values.shape != (num,):
        raise ValueError(f"{path} does not hold a number for each of {num} molecules; delete it and try again")
    return values
