"""``rayft run``: iterate, watch, evaluate, checkpoint, and come back from what can be come back from.

The order within an iteration is train -> guards -> row -> checkpoint, so a row is on disk only with everything that
led to it, and a resumed run drops rows later than its checkpoint: nothing is counted twice.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
import yaml
from ray.exceptions import RayError
from ray.rllib.core import DEFAULT_MODULE_ID

from rayft import report, storage, store
from rayft.guards import Guard, Trip, watch
from rayft.interrupt import told_to_stop
from rayft.mirror import Mirror, taken
from rayft.spec import RunSpec
from rayft.table import Table
from rayft.track import Tracker, open_trackers
from rayft.verdict import Verdict


class Display(Protocol):
    """Who is told how the run goes."""

    def row(self, row: Mapping[str, float], total: int) -> None: ...

    def event(self, text: str) -> None: ...


@dataclass
class Run:
    """One run and its folder."""

    spec: RunSpec
    folder: Path
    display: Display
    trust: bool = False
    algo: Any = None  # a DiffusionRL once open
    guards: list[Guard] = field(default_factory=list)
    trackers: list[Tracker] = field(default_factory=list)
    mirror: Mirror | None = None  # where the run is kept as well
    interrupted: bool = False
    failures: int = 0
    started: float = 0.0

    @property
    def name(self) -> str:
        return self.folder.name

    # -- life

    def execute(self, resume: bool) -> dict[str, Any]:
        """Runs to the end and returns the final row; ``run.json`` says how it ended."""
        if self.spec.resources.torch_threads is not None:
            torch.set_num_threads(self.spec.resources.torch_threads)
        self.table = Table(self.folder / "metrics.csv")
        self.note(status="running", started=now(), command=sys.argv, spec_file="config.yaml", **facts(self.spec))
        if self.spec.storage is not None:
            self.mirror = Mirror(self.folder, storage.place(self.spec.storage).child(self.name))
        with told_to_stop(self.stop):
            try:
                self.keep("the run", at_start=True)
                self.open(resume)
                self.trackers = open_trackers(self.spec.track, self.folder, self.spec.full())
                self.started = time.monotonic() - self.table.last("time_s", 0.0)
                return self.finish(self.iterate())
            except BaseException as error:
                self.note(status=f"failed: {error or type(error).__name__}")
                raise
            finally:
                for tracker in self.trackers:
                    tracker.close()
                if self.algo is not None:
                    self.algo.stop()
                self.keep("the end of the run")

    def iterate(self) -> str:
        """Steps until the end, a guard's trip or Ctrl-C; how it ended."""
        while self.algo.iteration < self.spec.iterations and not self.interrupted:
            if refused := self.algo.refusal():
                return f"stopped: {refused}"
            trip = self.step()
            if trip is not None:
                return f"stopped: {trip.message}"
        if self.interrupted:
            self.checkpoint()
            return "interrupted"
        return "finished"

    def open(self, resume: bool) -> None:
        """Builds the algorithm, from the newest checkpoint where the run is resumed."""
        self.algo = self.spec.checked().build_algo()
        checkpoint = store.newest(self.folder) if resume else None
        self.algo.horizon = self.spec.iterations
        if checkpoint is None:
            self.table.truncate(0)
            if refused := self.algo.refusal():
                raise ValueError(f"{refused}: raise it, or lower training.chains and evaluate.pretrained_chains")
            self.algo.draw_pretrained()
        else:
            self.restore(checkpoint)
            self.display.event(f"resumed {self.name} at iteration {checkpoint.iteration}")
        self.guards = watch(self.spec.checked().section("evaluate"))
        (self.folder / "evaluations").mkdir(exist_ok=True)
        self.algo.pretrained.save(self.folder / "evaluations" / "pretrained.npz")

    def restore(self, checkpoint: store.Checkpoint) -> None:
        store.trusted(checkpoint, self.trust)
        threads = checkpoint.card.get("torch_threads")
        changed = {k: v for k, v in store.versions().items() if checkpoint.card["versions"].get(k) != v}
        if threads != torch.get_num_threads():
            changed["torch threads"] = str(torch.get_num_threads())
        if changed:
            names = ", ".join(changed)
            self.display.event(f"{names} differ from the checkpoint's: the run continues, its bits will differ")
        self.algo.restore_from_path(str(checkpoint.state.resolve()))
        self.algo.sync()
        self.table.truncate(checkpoint.iteration)

    # -- one iteration

    def step(self) -> Trip | None:
        """One iteration; what is lost with a learner or its node is made again from the last checkpoint."""
        try:
            return self.advance()
        except (RayError, RuntimeError) as error:
            if not isinstance(error, RayError) and self.algo.config.num_learners == 0:
                raise
            self.replace(error)
            return None

    def advance(self) -> Trip | None:
        """Train, guard, tell, keep."""
        before = time.monotonic()
        result = self.algo.train()
        last = self.algo.iteration >= self.spec.iterations
        if last and self.algo.verdict is None:
            self.algo.evaluate_policy()
        row = self.row(result, time.monotonic() - before)
        trip = next((trip for guard in self.guards for trip in guard(row)), None)
        for message in (m for guard in self.guards for m in guard.said()):
            self.event("guard", message)
        for sentence in self.algo.rewards.meter.sentences():
            self.event("reward", sentence)
        self.table.add(row)
        for tracker in self.trackers:
            tracker.log(int(row["iteration"]), row)
        self.display.row(row, self.spec.iterations)
        if trip is not None:
            self.roll_back(trip)
            return trip
        if self.algo.verdict is not None:
            self.save_verdict(self.algo.verdict)
        if self.algo.verdict is not None or self.algo.iteration % self.spec.checkpoint.every == 0:
            self.checkpoint(row)
        return None

    def row(self, result: Mapping[str, Any], seconds: float) -> dict[str, float]:
        """One line of the table from RLlib's nested result."""
        row = {
            "iteration": self.algo.iteration,
            "time_s": time.monotonic() - self.started,
            **columns(self.algo, result),
            "chains_per_s": self.algo.settings.chains / max(seconds, 1e-9),
        }
        return {k: float(v) for k, v in row.items() if _number(v)}

    def replace(self, error: BaseException) -> None:
        """A fresh algorithm from the last checkpoint, in place of one that lost a learner; again where it fails."""
        reopened = False
        while not reopened:
            self.failures += 1
            reason = str(error).strip().splitlines()[-1][:200] if str(error).strip() else type(error).__name__
            if self.failures > self.spec.checkpoint.max_failures:
                raise ValueError(f"gave up after {self.failures} failures, the last: {reason}") from error
            self.event("failure", f"{reason}; starting again from the last checkpoint")
            with contextlib.suppress(Exception):
                self.algo.stop()
            try:
                self.open(resume=True)
                reopened = True
            except (RayError, RuntimeError) as another:  # as where the lost machine's successor is not there yet
                error = another

    def roll_back(self, trip: Trip) -> None:
        """Back to the best checkpoint within the budget, or to the pretrained model where there is none."""
        self.event(trip.guard, trip.message)
        checkpoint = store.best(self.folder)
        if checkpoint is None:
            self.algo.reset_policy()
            self.event(trip.guard, "no checkpoint lies within the budget: the pretrained weights are kept")
        else:
            self.algo.set_policy(checkpoint.weights())
            self.event(trip.guard, f"rolled back to iteration {checkpoint.iteration}")
        self.checkpoint()

    # -- what is left on disk

    def checkpoint(self, row: Mapping[str, float] = MappingProxyType({})) -> store.Checkpoint:
        """A whole checkpoint; the best so far is marked where this iteration was evaluated."""
        folder = self.folder / "checkpoints" / f"iteration_{self.algo.iteration:06d}"
        saved = save(self.spec, self.algo, folder)
        if (score := score_of(row)) is not None:
            leader = self.folder / "checkpoints" / "best.json"
            if not leader.is_file() or score > json.loads(leader.read_text())["score"]:
                store.mark_best(self.folder, saved, score)
        store.prune(self.folder, self.spec.checkpoint.keep)
        self.save_meter()
        self.keep(saved.path.name)
        return saved

    def keep(self, what: str, at_start: bool = False) -> None:
        """Sends what is new to the storage. That it cannot be sent ends a run at its start alone."""
        problem = self.mirror.send() if self.mirror is not None else ""
        if problem and at_start:
            raise ValueError(f"{what} {problem}: give another storage=URI")
        if problem:
            self.event("storage", f"{what} {problem}; it is tried again at the next checkpoint")

    def save_verdict(self, verdict: Verdict) -> None:
        path = self.folder / "evaluations" / f"iteration_{self.algo.iteration:06d}.npz"
        verdict.policy.save(path)

    def save_meter(self) -> None:
        """What rewards have cost so far, and what went wrong with them."""
        told = json.dumps(self.algo.rewards.meter.summary(), indent=1)
        store.write_text(self.folder / "rewards.json", told)

    def finish(self, status: str) -> dict[str, Any]:
        """Last evaluation, table as Parquet, report."""
        row = self.table.rows[-1] if self.table.rows else {}
        if "evaluate/reward" not in row or status.startswith("stopped"):
            verdict = self.algo.evaluate_policy()
            self.save_verdict(verdict)
            self.algo.verdict = verdict
            row = {**row, **{f"evaluate/{k}": v for k, v in verdict.scalars().items()}}
        self.save_meter()
        self.table.to_parquet(self.folder / "metrics.parquet")
        if status.startswith("stopped: scoring"):
            self.checkpoint()
            self.display.event(status)
        self.note(status=status, finished=now(), seconds=time.monotonic() - self.started)
        for sentence in [] if self.algo.verdict is None else self.algo.verdict.notes:
            self.display.event(sentence)
        report.write(self.folder, self.algo.domain, self.algo.config.evaluation_alpha())
        return row

    def event(self, guard: str, message: str) -> None:
        """Said to the user and kept in ``events.jsonl``."""
        iteration = self.algo.iteration if self.algo is not None else 0
        with (self.folder / "events.jsonl").open("a") as file:
            file.write(json.dumps({"iteration": iteration, "guard": guard, "message": message}) + "\n")
        self.display.event(message)

    def note(self, **values: Any) -> None:
        """Adds to ``run.json``."""
        path = self.folder / "run.json"
        told = json.loads(path.read_text()) if path.is_file() else {"name": self.name}
        store.write_text(path, json.dumps({**told, **values}, indent=1))

    def stop(self) -> None:
        """Ends the run after this iteration, saved."""
        self.interrupted = True
        self.display.event("stopping after this iteration; Ctrl-C again to stop at once")


def create_folder(spec: RunSpec) -> Path:
    """``output/name``, or ``name-2`` where that is taken, here or on the storage, with the checked config in it."""
    root = Path(spec.output)
    number = 1
    away = (lambda name: False) if spec.storage is None else taken(storage.ready(spec.storage))
    while True:
        folder = root / (spec.name if number == 1 else f"{spec.name}-{number}")
        if away(folder.name):
            number += 1
            continue
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            if not folder.is_dir():
                raise ValueError(f"{folder} is a file; choose another with output=FOLDER") from None
            number += 1
        except OSError as error:
            raise ValueError(f"cannot write to {root} ({error.strerror}); choose another with output=FOLDER") from None
    store.write_text(folder / "config.yaml", yaml.safe_dump(spec.full(), sort_keys=False))
    return folder


def columns(algo: Any, result: Mapping[str, Any]) -> dict[str, Any]:
    """RLlib's nested result as the flat columns that tables and guards know."""
    learner = result.get("learners", {}).get(DEFAULT_MODULE_ID, {})
    named = ("reward_mean", "reward_std", "reward_failed", "undecodable", "kl", "stale", "silent_timesteps", "waited_s")
    flat = {k: result[k] for k in named if k in result}
    flat |= {k: v for k, v in result.items() if k.startswith(("advantage", "effective", "guard_", "part/"))}
    flat |= {k: algo.counts[k] for k in ("reward_calls", "cache_hits", "chains")}
    flat |= {f"learner/{k}": v for k, v in learner.items() if not k.endswith("trainable_parameters")}
    verdict = {} if algo.verdict is None else algo.verdict.scalars()
    return {**flat, **{f"evaluate/{k}": v for k, v in verdict.items()}}


def save(spec: RunSpec, algo: Any, folder: Path, **more: Any) -> store.Checkpoint:
    """A whole checkpoint in ``folder``; ``more`` goes on its card."""
    told = spec.full()
    card = {
        "iteration": algo.iteration,
        "algorithm": told["algorithm"],
        "domain": told["domain"],
        "reward": told["reward"],
        "chain": told["chain"],
        "recipe": algo.rewards.recipe.state(),
        "alpha_bar": algo.env_runner.module.process.schedule.alpha_bar.tolist(),
        "config": told,
        **more,
    }
    weights = {"weights": algo.policy_state("denoiser")}
    if algo.settings.ema:
        weights["ema"] = algo.policy_state("ema")
    return store.save(folder, weights, card, lambda path: algo.save_to_path(str(path.resolve())))


def score_of(row: Mapping[str, float]) -> float | None:
    """What "best" means: the attained share, else the frontier share."""
    for key in ("evaluate/attained", "evaluate/frontier_share"):
        if key in row and math.isfinite(row[key]):
            return row[key]
    return None


def facts(spec: RunSpec) -> dict[str, Any]:
    """What a number may depend on."""
    machine = {"cpus": os.cpu_count(), "platform": sys.platform, "cuda": torch.cuda.is_available()}
    told = {"seed": spec.seed, "algorithm": spec.algorithm, "domain": spec.domain["name"]}
    return {**told, "versions": store.versions(), "machine": machine, "threads": torch.get_num_threads()}


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) or (hasattr(value, "ndim") and value.ndim == 0)
