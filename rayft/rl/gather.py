"""The parts of one draw from remote runners, whatever becomes of the runners while they work.

Chains may stay where they were drawn (``Afar``). Credit is then made of them by the learners (near.py), so that they
never pass through the driver.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayTaskError

from rayft.draws import Afar, Draw

PATIENCE = 600.0  # seconds without any runner: as long as a lost machine may take to be replaced
MISTAKES = 5  # times in a row that runners refuse by an error of the draw's own
PAUSE = 0.5  # seconds between two looks for a runner


def gather(group: Any, calls: list[dict[str, Any]], heal: Callable[[], None]) -> tuple[list[Draw], list[Any]]:
    """(draws in the order of ``calls``, the runners' statistics). A lost part is asked of another runner: same bits."""
    done: dict[int, Draw] = {}
    statistics, mistakes = [], 0
    error, seen = None, time.monotonic()
    while len(done) < len(calls):
        waiting = [call for call in calls if call["part"] not in done]
        workers = group.healthy_worker_ids()[: len(waiting)]
        sent, before = waiting[: len(workers)], len(done)
        for result in _asked(group, sent, workers):
            if not result.ok:
                error = result.get()
                mistakes += isinstance(error, RayTaskError)
                continue
            part, draw, told = result.get()
            if draw is None:  # started anew since the last sync, with the pretrained weights
                continue
            stays = isinstance(draw.chains, ray.ObjectRef)
            call = next(call for call in sent if call["part"] == part)
            done[part] = replace(draw, chains=Afar([draw.chains], [call])) if stays else draw
            statistics.append(told)
        if len(done) > before:
            mistakes, seen = 0, time.monotonic()
            continue
        if mistakes > MISTAKES or time.monotonic() - seen > PATIENCE:
            raise ValueError(f"no runner could draw: {str(error).strip().splitlines()[-1]}") from None
        heal()
        time.sleep(PAUSE)
    return [done[call["part"]] for call in calls], statistics


def _asked(group: Any, sent: list[dict[str, Any]], workers: list[int]) -> Any:
    if not workers:
        return []
    told: dict[str, Any] = {"kwargs": sent, "remote_actor_ids": workers, "timeout_seconds": None}
    return group._worker_manager.foreach_actor(["sample_part"] * len(sent), **told)
