"""The denoiser as an RLModule: the policy being trained, the frozen model it started from, and its moving average."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from ray.rllib.core.rl_module.apis import InferenceOnlyAPI
from ray.rllib.core.rl_module.torch.torch_rl_module import TorchRLModule
from ray.rllib.utils.framework import get_device

from rayft import adapt
from rayft import domain as domains
from rayft.bench import Bench
from rayft.chain import Policy, reverse_process

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.float32}


def device_of(config: Any, key: str) -> torch.device:
    """The device for ``config.key`` GPUs; the CPU (and ``key`` = 0) where Ray counts GPUs that torch cannot see."""
    if getattr(config, key) > 0 and not torch.cuda.is_available():
        logger.warning("%s is %s, but torch sees no CUDA device: the CPU is used", key, getattr(config, key))
        setattr(config, key, 0)
    return torch.device(get_device(config, getattr(config, key)))


class DenoiserModule(TorchRLModule, InferenceOnlyAPI):
    """Three networks of one shape. ``model_config`` names the domain and the chain; no weights travel in it."""

    def setup(self) -> None:
        told: Mapping[str, Any] = self.model_config
        self.domain = domains.build(told["domain"], told["domain_arguments"])
        self.dtype = DTYPES[told["precision"]]
        denoiser = domains.pretrained(self.domain).to(self.dtype)
        self.reference = copy.deepcopy(denoiser).requires_grad_(False).eval()
        if told["weights"] is not None:
            domains.load_weights(denoiser, told["weights"])
        self.ema = copy.deepcopy(denoiser).requires_grad_(False).eval() if told["ema"] > 0 else None
        self.denoiser = adapt.adapted(denoiser, told["lora_rank"], told["lora_scale"], told["trainable"])
        self.critic = self.domain.critic().to(self.dtype) if told.get("critic") else None
        self.through: Callable[[dict[str, Any]], dict[str, Any]] | None = None  # a learner's own use of a minibatch
        process = self.process = reverse_process(self.domain.schedule(), told["sigma"], told["eta"], told["num_steps"])
        autocast = torch.bfloat16 if told["precision"] == "bfloat16" else None
        self.policies = {
            name: Policy(net, process, self.domain.space, denoiser.prediction, autocast)
            for name, net in (("current", self.denoiser), ("reference", self.reference), ("ema", self.ema))
            if net is not None
        }

    def get_non_inference_attributes(self) -> list[str]:
        """Not sent to runners: the reference never changes, so every process builds its own; values guide learning."""
        return ["reference"] if self.critic is None else ["reference", "critic"]

    def set_state(self, state: dict[str, Any]) -> None:
        """RLlib would leave out what it does not know."""
        own, given = ({k for k in told if k.startswith("denoiser.")} for told in (self.state_dict(), state))
        if given and own != given:
            raise ValueError(
                "the state was made with other adapters: give the same training.lora_rank and trainable, or start "
                "another run from its exported weights"
            )
        super().set_state(state)

    def train(self, mode: bool = True) -> DenoiserModule:
        super().train(mode)
        for frozen in ("reference", "ema"):
            if getattr(self, frozen, None) is not None:
                getattr(self, frozen).eval()
        return self

    def bench(self, which: str = "current") -> Bench:
        """Where draws are made, with ``which`` policy in the trained one's place."""
        device = next(self.denoiser.parameters()).device
        return Bench(self.domain, self.policies[which], self.policies["reference"], device, self.dtype)

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        policy = self.policies["current"]
        context = {k.removeprefix("context/"): v for k, v in batch.items() if k.startswith("context/")}
        return {"mean": policy.mean(batch["x_t"], batch["t"], context), "sigma": policy.sigma(batch["t"])}

    def _forward_train(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Everything differentiable happens here (DDP): single transitions, or what a learner put in their place."""
        return (self.through or self.transitions)(batch)

    def transitions(self, batch: dict[str, Any]) -> dict[str, Any]:
        """mu_theta, and the log-prob of x_prev under it where one from before is to be compared with it."""
        policy = self.policies["current"]
        context = {k.removeprefix("context/"): v for k, v in batch.items() if k.startswith("context/")}
        mean = policy.mean(batch["x_t"], batch["t"], context)
        sigma = policy.sigma(batch["t"]).to(mean.dtype)
        out = {"mean": mean, "sigma": sigma}
        if "log_prob" in batch:
            out["log_prob"] = policy.log_prob(batch["x_prev"], mean, batch["t"], context)
        return out
