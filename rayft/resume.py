"""The state of a pretraining on disk: written in one piece, and taken up only by the training that it belongs to."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

KEYS = ("net", "average", "optimizers", "step", "steps", "seconds", "recipe", "window", "recent", "levels")


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Whole, on the disk, then in place of the one before; an ``OSError`` or ``RuntimeError`` leaves that as it was."""
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError):
        temporary.unlink(missing_ok=True)
        raise


def load_state(path: Path) -> dict[str, Any]:
    """What ``save_state`` wrote; nothing but tensors and plain values is unpickled."""
    if not path.is_file():
        raise ValueError(f"nothing to resume: no {path}")
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch tells its own developers about protocols it has not seen
        try:
            found = torch.load(file, map_location="cpu", weights_only=True)
            return {key: found[key] for key in KEYS}
        except Exception:  # whatever bytes make torch, zipfile or pickle raise
            raise ValueError(f"{path} is damaged or of another version; start again without --resume") from None


def unfinished(path: Path) -> int | None:
    """The step at which a training was stopped before its end, where ``path`` is its state."""
    try:
        found = load_state(path)
    except (ValueError, OSError):  # there is none, or none that is of use to anybody
        return None
    return found["step"] if found["step"] < found["steps"] else None


def refuse_another(mine: Mapping[str, Any], theirs: Mapping[str, Any], path: Path) -> None:
    """A ``ValueError`` that names the first value in which two trainings differ."""
    key = _difference(mine, theirs)
    if key is not None:
        what = f"{'.'.join(key)} is {_at(mine, key)!r} and {path} was made with {_at(theirs, key)!r}"
        raise ValueError(f"{what}: resume with the same, or start another with name=NAME")


def _difference(mine: Any, theirs: Any, key: tuple[str, ...] = ()) -> tuple[str, ...] | None:
    if not (isinstance(mine, Mapping) and isinstance(theirs, Mapping)):
        return None if mine == theirs else key
    found = (_difference(mine.get(name), theirs.get(name), (*key, str(name))) for name in {**mine, **theirs})
    return next((path for path in found if path is not None), None)


def _at(tree: Any, key: tuple[str, ...]) -> Any:
    for part in key:
        tree = tree.get(part)
    return tree
