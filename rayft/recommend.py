"""``rayft recommend``: which algorithm for this model, this reward and this machine (T Sec. 7, Figure 3), and why.

Nothing is guessed that can be measured: what a score costs, whether it has a gradient, how many samples p* would use,
and what one chain with gradients holds in memory (the tensors that autograd saves for a transition, times T).
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import yaml
from rich.table import Table

from rayft import evaluate
from rayft.algorithms.config import DiffusionConfig, Settings
from rayft.bench import Bench
from rayft.chain import sample
from rayft.draws import Draw
from rayft.learnable import bench
from rayft.offline import scoring
from rayft.plan import size_of
from rayft.seeds import torch_generator
from rayft.settings import defaults
from rayft.spec import RunSpec, override

DEAR = 10.0  # times what drawing a sample costs, from which on its score is dear
LAB = 1.0  # seconds a score, from which on scores are all that a run pays for
FEW = 0.005  # share of the samples that p* would use, under which weighting them teaches little
PROBED = 4  # chains whose memory is measured
WHOLE = ("backprop",)  # whose rows are whole chains
UNITS = ("minibatch_size", "microbatches")  # count rows, which are other things to other algorithms
ROWS = (*UNITS, "timesteps", "row_share", "target_kl")  # and what only single transitions have
SHARE = 0.5  # of the memory that a chain's gradients may take


@dataclass(frozen=True)
class Measured:
    """What is known of a model, a reward and a machine."""

    differentiable: bool
    score_s: float  # seconds to score a sample
    draw_s: float  # seconds to draw one
    num_steps: int
    bytes_a_transition: float  # that autograd saves, for one chain
    chains: int  # of a minibatch
    memory: float  # bytes there are
    effective: float | None  # share of the pretrained samples that p* would use; None without an alpha
    failed: float  # share of the scores that failed

    @property
    def chain_bytes(self) -> float:
        """One chain with the gradients of all its transitions."""
        return self.bytes_a_transition * self.num_steps

    @property
    def fitting(self) -> int:
        """Chains with gradients that fit at once."""
        return int(SHARE * self.memory / max(self.chain_bytes, 1))


@dataclass(frozen=True)
class Advice:
    """An algorithm, the settings that matter, and the reason."""

    algorithm: str
    settings: tuple[str, ...]
    why: str
    otherwise: str = ""


def choose(found: Measured, training: bool = True) -> Advice:
    """T's Figure 3 on what was measured."""
    if not training:
        return _guided(found)
    if found.differentiable:
        return _backpropagated(found)
    if found.score_s > LAB:
        return Advice(
            "backprop",
            ("training.surrogate=3",),
            f"a score takes {_time(found.score_s)}, so scores are what a run pays for: learn them from what the policy "
            "draws, and follow the learned reward where its networks agree",
            "rwmle with training.roll_in=noised learns from the same few scores and needs no network for them",
        )
    if found.score_s > DEAR * found.draw_s and (found.effective is None or found.effective >= FEW):
        return Advice(
            "rwmle",
            ("training.roll_in=noised",),
            f"the reward is a black box and a score costs {found.score_s / found.draw_s:.0f} times what its sample "
            "does: every score is used again at every iteration, weighted by exp(r/alpha)",
            "rgdm keeps its scores in a bank, which a sweep over temperature and radius reads for nothing",
        )
    few = found.effective is not None and found.effective < FEW
    weak = f", and p* would use {found.effective:.2%} of the pretrained samples: weighting them teaches little" * few
    return Advice(
        "ppo",
        (),
        f"the reward is a black box and cheap beside the chain that it scores{weak}",
        "pcl reaches the same objective and may learn from old chains again; grpo where conditions decide the reward",
    )


def _backpropagated(found: Measured) -> Advice:
    size = size_of(found.chain_bytes)
    if found.fitting >= found.chains:
        return Advice(
            "backprop",
            (),
            f"the reward has a gradient, and {found.chains} chains with theirs ({size} each) fit into memory",
            "ppo needs no gradient and less memory, for more chains",
        )
    if found.fitting >= 1:
        pieces = 1 << (-(-found.chains // found.fitting) - 1).bit_length()
        return Advice(
            "backprop",
            ("training.checkpoint=true", f"training.microbatches={min(pieces, found.chains)}"),
            f"the reward has a gradient, but only {found.fitting} of {found.chains} chains with theirs ({size} each) "
            "fit into memory at once: compute transitions again, and a minibatch in pieces",
            "training.steps=K goes through the last K transitions alone",
        )
    return Advice(
        "ppo",
        (),
        f"the reward has a gradient, but one chain with its own takes {size}, more than half of the memory there is",
        "backprop with training.checkpoint=true and training.steps=K, which holds K events and one transition",
    )


def _guided(found: Measured) -> Advice:
    if found.differentiable:
        return Advice(
            "tweedie",
            (),
            "without training, a reward with a gradient can guide every step where it is read at x0_hat",
            "mc learns the value instead and is not biased by x0_hat; it pays for the pretrained samples' scores",
        )
    if found.score_s > LAB:
        return Advice(
            "best_of_n",
            (),
            f"without training, and at {_time(found.score_s)} a score: draw, score and keep the best",
            "mc learns the value from scores that are there already",
        )
    return Advice(
        "mc",
        (),
        "without training and without a gradient: a value network learns from the pretrained samples' scores which way "
        "to lean at every step",
        "smc needs no network and pays scores at every step",
    )


# -- measuring


def measure(spec: RunSpec, num: int, seed: int = 0, memory: float | None = None) -> Measured:
    """Draws and scores ``num`` pretrained samples in this process; rewards run as a run would run them."""
    config = spec.checked()
    world = config.build_domain()
    place = bench(config, world)
    draw, draw_s = _drawn(place, num, seed)
    told = config.section("scoring")
    with scoring(config.recipe(world), world, {**asdict(told), "max_failed": 1.0}) as rewards:
        rewards.score(draw.events[:1], {k: v[:1] for k, v in draw.context.items()}, "evaluate")  # processes start
        before = time.perf_counter()
        scores = rewards.score(draw.events, draw.context, "evaluate")
        score_s = (time.perf_counter() - before) / num
    known, alpha = scores.rewards[np.isfinite(scores.rewards)], config.evaluation_alpha()
    share = None if alpha is None or not len(known) else evaluate.effective_sample_size(known, alpha) / len(known)
    return Measured(
        differentiable(config),
        score_s,
        draw_s,
        place.policy.process.num_steps,
        saved_bytes(place, seed),
        min(config.settings().chains, 512),
        available() if memory is None else memory,
        share,
        scores.num_failed / num,
    )


def _drawn(place: Bench, num: int, seed: int) -> tuple[Draw, float]:
    generator = torch_generator(seed, 0, "recommend")
    x_T, context = place.start(num, generator)  # noqa: N806
    with torch.no_grad():  # the first call of all sets up threads and kernels, which no run pays twice
        place.policy.mean_at(x_T, place.policy.process.num_steps, context)
    before = time.perf_counter()
    chains = sample(place.policy, x_T, context, generator)
    return Draw(chains, chains.x_0, chains.context).numpy(), (time.perf_counter() - before) / num


def differentiable(config: DiffusionConfig) -> bool:
    """Whether the reward is one torch function of x_0."""
    try:
        config.differentiable("it", "another")
    except ValueError:
        return False
    return True


def saved_bytes(place: Bench, seed: int) -> float:
    """What autograd keeps of one transition of one chain, the weights left out."""
    generator = torch_generator(seed, 0, "recommend")
    x, context = place.start(PROBED, generator)
    net: Any = place.policy.network
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    seen: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    trained = list(net.parameters())
    for parameter in trained:
        parameter.requires_grad_(True)
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            mean = place.policy.mean_at(x, place.policy.process.num_steps, context)
        del mean
    finally:
        for parameter in trained:
            parameter.requires_grad_(False)
    return sum(seen.values()) / PROBED


def available() -> float:
    """Bytes of the GPU that training would use, else of this machine."""
    if torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[0])
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))


# -- telling


def command(advice: Advice, file: str, spec: RunSpec | None, overrides: Sequence[str] = ()) -> str:
    """What to type, with what was typed already; without a spec, to guide a model that is not trained."""
    if spec is None:
        return f"rayft sample DOMAIN --reward NAME --guide {advice.algorithm}"
    found = retold(advice, spec)
    more = [] if spec.search is None else ["search=null"]
    if set(spec.training) <= set(found):
        told = {f"training.{k}": v for k, v in found.items() if k not in spec.training or v != spec.training[k]}
    else:
        told = {"training": found}
    more += [f"algorithm={advice.algorithm}", *(f"{key}={_flow(value)}" for key, value in told.items())]
    return shlex.join(["rayft", "run", file, *overrides, *more])


def retold(advice: Advice, spec: RunSpec) -> dict[str, Any]:
    """The training section: of another algorithm's, what means the same to both; and a minibatch that fits."""
    given, known = dict(spec.training), {*defaults(Settings), "alpha"}
    if spec.algorithm != advice.algorithm:
        left = ROWS if advice.algorithm in WHOLE else UNITS
        given = {k: v for k, v in given.items() if k in known and k not in left}
        if advice.algorithm == "rwmle" and not given.get("alpha", 1):
            del given["alpha"]  # reward alone: nothing to weigh by
    given = override({"training": given}, advice.settings)["training"]
    config = spec.model_copy(update={"algorithm": advice.algorithm, "training": given}).config()
    told, rows = config.settings(), config.num_rows(config.process().num_steps)
    pieces = max(1, spec.resources.num_learners) * told.microbatches
    if told.minibatch_size > rows or told.minibatch_size % pieces:
        given["minibatch_size"] = max(min(told.minibatch_size, rows) // pieces, 1) * pieces
    return given


def _flow(value: Any) -> str:
    """YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False).removesuffix("\n...\n").strip()


def table(found: Measured) -> Table:
    """What was measured, for a person."""
    shown = Table(title="measured", title_justify="left", show_header=False)
    shown.add_column()
    shown.add_column(justify="right")
    shown.add_row("the reward has a gradient", "yes" if found.differentiable else "no")
    shown.add_row("a score, a sample's chain", f"{_time(found.score_s)}, {_time(found.draw_s)}")
    shown.add_row("transitions of a chain", f"{found.num_steps}")
    shown.add_row("one chain with gradients", size_of(found.chain_bytes))
    shown.add_row("memory there is", size_of(found.memory))
    if found.effective is not None:
        shown.add_row("samples that p* would use", f"{found.effective:.1%}")
    if found.failed:
        shown.add_row("scores that failed", f"{found.failed:.0%}")
    return shown


def told(found: Measured, advice: Advice, line: str) -> Mapping[str, Any]:
    """As plain data, for --json."""
    return {"measured": asdict(found), "algorithm": advice.algorithm, "why": advice.why, "command": line}


def sentences(advice: Advice, line: str) -> Sequence[str]:
    """For a person."""
    return [f"{advice.algorithm}: {advice.why}", *([f"or: {advice.otherwise}"] if advice.otherwise else []), line]


def _time(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.2g} us"
