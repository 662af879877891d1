"""One trial of a sweep: a run whose steps are evaluations, told to Ray Tune.

    step = evaluate.every iterations + one evaluation -> one flat row of numbers

Its config holds the dotted keys of the space and nothing else; the run they vary comes once for all trials. What went
wrong becomes the trial's reason rather than the sweep's end; a lost process is raised, for Tune to go on elsewhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from pyarrow import fs
from ray import tune
from ray.exceptions import RayError
from ray.rllib.core import DEFAULT_MODULE_ID

from rayft import loop, store
from rayft import spec as specs
from rayft.guards import watch
from rayft.imports import reason
from rayft.lease import alone
from rayft.objective import Objective
from rayft.search import with_values
from rayft.storage import Place, patiently
from rayft.verdict import Samples

UNKNOWN = -1e9  # what Tune is told where there is no objective: it cannot rank NaN
SHOWN = ("reward", "kl", "attained", "frontier_share", "diversity", "undecodable")


@dataclass(frozen=True)
class Told:
    """What all trials of a sweep have in common."""

    tree: dict[str, Any]  # the run, without the values that a trial puts there
    home: Place  # of what they share
    where: str  # its working directory, which relative paths in the run are from
    objective: Objective


class Trial(tune.Trainable):
    """A run under Tune. ``reset_config`` makes the next one in the same process."""

    algo: Any = None  # a DiffusionRL once open

    def setup(self, config: dict[str, Any], told: Told | None = None) -> None:
        assert told is not None
        self.told = told
        with contextlib.suppress(OSError):  # another machine need not have it
            os.chdir(told.where)
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.cleanup()
        self.row: dict[str, Any] = {}
        self.ended = False  # it was killed after its last row, before Tune noted its end
        self.wrong = self._attempt(lambda: self._open(new_config))
        return True

    def cleanup(self) -> None:
        if self.algo is not None:
            self.algo.stop()
        self.algo = None

    def step(self) -> dict[str, Any]:
        if self.wrong is None:
            self.wrong = self._attempt(self._advance)
        if self.wrong is not None:
            told = {"objective": math.nan, "score": UNKNOWN, "reason": self.wrong, "status": "failed", "done": True}
            self.row = {"iteration": 0, "paid": {}, **self.row, **self._costs(), **told}
        return self.row

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        if self.algo is not None and self.row:
            loop.save(self.spec, self.algo, Path(checkpoint_dir), row=_plain(self.row), step=self.iteration)

    def restore(self, checkpoint_path: Any) -> None:
        if still_there(checkpoint_path):
            super().restore(checkpoint_path)

    def load_checkpoint(self, checkpoint: Any) -> None:
        if self.algo is not None:
            self.wrong = self._attempt(lambda: self._load(Path(checkpoint)))

    # -- the run

    def _open(self, values: Mapping[str, Any]) -> None:
        self.spec = specs.parse(with_values(self.told.tree, values))
        if self.spec.resources.torch_threads is not None:
            torch.set_num_threads(self.spec.resources.torch_threads)
        config = self.spec.checked()
        self.evaluate = config.section("evaluate")
        self.guards = watch(self.evaluate)
        self.algo = config.build_algo()
        self.algo.horizon = self.spec.iterations
        self.mark = self.algo.rewards.meter.mark()
        share_pretrained(self.algo, self.spec, self.told.home)

    def _advance(self) -> None:
        algo, last = self.algo, self.spec.iterations
        if self.ended:
            self.row = {**self.row, **self._costs(), "done": True, "again": True}
            return
        every, why = self.evaluate.every or last, ""
        until = min(last, (algo.iteration // every + 1) * every)
        while algo.iteration < until and not why:
            why = algo.refusal() or ""
            if not why:
                row = loop.columns(algo, algo.train())
                drawn = {name: value for name, value in row.items() if not name.startswith("evaluate/")}
                why = self._trip(drawn)
        if why:  # its last evaluation still stands, but the checkpoint of this is not to be the best
            self.row = {**self.row, "iteration": algo.iteration, **self._costs(), "objective": math.nan}
            self.row |= {"score": UNKNOWN, "reason": why, "status": "stopped", "done": True}
            return
        verdict = algo.verdict or algo.evaluate_policy()
        scalars = verdict.scalars()
        over = self._trip({f"evaluate/{name}": value for name, value in scalars.items()})
        objective, missing = self.told.objective.read(verdict)
        objective = math.nan if over else objective
        self.row = {
            "iteration": algo.iteration,
            **{name: scalars[name] for name in SHOWN if name in scalars},
            "evaluate": {name: value for name, value in scalars.items() if name not in SHOWN},
            "objective": objective,
            "score": objective if math.isfinite(objective) else UNKNOWN,
            "reason": over or missing,
            "status": "stopped" if over else "finished" if algo.iteration >= last else "running",
            "done": bool(over) or algo.iteration >= last,
            **self._costs(),
        }

    def _load(self, path: Path) -> None:
        """Weights, optimizer and meter of a checkpoint, which may be another trial's; the numbers are this trial's."""
        found = store.load(path)
        store.trusted(found, trust=False)
        self.algo.restore_from_path(str(found.state.resolve()))
        self.algo.sync()
        told = {"lr": self.algo.settings.lr, "weight_decay": self.algo.settings.weight_decay}
        self.algo.learner_group.foreach_learner(lambda learner: _set_optimizer(learner, told))
        share_pretrained(self.algo, self.spec, self.told.home)
        self.mark, self.row = self.algo.rewards.meter.mark(), dict(found.card["row"])
        own = found.card["config"] == json.loads(json.dumps(self.spec.full()))
        self.ended = own and self.algo.iteration >= self.spec.iterations

    def _costs(self) -> dict[str, Any]:
        """Calls so far, by purpose; ``paid`` since the last row, so that what is copied by pbt is not added twice."""
        if self.algo is None:
            return {"paid": {}}
        meter, settings = self.algo.rewards.meter, self.algo.settings
        since, self.mark = meter.since(self.mark), meter.mark()
        paid: Counter[str] = Counter()
        for (purpose, _), counts in since.items():
            paid[purpose] += counts.calls
        by_purpose: Counter[str] = Counter()
        for (purpose, _), counts in self.mark.items():
            by_purpose[purpose] += counts.calls
        return {
            "reward_calls": meter.total_calls,
            **{f"{purpose}_calls": by_purpose[purpose] for purpose in ("payoff", "train", "evaluate", "pretrained")},
            "paid": dict(paid),
            "lr_used": next(iter(self.algo.learner_group.foreach_learner(_lr_of))).get(),
            **({"temperature_used": settings.temperature} if hasattr(settings, "temperature") else {}),
        }

    def _trip(self, row: Mapping[str, float]) -> str:
        return next((trip.message for guard in self.guards for trip in guard(row)), "")

    def _attempt(self, act: Callable[[], Any]) -> str | None:
        """Why it could not be done. A lost process is Tune's to replace, from the last checkpoint."""
        try:
            act()
        except RayError as error:
            cause = getattr(error, "cause", None)
            if not isinstance(cause, ValueError):
                raise
            return reason(cause)
        except RuntimeError as error:
            if self.algo is not None and self.algo.config.num_learners:
                raise  # learners that lose one of them say no more than this
            return reason(error)
        except Exception as error:
            return reason(error)
        return None


def still_there(noted: Any) -> bool:
    """Whether there is something to restore.

    A killed sweep's note may name a checkpoint that was dropped since: it is made to name the trial's newest whole one
    instead, and without any the trial starts anew.
    """
    place = getattr(noted, "checkpoint", None)
    if place is None or place.filesystem.get_file_info(place.path).type == fs.FileType.Directory:
        return True
    folder = str(Path(place.path).parent)
    for name in reversed(Place(folder, place.filesystem, folder).listing()):
        if not fnmatch(name, "checkpoint_*/card.json"):
            continue
        found = tune.Checkpoint(f"{folder}/{Path(name).parent}", place.filesystem)
        with found.as_directory() as here:
            card = json.loads((Path(here) / "card.json").read_text())
            whole = store.tree_hash(Path(here) / "rllib") == card["rllib_sha256"]
        if whole:
            noted.checkpoint, noted.metrics = found, {"training_iteration": card["step"]}
            return True
    return False


def share_pretrained(algo: Any, spec: specs.RunSpec, home: Place) -> None:
    """The pretrained model's samples, drawn and scored once in a sweep by whichever trial needs them first.

    Trials whose chain, domain or reward differ have files of their own.
    """
    told = spec.full()
    scoring = {name: told["scoring"][name] for name in ("on_failure", "floor", "undecodable")}
    what = [told[name] for name in ("domain", "chain", "reward", "watch")] + [scoring]
    what.append(told["evaluate"]["pretrained_chains"])
    digest = hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:8]
    samples, recipe = f"pretrained-{digest}.npz", f"pretrained-{digest}.json"
    with alone(home, f"pretrained-{digest}"):
        if not patiently(lambda: home.has(samples)):
            algo.draw_pretrained()
            if algo.scoring.max_reward_calls is None:
                _write(home, f"signal-{digest}.json", algo.signal())
            _write(home, recipe, algo.rewards.recipe.state())
            with tempfile.TemporaryDirectory() as folder:
                algo.pretrained.save(Path(folder) / samples)
                patiently(lambda: home.put(Path(folder) / samples, samples))
    algo.pretrained = Samples.load(patiently(lambda: home.fetched(samples)))
    state = json.loads(patiently(lambda: home.read(recipe)) or b"{}")
    algo.rewards.recipe = algo.rewards.recipe.with_state(state)


def _write(home: Place, name: str, told: Any) -> None:
    patiently(lambda: home.write(name, json.dumps(told).encode()))


def _set_optimizer(learner: Any, told: Mapping[str, float]) -> None:
    """A restored optimizer keeps the checkpoint's numbers, which may be another trial's, until its first update."""
    for optimizer in learner.get_optimizers_for_module(DEFAULT_MODULE_ID):
        for group in optimizer[1].param_groups:
            group.update(told)


def _lr_of(learner: Any) -> float:
    return float(learner.get_optimizers_for_module(DEFAULT_MODULE_ID)[0][1].param_groups[0]["lr"])


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in ("paid", "done", "again")}
