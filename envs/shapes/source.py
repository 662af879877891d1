"""The shapes that a model is of, by split, with their embeddings: read once in a process, however many domains ask."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from envs.shapes.data import Shapes, normalised, split
from envs.shapes.formats import HDF5, read
from envs.shapes.latent import embedding

STORED_POINTS = 2048  # of each shape, to draw an event's from
GENERATED = "aircraft"  # the category of generated shapes where none is named: that of the shipped weights


class Source:
    """Shapes of one source, each part of them made when it is first asked for."""

    def __init__(self, source: str, group: str | None, classes: tuple[str, ...] | None) -> None:
        self.source, self.group, self.chosen = source, group, classes

    @cached_property
    def table(self) -> dict[str, Shapes]:
        """'train', 'valid' and 'test'."""
        return split(read(self.source, STORED_POINTS, self.group, self.chosen))

    @cached_property
    def clouds(self) -> dict[str, np.ndarray]:
        """[shape, n, 3] of zero mean and unit variance."""
        return {name: normalised(part.points) for name, part in self.table.items()}

    @cached_property
    def embeddings(self) -> dict[str, np.ndarray]:
        """[shape, features], of all their points."""
        return {name: embedding(clouds) for name, clouds in self.clouds.items()}

    @property
    def classes(self) -> tuple[str, ...]:
        return self.table["train"].classes


def group_of(source: str, group: str | None) -> str | None:
    """The group that is meant where none may be named."""
    return GENERATED if group is None and source == "generated" else group


def upright(source: str) -> str:
    """The axis that stands upright: y in ShapeNet's HDF5; elsewhere z, as in what is generated and in ModelNet."""
    return "y" if Path(source).suffix.lower() in HDF5 else "z"


def open_source(source: str, group: str | None, classes: Sequence[str] | None) -> Source:
    """The same one for the same words, until the file or folder changes."""
    path, group = Path(source), group_of(source, group)
    changed = path.stat().st_mtime_ns if path.exists() else 0
    return _opened(source, group, None if classes is None else tuple(classes), changed)


@lru_cache(maxsize=2)
def _opened(source: str, group: str | None, classes: tuple[str, ...] | None, changed: int) -> Source:
    return Source(source, group, classes)
