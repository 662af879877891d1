"""Credit by the learners: once on each of their nodes, of chains that stay with the runners that drew them.

The driver passes references and one number a chain; what a learner reads lies on its own node, shared by all there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
from ray.exceptions import ObjectLostError, RayActorError, RayError

from rayft.chain import Chains


@dataclass(frozen=True)
class Credit:
    """What learners get: transitions with their columns, a few scalars, and what credit wants logged."""

    chains: Any  # Chains, or a reference to them for every learner
    scalars: dict[str, float] = field(default_factory=dict)
    logged: dict[str, float] = field(default_factory=dict)


Creditor = Callable[[Chains], Credit]  # travels to where the chains are read: a function of a module, and small numbers


@dataclass(frozen=True)
class Refused:
    """What a creditor raised."""

    error: Exception


class Lost(Exception):  # noqa: N818
    """Chains that went with a runner or a node."""


def credited(group: Any, creditor: Creditor, parts: list[ray.ObjectRef], homes: list[str]) -> Credit:
    """``creditor`` applied by one learner on every node of ``homes``, the learners' nodes in their order.

    Raises ``Lost``, and whatever ``creditor`` raises.
    """
    first = {node: homes.index(node) for node in homes}
    told = group.foreach_learner(_made, remote_actor_ids=list(first.values()), creditor=creditor, parts=parts)
    made = {one.actor_id: one.get() for one in told}
    if len(made) < len(first):
        raise RayActorError(error_msg="a learner was lost")
    for found in made.values():
        if found is None:
            raise Lost
        if isinstance(found, Refused):
            raise found.error
        if isinstance(found, RayError):
            raise found
    refs = [made[first[node]][0] for node in homes]
    return Credit(refs, *made[0][1:])


def _made(learner: Any, creditor: Creditor, parts: list[ray.ObjectRef]) -> Any:
    """(reference to the rows, scalars, logged), None where chains are lost, or what went wrong.

    RLlib would take a learner that raises for a dead one.
    """
    try:
        credit = creditor(Chains.join(ray.get(parts)))
    except ObjectLostError:
        return None
    except Exception as error:
        return Refused(error)
    return ray.put(credit.chains), credit.scalars, credit.logged


def homes_of(group: Any) -> list[str]:
    """The learners' nodes, in the learners' order."""
    told = {one.actor_id: one.get() for one in group.foreach_learner(node_of)}
    return [told[number] for number in sorted(told)]


def node_of(_: Any) -> str:
    """The node that it runs on."""
    return ray.get_runtime_context().get_node_id()


def same_events(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether scores of the one are scores of the other."""
    return one.shape == other.shape and one.tobytes() == other.tobytes()
