"""The ``search:`` block of a run's YAML: which keys are drawn from what, how many trials, and which of them go on.

    search: {space: {training.lr: {loguniform: [1e-4, 1e-2]}}, trials: 24, scheduler: asha, objective: frontier_share}

A trial is the run with its values put at their dotted keys. All that can be known of them is checked here, before Ray
starts: names, ranges, and whether a run would take each end of a range and each choice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from rayft import spec as specs
from rayft.imports import nearest
from rayft.objective import Objective, objective
from rayft.settings import NUMBER, STRICT, Count, Positive, check, defaults

RANGES = {"uniform": 2, "loguniform": 2, "quniform": 3, "randint": 2, "lograndint": 2}  # how many numbers each takes
LISTS = ("choice", "grid")
PLACES = ("output", "storage")
SAME_FOR_ALL = ("algorithm", "name", *PLACES, "iterations", "evaluate", "resources", "checkpoint", "track", "search")
FIXED = ("precision", "ema", "bank", "bank_pairs", "radii", "payoff_actors", "payoff_lead")  # of training, once begun
BANKED = (
    "num_candidates",
    "radius_unit",
    "reward_at",
    "x_0_above",
    "centre",
    "sampler",
    "sampler_steps",
    "sampler_end",
)
NUM_TRIALS, NUM_RADII = 24, 5


@dataclass(frozen=True)
class SearchSettings:
    """How a sweep searches."""

    __pydantic_config__ = STRICT

    space: dict[str, Any] | None = None
    """Dotted keys of the run, each with a distribution: {loguniform: [0.05, 1.0]}, {choice: [1, 2, 4]} ..."""
    trials: Count | None = None
    """How many; 24, or all points of a grid."""
    scheduler: Literal["asha", "pbt", "none"] = "asha"
    """asha stops what is behind; pbt lets those behind go on from those ahead, with changed values."""
    sampler: Literal["random", "grid", "optuna"] | None = None
    """Where values come from: grid where the space is one, random otherwise."""
    objective: str | dict[str, float] | None = None
    """attained, frontier_share, reward, reward_at_kl (with ``kl``), or weights of an evaluation's scalars. By default
    attained where an alpha is known, else the frontier share, which is uncertain for a policy that has hardly moved."""
    kl: Positive | None = None
    """Nats that reward_at_kl allows."""
    max_concurrent: Count | None = None
    """Trials at a time; as many as the machine has logical CPUs for where none is given."""
    time_limit_s: Positive | None = None
    """Seconds after which what runs is ended."""
    grace: Count | None = None
    """Iterations before asha may stop a trial; one evaluation where none is given."""
    reduction: Annotated[float, NUMBER, Field(gt=1)] = 3.0
    """asha keeps one in so many at each of its rungs."""
    perturb_every: Count | None = None
    """Iterations between pbt's exchanges; one evaluation where none is given."""
    bank: Literal["shared", "own"] | None = None
    """shared: RGDM's pay-off draws are made once for all trials, the default where importance sampling draws them."""


@dataclass(frozen=True)
class Distribution:
    """``kind`` and its numbers: the ends of a range, or the choices."""

    kind: str
    values: tuple[Any, ...]

    @property
    def ends(self) -> tuple[Any, ...]:
        """What to try a run with."""
        if self.kind in LISTS:
            return self.values
        low, high = self.values[:2]
        return (low, high - 1) if self.kind.endswith("randint") else (low, high)

    @property
    def numeric(self) -> bool:
        return all(isinstance(value, int | float) and not isinstance(value, bool) for value in self.values)

    @property
    def logarithmic(self) -> bool:
        """Whether an axis of it should be: by its kind, or as choices that span more than a decade."""
        low, high = (min(self.ends), max(self.ends)) if self.numeric else (0, 0)
        return self.kind.startswith("log") or (self.kind in LISTS and low > 0 and high >= 10 * low)

    def clip(self, value: Any) -> Any:
        """The nearest value inside."""
        if self.kind in LISTS:
            return value
        low, high = self.ends
        if self.kind == "quniform":
            value = round(value / self.values[2]) * self.values[2]
        return min(max(value, low), high)

    def __str__(self) -> str:
        return f"{self.kind} [{', '.join(str(value) for value in self.values)}]"


@dataclass(frozen=True)
class Search:
    """A checked ``search:`` block with its defaults filled in, and the run it varies."""

    told: SearchSettings
    space: dict[str, Distribution]
    objective: Objective
    trials: int
    sampler: str
    shared: bool  # one pay-off bank for all trials
    every: int  # iterations from one evaluation to the next
    tree: dict[str, Any]  # the run without ``search``

    def banked(self, folder: str) -> dict[str, Any]:
        """The run, with the pay-off bank that its trials share where they do."""
        return banked(self.tree, self.space, folder) if self.shared else self.tree


def read(spec: specs.RunSpec) -> Search:
    """The search of a spec, or a ``ValueError`` of one sentence."""
    if spec.search is None:
        raise ValueError(f"{spec.name} has no search: block, so there is nothing to tune; start it with `rayft run`")
    told = check("search", SearchSettings, spec.search)
    space = {key: distribution(key, value) for key, value in _leaves(told.space or {})}
    if not space:
        raise ValueError("search.space is empty; name keys of the run, such as training.lr: {loguniform: [1e-4, 1e-2]}")
    tree = spec.model_dump(exclude={"search"})
    config = spec.checked()
    every = config.section("evaluate").every
    _check_keys(space, tree)
    _check_values(space, tree)
    _check_schedule(told, spec.iterations, every)
    goal = objective(told.objective, told.kl, config)
    if "training.alpha" in space and "attained" in goal.weights and config.section("evaluate").alpha is None:
        raise ValueError("training.alpha is searched, so every trial would have a J* of its own: set evaluate.alpha")
    sampler = told.sampler or ("grid" if all(d.kind == "grid" for d in space.values()) else "random")
    if told.scheduler == "pbt":
        _check_population(told, space, sampler, config)
    shared = _shares(told, space, config)
    found = Search(told, space, goal, _trials(told, space, sampler), sampler, shared, every or spec.iterations, tree)
    if shared:
        try:
            _check_values(space, found.banked("bank"))
        except ValueError as error:
            raise ValueError(f"with a bank that all trials share, {error}; or set search.bank: own") from None
    return found


def distribution(key: str, told: Any) -> Distribution:
    """``{loguniform: [0.05, 1.0]}``, checked."""
    where, known = f"search.space.{key}", [*RANGES, *LISTS]
    if not isinstance(told, Mapping) or len(told) != 1:
        raise ValueError(f"{where} is {told!r}; give it one distribution, such as {{loguniform: [1e-4, 1e-2]}}")
    kind, values = next(iter(told.items()))
    if kind not in known:
        raise ValueError(
            f"{where} has no distribution {kind!r}{nearest(str(kind), known)}; there are {', '.join(known)}"
        )
    if not isinstance(values, list | tuple):
        raise ValueError(f"{where}.{kind} is {values!r}; it should be a list")
    values = tuple(_number(value) for value in values)
    if kind in LISTS:
        if not values:
            raise ValueError(f"{where}.{kind} is a choice of nothing; list what to try")
        return Distribution(kind, values)
    _check_range(f"{where}.{kind}", kind, values)
    return Distribution(kind, values)


def with_values(tree: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The run with a trial's values."""
    found = dict(tree)
    for key, value in values.items():
        specs.put(found, key, value)
    return found


def banked(tree: Mapping[str, Any], space: Mapping[str, Distribution], folder: str) -> dict[str, Any]:
    """The run with a bank in ``folder`` that holds the radii of the space, unless it names a bank of its own."""
    training, radius = dict(tree.get("training") or {}), space.get("training.radius")
    training["bank"] = training.get("bank") or folder
    if radius is not None and not training.get("radii"):
        training["radii"] = _radii(radius, specs.parse(tree).checked().settings().num_candidates)
    return {**tree, "training": training}


def _radii(radius: Distribution, num_candidates: int) -> list[float]:
    """What is listed, where the candidates can be dealt to that many; else values with one ratio between them.

    A bank can be read between the radii it holds, so the ends of a range, or of a list, are enough.
    """
    low, high = (float(end(radius.ends)) for end in (min, max))
    if radius.kind in LISTS:
        listed = sorted({float(value) for value in radius.values})
        if num_candidates % len(listed) == 0 or low == 0:
            return listed
    num = next(n for n in range(NUM_RADII, 0, -1) if num_candidates % n == 0)
    if num == 1:
        return [high]
    ratio = (high / max(low, high / 100)) ** (1 / (num - 1))
    return sorted(float(f"{high / ratio**i:.12g}") for i in range(num))


# -- checks


def _leaves(space: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, distribution); a space may also be nested, as ``search.space.training.lr=`` writes it."""
    for key, value in space.items():
        nested = isinstance(value, Mapping) and value and all(isinstance(v, Mapping) for v in value.values())
        yield from _leaves(value, f"{path}{key}.") if nested else [(f"{path}{key}", value)]


def _number(value: Any) -> Any:
    """PyYAML reads 1e-4 as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _check_range(where: str, kind: str, values: tuple[Any, ...]) -> None:
    numbers = Distribution(kind, values).numeric and all(math.isfinite(value) for value in values)
    if len(values) != RANGES[kind] or not numbers:
        wanted = "[low, high, step]" if RANGES[kind] == 3 else "[low, high]"
        raise ValueError(f"{where} is {list(values)}; it should be the numbers {wanted}")
    if kind.endswith("randint") and not all(isinstance(value, int) for value in values):
        raise ValueError(f"{where} is {list(values)}; it should be whole numbers, of which the last is not drawn")
    low, high = values[:2]
    if not low < high:
        raise ValueError(f"{where} is {list(values)}; the first number should be below the second")
    if kind.startswith("log") and low <= 0:
        raise ValueError(f"{where} begins at {low}; a logarithm needs numbers above 0")
    if kind == "quniform" and not 0 < values[2] <= high - low:
        raise ValueError(f"{where} has a step of {values[2]}; it should be above 0 and at most {high - low:g}")


def _check_keys(space: Mapping[str, Distribution], tree: dict[str, Any]) -> None:
    for key, drawn in space.items():
        head = key.partition(".")[0]
        if head in SAME_FOR_ALL:
            raise ValueError(f"search.space has {key}, which has to be the same for all trials; take it out")
        try:
            specs.parse(with_values(tree, {key: drawn.ends[0]})).config()
        except ValueError as error:
            raise ValueError(f"search.space has {key} = {drawn.ends[0]!r}: {error}") from None


def _check_values(space: Mapping[str, Distribution], tree: dict[str, Any]) -> None:
    first = with_values(tree, {key: drawn.ends[0] for key, drawn in space.items()})
    for key, drawn in space.items():
        for value in drawn.ends:
            try:
                specs.parse(with_values(first, {key: value})).checked()
            except ValueError as error:
                raise ValueError(f"search.space has {key} = {value!r}: {error}") from None


def _check_schedule(told: SearchSettings, iterations: int, every: int) -> None:
    if told.scheduler != "none" and not every:
        raise ValueError(f"evaluate.every is 0 and {told.scheduler} compares trials at their evaluations; set it")
    if told.scheduler != "none" and every > iterations:
        raise ValueError(
            f"evaluate.every is {every} and iterations is {iterations}, so {told.scheduler} would compare no trials "
            "before their end; lower the one, or take scheduler none"
        )
    for name, scheduler in (("grace", "asha"), ("perturb_every", "pbt")):
        value = getattr(told, name)
        if value is not None and told.scheduler != scheduler:
            raise ValueError(f"search.{name} is for scheduler {scheduler} and this is {told.scheduler}; leave it out")
        if value is not None and value > iterations:
            raise ValueError(f"search.{name} is {value}, more than iterations = {iterations}; lower it")
    if told.perturb_every is not None and told.perturb_every % every:
        raise ValueError(
            f"search.perturb_every is {told.perturb_every}; make it a multiple of evaluate.every = {every}"
        )


def _check_population(told: SearchSettings, space: Mapping[str, Distribution], sampler: str, config: Any) -> None:
    free = [f"training.{name}" for name in defaults(config.settings_class) if name not in FIXED]
    for key in space:
        if key not in free:
            near = nearest(key, free) or f"; it may mutate {', '.join(free)}"
            raise ValueError(f"{key} cannot change while a run goes on, so pbt cannot mutate it{near}")
    if sampler != "random":
        raise ValueError(
            f"scheduler pbt draws its own values and does not go with sampler {sampler}; leave sampler out"
        )
    if told.max_concurrent is not None:
        raise ValueError("search.max_concurrent is not for pbt, which keeps all trials alive in turn; leave it out")
    if told.trials is not None and told.trials < 4:
        raise ValueError(f"search.trials is {told.trials}; the last quarter copies the first, so pbt needs at least 4")


def _trials(told: SearchSettings, space: Mapping[str, Distribution], sampler: str) -> int:
    if sampler != "grid":
        for key, drawn in space.items():
            if drawn.kind == "grid":
                raise ValueError(f"{key} is a grid and the sampler is {sampler}; make it a choice, or sampler: grid")
        return told.trials or NUM_TRIALS
    for key, drawn in space.items():
        if drawn.kind not in LISTS:
            raise ValueError(f"{key} is {drawn.kind} and the sampler is grid; give it a grid: [...] of values")
    points = math.prod(len(drawn.values) for drawn in space.values())
    if told.trials not in (None, points):
        raise ValueError(f"search.trials is {told.trials} and the grid has {points} points; leave trials out")
    return points


def _shares(told: SearchSettings, space: Mapping[str, Distribution], config: Any) -> bool:
    """Whether trials share a bank; refuses a space that would need several."""
    can = "bank" in defaults(config.settings_class) and getattr(config, "sampler", None) == "importance"
    if told.bank == "shared" and not can:
        raise ValueError("search.bank: shared is for rgdm with training.sampler importance; leave it out")
    if told.bank == "own" or not can:
        return False
    heads = ("domain", "reward", "watch", "scoring", "chain", "seed")
    parts = [f"training.{name}" for name in (*BANKED, *FIXED)]
    for key in space:
        if key.partition(".")[0] in heads or key in parts:
            if told.bank is None and key not in ("training.bank", "training.radii"):
                return False
            raise ValueError(f"{key} is searched and decides what a pay-off bank holds; take it out, or set bank: own")
    return True
