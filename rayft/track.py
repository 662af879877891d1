"""Where the rows of metrics.csv also go: TensorBoard, Weights & Biases, MLflow.

Each shows an iteration once, also after a resume that goes back a few, and none can cost a run: a tracker is opened at
its first row, and its first failure is one warning, then silence.
"""

from __future__ import annotations

import importlib
import math
import os
import time
import uuid
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rayft.settings import STRICT

Backend = tuple[Callable[[int, Mapping[str, float]], None], Callable[[], None]]  # log and close


@dataclass(frozen=True)
class TrackSettings:
    """Who is told about every iteration, besides metrics.csv."""

    __pydantic_config__ = STRICT

    tensorboard: bool = True
    """Event files in the run's folder tensorboard/."""
    wandb: str | None = None
    """Project at Weights & Biases; the environment says who logs in, and WANDB_MODE=offline needs no network."""
    mlflow: str | None = None
    """Tracking URI of MLflow: http://host:5000, or sqlite:////absolute/path.db for a file."""


class Tracker(Protocol):
    def log(self, iteration: int, row: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


def open_trackers(spec: TrackSettings, run: Path, config: Mapping[str, Any]) -> list[Tracker]:
    """Those that ``spec`` names. A missing package is a ``ValueError`` now; everything else waits for the first row."""
    for package, function in (("wandb", "init"), ("mlflow", "MlflowClient")):
        if getattr(spec, package) and not hasattr(_imported(package), function):  # W&B's own folder wandb/ imports too
            raise ValueError(f"track.{package} needs a package that is not installed: pip install rayft[{package}]")
    backends = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}
    told = {name: getattr(spec, name) for name in backends}
    return [Guarded(name, backends[name], (where, run, config)) for name, where in told.items() if where]


class Guarded:
    """A tracker that is told finite numbers only, and nothing more after a failure."""

    def __init__(self, name: str, opens: Callable[..., Backend], told: tuple[Any, Path, Mapping[str, Any]]) -> None:
        self.name, self.opens, self.told = name, opens, told
        self.backend: Backend | None = None
        self.failed = False

    def log(self, iteration: int, row: Mapping[str, float]) -> None:
        if not self.failed:
            self._try(lambda: self._log(iteration, {k: float(v) for k, v in row.items() if math.isfinite(v)}))

    def close(self) -> None:
        if self.backend:
            self._try(self.backend[1])
        self.backend = None

    def _log(self, iteration: int, row: Mapping[str, float]) -> None:
        self.backend = self.backend or self.opens(*self.told, iteration)
        self.backend[0](iteration, row)

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            self.failed = True
            why = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            told = f"{self.name} failed ({why}) and is told nothing more; metrics.csv holds every row"
            warnings.warn(told, RuntimeWarning, stacklevel=3)


def _tensorboard(_: bool, run: Path, config: Mapping[str, Any], first: int) -> Backend:
    """Event files; what an earlier process wrote at ``first`` or after is purged."""
    from tensorboardX import SummaryWriter

    parts = len(list((run / "tensorboard").glob("events.out.tfevents.*")))
    purge, suffix = first if parts else None, f".{parts:04d}"  # two parts of one second would share a name
    writer = SummaryWriter(str(run / "tensorboard"), purge_step=purge, filename_suffix=suffix)

    def log(iteration: int, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            writer.add_scalar(name, value, iteration)
        writer.flush()  # a killed run must not lose rows that its resume will not repeat

    return log, writer.close


def _wandb(project: str, run: Path, config: Mapping[str, Any], first: int) -> Backend:
    """One run there per run folder. Steps only rise at W&B: of a row that a resume repeats, the first stays."""
    os.environ.setdefault("WANDB_INIT_TIMEOUT", "30")  # seconds; its own default is 90
    os.environ.setdefault("WANDB_FINISH_TIMEOUT", "60")  # its own waits for ever; `wandb sync` uploads the rest
    ident, told = _remembered(run, "wandb", lambda: uuid.uuid4().hex[:8]), {"dir": str(run), "config": dict(config)}
    there = _imported("wandb").init(project=project, id=ident, name=run.name, resume="allow", reinit="create_new", **told)
    return lambda iteration, row: there.log(dict(row), step=iteration), there.finish


def _mlflow(uri: str, run: Path, config: Mapping[str, Any], first: int) -> Backend:
    """One run there per run folder, in the experiment rayft. A row that a resume repeats is not logged again."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # its own 7 hold a run up for minutes
    mlflow = _imported("mlflow")
    client = mlflow.MlflowClient(tracking_uri=uri)

    def create() -> str:
        found = client.get_experiment_by_name("rayft")
        experiment = found.experiment_id if found else client.create_experiment("rayft")
        ident = client.create_run(experiment, run_name=run.name).info.run_id
        client.log_batch(ident, params=[mlflow.entities.Param(k, str(v)[:500]) for k, v in config.items()])
        return ident

    ident = _remembered(run, "mlflow", create)
    last = client.get_run(ident).data.metrics.get("iteration", -math.inf)
    client.update_run(ident, status="RUNNING")

    def log(iteration: int, row: Mapping[str, float]) -> None:
        now, told = int(time.time() * 1000), {**row, "iteration": iteration}
        if iteration > last:
            client.log_batch(ident, [mlflow.entities.Metric(k, v, now, iteration) for k, v in told.items()])

    return log, lambda: client.set_terminated(ident)


def _imported(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        return None


def _remembered(run: Path, name: str, make: Callable[[], str]) -> str:
    """The run's name at a tracker, made once and kept in the run folder."""
    path = run / f".{name}_id"
    if not path.is_file():
        path.write_text(make())
    return path.read_text()
