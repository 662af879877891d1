"""What a YAML says under ``reward:`` and ``watch:`` -> a ``Recipe``; aggregate.py says what becomes of the scores.

    reward: {name: ./dock.py:Docking, receptor: x.pdbqt}        # or just a name; every key is an argument of it
    reward:
      name: combine
      aggregate: sum                                            # or geometric, product, constraint
      parts:
        qed:  {name: qed, weight: {0: 0.0, 100: 1.0}, transform: [{sigmoid: {centre: 0.6, scale: 0.1}}, ...]}
        dock: {name: ./dock.py:Docking, receptor: x.pdbqt, only_if: {qed: 0.5}, otherwise: 0.0}
    watch: [sa, {name: ./x.py:f}]                               # or {my_name: {name: ./x.py:f}}

One reward's scores are the reward as they are. What is watched is logged, and never part of the reward.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from rayft import reward as rewards
from rayft.aggregate import AGGREGATES, TRANSFORMS, Component, Recipe, Transform, Weight
from rayft.imports import nearest
from rayft.settings import check

COMBINE = "combine"
COMBINE_KEYS = ("aggregate", "undecodable", "floor", "parts")
PART_KEYS = ("name", "arguments", "weight", "transform", "only_if", "otherwise", "at_least")


def recipe(reward: Any, arguments: Mapping[str, Any], watch: Any, short_names: Mapping[str, str] | None) -> Recipe:
    """The recipe of a reward's name and arguments and of what is watched, every value and import path checked.

    ``undecodable``, where it is not given, is 0, and with constraints floor - K, below every infeasible event.
    """
    watched = _watched(watch, short_names)
    if reward != COMBINE:
        _single(reward, arguments, short_names)
        found = Recipe((Component(_last_word(reward), reward, dict(arguments)), *watched))
    else:
        _known("reward", arguments, COMBINE_KEYS)
        given = arguments.get("parts")
        if not isinstance(given, Mapping) or not given:
            raise ValueError(f"reward.parts is {given!r}; it should be a mapping such as parts: {{qed: {{name: qed}}}}")
        aggregate = _one_of("reward.aggregate", arguments.get("aggregate", "sum"), AGGREGATES)
        parts = tuple(_part(f"reward.parts.{name}", str(name), part, short_names) for name, part in given.items())
        _filters(parts)
        _suits(aggregate, parts)
        floor = _number("reward.floor", arguments.get("floor", 0.0))
        lowest = floor - sum(part.at_least is not None for part in parts) if aggregate == "constraint" else 0.0
        undecodable = arguments.get("undecodable")
        undecodable = lowest if undecodable is None else _number("reward.undecodable", undecodable)
        found = Recipe((*parts, *watched), aggregate, undecodable, floor)
    _distinct(found.components)
    return found


def differentiable(found: Recipe, short_names: Mapping[str, str] | None) -> Component | None:
    """The part whose gradient is the reward's; ``None`` where there is none."""
    kind = rewards.target(found.parts[0].path, short_names)
    smooth = inspect.isclass(kind) and issubclass(kind, rewards.DifferentiableReward)
    return found.parts[0] if smooth and found.plain else None


def _single(reward: Any, arguments: Mapping[str, Any], short_names: Mapping[str, str] | None) -> None:
    try:
        rewards.check(reward, arguments, short_names)
    except ValueError as error:
        meant = next((key for key in arguments if key in PART_KEYS), None)
        hint = f"; {meant} is for a part of reward: {{name: combine, parts: {{...}}}}" if meant else ""
        raise ValueError(f"{error}{hint}") from None


def _part(key: str, name: str, given: Any, short_names: Mapping[str, str] | None) -> Component:
    told = dict(given) if isinstance(given, Mapping) else {"name": given}
    path, arguments = _box(key, told, PART_KEYS, short_names)
    otherwise, only_if = told.get("otherwise"), told.get("only_if") or {}
    if not isinstance(only_if, Mapping):
        raise ValueError(f"{key}.only_if is {only_if!r}; it should be a mapping such as only_if: {{qed: 0.5}}")
    if otherwise is not None and not only_if:
        raise ValueError(f"{key}.otherwise is what it counts where only_if does not let it be called; give only_if too")
    least = told.get("at_least")
    return Component(
        _name(key, name),
        path,
        arguments,
        _weight(f"{key}.weight", told.get("weight", 1.0)),
        _transforms(f"{key}.transform", told.get("transform")),
        {str(other): _number(f"{key}.only_if.{other}", bound) for other, bound in only_if.items()},
        0.0 if otherwise is None else _number(f"{key}.otherwise", otherwise),
        None if least is None else _number(f"{key}.at_least", least),
    )


def _watched(watch: Any, short_names: Mapping[str, str] | None) -> tuple[Component, ...]:
    if not watch:
        return ()
    if isinstance(watch, Mapping) and not isinstance(watch.get("name"), str):
        named = [(f"watch.{name}", str(name), given) for name, given in watch.items()]
    else:
        listed = list(watch) if isinstance(watch, list | tuple) else [watch]
        named = [(f"watch.{number}", None, given) for number, given in enumerate(listed)]
    found = []
    for key, name, given in named:
        told = dict(given) if isinstance(given, Mapping) else {"name": given}
        path, arguments = _box(key, told, ("name", "arguments"), short_names)
        found.append(Component(_name(key, name or _last_word(path)), path, arguments, watched=True))
    return tuple(found)


def _box(
    key: str, told: Mapping[str, Any], own: tuple[str, ...], short_names: Mapping[str, str] | None
) -> tuple[Any, dict[str, Any]]:
    """(import path, constructor arguments): every key that is not the combiner's own."""
    path, extra = told.get("name"), told.get("arguments") or {}
    if path is None:
        raise ValueError(f"{key} has no name; write {key}: {{name: NAME, argument: value}}")
    if path == COMBINE:
        raise ValueError(f"{key}.name is {COMBINE!r}; parts and watched rewards are single ones")
    if not isinstance(extra, Mapping):
        raise ValueError(f"{key}.arguments is {extra!r}; it should be a mapping of the reward's arguments")
    arguments = {k: v for k, v in told.items() if k not in own}
    if both := set(arguments) & set(extra):
        raise ValueError(f"{key}.{min(both)} is there twice, once under arguments; remove one")
    try:
        rewards.check(path, {**arguments, **extra}, short_names)
    except ValueError as error:
        hints = (f"; of its own a part has {', '.join(own)}" for k in arguments if nearest(k, own))
        raise ValueError(f"{key}: {error}{next(hints, '')}") from None
    return path, {**arguments, **extra}


def _weight(key: str, given: Any) -> Weight:
    if not isinstance(given, Mapping):
        return _number(key, given)
    if not given:
        raise ValueError(f"{key} is empty; write a number, or iterations with weights such as {{0: 0.0, 100: 1.0}}")
    knots: dict[int, float] = {}
    for at, weight in given.items():
        if isinstance(at, bool) or not str(at).isdecimal():
            raise ValueError(f"{key} has {at!r} as an iteration; it should be a whole number, 0 or more")
        knots[int(at)] = _number(f"{key}.{at}", weight)
    return tuple(sorted(knots.items()))


def _transforms(key: str, given: Any) -> tuple[Transform, ...]:
    chain = [] if given is None else list(given) if isinstance(given, list | tuple) else [given]
    found = []
    for link in chain:
        told = {link: {}} if isinstance(link, str) else link
        if not isinstance(told, Mapping) or len(told) != 1:
            raise ValueError(f"{key} is {link!r}; write one as {{sigmoid: {{centre: 4}}}}, several as a list of those")
        ((name, values),) = told.items()
        name = _one_of(key, name, TRANSFORMS)
        if not isinstance(values or {}, Mapping):
            raise ValueError(f"{key}.{name} is {values!r}; it should be a mapping such as {{sigmoid: {{centre: 4}}}}")
        found.append(check(f"{key}.{name}", TRANSFORMS[name], values or {}))
    return tuple(found)


# -- what only the whole shows


def _filters(parts: tuple[Component, ...]) -> None:
    """Refuses filters that are no parts, or that wait for one another."""
    known = {part.name: part for part in parts}
    for part in parts:
        for other in part.only_if:
            _one_of(f"reward.parts.{part.name}.only_if", other, known)

    def walk(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            circle = " -> ".join([*path[path.index(name) :], name])
            raise ValueError(f"reward.parts: only_if goes round in a circle, {circle}; take one of them out")
        for other in known[name].only_if:
            walk(other, (*path, name))

    for name in known:
        walk(name, ())


def _suits(aggregate: str, parts: tuple[Component, ...]) -> None:
    """Refuses weights and bounds that mean nothing to the aggregate."""
    constraints = [part for part in parts if part.at_least is not None]
    if aggregate == "constraint" and not constraints:
        raise ValueError("reward.aggregate is 'constraint' and no part has at_least; give it to those that must hold")
    for part in constraints:
        if aggregate != "constraint":
            raise ValueError(f"reward.parts.{part.name}.at_least needs aggregate: constraint; it is {aggregate!r}")
        if part.weight != 1.0:
            raise ValueError(f"reward.parts.{part.name} has both weight and at_least; a constraint is not weighed")
    if aggregate not in ("geometric", "product"):
        return
    knots = {at for part in parts if isinstance(part.weight, tuple) for at, _ in part.weight} or {0}
    for part in parts:
        if min(part.weight_at(at) for at in knots) < 0:
            raise ValueError(f"reward.parts.{part.name}.weight is negative; with {aggregate} it should be 0 or more")
    for at in sorted(knots):
        if aggregate == "geometric" and sum(part.weight_at(at) for part in parts) <= 0:
            raise ValueError(f"reward.parts: at iteration {at} all weights are 0; a geometric mean needs one above 0")


def _distinct(components: Iterable[Component]) -> None:
    seen: set[str] = set()
    for component in components:
        if component.name in seen:
            raise ValueError(f"two rewards are called {component.name!r}; name one: watch: {{a_name: {{name: ...}}}}")
        seen.add(component.name)


# -- words and numbers


def _last_word(path: Any) -> str:
    """What a reward is called where nobody named it: qed, Docking."""
    if isinstance(path, str):
        word = re.split(r"[:.]", path)[-1]
    else:
        named = path if inspect.isclass(path) or inspect.isfunction(path) else type(path)
        word = "reward" if isinstance(path, bytes) else named.__name__
    return word if re.fullmatch(r"[\w-]+", word) else "reward"


def _name(key: str, name: str) -> str:
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"{key}: the name {name!r} should be letters, digits, _ and - only")
    return name


def _known(key: str, given: Mapping[str, Any], allowed: tuple[str, ...]) -> None:
    for name in given:
        if name not in allowed:
            hint = nearest(str(name), allowed)
            raise ValueError(f"{key} has no key {name!r}{hint}; combine has {', '.join(allowed)}")


def _one_of(key: str, given: Any, allowed: Iterable[str]) -> str:
    allowed = list(allowed)
    if given not in allowed:
        raise ValueError(f"{key} is {given!r}{nearest(str(given), allowed)}; it should be one of {', '.join(allowed)}")
    return given


def _number(key: str, given: Any) -> float:
    try:
        number = math.nan if isinstance(given, bool) else float(given)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{key} is {given!r}; it should be a number")
    return number
