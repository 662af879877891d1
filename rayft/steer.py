"""A ``Search`` in Ray Tune's own objects: space, sampler, scheduler, and callbacks that write down what happens."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.logger import JsonLoggerCallback, TBXLoggerCallback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining
from ray.tune.search.basic_variant import BasicVariantGenerator

from rayft import sweep
from rayft.board import Board
from rayft.search import LISTS, Distribution, Search
from rayft.track import TrackSettings

TUNES_OWN = {
    *("config", "date", "timestamp", "hostname", "pid", "node_ip", "time_since_restore", "iterations_since_restore"),
    *("trial_id", "experiment_tag", "checkpoint_dir_name", "done", "time_this_iter_s", "should_checkpoint"),
}


class Rungs(ASHAScheduler):
    """ASHA that a resumed sweep tells again what was compared before: Tune does not save its schedulers."""

    def __init__(self, folder: str, **told: Any) -> None:
        super().__init__(**told)
        self.folder = folder

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        for row in sweep.read_rows(Path(self.folder)):
            if row["trial"] == str(trial) and "score" in row:
                self._trial_info[trial.trial_id].on_result(trial, row["iteration"], row["score"])


class Ledger(tune.Callback):
    """Writes rows.jsonl, which ``send`` sends on before Tune notes anything, and tells the board."""

    def __init__(self, folder: Path, board: Board | None, total: int, send: Callable[[], None]) -> None:
        self.folder, self.board, self.total, self.send = folder, board, total, send
        self.rows = sweep.read_rows(folder)

    def __getstate__(self) -> dict[str, Any]:
        """Tune keeps its callbacks in a file; a resumed sweep brings a ledger of its own."""
        return {"folder": self.folder, "board": None, "total": self.total, "rows": [], "send": None}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._show()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if result.get("again"):
            return
        told = {name: value for name, value in result.items() if name not in TUNES_OWN}
        told["step"], told["seconds"] = told.pop("training_iteration", 0), told.pop("time_total_s", 0.0)
        told["process"] = result.get("pid")
        self._add({"trial": str(trial), "values": result.get("config", trial.config), **told})

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._end(trial, "stopped")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        lines = [line for line in str(trial.get_pickled_error() or "").splitlines() if line.strip()]
        self._end(trial, "failed", reason=lines[-1][:300] if lines else "its process was lost")

    def _end(self, trial: Any, how: str, **more: Any) -> None:
        self._add({"trial": str(trial), "ended": how, "values": trial.config, **more})
        if self.board is not None:
            found = sweep.outcomes((row for row in self.rows if row["trial"] == str(trial)), ended=False)
            self.board.ended(found[0])

    def _add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with (self.folder / "rows.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, default=_plain) + "\n")
        self.send()
        self._show()

    def _show(self) -> None:
        if self.board is not None:
            self.board.shows(sweep.outcomes(self.rows, ended=False), self.total)


def callbacks(folder: Path, board: Board, total: int, track: TrackSettings, send: Callable[[], None]) -> list[Any]:
    """The ledger, Tune's result.json, and the trackers that the run names."""
    found: list[Any] = [Ledger(folder, board, total, send), JsonLoggerCallback()]
    if track.tensorboard:
        found.append(TBXLoggerCallback())
    if track.wandb:
        from ray.air.integrations.wandb import WandbLoggerCallback

        found.append(WandbLoggerCallback(project=track.wandb, group=folder.name, dir=str(folder)))
    if track.mlflow:
        from ray.air.integrations.mlflow import MLflowLoggerCallback

        tags = {"sweep": folder.name}
        found.append(MLflowLoggerCallback(tracking_uri=track.mlflow, experiment_name="rayft", tags=tags))
    return found


def param_space(search: Search) -> dict[str, Any]:
    """The space as Tune draws it."""
    grid = search.sampler == "grid"
    return {key: tune.grid_search(list(d.values)) if grid else domain(d) for key, d in search.space.items()}


def domain(drawn: Distribution) -> Any:
    """One key's distribution."""
    if drawn.kind in LISTS:
        return tune.choice(list(drawn.values))
    return getattr(tune, drawn.kind)(*drawn.values)


def sampler(search: Search, seed: int, num_concurrent: int) -> Any:
    """What suggests values. ``num_concurrent`` 0: as many trials at a time as there is room for."""
    if search.sampler == "optuna":
        if find_spec("optuna") is None:
            raise ValueError("search.sampler: optuna needs a package that is not installed: pip install rayft[tune]")
        import optuna
        from ray.tune.search import ConcurrencyLimiter
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        return ConcurrencyLimiter(OptunaSearch(seed=seed, metric="score", mode="max"), max_concurrent=num_concurrent)
    return BasicVariantGenerator(random_state=seed, max_concurrent=num_concurrent)


def scheduler(search: Search, folder: Path, iterations: int) -> Any:
    """What ends trials, or changes them."""
    told, every = search.told, search.every
    if told.scheduler == "asha":
        grace = told.grace or every
        times = {"time_attr": "iteration", "max_t": iterations, "grace_period": grace}
        return Rungs(str(folder), reduction_factor=told.reduction, **times)
    if told.scheduler == "pbt":
        mutations: Any = {
            key: sorted(d.values) if d.numeric and d.kind in LISTS else list(d.values) if d.kind in LISTS else domain(d)
            for key, d in search.space.items()
        }
        return PopulationBasedTraining(
            time_attr="training_iteration",
            perturbation_interval=steps_between(search),
            hyperparam_mutations=mutations,
            custom_explore_fn=partial(inside, search.space),
        )
    return FIFOScheduler()


def steps_between(search: Search) -> int:
    """Steps of a trial from one of pbt's exchanges to the next."""
    return (search.told.perturb_every or search.every) // search.every


def inside(space: Mapping[str, Distribution], values: dict[str, Any]) -> dict[str, Any]:
    """Pbt multiplies by 0.8 and 1.2 whatever the range is; back into it."""
    return {key: space[key].clip(value) if key in space else value for key, value in values.items()}


def checkpoints(search: Search) -> tune.CheckpointConfig:
    """Pbt copies from checkpoints that may be old: it keeps all, and makes them when it exchanges."""
    if search.told.scheduler == "pbt":
        return tune.CheckpointConfig(checkpoint_frequency=steps_between(search), num_to_keep=None)
    return tune.CheckpointConfig(
        checkpoint_frequency=1, num_to_keep=1, checkpoint_score_attribute="score", checkpoint_score_order="max"
    )


def name_of(trial: Any) -> str:
    """Trials by number; the tag begins with it."""
    number = trial.experiment_tag.partition("_")[0]
    return f"trial_{int(number):05d}" if number.isdigit() else f"trial_{trial.trial_id}"


def _plain(value: Any) -> Any:
    told = value.item() if hasattr(value, "item") else str(value)
    return None if isinstance(told, float) and math.isnan(told) else told
