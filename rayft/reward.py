"""Rewards: a score of finished samples, as a user writes it. numpy only, so that a scoring process stays small.

r : x_0 -> R,    NaN = the call failed (never 0);  an undecodable event is no failure: it has the value ``undecodable``
"""

from __future__ import annotations

import hashlib
import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rayft import imports

BUILTIN = {  # rewards that are no Python of the user's own
    "command": "rayft.wire:Command",
    "http": "rayft.wire:Http",
}
DIGITS = 6  # decimals of an array that count when two samples are told apart


class Reward(ABC):
    """A black box over decoded samples. One sample in, one number out; higher is better.

    ``__call__`` may also take ``(samples, conditions, metadata)``: for each sample a dict of its chain's context, and a
    dict with ``purpose`` and ``iteration``. It may return ``(scores, {"name": numbers})``: those are logged.
    """

    undecodable: float = 0.0
    """What an event scores that decodes to nothing."""
    version: str | None = None
    """Part of every cache key: raise it when the number changes its meaning. Undeclared, any edit of its file does."""
    groupwise: bool = False
    """Scores depend on the whole batch (diversity, say): called once with all samples, never cached."""
    batch_size: int | None = None
    """Samples per call, for a network that wants many; chosen by the clock where it is not given."""
    num_gpus: float = 0.0
    """GPU fraction it needs. Such a reward runs in its actor itself, without a child process of its own."""
    canonical: Callable[[Any], Any] | None = None
    """A static function: sample -> str, number or array that says all the score depends on; the domain's otherwise."""

    @abstractmethod
    def __call__(self, samples: Sequence[Any]) -> Any:
        """One score per sample, in order; ``None`` or NaN where scoring failed."""


class DifferentiableReward(Reward):
    """A reward that is also a torch function of x_0, for algorithms that follow its gradient."""

    @abstractmethod
    def value(self, x_0: Any, context: Mapping[str, Any]) -> Any:
        """r(x_0) as a tensor [batch], differentiable in ``x_0`` [batch, *event]."""

    def __call__(self, samples: Sequence[Any]) -> Any:
        import torch

        with torch.no_grad():
            return self.value(torch.from_numpy(np.stack(samples)), {}).cpu().numpy()


class FunctionReward(Reward):
    """A plain ``f(samples)`` or ``f(samples, conditions, metadata)`` as a Reward; a callable object likewise."""

    def __init__(self, function: Callable[..., Any], undecodable: float = 0.0) -> None:
        self.function, self.undecodable = function, undecodable
        self.version, self.canonical = getattr(function, "version", None), getattr(function, "canonical", None)
        self.groupwise = bool(getattr(function, "groupwise", False))
        self.batch_size = getattr(function, "batch_size", None)
        self.num_gpus = float(getattr(function, "num_gpus", 0.0))

    def __call__(self, samples: Sequence[Any], *told: Any) -> Any:
        return self.function(samples, *told)


def arity(reward: Reward) -> int:
    """How many of (samples, conditions, metadata) it takes: 1, 2 or 3."""
    called = reward.function if isinstance(reward, FunctionReward) else reward
    try:
        parameters = inspect.signature(called).parameters.values()
    except (TypeError, ValueError):  # written in C
        return 1
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return 3
    needed = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return min(3, max(1, len(needed)))


def target(path: Any, short_names: Mapping[str, str] | None = None) -> Any:
    """The class or function a reward name stands for: a domain's short name, an import path, or the object itself."""
    if isinstance(path, bytes):
        return imports.unpack(path)
    if not isinstance(path, str):
        return path
    known = {**BUILTIN, **(short_names or {})}
    if path in known:
        return imports.load(known[path])
    if ":" not in path:
        own, others = ", ".join(short_names or {}) or "none of its own", " or ".join(BUILTIN)
        raise ValueError(
            f"no reward {path!r}{imports.nearest(path, known)}; this domain has {own}, or write 'package.module:Name', "
            f"'./file.py:Name', {others}"
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


# -- what a sample is to a cache, a wire and a log


def itself(sample: Any) -> Any:
    """The canonical form of samples that are plain data: strings, numbers, arrays, lists and dicts of them."""
    return sample


def as_json(canonical: Any) -> Any:
    """A canonical form as JSON has it; arrays become lists."""
    if isinstance(canonical, np.ndarray | np.generic):
        return canonical.tolist()
    if isinstance(canonical, Mapping):
        return {str(key): as_json(value) for key, value in canonical.items()}
    if isinstance(canonical, list | tuple):
        return [as_json(value) for value in canonical]
    if canonical is None or isinstance(canonical, str | int | float | bool):
        return canonical
    raise TypeError(f"a sample of type {type(canonical).__name__} has no canonical form; give its domain a `canonical`")


def digest(canonical: Any, *others: Any) -> bytes:
    """16 bytes that stand for a canonical form; arrays are equal up to ``DIGITS`` decimals."""
    found = hashlib.blake2b(digest_size=16)
    for value in (canonical, *others):
        if isinstance(value, np.ndarray) and value.dtype.kind == "f":
            rounded = np.round(value.astype(np.float64), DIGITS) + 0.0  # -0.0 is 0.0
            found.update(str(value.shape).encode() + np.ascontiguousarray(rounded).tobytes())
        elif isinstance(value, np.ndarray):
            found.update(f"{value.shape}{value.dtype}".encode() + np.ascontiguousarray(value).tobytes())
        else:
            found.update(json.dumps(as_json(value), sort_keys=True).encode())
        found.update(b"\0")
    return found.digest()


def label(canonical: Any) -> str:
    """A few characters by which a person knows a sample again."""
    if isinstance(canonical, np.ndarray):
        few = ", ".join(f"{value:.4g}" for value in canonical.ravel()[:4])
        return f"[{few}{', ...' if canonical.size > 4 else ''}]"
    return str(canonical)[:80]


def identity(path: Any, arguments: Mapping[str, Any], short_names: Mapping[str, str] | None = None) -> str:
    """What makes two rewards the same to a cache: name, version and arguments.

    Where the class declares no ``version``, the source file's digest takes its place: an edit starts afresh.
    """
    found = target(path, short_names)
    kind = found if inspect.isclass(found) or inspect.isfunction(found) else type(found)
    module = getattr(found, "__module__", "")
    version = getattr(found, "version", None)
    if version is None:
        try:
            text = Path(inspect.getsourcefile(kind) or "").read_bytes()
        except (TypeError, OSError):
            text = imports.pack(found)
        version = hashlib.blake2b(text, digest_size=16).hexdigest()
    name = f"{module if not module.startswith('rayft_file_') else 'file'}:{getattr(kind, '__qualname__', kind)}"
    return json.dumps([name, str(version), as_json(dict(arguments))], sort_keys=True, default=str)


def as_arrays(x_0: np.ndarray, context: Mapping[str, np.ndarray]) -> list[np.ndarray | None]:
    """The decoder of domains whose samples are plain arrays; an event that is not finite decodes to nothing."""
    return [event if np.isfinite(event).all() else None for event in x_0]
