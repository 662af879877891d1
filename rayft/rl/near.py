"""Credit beside the learners: once on each of their nodes, from chains that stay with the runners that drew them.

The driver passes references and one number a chain; what a learner reads lies on its own node, shared by all there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
from ray.exceptions import NodeDiedError, ObjectLostError, RayTaskError, WorkerCrashedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayft.chain import Chains


@dataclass(frozen=True)
class Credit:
    """What learners get: transitions with their columns, a few scalars, and what credit wants logged."""

    chains: Any  # Chains, or a reference to them for every learner
    scalars: dict[str, float] = field(default_factory=dict)
    logged: dict[str, float] = field(default_factory=dict)


GONE = (ObjectLostError, NodeDiedError, WorkerCrashedError)
Creditor = Callable[[Chains], Credit]  # travels to where the chains are read: a function of a module, and small numbers


class Lost(Exception):  # noqa: N818
    """Chains that went with a runner or a node."""


def credited(creditor: Creditor, parts: list[ray.ObjectRef], homes: list[str]) -> Credit:
    """``creditor`` applied on every node of ``homes``, the learners' nodes in their order. Raises ``Lost``."""
    made: dict[str, Any] = {}
    for node in dict.fromkeys(homes):
        there = NodeAffinitySchedulingStrategy(node, soft=True)
        made[node] = _credited.options(scheduling_strategy=there).remote(creditor, *parts)
    try:
        scalars, logged = ray.get([told for _, told in made.values()])[0]
    except RayTaskError as error:
        if isinstance(error.cause, GONE):
            raise Lost from error
        raise error.cause from None
    except GONE as error:
        raise Lost from error
    return Credit([made[node][0] for node in homes], scalars, logged)


@ray.remote(num_cpus=0, num_returns=2)
def _credited(creditor: Creditor, *parts: Chains) -> tuple[Chains, tuple[dict[str, float], dict[str, float]]]:
    credit = creditor(Chains.join(parts))
    return credit.chains, (credit.scalars, credit.logged)


def node_of(_: Any) -> str:
    """The node that it runs on."""
    return ray.get_runtime_context().get_node_id()


def same_events(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether scores of the one are scores of the other."""
    return one.shape == other.shape and one.tobytes() == other.tobytes()
