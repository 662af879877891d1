"""The Learner base: minibatches straight from chains, accumulated gradients, and a trust region around each update.

    theta <- theta_old + s (theta - theta_old),    s = min(1, sqrt(target_kl / KL(old || new)))

KL is quadratic in a small step, so an update that went too far is shrunk back to the target, whatever the learning
rate was. Rows are shuffled by an addressed generator and dealt so that a global minibatch holds the same rows for any
number of learners.
"""

from __future__ import annotations

import contextlib
import dataclasses
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.learner import learner_group
from ray.rllib.core.learner.torch.torch_learner import TorchLearner
from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch
from torch import Tensor

from rayft import adapt
from rayft.chain import Chains
from rayft.rl.module import device_of
from rayft.seeds import numpy_generator
from rayft.space import squared_norm

PROBE_ROWS = 256


@contextlib.contextmanager
def gloo_where_nccl_is_missing() -> Iterator[None]:
    """RLlib connects learners that reserve GPUs by NCCL, which a CPU build of torch lacks: gloo there.

    Such learners exist where Ray counts GPUs that torch cannot use, as in a rehearsal of a placement.
    """
    choose: Any = learner_group._get_backend_config
    if not torch.distributed.is_nccl_available():
        learner_group._get_backend_config = lambda cls: dataclasses.replace(choose(cls), backend="gloo")
    try:
        yield
    finally:
        learner_group._get_backend_config = choose


class DiffusionLearner(TorchLearner):
    """Subclasses say what one row costs; everything else is here."""

    config: Any
    probe_every = 4  # minibatches between two looks at how far the update has gone
    _params: dict[Any, Any]

    @abstractmethod
    def row_loss(self, rows: dict[str, Tensor], out: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, logged) per row, unreduced. ``rows`` holds the batch, ``out`` mu_theta, sigma and log_prob."""

    def build(self) -> None:
        device_of(self.config, "num_gpus_per_learner")
        super().build()
        self._learner_connector = None
        self.scalars: dict[str, float] = {}
        self.seen: dict[str, Tensor] = {}  # what rows of this update were said to be, added up over its minibatches
        self.fresh = True  # no step taken yet in this update: p_theta is still p_old

    def get_parameters(self, module: Any) -> list[Any]:
        return [p for p in module.parameters() if p.requires_grad]

    def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
        params = self.get_parameters(self._module[module_id])
        optimizer = torch.optim.AdamW(params, weight_decay=self.config.weight_decay)
        self.register_optimizer(
            module_id=module_id, optimizer=optimizer, params=params, lr_or_lr_schedule=self.config.lr
        )

    def transitions(self, chains: Chains) -> Chains:
        """The single transitions of what is learned from, on which the trust region is measured."""
        return chains

    def step_sizes(self, lr: float) -> dict[Any, float]:
        """This iteration's step size for every optimizer."""
        return dict.fromkeys(self._optimizer_parameters, lr)

    def compute_loss_for_module(self, *, module_id: str, config: Any, batch: Any, fwd_out: Any) -> Tensor:
        """RLlib's own entry to the loss."""
        return self.row_loss(batch, fwd_out)[0].mean()

    def say(self, name: str, value: Any) -> None:
        """Logs one current value of this learner."""
        self.metrics.log_value((DEFAULT_MODULE_ID, name), value, window=1)

    # -- minibatches

    def _create_iterator_if_necessary(self, *, training_data: Any, **kwargs: Any) -> Iterator[MultiAgentBatch]:
        self.scalars = kwargs["scalars"]
        for optimizer, lr in self.step_sizes(self.scalars["lr"]).items():
            self._set_optimizer_lr(optimizer, lr)
        self.say("step_size", self.scalars["lr"])
        return self._minibatches(training_data.batch, kwargs["num_epochs"], kwargs["minibatch_size"], kwargs["address"])

    def _minibatches(
        self, chains: Chains, num_epochs: int, size: int, address: tuple[int, int]
    ) -> Iterator[MultiAgentBatch]:
        """Global minibatches of ``size`` rows; this learner's share of each. A short last one is left out.

        Stops early once the measured KL to the policy that the update began with has passed the target.
        """
        first, last = self.config.timesteps or (1, np.inf)
        known = np.flatnonzero((chains.t.ravel() >= first) & (chains.t.ravel() <= last))
        if self.config.row_share < 1:
            known = numpy_generator(*address, "share").permutation(known)[: round(self.config.row_share * len(known))]
        total = len(known)
        learners = max(1, self.config.num_learners)
        size = min(size, total // learners * learners)
        if not size:
            raise ValueError("training.timesteps and row_share leave no transition; raise training.chains")
        index = getattr(self, "_learner_index", None) or 0
        probe = _Probe(self, chains, numpy_generator(*address, "probe"), learners, index)
        steps, whole, self.fresh, self.seen = 0, num_epochs * (total // size), True, {}
        for epoch in range(num_epochs):
            order = known[numpy_generator(*address, "shuffle", epoch).permutation(total)]
            for start in range(0, total - size + 1, size):
                mine = order[start : start + size].reshape(learners, -1)[index]
                yield self._batch(chains, mine)
                steps, self.fresh = steps + 1, False
                due = self.config.target_kl is not None and steps % self.probe_every == 0 and steps < whole
                if due and probe.kl() > probe.target:
                    break
            else:
                continue
            break
        shrunk = probe.shrink()
        mean = {key: value / steps for key, value in self.seen.items()}
        told = {"num_minibatches": steps, "update_kl": probe.last, "update_shrunk_to": shrunk}
        for key, value in {**mean, **told}.items():
            self.say(key, float(value))

    def _batch(self, chains: Chains, index: np.ndarray) -> MultiAgentBatch:
        rows = {k: torch.from_numpy(np.ascontiguousarray(v)).to(self._device) for k, v in chains.gather(index).items()}
        return MultiAgentBatch({DEFAULT_MODULE_ID: SampleBatch(rows)}, env_steps=len(index))

    # -- one minibatch

    def _update(self, batch: dict[str, Any], **kwargs: Any) -> tuple[Any, dict[str, Tensor], dict[str, Any]]:
        """Loss and gradient of one minibatch, in ``microbatches`` equal pieces, then one optimizer step."""
        rows = batch[DEFAULT_MODULE_ID]
        module = self._module[DEFAULT_MODULE_ID]
        for optimizer in self._optimizer_parameters:
            optimizer.zero_grad(set_to_none=True)
        count = len(rows["t"])
        pieces = torch.arange(count, device=rows["t"].device).tensor_split(min(self.config.microbatches, count))
        total: Tensor = torch.zeros((), device=self._device)
        sums: dict[str, Tensor] = {}
        for number, piece in enumerate(pieces):
            part = {k: v[piece[0] : piece[-1] + 1] for k, v in rows.items()}
            last = number == len(pieces) - 1
            quiet = getattr(module, "no_sync", contextlib.nullcontext) if not last else contextlib.nullcontext
            with quiet():
                loss, logged = self.row_loss(part, module.forward_train(part))
                loss = loss.sum() / count
                loss.backward()
            total = total + loss.detach()
            for key, value in logged.items():
                sums[key] = sums.get(key, 0.0) + value.detach().sum() / count
        self._step(total)
        for key, value in sums.items():
            self.seen[key] = self.seen.get(key, 0.0) + value
        return {}, {DEFAULT_MODULE_ID: total}, {}

    def _step(self, loss: Tensor) -> None:
        """Clip, step, average; a gradient that is not finite is counted and thrown away on every learner alike."""
        limit = self.config.grad_clip or float("inf")
        parts = [[self._params[ref] for ref in refs] for refs in self._optimizer_parameters.values()]
        norm = torch.stack([torch.nn.utils.clip_grad_norm_(part, limit) for part in parts]).norm()
        finite = bool(torch.isfinite(norm))
        self.say("grad_norm", norm)
        self.metrics.log_value((DEFAULT_MODULE_ID, "guard_non_finite"), float(not finite), reduce="sum")
        if not finite:
            return
        for optimizer in self._optimizer_parameters:
            optimizer.step()
        module = self._module[DEFAULT_MODULE_ID].unwrapped()
        if module.ema is not None:
            with torch.no_grad():
                for slow, fast in zip(module.ema.parameters(), adapt.parameters(module.denoiser), strict=True):
                    slow.lerp_(fast, 1 - self.config.ema)

    def _log_steps_trained_metrics(self, batch: MultiAgentBatch) -> None:
        """RLlib's own count costs a millisecond a minibatch and counts env steps twice; rows are logged once."""
        self.metrics.log_value((DEFAULT_MODULE_ID, "num_rows_trained"), batch.env_steps(), reduce="sum")

    def _log_metrics(self, batch: MultiAgentBatch) -> None:
        """Prometheus counters of env steps: not ours."""


class _Probe:
    """A few rows on which the KL from the update's first policy to the present one is measured, in nats a chain."""

    def __init__(
        self, learner: DiffusionLearner, chains: Chains, draw: np.random.Generator, learners: int, index: int
    ) -> None:
        self.learner, self.num_steps = learner, learner._module[DEFAULT_MODULE_ID].unwrapped().process.num_steps
        self.target = learner.config.target_kl
        self.last = 0.0
        if self.target is None:
            return
        chains = learner.transitions(chains)
        total = chains.num_rows * chains.num_chains
        chosen = draw.permutation(total)[: max(PROBE_ROWS // learners, 1) * learners]
        mine = np.array_split(chosen, learners)[index]
        self.rows = dict(learner._batch(chains, mine).policy_batches[DEFAULT_MODULE_ID])
        self.params = learner.get_parameters(learner._module[DEFAULT_MODULE_ID].unwrapped().denoiser)
        self.before = [p.detach().clone() for p in self.params]
        self.mean = self._forward()["mean"]

    def _forward(self) -> dict[str, Tensor]:
        with torch.no_grad():
            return self.learner._module[DEFAULT_MODULE_ID].unwrapped().transitions(self.rows)

    def kl(self) -> float:
        """T times the mean over rows of |mu_new - mu_old|^2 / (2 sigma^2), the same number on every learner."""
        out = self._forward()
        value = (squared_norm(out["mean"] - self.mean) / (2 * out["sigma"] ** 2)).mean() * self.num_steps
        if self.learner.config.num_learners > 1:
            torch.distributed.all_reduce(value)
            value = value / self.learner.config.num_learners
        self.last = float(value)
        return self.last

    def shrink(self) -> float:
        """Pulls the update back onto the target where it went past it; returns the factor s."""
        if self.target is None:
            return 1.0
        factor = 1.0
        for _ in range(5):
            kl = self.kl()
            if kl <= 1.05 * self.target:
                break
            step = (self.target / kl) ** 0.5 if np.isfinite(kl) else 0.0
            factor *= step
            with torch.no_grad():
                for parameter, old in zip(self.params, self.before, strict=True):
                    parameter.copy_(old + step * (parameter - old) if step > 0 else old)
        return factor
