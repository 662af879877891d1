"""The denoising chain as a Gymnasium environment: what a third-party agent sees, and what the EnvRunner is held to.

    state (x_t, t, context),    action x_prev,    next state (P x_prev, t - 1, context),    reward r(x_0) at t = 0

P projects into the domain's space: what an action says of padding or drift is dropped. Every chain takes T steps.
``info`` speaks of the reference, the domain's pretrained denoiser: the ``log_prob`` of the action, the ``mean`` and
``sigma`` of the transition it took, and ``next_mean`` and ``next_sigma`` of the one that comes next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.envs.registration import namespace
from gymnasium.utils import RecordConstructorArgs, seeding
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from torch import Tensor

from rayft import domain as domains
from rayft import imports, register_envs, score
from rayft import reward as rewards
from rayft.chain import Policy, Prediction, Process, reverse_process
from rayft.domain import Domain
from rayft.reward import Reward

Arrays = dict[str, Any]  # name -> array, or a dict of arrays


class _Batch:
    """Chains side by side at the same t: the state and the arithmetic of both environments."""

    def __init__(self, domain: Domain, reward: Reward, process: Process) -> None:
        self.domain, self.reward, self.decode = domain, reward, imports.load(domain.decoder)
        net = domains.pretrained(domain).requires_grad_(False)
        self.reference = Policy(net, process, domain.space, cast("Prediction", net.prediction))
        probe = domain.context(1, torch.Generator().manual_seed(0))
        self.context_dtypes = {key: probe[key].dtype for key in sorted(probe)}
        self.context_spaces = {key: _context_space(key, probe[key][0]) for key in sorted(probe)}
        self.action_space = spaces.Box(-np.inf, np.inf, domain.event_shape, np.float32)
        seen: dict[str, gym.Space[Any]] = {"x_t": self.action_space, "t": spaces.Discrete(process.num_steps + 1)}
        if probe:
            seen["context"] = spaces.Dict({**self.context_spaces})
        self.observation_space = spaces.Dict(seen)
        self.t = 0

    @torch.no_grad()
    def start(self, generators: Sequence[np.random.Generator], options: Mapping[str, Any]) -> Arrays:
        """New chains at T, one from each generator; ``options`` may give ``x_T`` and ``context``, to replay."""
        for key in options:
            if key not in ("x_T", "context"):
                raise ValueError(f"reset takes no option {key!r}; it takes x_T and context")
        drawn = [self._draw(generator) for generator in generators]
        self.context = {k: torch.cat([context[k] for _, context in drawn]) for k in self.context_dtypes}
        if "context" in options:
            self.context = self._given_context(options["context"], len(drawn))
        x_T = torch.cat([noise for noise, _ in drawn])  # noqa: N806
        if "x_T" in options:
            x_T = self._given(options["x_T"], torch.float32, self.action_space, len(drawn), "x_T")  # noqa: N806
        told = {k: v.numpy().astype(self.context_spaces[k].dtype) for k, v in self.context.items()}
        self.context_seen = {"context": told} if told else {}
        return self._arrive(self.domain.space.project(x_T, self.context), self.reference.process.num_steps)

    @torch.no_grad()
    def step(self, actions: Any) -> tuple[np.ndarray, Arrays]:
        """Rewards and info of moving to P ``actions``."""
        if self.t == 0:
            raise gym.error.ResetNeeded("no chain is under way (it ends at x_0); call reset() for a new one")
        given = self._given(actions, torch.float32, self.action_space, len(self.x), "the action")
        x_prev = self.domain.space.project(given, self.context)
        log_prob = self.reference.log_prob(x_prev, self.mean, torch.full((len(x_prev),), self.t), self.context)
        info = {"log_prob": log_prob.numpy(), "mean": self.mean.numpy(), "sigma": self._sigma()}
        info |= self._arrive(x_prev, self.t - 1)
        if self.t > 0:
            return np.zeros(len(x_prev)), info
        values, read = self._score()
        return values, info | read

    def observation(self) -> Arrays:
        """{x_t, t, context}, chains first in every array; without ``context`` where the domain has none."""
        return {"x_t": self.x.numpy(), "t": np.full(len(self.x), self.t), **self.context_seen}

    def _arrive(self, x: Tensor, t: int) -> Arrays:
        self.x, self.t = x, t
        if t == 0:
            return {}
        self.mean = self.reference.mean_at(x, t, self.context)
        return {"next_mean": self.mean.numpy().copy(), "next_sigma": self._sigma()}

    def _sigma(self) -> np.ndarray:
        return np.full(len(self.x), float(self.reference.process.sigma[self.t]), np.float32)

    def _draw(self, generator: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        local = torch.Generator().manual_seed(int(generator.integers(2**63)))
        context = self.domain.context(1, local)
        return torch.randn(1, *self.domain.event_shape, generator=local), context

    def _given(self, value: Any, dtype: torch.dtype, space: spaces.Box, num_chains: int, what: str) -> Tensor:
        found, shape = torch.tensor(np.asarray(value), dtype=dtype), (num_chains, *space.shape)
        if found.shape != shape:
            raise ValueError(f"{what} has the shape {list(found.shape)}, chains first; it must be {list(shape)}")
        return found

    def _given_context(self, given: Mapping[str, Any], num_chains: int) -> dict[str, Tensor]:
        if set(given) != set(self.context_dtypes):
            known = ", ".join(self.context_dtypes) or "none"
            raise ValueError(f"the context has the entries {', '.join(given) or 'none'}; this domain's are {known}")
        entries = self.context_dtypes.items()
        return {k: self._given(given[k], dtype, self.context_spaces[k], num_chains, k) for k, dtype in entries}

    def _score(self) -> tuple[np.ndarray, Arrays]:
        """Rewards of the events reached. A Gym reward is a number, so a failed call has the undecodable value too."""
        context = {k: v.numpy() for k, v in self.context.items()}
        samples = self.decode(self.x.numpy().copy(), context)
        found = np.array([sample is not None for sample in samples])
        values = np.full(len(samples), np.nan)
        if found.any():
            given = [sample for sample in samples if sample is not None]
            values[found], reasons = score.call(self.reward, given, {k: v[found] for k, v in context.items()})
            for reason in reasons:
                gym.logger.warn(f"the reward failed, so the event scores as undecodable: {reason}")
        scored = np.isfinite(values)
        values[~scored] = self.reward.undecodable
        return values, {"undecodable": ~found, "failed": found & ~scored}


class DenoisingEnv(gym.Env[Arrays, np.ndarray]):
    """One chain. ``reset(options={"x_T": ..., "context": ...})`` replays.

    At x_0 ``info`` also has ``undecodable`` and ``failed``; both score the reward's ``undecodable`` value.
    """

    metadata: dict[str, Any] = {"render_modes": []}

    def __init__(self, domain: Domain, reward: Reward, process: Process | None = None) -> None:
        self.batch = _Batch(domain, reward, process or reverse_process(domain.schedule()))
        self.observation_space, self.action_space = self.batch.observation_space, self.batch.action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Arrays, Arrays]:
        super().reset(seed=seed)
        info = self.batch.start([self.np_random], _each(options or {}, lambda value: np.asarray(value)[None]))
        return self._only(self.batch.observation()), self._only(info)

    def step(self, action: Any) -> tuple[Arrays, float, bool, bool, Arrays]:
        values, info = self.batch.step(np.asarray(action)[None])
        return self._only(self.batch.observation()), float(values[0]), self.batch.t == 0, False, self._only(info)

    def _only(self, batched: Arrays) -> Arrays:
        """The one chain; numbers as numpy scalars, but arrays in the context, as its Boxes want them."""
        context = {"context": _each(batched["context"], lambda v: np.asarray(v[0]))} if "context" in batched else {}
        return {key: value[0] for key, value in batched.items() if key != "context"} | context


class DenoisingVectorEnv(gym.vector.VectorEnv[Arrays, np.ndarray, np.ndarray]):
    """``num_envs`` chains in one torch call. Chain i is the single environment with seed ``seed + i``, to rounding.

    All end together; the step after the end starts new chains and ignores its actions (NEXT_STEP, as RLlib expects).
    """

    metadata: dict[str, Any] = {"render_modes": [], "autoreset_mode": AutoresetMode.NEXT_STEP}

    def __init__(self, num_envs: int, domain: Domain, reward: Reward, process: Process | None = None) -> None:
        self.num_envs = num_envs
        self.batch = _Batch(domain, reward, process or reverse_process(domain.schedule()))
        self.single_observation_space, self.single_action_space = self.batch.observation_space, self.batch.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.generators: list[np.random.Generator | None] = [None] * num_envs

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Arrays, Arrays]:
        seeds = [seed + i for i in range(self.num_envs)] if isinstance(seed, int) else seed or [None] * self.num_envs
        if len(seeds) != self.num_envs:
            raise ValueError(f"reset was given {len(seeds)} seeds for {self.num_envs} chains")
        for i, one in enumerate(seeds):
            if one is not None or self.generators[i] is None:
                self.generators[i] = seeding.np_random(one)[0]
        return self._start(options or {})

    def step(self, actions: Any) -> tuple[Arrays, np.ndarray, np.ndarray, np.ndarray, Arrays]:
        if self.batch.t == 0 and None not in self.generators:
            return self._returned(np.zeros(self.num_envs), self._start({})[1], ended=False)
        values, info = self.batch.step(actions)
        return self._returned(values, self._masked(info), ended=self.batch.t == 0)

    def _start(self, options: Mapping[str, Any]) -> tuple[Arrays, Arrays]:
        info = self.batch.start(cast("list[np.random.Generator]", self.generators), options)
        return self.batch.observation(), self._masked(info)

    def _returned(
        self, values: np.ndarray, info: Arrays, ended: bool
    ) -> tuple[Arrays, np.ndarray, np.ndarray, np.ndarray, Arrays]:
        return self.batch.observation(), values, np.full(self.num_envs, ended), np.zeros(self.num_envs, bool), info

    def _masked(self, info: Arrays) -> Arrays:
        return info | {f"_{key}": np.ones(self.num_envs, bool) for key in info}


class FlatObservation(gym.ObservationWrapper[np.ndarray, np.ndarray, Arrays], RecordConstructorArgs):
    """One row for agents that want a Box: x_t, t/T, then the context's entries in the order of their names."""

    def __init__(self, env: gym.Env[Arrays, np.ndarray]) -> None:
        RecordConstructorArgs.__init__(self)
        super().__init__(env)
        self.observation_space = _flat_space(env.observation_space)

    def observation(self, observation: Arrays) -> np.ndarray:
        return _flat(self.env.observation_space, observation, ())


class FlatVectorObservation(gym.vector.VectorObservationWrapper):
    """The same for the vector environment, one row per chain."""

    def __init__(self, env: gym.vector.VectorEnv[Any, Any, Any]) -> None:
        super().__init__(env)
        self.single_observation_space = _flat_space(env.single_observation_space)
        self.observation_space = batch_space(self.single_observation_space, env.num_envs)

    def observations(self, observations: Any) -> np.ndarray:
        return _flat(self.env.single_observation_space, observations, (self.num_envs,))


def make(domain: Any, *, flat: bool = False, render_mode: str | None = None, **told: Any) -> gym.Env[Any, np.ndarray]:
    """``DenoisingEnv`` from names, as ``named`` takes them; ``gym.make("rayft/Toy-v0", **told)`` ends here."""
    env = DenoisingEnv(*_found(domain, render_mode, told))
    return FlatObservation(env) if flat else env


def make_vector(
    num_envs: int = 1, *, domain: Any, flat: bool = False, render_mode: str | None = None, **told: Any
) -> gym.vector.VectorEnv[Any, np.ndarray, np.ndarray]:
    """``DenoisingVectorEnv`` from names; ``gym.make_vec("rayft/Toy-v0", num_envs, **told)`` ends here."""
    env = DenoisingVectorEnv(num_envs, *_found(domain, render_mode, told))
    return FlatVectorObservation(env) if flat else env


def named(
    domain: Any,
    reward: Any = None,
    domain_arguments: Mapping[str, Any] | None = None,
    reward_arguments: Mapping[str, Any] | None = None,
    num_steps: int | None = None,
    sigma: str = "beta",
    eta: float = 1.0,
) -> tuple[Domain, Reward, Process]:
    """What an environment is made of, by the names a YAML uses; without a reward, the domain's first."""
    world = domains.build(domain, domain_arguments or {})
    chosen = next(iter(world.rewards), None) if reward is None else reward
    if chosen is None:
        raise ValueError(f"domain {domain!r} has no reward of its own; give reward='package.module:Name' or a function")
    process = reverse_process(world.schedule(), sigma, eta, num_steps)
    return world, rewards.build(chosen, reward_arguments or {}, world.rewards), process


def _found(domain: Any, render_mode: Any, told: Mapping[str, Any]) -> tuple[Domain, Reward, Process]:
    if render_mode is not None:
        raise ValueError(f"render_mode is {render_mode!r}; a chain is not drawn, so leave it out")
    imports.check_arguments(named, {"domain": domain, **told}, "the environment")
    return named(domain, **told)


def _each(tree: Mapping[str, Any], fn: Callable[[Any], Any]) -> Arrays:
    """Every array through ``fn``, those of the context too."""
    return {key: _each(value, fn) if isinstance(value, Mapping) else fn(value) for key, value in tree.items()}


def _context_space(key: str, entry: Tensor) -> spaces.Box:
    """Masks and truth values lie between 0 and 1; of other entries a domain tells only the shape and the type."""
    if entry.is_floating_point():
        low, high = (0.0, 1.0) if key == "mask" else (-np.inf, np.inf)
        return spaces.Box(low, high, entry.shape, np.float32)
    if key == "mask" or entry.dtype == torch.bool:
        return spaces.Box(0, 1, entry.shape, np.int8)
    return spaces.Box(-(2**31), 2**31 - 1, entry.shape, np.int64)


def _flat(space: gym.Space[Any], observation: Mapping[str, Any], lead: tuple[int, ...]) -> np.ndarray:
    assert isinstance(space, spaces.Dict)
    context, last = observation.get("context", {}), cast("spaces.Discrete", space["t"]).n - 1
    parts = [observation["x_t"], np.asarray(observation["t"]) / last, *(context[key] for key in sorted(context))]
    return np.concatenate([np.reshape(part, (*lead, -1)).astype(np.float32) for part in parts], axis=-1)


def _flat_space(space: gym.Space[Any]) -> spaces.Box:
    """The bounds of every entry, flattened as the entries are."""
    assert isinstance(space, spaces.Dict)
    entries: Any = {key: part.spaces if isinstance(part, spaces.Dict) else part for key, part in space.items()}
    low = _each({**entries, "t": 0}, lambda part: getattr(part, "low", part))
    high = _each({**entries, "t": entries["t"].n - 1}, lambda part: getattr(part, "high", part))
    return spaces.Box(_flat(space, low, ()), _flat(space, high, ()), dtype=np.float32)


# Gymnasium reads no entry points since 1.0, so a process knows ``rayft/Toy-v0`` once it has imported this module.
# Where it has not, as in RLlib's remote runners, the name ``rayft.env:rayft/Toy-v0`` does both.
if not any(spec.namespace == "rayft" for spec in gym.registry.values()):
    with namespace("rayft"):
        register_envs()
