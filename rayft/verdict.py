"""One verdict on a policy: samples of it and of the pretrained model, held against J* and the frontier.

Both are plain arrays that can be saved and judged again later, so a report needs neither model nor reward.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rayft import evaluate
from rayft.domain import Domain
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

    def save(self, path: Path) -> None:
        """As one .npz, without pickles."""
        context = {f"context/{k}": v for k, v in self.context.items()}
        groups = {} if self.groups is None else {"groups": self.groups}
        plain = {"rewards": self.rewards, "kl": self.kl, "undecodable": self.undecodable, "x_0": self.x_0}
        np.savez_compressed(path, allow_pickle=False, **plain, **groups, **context, **self.beside)

    @staticmethod
    def load(path: Path) -> Samples:
        with np.load(path, allow_pickle=False) as found:
            context = {k.removeprefix("context/"): found[k] for k in found.files if k.startswith("context/")}
            groups = found["groups"] if "groups" in found.files else None
            beside = {k: found[k] for k in found.files if k.startswith(("part/", "watch/"))}
            plain = (found["rewards"], found["kl"], groups, found["undecodable"], found["x_0"])
            return Samples(*plain, context, beside)


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
        return told

    @property
    def notes(self) -> list[str]:
        """What a person has to know beside the numbers."""
        refused = None if self.attained is None else self.attained.refused
        return [f"the attained share is refused: {refused}"] if refused else []


def known_mean(values: np.ndarray) -> float:
    """Over what is known; nan where nothing is."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def remember(domain: Domain, draw: Draw, scores: Scores) -> Samples:
    """The part of a draw of whole chains that a verdict needs; lets go of the chains."""
    context = draw.chains.context
    groups: Any = domain.groups({k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in context.items()})
    return Samples(
        rewards=scores.rewards,
        kl=draw.chains.columns["kl"].sum(0).astype(np.float64),
        groups=None if groups is None else groups.numpy(),
        undecodable=scores.undecodable,
        x_0=np.ascontiguousarray(draw.chains.x_0[:NUM_KEPT]),
        context={k: v[:NUM_KEPT] for k, v in context.items()},
        beside={
            **{f"part/{name}": column for name, column in scores.parts.items() if len(scores.parts) > 1},
            **{f"watch/{name}": column for name, column in scores.watch.items()},
        },
    )


def judge(pretrained: Samples, policy: Samples, alpha: float | None) -> Verdict:
    """Attained share of J* at ``alpha`` (where one is known) and share of the frontier."""
    pairs = (pretrained.rewards, policy.rewards, policy.kl)
    groups = (pretrained.groups, policy.groups)
    attained = None if alpha is None else evaluate.attained(*pairs, alpha, *groups)
    share = evaluate.frontier_share(*pairs, *groups)
    return Verdict(pretrained, policy, attained, share, evaluate.frontier(pretrained.rewards, pretrained.groups))
