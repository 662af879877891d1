"""RGDM (R Sec. 4): learn from a pay-off distribution that does not depend on the policy, so nothing is rolled out.

    L = E_D E_t E_{eps_star ~ U(ball)} [ w |x_tilde + eps_star - mu_theta(x_t, t)|^2 / (2 sigma_t^2) ],   w = exp(r/tau)

Candidates come from the base, not from q_pd, so they carry the weight (R Eq. 12-13; math, Sec. 3). They are drawn in
shards, kept in a bank where one is named, and read at any temperature, and at any radius that the bank holds.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from ray.rllib.utils.metrics import ENV_RUNNER_SAMPLING_TIMER, TIMERS
from torch import Tensor

from rayft import credit, domain, losses, reward
from rayft.algorithms.base import DiffusionRL, spoken
from rayft.algorithms.config import DiffusionConfig, Settings
from rayft.bench import Bench
from rayft.chain import Policy, reverse_process
from rayft.payoff.bank import open_bank
from rayft.payoff.pairs import Aim, Centre, RewardAt, SamplerName
from rayft.payoff.reading import Reading, TimestepWeight, View, cut, read
from rayft.payoff.refresh import refreshed
from rayft.payoff.sampler import questions
from rayft.payoff.signal import probe, signal
from rayft.payoff.source import Source
from rayft.payoff.weight import NUM_BINS, Normalise, Running, bin_of, name_of
from rayft.rl.learner import DiffusionLearner
from rayft.rl.module import DTYPES
from rayft.rl.near import Credit
from rayft.seeds import torch_generator
from rayft.settings import Count, CountOrZero, NonNegative, Positive
from rayft.supply import Supply, Terms

MIN_EFFECTIVE = 100  # candidates that each tenth of the timesteps must be worth, over all that a bank will hold


@dataclass(frozen=True)
class RGDMSettings(Settings):
    """RGDM's numbers."""

    chains: Count = 4096
    """Pairs (x_0, t) per iteration; each gives ``num_candidates`` events to score."""
    minibatch_size: Count = 512
    """Pairs per optimizer step."""
    temperature: Positive = 0.3
    """tau of exp(r/tau). R writes 1; with unit-sized rewards that hardly tilts."""
    radius: NonNegative = 1.0
    """d, in ``radius_unit``."""
    radius_unit: Literal["absolute", "sigma", "kl"] = "sigma"
    """absolute: R's; sigma: times sigma_t sqrt(dim); kl: a budget of nats for the whole chain (use it in high dim)."""
    num_candidates: Count = 8
    """K draws of eps_star per pair."""
    sampler: SamplerName = "importance"
    """importance: weighted uniform draws, to be re-read; annealing: for black boxes; gradient: differentiable ones."""
    sampler_steps: Count = 30
    """Steps of annealing (each scores all candidates) or of gradient ascent."""
    sampler_end: Literal["maximum", "temperature"] = "maximum"
    """Where annealing ends: at 0, with the best it saw (R's argmax), or at tau, with a draw from q_pd."""
    reward_at: RewardAt = "x0_hat"
    """Where r is read: the candidate (R), the pretrained model's x_0 of it, which means something at any t, or x_0."""
    x_0_above: Count | None = None
    """Timestep past which r is read at x_0 instead, where ``reward_at`` says nothing of it (see a sweep's page)."""
    centre: Centre = "mean"
    """What candidates lie around: the posterior's mean (R Eq. 14), or a draw from it (R Eq. 8)."""
    normalise: Normalise = "batch"
    """What w is compared with: all of the batch (R Eq. 13), its own candidates (R Eq. 12), its timestep, or nothing."""
    timestep_weight: TimestepWeight = "vlb"
    """vlb: the likelihood's 1/(2 sigma_t^2); simple: even in predicted noise; v: even in v, more where noise is."""
    anchor: bool = True
    """Subtracts the noise that a weight of 1 would carry: same expected gradient, no wandering where r says nothing."""
    refresh: bool = False
    """Where r is read at x_0, draw x_0 by weight and t and noise anew at every reading, instead of weighting rows."""
    kl_weight: NonNegative = 0.0
    """Nats of reward per nat of each transition's KL to the pretrained model, as a term of the loss."""
    bank: str | None = None
    """Folder that keeps what was drawn and scored, for later runs, other temperatures and radii; may be shared."""
    bank_pairs: Count | None = None
    """Pairs after which no more are paid for and the bank is read again; endless where none is given."""
    radii: tuple[Positive, ...] | list[NonNegative] | None = None
    """Radii the bank is stratified in, equally many candidates each; ``radius`` alone where none are given."""
    payoff_actors: CountOrZero = 0
    """Actors that draw ahead of the learner; 0 draws in the driver, when it is needed."""
    payoff_lead: Count = 2
    """Iterations that they may be ahead."""

    def aim(self) -> Aim:
        """What decides the candidates."""
        searched = self.sampler != "importance"
        ends = self.temperature if self.sampler == "annealing" and self.sampler_end == "temperature" else None
        return Aim(
            self.num_candidates,
            tuple(sorted(self.radii or (self.radius,))),
            self.radius_unit,
            self.reward_at,
            self.centre,
            self.sampler,
            self.sampler_steps if searched else 0,
            ends,
            self.x_0_above,
        )

    def view(self) -> View:
        """How they are read."""
        return View(self.temperature, self.radius, self.normalise, self.timestep_weight, self.anchor)


class RGDMLearner(DiffusionLearner):
    """Weighted cross-entropy to the folded candidates, anchored or plain."""

    probe_every = 8  # the target does not move with the policy, so an update goes astray slowly

    def row_loss(self, rows: dict[str, Tensor], out: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        kl = losses.transition_kl(out["mean"], rows["mean_ref"], out["sigma"])
        if self.config.anchor:
            loss = losses.pull_loss(out["mean"], rows["mean_ref"], rows["shift"], rows["weight"], out["sigma"])
        else:
            loss = losses.weighted_mle_loss(out["mean"], rows["x_prev"], out["sigma"], rows["weight"])
        return loss + self.config.kl_weight * rows["factor"] * kl, {"kl_rows": kl}


class RGDM(DiffusionRL):
    """R Alg. 1 after pretraining, on RLlib."""

    pays_for = "payoff"
    rolls_out = False

    def setup(self, config: Any) -> None:
        super().setup(config)
        told, seed = self.settings, self.config.seed or 0
        self.aim, self.running = told.aim(), Running()
        bank = None if told.bank is None else open_bank(told.bank, self.manifest())
        self.shard_pairs = told.chains if bank is None else bank.shard_pairs
        shards = None if told.bank_pairs is None else -(-told.bank_pairs // self.shard_pairs)
        custom = self.config.section("scoring").resources or {}
        terms = Terms(told.payoff_actors, told.payoff_lead, shards, seed, custom=custom)
        self.supply = Supply(self.source(), self.rewards, bank, terms)
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="rayft-reader")
        self.next: tuple[int, Future[Reading]] | None = None  # the next iteration's, where that costs nothing

    def cleanup(self) -> None:
        if hasattr(self, "supply"):
            self.reader.shutdown(wait=False, cancel_futures=True)
            self.supply.close()
        super().cleanup()

    @classmethod
    def get_default_config(cls) -> RGDMConfig:
        return RGDMConfig()

    def source(self) -> Any:
        """Makes the source of shards, in whatever process calls it."""
        config, chain, part = self.config, self.config.section("chain"), self.rewards.recipe.parts[0]
        return partial(
            make_source,
            (config.domain_path, config.domain_arguments),
            (chain.sigma, chain.eta, chain.num_steps),
            config.precision,
            self.aim,
            self.shard_pairs,
            config.seed or 0,
            (part.path, dict(part.arguments)),
        )

    def manifest(self) -> dict[str, Any]:
        """What a bank must have been made for, to be of use to this run."""
        module, recipe = self.env_runner.module, self.rewards.recipe
        parts = [reward.identity(p.path, p.arguments, self.domain.rewards) for p in recipe.parts]
        told = asdict(recipe) | {"components": [asdict(p) | {"path": "", "arguments": {}} for p in recipe.parts]}
        weights = [v.cpu().numpy() for v in module.reference.state_dict().values()]
        aim = asdict(self.aim)
        return {
            "domain": str(self.config.domain_path),
            "model": reward.digest("weights", *weights).hex(),
            "schedule": reward.digest(module.process.schedule.alpha_bar.numpy()).hex(),
            "chain": asdict(self.config.section("chain")),
            "reward": "; ".join(parts),
            "recipe": reward.digest(json.dumps(told, default=str, sort_keys=True)).hex(),
            "precision": self.config.precision,
            "seed": self.config.seed or 0,
            **aim,
            "shard_pairs": self.settings.chains,
        }

    def signal(self) -> dict[str, float]:
        """``payoff.signal`` on the pretrained samples; pays for a thousand scores at most."""
        module, samples = self.env_runner.module, self.draw_pretrained()
        if self.aim.reward_at == "x_0":
            return {}
        bench = module.bench("reference")
        x_0 = torch.from_numpy(samples.x_0).to(bench.device, bench.dtype)
        context = {k: torch.from_numpy(v[: len(x_0)]).to(bench.device) for k, v in samples.context.items()}
        question, t = probe(bench, x_0, context, self.aim, self.config.seed or 0)
        told = {k: v.cpu().numpy() for k, v in question.context.items()}
        scores = self.rewards.submit(question.events.cpu().numpy(), told, "pretrained").result()
        self.count(scores)
        return signal(samples.rewards[: len(t)], scores.rewards, t, module.process.num_steps)

    # -- one iteration

    def experience(self) -> tuple[Credit, dict[str, float]]:
        before, (number, coming) = time.perf_counter(), self.next or (-1, None)
        with self.metrics.log_time((TIMERS, ENV_RUNNER_SAMPLING_TIMER)):
            ready = coming is not None and number == self.iteration
            reading = coming.result() if ready and coming else self.reading(self.iteration, self.running)
        self.waited, self.running, self.next = time.perf_counter() - before, reading.running, None
        over = self.horizon is not None and self.iteration + 1 >= self.horizon
        if not over and (self.settings.payoff_actors or not self.events_ahead(self.iteration + 1)):
            self.next = self.iteration + 1, self.reader.submit(self.reading, self.iteration + 1, self.running)
        for scores in self.supply.drain():
            self.count(scores)
        self._warn(reading)
        failed = ~np.isfinite(reading.rewards)
        told = {
            "reward_failed": float(failed.sum()),
            "effective_share": credit.effective_share(reading.weight.ravel()),
            "waited_s": self.waited,
            "silent_timesteps": float(len(reading.silent)),
        }
        steps = self.env_runner.module.process.num_steps
        told |= {f"effective/{name_of(label, steps)}": size for label, size in reading.effective.items()}
        return Credit(reading.chains), told | spoken(reading.rewards, reading.parts)

    def reading(self, iteration: int, running: Running) -> Reading:
        """An iteration's pairs, from one shard or several."""
        told, process = self.settings, self.env_runner.module.process
        num = told.chains
        pieces, position = [], iteration * num
        if self.horizon is not None:
            self.supply.last = -(-self.horizon * num // self.shard_pairs)
        while num:
            place, offset = divmod(position, self.shard_pairs)
            count = min(num, self.shard_pairs - offset)
            rows = slice(offset, offset + count)
            pieces.append(cut(self.supply.take(place), rows, process, self.domain.space, self.aim))
            position, num = position + count, num - count
        view = told.view()
        found = read(pieces, view, self.aim, process, running)
        if not told.refresh:
            return found
        x_0 = np.concatenate([piece["x_0"] for piece in pieces])
        generator = torch_generator(self.config.seed or 0, iteration, "refresh")
        bench = self.env_runner.module.bench("reference")
        return refreshed(found, x_0, view, self.aim, bench, generator, told.timesteps)

    def _warn(self, reading: Reading) -> None:
        """Refuses a temperature and radius that a bank's draws say too little about."""
        told = self.settings
        pairs = told.bank_pairs or told.chains * (self.horizon or 0)
        if told.bank is None or self.aim.sampler != "importance" or not pairs:
            return
        steps = self.env_runner.module.process.num_steps
        seen = Counter(bin_of(reading.chains.t[0], steps).tolist())
        worth = {label: size / seen[label] for label, size in reading.effective.items()}  # of one pair
        worst = min(worth, key=lambda label: worth[label])
        size = worth[worst] * pairs / min(NUM_BINS, steps)
        if size < MIN_EFFECTIVE:
            raise ValueError(
                f"at temperature {told.temperature:g} and radius {told.radius:g} the bank's candidates for "
                f"t = {name_of(worst, steps)} are worth {size:.0f} equally weighted ones, fewer than {MIN_EFFECTIVE}: "
                "raise the temperature, choose a radius nearer to one of training.radii, or make a larger bank"
            )

    def events_ahead(self, iteration: int | None = None) -> int:
        """Of the shards that an iteration needs and nobody has."""
        start = (self.iteration if iteration is None else iteration) * self.settings.chains
        first, last = start // self.shard_pairs, -(-(start + self.settings.chains) // self.shard_pairs)
        return self.supply.missing(first, last) * self.shard_pairs * questions(self.aim)

    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        state = super().get_state(*args, **kwargs)
        return {**state, "payoff": (self.running.log_sum, self.running.count)}

    def set_state(self, state: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        super().set_state(state, *args, **kwargs)
        if "payoff" in state:
            self.running, self.next = Running(*map(dict, state["payoff"])), None


def make_source(
    world: tuple[Any, dict[str, Any]],
    chain: tuple[str, float, int | None],
    precision: str,
    aim: Aim,
    shard_pairs: int,
    seed: int,
    rewarded: tuple[Any, dict[str, Any]],
) -> Source:
    """A source with its own copy of the pretrained network."""
    own = domain.build(*world)
    net = domain.pretrained(own).to(DTYPES[precision]).requires_grad_(False)
    autocast = torch.bfloat16 if precision == "bfloat16" else None
    policy = Policy(net, reverse_process(own.schedule(), *chain), own.space, net.prediction, autocast)
    slope: Any = None
    if aim.sampler == "gradient":
        slope = reward.build(*rewarded, own.rewards).value  # type: ignore[attr-defined]
    return Source(Bench(own, policy, policy, torch.device("cpu"), DTYPES[precision]), aim, shard_pairs, seed, slope)


class RGDMConfig(DiffusionConfig):
    """``RGDMConfig().domain(...).reward(...).training(temperature=..., radius=...)``."""

    settings_class = RGDMSettings

    def __init__(self, algo_class: Any = None) -> None:
        super().__init__(algo_class=algo_class or RGDM)

    def own_actors(self) -> list[tuple[str, int, dict[str, float]]]:
        reserved = {"CPU": Terms.num_cpus, "GPU": 0.0, **(self.section("scoring").resources or {})}
        return [*super().own_actors(), ("pay-off actors", self.settings().payoff_actors, reserved)]

    def num_events(self) -> int:
        return self.settings().chains * questions(self.settings().aim())

    def num_rows(self, num_steps: int) -> int:
        return self.settings().chains

    def validate(self) -> None:
        told = self.settings()
        radii = told.radii
        if radii is not None and told.sampler != "importance":
            raise ValueError(f"training.radii are for sampler importance; {told.sampler} searches one ball, of radius")
        if radii is not None and (not radii or len(set(radii)) < len(radii) or min(radii) < 0):
            raise ValueError(f"training.radii is {list(radii)}; give different numbers of at least 0")
        if radii is not None and not (told.radius <= max(radii) and (told.radius > 0 or 0 in radii)):
            raise ValueError(f"training.radius is {told.radius:g}, which a bank of radii {list(radii)} does not hold")
        shells = len(radii or (0,))
        if told.num_candidates % shells:
            raise ValueError(
                f"training.num_candidates is {told.num_candidates}; with {shells} radii it must be a multiple of that"
            )
        if told.radius == 0 and told.sampler != "importance":
            raise ValueError(f"training.radius is 0, where {told.sampler} has nowhere to search; use importance")
        scoring = self.section("scoring")
        if scoring.micro_batches > 1 or scoring.staleness:
            key = "staleness" if scoring.staleness else "micro_batches"
            raise ValueError(
                f"scoring.{key} is for algorithms that roll out their policy; rgdm draws ahead with "
                "training.payoff_actors and training.payoff_lead"
            )
        if told.x_0_above is not None and told.reward_at == "x_0":
            raise ValueError("training.x_0_above is for reward_at x0_hat or x_prev; with x_0 it is read there anyway")
        if told.refresh and told.reward_at != "x_0" and told.x_0_above is None:
            raise ValueError("training.refresh is for rewards read at x_0: set reward_at to x_0, or x_0_above")
        if told.sampler == "gradient":
            self.differentiable("sampler gradient", "take sampler importance or annealing")
            if told.reward_at == "x_0":
                raise ValueError("sampler gradient searches for candidates, which reward_at: x_0 does not look at")
        super().validate()

    def get_default_learner_class(self) -> type[RGDMLearner]:
        return RGDMLearner
