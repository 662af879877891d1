"""What guides share: a reward that counts its calls, and the policy that most of them are, whose mean they move.

    p(x_prev | x_t) = N(mu_base(x_t, t) + shift(x_t, t), sigma_t^2 P),    chain KL = E sum_t |shift|^2 / (2 sigma_t^2)

The base is any policy, pretrained or fine-tuned; it stays as it is.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rayft.bench import Bench
from rayft.chain import Policy, expand, sample
from rayft.settings import STRICT, Positive
from rayft.space import Context, squared_norm

Slope = Callable[[Tensor, Context], Tensor]  # r(x_0) [batch], differentiable
Score = Callable[[Tensor, Context], tuple[Tensor, int]]  # rewards [batch], NaN where failed, and the calls they took
Draw = Callable[[int, torch.Generator], tuple[Tensor, Context]]  # how many -> finished events and their contexts
Tell = Callable[[str, int, int], None]  # what is being done, how much of it, of how much

LARGEST = 50.0  # lengths of a transition's own noise; a shift beyond costs 1,250 nats for every dimension
# Nats that a chain may be moved by: strong guidance takes tens to hundreds, and nobody could find by drawing what is
# found once in e^1000 samples. In many dimensions, what moves each of its numbers by two deviations.
DEAREST, DEAREST_A_NUMBER = 1000.0, 2.0


@dataclass(frozen=True)
class Temperature:
    """What guides towards exp(r/alpha) p_base are told."""

    __pydantic_config__ = STRICT

    alpha: Positive = 0.1
    """Temperature of exp(r/alpha): small for a strong pull, large for none."""


@dataclass
class Reward:
    """A reward of finished events, as a black box and, where ``slope`` is there, as a torch function."""

    name: str
    score: Score
    slope: Slope | None = None
    identity: str = ""  # what tells it from others
    calls: int = 0

    def __call__(self, x_0: Float[Tensor, "batch *event"], context: Context) -> Float[Tensor, " batch"]:
        """r(x_0), NaN where scoring failed."""
        found, calls = self.score(x_0, context)
        self.calls += calls
        return found

    def differentiable(self, guide: str) -> Slope:
        """The torch function, counted too."""
        slope = self.slope
        if slope is None:
            raise ValueError(
                f"{guide} follows the reward's gradient and {self.name} has none: subclass DifferentiableReward, or "
                "take mc, soft_q, path_integral, smc or best_of_n, for which any reward will do"
            )

        def counted(x_0: Tensor, context: Context) -> Tensor:
            self.calls += len(x_0)
            return slope(x_0, context)

        return counted


def _nobody(what: str, done: int, total: int) -> None:
    """Nobody is told."""


@dataclass(frozen=True)
class Ground:
    """What a guide stands on: the base is the bench's policy."""

    bench: Bench
    reward: Reward
    seed: int = 0
    tell: Tell = _nobody


class Shifted(Policy):
    """The base's transitions with another mean; ``sample`` and all else take it as any other policy."""

    def __init__(self, base: Policy, alpha: float) -> None:
        if not alpha > 0:
            raise ValueError(f"alpha is {alpha}; guidance needs a temperature above 0, small for a strong pull")
        self.__dict__.update(vars(base))
        self.base, self.alpha = base, alpha
        self.paid = 0, torch.zeros(0)  # (t, nats up to there) of the chains that are being drawn

    @abstractmethod
    def moved(self, x_t: Tensor, t: Int[Tensor, " batch"], context: Context) -> tuple[Tensor, Tensor]:
        """(mu_base, the shift of it)."""

    def mean(self, x_t: Tensor, t: Int[Tensor, " batch"], context: Context) -> Tensor:
        """mu, of every row at its own timestep."""
        mean, shift = self.moved(x_t, t, context)
        self._within_reason(mean, shift, t, context)
        return mean + shift

    def mean_at(self, x_t: Tensor, step: int, context: Context) -> Tensor:
        """mu, with the whole batch at one timestep, as chains are drawn: what they pay on the way is added up."""
        t = torch.full((len(x_t),), step, device=x_t.device)
        mean, shift = self.moved(x_t, t, context)
        self._within_reason(mean, shift, t, context)
        paid, (before, so_far) = squared_norm(shift) / (2 * self.sigma(t).to(shift.dtype) ** 2), self.paid
        paid = paid + so_far if (before, so_far.shape) == (step + 1, paid.shape) else paid
        self.paid = step, paid
        limit = torch.as_tensor(DEAREST_A_NUMBER * self.space.dim(shift, context)).clamp(min=DEAREST)
        if bool((paid > limit).any()):
            raise ValueError(
                f"at t = {step} the guide has moved a chain by {float(paid.max()):,.0f} nats: it throws the chain out; "
                f"raise guide.alpha above {self.alpha:g}"
            )
        return mean + shift

    def _within_reason(self, mean: Tensor, shift: Tensor, t: Tensor, context: Context) -> None:
        dim = torch.as_tensor(self.space.dim(shift, context)).clamp(min=1)
        size = (squared_norm(shift) / dim).sqrt() / self.sigma(t).to(shift.dtype)
        lost = ~mean.flatten(1).isfinite().all(1)
        if bool((lost | ~(size < LARGEST)).any()):
            row = int((lost | ~(size < LARGEST)).nonzero()[0])
            done = "has lost the chain" if lost[row] else f"moves the mean by {float(size[row]):.3g} times the noise"
            raise ValueError(
                f"at t = {int(t[row])} the guide {done}: it diverges; raise guide.alpha above {self.alpha:g}"
            )

    def uphill(self, t: Tensor, gradient: Tensor, context: Context) -> Tensor:
        """sigma_t^2 times a gradient of v/alpha, in the space; where that is no number nothing moves."""
        return expand(self.sigma(t) ** 2, gradient) * torch.nan_to_num(self.space.project(gradient, context))


def by_chains(bench: Bench, policy: Policy) -> Draw:
    """Events at the end of whole chains."""

    def draw(num: int, generator: torch.Generator) -> tuple[Tensor, Context]:
        x_T, context = bench.start(num, generator)  # noqa: N806
        return sample(policy, x_T, context, generator).x_0, context

    return draw


def repeated(context: Context, copies: int) -> dict[str, Tensor]:
    """Each chain's context for so many chains side by side."""
    return {k: v.repeat_interleave(copies, 0) for k, v in context.items()}
