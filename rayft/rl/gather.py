"""The parts of one draw from remote runners, whatever becomes of the runners while they work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError

from rayft.draws import Draw

PATIENCE = 20  # rounds in which no runner gave anything


def gather(group: Any, calls: list[dict[str, Any]], heal: Callable[[], None]) -> tuple[list[Draw], list[Any]]:
    """(draws in the order of ``calls``, the runners' statistics). A lost part is asked of another runner: same bits."""
    done: dict[int, Draw] = {}
    statistics, idle_rounds = [], 0
    error: Any = None
    while len(done) < len(calls):
        waiting = [call for call in calls if call["part"] not in done]
        workers = group.healthy_worker_ids()[: len(waiting)]
        sent, before = waiting[: len(workers)], len(done)
        for result in _asked(group, sent, workers):
            if not result.ok:
                error = result.get()
                continue
            part, ref, told = result.get()
            try:
                done[part] = ray.get(ref)
            except RayError:  # the runner died with its draw: another draws it again
                continue
            statistics.append(told)
        idle_rounds = 0 if len(done) > before else idle_rounds + 1
        if idle_rounds > PATIENCE:
            raise ValueError(f"no runner could draw: {str(error).strip().splitlines()[-1]}") from None
        if idle_rounds:
            heal()
    return [done[call["part"]] for call in calls], statistics


def _asked(group: Any, sent: list[dict[str, Any]], workers: list[int]) -> Any:
    if not workers:
        return []
    told: dict[str, Any] = {"kwargs": sent, "remote_actor_ids": workers, "timeout_seconds": None}
    return group._worker_manager.foreach_actor(["sample_part"] * len(sent), **told)
