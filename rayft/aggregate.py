"""Several rewards as one: which of them are called, on which events, and how their raw scores become one number.

    v_i = transforms_i(raw_i) where part i is due, its ``otherwise`` elsewhere;    w_i = its weight at this iteration

    sum         sum_i w_i v_i
    geometric   prod_i v_i ^ (w_i / sum_j w_j)    fails where v_i < 0 and w_i > 0
    product     prod_i v_i ^ w_i    fails where v_i < 0 and w_i is no whole number
    constraint  max(floor, sum_i w_i v_i)    where all K constraints v >= at_least hold; i: the parts that are none
                floor - (K - k) + s    where k hold and the next does not, s = m + (1 - 2 m) / (1 + at_least - v)

m = 1e-6, so s is in (0, 1) and grows towards feasibility: the feasible beat the others, and who fails a later
constraint beats who fails an earlier one. A constraint whose score is not of order 1 wants a transform, or s is flat.

A part is due where every filter in its ``only_if`` was due and has a raw score of at least that. A failed part fails
the reward, whatever its weight; a part of weight 0 is called all the same, so that it is logged.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np

from rayft.settings import NUMBER, STRICT, Positive

AGGREGATES = ("sum", "geometric", "product", "constraint")
MARGIN = 1e-6  # keeps s off 0 and 1 in float32 too

Number = Annotated[float, NUMBER]
Raw = Mapping[str, np.ndarray]
Weight = float | tuple[tuple[int, float], ...]


# -- transforms


@dataclass(frozen=True)
class Sigmoid:
    """1 / (1 + exp(-(v - centre) / scale)); a negative scale makes low scores good."""

    __pydantic_config__ = STRICT

    centre: Number = 0.0
    scale: Number = 1.0

    def __post_init__(self) -> None:
        if self.scale == 0:
            raise ValueError("scale is 0; give the distance from the centre at which it reaches 0.73")

    def __call__(self, v: np.ndarray, fit: Sequence[float]) -> np.ndarray:
        return 0.5 * (1 + np.tanh((v - self.centre) / self.scale / 2))


@dataclass(frozen=True)
class Step:
    """1 where v >= at, 0 elsewhere; with ``below: true``, 1 where v <= at."""

    __pydantic_config__ = STRICT

    at: Number
    below: bool = False

    def __call__(self, v: np.ndarray, fit: Sequence[float]) -> np.ndarray:
        return np.where(np.isnan(v), np.nan, v <= self.at if self.below else v >= self.at)


@dataclass(frozen=True)
class Clip:
    """min(max(v, low), high); either bound may be left out."""

    __pydantic_config__ = STRICT

    low: Number = -math.inf
    high: Number = math.inf

    def __post_init__(self) -> None:
        _check_bounds("clip", self.low, self.high)

    def __call__(self, v: np.ndarray, fit: Sequence[float]) -> np.ndarray:
        return np.clip(v, self.low, self.high)


@dataclass(frozen=True)
class Window:
    """1 where low <= v <= high, exp(-(distance / scale)^2 / 2) outside; either bound may be left out."""

    __pydantic_config__ = STRICT

    low: Number = -math.inf
    high: Number = math.inf
    scale: Positive = 1.0

    def __post_init__(self) -> None:
        _check_bounds("window", self.low, self.high)

    def __call__(self, v: np.ndarray, fit: Sequence[float]) -> np.ndarray:
        outside = np.maximum(np.maximum(self.low - v, v - self.high), 0.0)
        return np.exp(-((outside / self.scale) ** 2) / 2)


def _check_bounds(name: str, low: float, high: float) -> None:
    if (low, high) == (-math.inf, math.inf):
        raise ValueError(f"{name} has no bound; give low, high or both")
    if low > high:
        raise ValueError(f"low is {low:g}, above high, which is {high:g}")


@dataclass(frozen=True)
class Zscore:
    """(v - mean) / std; what is not given is taken once from the pretrained model's scores, a std of 0 being 1."""

    __pydantic_config__ = STRICT

    mean: Number | None = None
    std: Number | None = None

    def __post_init__(self) -> None:
        if self.std is not None and self.std <= 0:
            raise ValueError(f"std is {self.std:g}; it should be above 0")

    @property
    def open(self) -> bool:
        return self.mean is None or self.std is None

    def __call__(self, v: np.ndarray, fit: Sequence[float]) -> np.ndarray:
        mean, std = fit if self.open else (0.0, 1.0)
        return (v - (mean if self.mean is None else self.mean)) / (std if self.std is None else self.std)


Transform = Sigmoid | Step | Clip | Window | Zscore
TRANSFORMS: dict[str, type[Transform]] = {
    "sigmoid": Sigmoid,
    "step": Step,
    "clip": Clip,
    "window": Window,
    "zscore": Zscore,
}


# -- what a run has


@dataclass(frozen=True)
class Component:
    """One black box and its place in the whole. A weight is a number, or (iteration, weight) knots of a curriculum."""

    name: str
    path: Any
    arguments: Mapping[str, Any] = field(default_factory=dict)
    weight: Weight = 1.0
    transforms: tuple[Transform, ...] = ()
    only_if: Mapping[str, float] = field(default_factory=dict)
    otherwise: float = 0.0
    at_least: float | None = None
    watched: bool = False

    def weight_at(self, iteration: float | None) -> float:
        """Linear between the knots, flat beyond them; ``None`` is the last."""
        if not isinstance(self.weight, tuple):
            return self.weight
        at, weights = zip(*self.weight, strict=True)
        return weights[-1] if iteration is None else float(np.interp(iteration, at, weights))


@dataclass(frozen=True)
class Recipe:
    """Which rewards are called and what becomes of their scores. ``undecodable`` ``None``: the reward's own."""

    components: tuple[Component, ...]
    aggregate: str = "sum"
    undecodable: float | None = None
    floor: float = 0.0
    fit: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # "part.position" of a zscore -> mean, std

    @property
    def parts(self) -> list[Component]:
        """The components that are optimised."""
        return [component for component in self.components if not component.watched]

    @property
    def plain(self) -> bool:
        """Whether one part's scores are the reward as they are."""
        one = self.parts[0]
        return len(self.parts) == 1 and not one.transforms and one.weight == 1 and self.aggregate == "sum"

    @property
    def stages(self) -> list[list[int]]:
        """Numbers of the components by the depth of their filters; a stage needs the raw scores of those before it."""
        known = {component.name: component for component in self.components}

        def depth(name: str) -> int:
            return 1 + max((depth(other) for other in known[name].only_if), default=-1)

        found: list[list[int]] = [[] for _ in range(1 + max(map(depth, known)))]
        for number, component in enumerate(self.components):
            found[depth(component.name)].append(number)
        return found

    def passing(self, index: int, raw: Raw) -> np.ndarray:
        """bool [event]: where component ``index`` is due; a filter that failed lets nothing pass.

        Without a filter it is due everywhere; the mask is then as long as any column of ``raw``, and a scalar if none.
        """
        known = {component.name: number for number, component in enumerate(self.components)}
        mask = np.ones(next(iter(raw.values())).shape if raw else (), dtype=bool)
        for name, least in self.components[index].only_if.items():
            mask = mask & self.passing(known[name], raw) & (raw[name] >= least)  # NaN >= least is False
        return mask

    def total(self, raw: Raw, iteration: float | None, called: Raw) -> tuple[np.ndarray, dict[int, str]]:
        """(rewards [event], reasons by event) at an iteration; ``None`` has the final weights, for one and the same r.

        ``raw`` [event] is NaN where a part failed or was not asked. ``called`` says who was asked about an event, and
        about those that nobody was asked about (undecodable ones) nothing is said: NaN and no reason. Empty: all were.
        """
        asked = np.logical_or.reduce([called[part.name] for part in self.parts if part.name in called] or [True])
        values, failed = [], {}
        for number, part in enumerate(self.components):
            if not part.watched:
                due = self.passing(number, raw)
                values.append(np.where(due, self._value(part, raw[part.name]), part.otherwise))
                failed[part.name] = due & np.isnan(values[-1]) & asked
        with np.errstate(all="ignore"):
            rewards, refused = self._aggregated(np.stack(values), iteration)
        errors: dict[int, str] = {}
        for event in np.flatnonzero(np.logical_or.reduce(list(failed.values()))).tolist():
            errors[event] = f"component: {', '.join(name for name, where in failed.items() if where[event])} failed"
        for reason, where in [*refused.items(), ("aggregate: the reward is not finite", ~np.isfinite(rewards))]:
            for event in np.flatnonzero(where & asked).tolist():
                errors.setdefault(event, reason)
        rewards[list(errors)] = np.nan
        return np.where(asked, rewards, np.nan), errors

    @property
    def needs_fit(self) -> bool:
        """Whether a zscore waits for the pretrained model's scores."""
        return any(key not in self.fit for part in self.parts for key, _ in _open(part))

    def fitted(self, raw: Raw) -> Recipe:
        """With the mean and std of these scores for every zscore that has none, after the transforms before it."""
        fit = dict(self.fit)
        for number, part in enumerate(self.components):
            for key, position in _open(part):
                if key not in fit:
                    so_far = dataclasses.replace(self, fit=fit)
                    values = so_far._value(part, raw[part.name], position)
                    values = values[self.passing(number, raw) & np.isfinite(values)]
                    if len(values) < 2:
                        raise ValueError(f"{part.name} scored {len(values)} of the pretrained samples; zscore needs 2")
                    fit[key] = (float(values.mean()), float(values.std()) or 1.0)
        return dataclasses.replace(self, fit=fit)

    def state(self) -> dict[str, Any]:
        """What was fitted, as plain JSON."""
        return {"fit": {key: list(pair) for key, pair in self.fit.items()}}

    def with_state(self, state: Mapping[str, Any]) -> Recipe:
        """As it was when ``state`` was taken from this recipe or an equal one."""
        known, fit = [key for part in self.parts for key, _ in _open(part)], state.get("fit", {})
        for key in fit:
            if key not in known:
                raise ValueError(f"the checkpoint has a zscore {key!r}, and this reward does not; resume with its own")
        return dataclasses.replace(self, fit={key: (float(mean), float(std)) for key, (mean, std) in fit.items()})

    def _value(self, part: Component, raw: np.ndarray, before: int | None = None) -> np.ndarray:
        v = np.asarray(raw, dtype=np.float64)
        for position, transform in enumerate(part.transforms[:before]):
            key = f"{part.name}.{position}"
            assert not (isinstance(transform, Zscore) and transform.open) or key in self.fit, f"{key} was not fitted"
            v = transform(v, self.fit.get(key, ()))
        return v

    def _aggregated(self, v: np.ndarray, iteration: float | None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(rewards, reason -> [event]) of the values [part, event]."""
        parts, w = self.parts, np.array([part.weight_at(iteration) for part in self.parts])[:, None]
        if self.aggregate == "sum":
            return (w * v).sum(axis=0), {}
        if self.aggregate == "constraint":
            return self._constrained(v, w), {}
        whole = self.aggregate == "product"
        wrong = (v < 0) & ((w % 1 != 0) if whole else (w > 0))
        kind = "product with a weight that is no whole number" if whole else "geometric mean"
        refused = {f"aggregate: {part.name} is negative in a {kind}": wrong[i] for i, part in enumerate(parts)}
        powers = w if whole else w / w.sum()
        return np.prod(np.where(w == 0, 1.0, np.where(wrong, np.nan, v) ** powers), axis=0), refused

    def _constrained(self, v: np.ndarray, w: np.ndarray) -> np.ndarray:
        least = np.array([np.nan if part.at_least is None else part.at_least for part in self.parts])
        is_constraint = ~np.isnan(least)
        objective = np.maximum(self.floor, (w * v)[~is_constraint].sum(axis=0))
        short = least[is_constraint, None] - v[is_constraint]  # [constraint, event], above 0 where violated
        violated = short > 0
        held = np.argmax(violated, axis=0)  # how many hold before the first that does not
        distance = np.take_along_axis(short, held[None], axis=0)[0]
        towards = MARGIN + (1 - 2 * MARGIN) / (1 + distance)
        return np.where(violated.any(axis=0), self.floor - (len(short) - held) + towards, objective)


def _open(part: Component) -> list[tuple[str, int]]:
    """(key, position) of the zscores without a mean or std of their own."""
    chain = enumerate(part.transforms)
    return [(f"{part.name}.{i}", i) for i, transform in chain if isinstance(transform, Zscore) and transform.open]
