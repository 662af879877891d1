"""Shapes: what a chain of 2,048 points and its metrics cost, beside the bare network.

step/*    milliseconds of one step at batch 1, and of the network's forward pass alone; sample/vs_bare is their ratio
sample/*  the same at batch 16, and seconds per cloud
train/*   seconds of a training step on a batch of 128 clouds
emd/*     minutes for 50 x 50 clouds of 2,048 points by the exact earth mover's distance, extrapolated from fewer pairs,
          and the power of the number of points that it grows with
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from benchmarks import _result
from benchmarks._result import Figure
from envs.shapes.data import normalised
from envs.shapes.distances import pairwise_chamfer, pairwise_emd
from envs.shapes.domain import Shapes
from envs.shapes.generated import generated
from rayft.chain import Policy, reverse_process, sample
from rayft.denoise import Learner, PretrainSettings
from rayft.domain import Denoiser

POINTS = 2048
MOST = {"sample/vs_bare": 1.1, "step/ms_2048_b1": 10.0, "train/seconds_b128": 13.6, "emd/minutes_50x50": 15.0}


def main() -> None:
    parser = _result.arguments(__doc__)
    parser.add_argument("--only", nargs="*", choices=BENCHES, default=list(BENCHES), help="these parts alone")
    told = parser.parse_args()
    result = _result.Result("shapes", partial=set(told.only) != set(BENCHES))
    for name in told.only:
        result.figures |= BENCHES[name](told.quick)
    rows = [[name, figure, f"<= {MOST[name]:g}" if name in MOST else ""] for name, figure in result.figures.items()]
    _result.show("shapes", ("figure", "measured", "asked"), rows)
    result.write(_result.folder(told))


def sampling(quick: bool) -> dict[str, Figure]:
    """Chains and bare forward passes by turns, each with the same network and batch."""
    domain, found = Shapes(POINTS), {}
    net = domain.denoiser().eval()
    process = reverse_process(domain.schedule(), num_steps=10 if quick else None)
    generator = torch.Generator().manual_seed(0)
    policy, low = (Policy(net, process, domain.space, net.prediction, kind) for kind in (None, torch.bfloat16))
    for size, name in ((1, "step/ms_2048_b1"), (16, "sample/ms_per_cloud_step_b16")):
        x_T = torch.randn(size, *domain.event_shape)  # noqa: N806
        each, steps = 1e3 / process.num_steps / size, process.schedule.timestep[1:]
        chain = partial(sample, x_T=x_T, context={}, generator=generator)
        runs = partial(chain, policy), partial(_bare, net, x_T, steps), partial(chain, low)
        rounds = [[each * _seconds(run) for run in runs] for _ in range(3 if quick else 13 if size == 1 else 5)]
        for column, label in enumerate((name, f"{name}/bare", f"{name}/bf16")):
            found[label] = _result.over_rounds([row[column : column + 1] for row in rounds[1:]], _median)
        found["sample/vs_bare" if size == 1 else "sample/vs_bare_b16"] = _result.over_rounds(rounds[1:], _ratio)
    return found


def _median(rounds: np.ndarray) -> float:
    return float(np.median(rounds))


def _ratio(rounds: np.ndarray) -> float:
    return float(np.median(rounds[:, 0]) / np.median(rounds[:, 1]))


@torch.no_grad()
def _bare(net: Denoiser, x: torch.Tensor, timesteps: torch.Tensor) -> None:
    """As many forward passes, and nothing else."""
    for t in timesteps.flip(0):
        net(x, t.expand(len(x)), {})


def _seconds(work: Callable[..., object], *told: object) -> float:
    start = time.perf_counter()
    work(*told)
    return time.perf_counter() - start


def training(quick: bool) -> dict[str, Figure]:
    """The pretraining's own step: draw, noise, forward, backward, AdamW."""
    domain, found = Shapes(POINTS, weights=None), {}
    size = 8 if quick else 128
    settings = {
        "train/seconds_b128": PretrainSettings(batch_size=size),
        "train/bf16/seconds_b128": PretrainSettings(batch_size=size, precision="bfloat16"),
    }
    for name, told in settings.items():
        learner = Learner(domain, told, 0)
        found[name] = Figure(float(np.median([_seconds(learner.step, step) for step in range(4)][1:])))
    return found


def movers(quick: bool) -> dict[str, Figure]:
    """Generated aircraft against other ones."""
    clouds = normalised(generated("aircraft").points)
    num, sizes = (2, (128, 256)) if quick else (6, (256, 512, 1024, 2048))
    pairwise_emd(clouds[:1, : sizes[0]], clouds[-1:, : sizes[0]])  # or the first size would pay for importing POT
    tried = [[_seconds(pairwise_emd, clouds[:num, :n], clouds[-num:, :n]) / num**2 for n in sizes] for _ in range(5)]
    seconds = np.median(tried, axis=0).tolist()
    power = float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])
    each = {f"emd/ms_per_pair/{n}": Figure(1e3 * s) for n, s in zip(sizes, seconds, strict=True)}
    chamfer = _seconds(pairwise_chamfer, clouds[:num], clouds[-num:]) / num**2
    minutes = [2500 / 60 * last for *_, last in tried]
    whole = {"emd/minutes_50x50": Figure(float(np.median(minutes)), min(minutes), max(minutes))}
    whole |= {"emd/power": Figure(power)}
    return {**whole, **each, "chamfer/ms_per_pair/2048": Figure(1e3 * chamfer)}


BENCHES = {"sample": sampling, "train": training, "emd": movers}

if __name__ == "__main__":
    main()
