"""The EnvRunner: a whole batch of chains in one torch loop, on its own device, from an addressed generator.

No episode objects: a draw leaves as numpy arrays, its chains by reference where only learners read them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ray
from ray.rllib.core import COMPONENT_RL_MODULE, DEFAULT_MODULE_ID
from ray.rllib.env import INPUT_ENV_SPACES
from ray.rllib.env.env_runner import EnvRunner
from ray.rllib.utils.checkpoints import Checkpointable
from ray.rllib.utils.metrics import (
    NUM_ENV_STEPS_SAMPLED,
    NUM_ENV_STEPS_SAMPLED_LIFETIME,
    NUM_EPISODES,
    WEIGHTS_SEQ_NO,
)

from rayft.draws import Draw, DrawFunction, Fate
from rayft.rl.module import DenoiserModule, device_of
from rayft.seeds import torch_generator


class ChainRunner(EnvRunner, Checkpointable):
    """Draws what an algorithm asks for. A draw depends on its address and the weights, not on who makes it."""

    def __init__(self, *, config: Any, **kwargs: Any) -> None:
        super().__init__(config=config, **kwargs)
        alone = self.config.num_env_runners == 0  # otherwise the driver's own runner draws nothing
        self.config.num_gpus_per_env_runner = self.config.num_gpus_per_env_runner if self.worker_index or alone else 0
        self._device = device_of(self.config, "num_gpus_per_env_runner")
        self._weights_seq_no = 0
        self._synced = 0  # which of the driver's syncs it has seen; Ray itself may have started it anew since
        self.make_module()

    def make_module(self) -> None:
        spec = self.config.get_rl_module_spec(spaces=self.get_spaces(), inference_only=False)
        self.module: DenoiserModule = spec.build().to(self._device).eval()

    def get_spaces(self) -> dict[str, Any]:
        spaces = (self.config.observation_space, self.config.action_space)
        return {INPUT_ENV_SPACES: spaces, DEFAULT_MODULE_ID: spaces}

    def assert_healthy(self) -> None:
        assert self.module is not None

    def sample(
        self,
        *,
        draw: DrawFunction,
        num_chains: int,
        iteration: int,
        purpose: str,
        part: int = 0,
        which: str = "current",
        settings: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Draw:
        """Part ``part`` of this iteration's draw for ``purpose``."""
        generator = torch_generator(self.config.seed or 0, iteration, purpose, part)
        drawn = draw(self.module.bench(which), num_chains, generator, settings or {}).numpy()
        self.metrics.log_value(NUM_ENV_STEPS_SAMPLED, drawn.chains.t.size, reduce="sum")
        self.metrics.log_value(NUM_ENV_STEPS_SAMPLED_LIFETIME, drawn.chains.t.size, reduce="lifetime_sum")
        self.metrics.log_value(NUM_EPISODES, num_chains, reduce="sum")
        return drawn

    def sample_part(self, *, synced: int = 0, chains: Fate = "sent", **kwargs: Any) -> tuple[int, Draw | None, Any]:
        """(part, draw, metrics): the same for a caller elsewhere; chains that stay are a reference in the draw.

        No draw from one that lacks the weights of sync ``synced``.
        """
        if synced != self._synced:
            return kwargs.get("part", 0), None, None
        drawn = self.sample(**kwargs)
        if chains != "sent":
            drawn = replace(drawn, chains=ray.put(drawn.chains) if chains == "stay" else None)
        return kwargs.get("part", 0), drawn, self.get_metrics()

    def get_metrics(self) -> Any:
        return self.metrics.reduce()

    def get_state(self, components: Any = None, *, not_components: Any = None, **kwargs: Any) -> dict[str, Any]:
        state: dict[str, Any] = {}
        if self._check_component(COMPONENT_RL_MODULE, components, not_components):
            state[COMPONENT_RL_MODULE] = self.module.get_state(**kwargs)
            state[WEIGHTS_SEQ_NO] = self._weights_seq_no
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        if COMPONENT_RL_MODULE not in state:
            return
        self._synced = state.get("synced", self._synced)
        weights = state[COMPONENT_RL_MODULE]
        weights = ray.get(weights) if isinstance(weights, ray.ObjectRef) else weights
        sequence = state.get(WEIGHTS_SEQ_NO, 0)
        self.module.set_state(weights.get(DEFAULT_MODULE_ID, weights))
        self._weights_seq_no = sequence or self._weights_seq_no

    def get_ctor_args_and_kwargs(self) -> tuple[tuple[()], dict[str, Any]]:
        return (), {"config": self.config}

    def get_checkpointable_components(self) -> list[tuple[str, Any]]:
        return [(COMPONENT_RL_MODULE, self.module)]

    def stop(self) -> None:
        """Nothing to release."""
