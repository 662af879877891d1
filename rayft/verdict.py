"""One verdict on a policy: samples of it and of the pretrained model, held against J* and the frontier.

Both are plain arrays that can be saved and judged again later, so a report needs neither model nor reward.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rayft import evaluate, imports
from rayft.domain import Domain, decoded
from rayft.draws import Draw
from rayft.score import Scores

NUM_KEPT = 2000


@dataclass(frozen=True)
class Samples:
    """What is remembered of a set of chains: a number or two each, and some events for pictures."""

    rewards: np.ndarray  # [chain], NaN = failed
    kl: np.ndarray  # [chain], chain KL to the pretrained model
    groups: np.ndarray | None  # [chain], c
    undecodable: np.ndarray  # [chain]
    x_0: np.ndarray  # [at most NUM_KEPT, *event]
    context: dict[str, np.ndarray]
    beside: dict[str, np.ndarray] = field(default_factory=dict)  # part/NAME and watch/NAME -> [chain]
    metrics: dict[str, float] = field(default_factory=dict)  # of the events kept, as the domain measures them
    unmeasured: str = ""  # why there are none, where the domain has some

    def save(self, path: Path) -> None:
        """As one .npz, without pickles."""
        context = {f"context/{k}": v for k, v in self.context.items()}
        groups = {} if self.groups is None else {"groups": self.groups}
        plain = {"rewards": self.rewards, "kl": self.kl, "undecodable": self.undecodable, "x_0": self.x_0}
        metrics: dict[str, Any] = {f"metric/{k}": np.float64(v) for k, v in self.metrics.items()}
        metrics |= {"unmeasured": np.array(self.unmeasured)} if self.unmeasured else {}
        np.savez_compressed(path, allow_pickle=False, **plain, **groups, **context, **self.beside, **metrics)

    @staticmethod
    def load(path: Path) -> Samples:
        with np.load(path, allow_pickle=False) as found:
            context = {k.removeprefix("context/"): found[k] for k in found.files if k.startswith("context/")}
            groups = found["groups"] if "groups" in found.files else None
            beside = {k: found[k] for k in found.files if k.startswith(("part/", "watch/"))}
            metrics = {k.removeprefix("metric/"): float(found[k]) for k in found.files if k.startswith("metric/")}
            unmeasured = str(found["unmeasured"]) if "unmeasured" in found.files else ""
            plain = (found["rewards"], found["kl"], groups, found["undecodable"], found["x_0"])
            return Samples(*plain, context, beside, metrics, unmeasured)

    def scored(self) -> np.ndarray:
        """Positions of the kept events whose scoring did not fail: the others may crash a decoder that has no child."""
        return np.flatnonzero(np.isfinite(self.rewards[: len(self.x_0)]))

    def decoded(self, domain: Domain, positions: np.ndarray) -> list[Any]:
        """The samples at some positions of the kept events."""
        return decoded(domain, self.x_0[positions], {k: v[positions] for k, v in self.context.items()})


@dataclass(frozen=True)
class Verdict:
    """How much of the attainable the policy reached."""

    pretrained: Samples
    policy: Samples
    attained: evaluate.Attained | None
    frontier_share: evaluate.Estimate
    frontier: evaluate.Frontier

    def scalars(self) -> dict[str, float]:
        """Plain numbers for tables and trackers; nan where something is refused."""
        told = {
            "reward": float(np.nanmean(self.policy.rewards)),
            "reward_pretrained": float(np.nanmean(self.pretrained.rewards)),
            "kl": float(self.policy.kl.mean()),
            "frontier_share": self.frontier_share.value,
            "frontier_share_low": self.frontier_share.low,
            "frontier_share_high": self.frontier_share.high,
            "diversity": evaluate.diversity(self.policy.x_0),
            "diversity_pretrained": evaluate.diversity(self.pretrained.x_0),
            "undecodable": float(self.policy.undecodable.mean()),
        }
        if self.attained is not None:
            share = self.attained.share
            told |= {
                "objective": self.attained.objective.value,
                "optimum": self.attained.optimum.value,
                "effective_sample_size": self.attained.effective_sample_size,
                "attained": share.value if share else float("nan"),
                "attained_low": share.low if share else float("nan"),
                "attained_high": share.high if share else float("nan"),
            }
        for name, column in self.policy.beside.items():
            told[name] = known_mean(column)
            told[f"{name}_pretrained"] = known_mean(self.pretrained.beside.get(name, column[:0]))
        for name, value in self.policy.metrics.items():
            told[f"metric/{name}"] = value
            told[f"metric/{name}_pretrained"] = self.pretrained.metrics.get(name, float("nan"))
        return told

    @property
    def notes(self) -> list[str]:
        """What a person has to know beside the numbers."""
        refused = None if self.attained is None else self.attained.refused
        told = [f"the attained share is refused: {refused}"] if refused else []
        return told + list(dict.fromkeys(one.unmeasured for one in (self.pretrained, self.policy) if one.unmeasured))


def known_mean(values: np.ndarray) -> float:
    """Over what is known; nan where nothing is."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def remember(domain: Domain, draw: Draw, scores: Scores) -> Samples:
    """The part of a draw that a verdict needs; its chains are not looked at."""
    context = draw.context
    groups: Any = domain.groups({k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in context.items()})
    kept = Samples(
        rewards=scores.rewards,
        kl=draw.kl.astype(np.float64),
        groups=None if groups is None else groups.numpy(),
        undecodable=scores.undecodable,
        x_0=np.ascontiguousarray(draw.events[:NUM_KEPT]),
        context={k: v[:NUM_KEPT] for k, v in context.items()},
        beside={
            **{f"part/{name}": column for name, column in scores.parts.items() if len(scores.parts) > 1},
            **{f"watch/{name}": column for name, column in scores.watch.items()},
        },
    )
    return measured(domain, kept)


def measured(domain: Domain, samples: Samples) -> Samples:
    """With the domain's metrics of the kept events; what goes wrong with them is a sentence."""
    if domain.metrics is None:
        return samples
    try:
        rows = samples.scored()
        context = {k: v[rows] for k, v in samples.context.items()}
        found = domain.measure(samples.decoded(domain, rows), samples.x_0[rows], context)
        return replace(samples, metrics={str(name): float(value) for name, value in found.items()})
    except Exception as error:
        return replace(samples, unmeasured=f"the domain's metrics are left out: {imports.reason(error)}")


def judge(pretrained: Samples, policy: Samples, alpha: float | None) -> Verdict:
    """Attained share of J* at ``alpha`` (where one is known) and share of the frontier."""
    pairs = (pretrained.rewards, policy.rewards, policy.kl)
    groups = (pretrained.groups, policy.groups)
    attained = None if alpha is None else evaluate.attained(*pairs, alpha, *groups)
    share = evaluate.frontier_share(*pairs, *groups)
    return Verdict(pretrained, policy, attained, share, evaluate.frontier(pretrained.rewards, pretrained.groups))
