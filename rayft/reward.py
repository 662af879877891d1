"""Rewards: a score of finished samples, as a user writes it. numpy only, so that a scoring process stays small.

r : x_0 -> R,    NaN = the call failed (never 0);  an undecodable event is no failure: it has the value ``undecodable``
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rayft import imports


class Reward(ABC):
    """A black box over decoded samples. One sample in, one number out; higher is better.

    ``undecodable`` is what an event scores that decodes to nothing. ``version`` is part of every cache key: raise it
    when the meaning of the number changes.
    """

    undecodable: float = 0.0
    version: str = "1"

    @abstractmethod
    def __call__(self, samples: Sequence[Any]) -> Sequence[float] | np.ndarray:
        """One score per sample, in order; ``None`` or NaN where scoring failed."""


class FunctionReward(Reward):
    """A plain ``f(samples) -> scores`` or callable object as a Reward."""

    def __init__(self, function: Callable[[Sequence[Any]], Any], undecodable: float = 0.0) -> None:
        self.function, self.undecodable = function, undecodable

    def __call__(self, samples: Sequence[Any]) -> Sequence[float] | np.ndarray:
        return self.function(samples)


def target(path: Any, short_names: Mapping[str, str] | None = None) -> Any:
    """The class or function a reward name stands for: a domain's short name, an import path, or the object itself."""
    if not isinstance(path, str):
        return path
    short_names = short_names or {}
    if path in short_names:
        return imports.load(short_names[path])
    if ":" not in path:
        known = ", ".join(short_names) or "none"
        hint = imports.nearest(path, short_names)
        raise ValueError(
            f"no reward {path!r}{hint}; this domain has {known}, or write 'package.module:Name' or './file.py:Name'"
        )
    return imports.load(path)


def check(path: Any, kwargs: Mapping[str, Any], short_names: Mapping[str, str] | None = None) -> None:
    """Refuses what is not a reward, or arguments it does not take, without building it."""
    found = target(path, short_names)
    if inspect.isclass(found):
        if not any("__call__" in vars(base) for base in found.__mro__):
            raise ValueError(f"{path} is a class without __call__(samples); a reward is called with a list of samples")
        if inspect.isabstract(found):
            raise ValueError(
                f"{path} is abstract: it lacks {', '.join(sorted(getattr(found, '__abstractmethods__', ())))}"
            )
        imports.check_arguments(found, kwargs, str(path))
    elif not callable(found):
        raise ValueError(f"{path} is {type(found).__name__}, not a Reward: give a class, or a function f(samples)")
    elif kwargs:
        raise ValueError(f"{path} is a function and takes no arguments ({', '.join(kwargs)}); make it a class for that")


def build(path: Any, kwargs: Mapping[str, Any], short_names: Mapping[str, str] | None = None) -> Reward:
    """The reward, ready to be called."""
    check(path, kwargs, short_names)
    found = target(path, short_names)
    reward: Any = imports.construct(found, kwargs, f"reward {path}") if inspect.isclass(found) else found
    return reward if isinstance(reward, Reward) else FunctionReward(reward, getattr(reward, "undecodable", 0.0))


def as_arrays(x_0: np.ndarray, context: Mapping[str, np.ndarray]) -> list[np.ndarray | None]:
    """The decoder of domains whose samples are plain arrays; an event that is not finite decodes to nothing."""
    return [event if np.isfinite(event).all() else None for event in x_0]
