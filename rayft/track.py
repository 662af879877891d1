"""Where the rows of metrics.csv also go: TensorBoard, Weights & Biases, MLflow.

Each shows an iteration once, also after a resume that goes back a few, and none can cost a run: a tracker is opened at
its first row, and its first failure is one warning, then silence.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from rayft.settings import STRICT

Backend = tuple[Callable[[int, dict[str, float]], Any], Callable[[], Any]]  # log and close


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
    for package in ("wandb", "mlflow"):
        if getattr(spec, package) and not getattr(find_spec(package), "origin", None):  # a mere folder has no origin
            raise ValueError(f"track.{package} needs a package that is not installed: pip install rayft[{package}]")
    known = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}
    told = {name: getattr(spec, name) for name in known}
    return [Guarded(name, partial(known[name], where, run, config)) for name, where in told.items() if where]


class Guarded:
    """A tracker that is told finite numbers only, and nothing more after a failure."""

    def __init__(self, name: str, opens: Callable[[int], Backend]) -> None:
        self.name, self.opens, self.failed, self.last = name, opens, False, -math.inf
        self.backend: Backend | None = None

    def log(self, iteration: int, row: Mapping[str, float]) -> None:
        with self._quiet():
            if iteration <= self.last:  # the run went back to a checkpoint: as after a resume
                self.close()
            if not self.failed:
                self.backend, self.last = self.backend or self.opens(iteration), iteration
                self.backend[0](iteration, {k: float(v) for k, v in row.items() if math.isfinite(v)})

    def close(self) -> None:
        backend, self.backend = self.backend, None
        with self._quiet():
            if backend:
                backend[1]()

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            why = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            if not self.failed:
                warnings.warn(f"{self.name} is told nothing more, metrics.csv is: {why}", RuntimeWarning, stacklevel=4)
            self.failed = True


def _tensorboard(_: bool, run: Path, config: Mapping[str, Any], first: int) -> Backend:
    """Event files; what an earlier part holds at ``first`` or after is purged.

    Not SummaryWriter: its flush leaves rows in a queue, and a killed run loses those that its resume does not repeat.
    """
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]
    from tensorboardX.summary import scalar

    folder = run / "tensorboard"
    folder.mkdir(exist_ok=True)
    suffix = f".{len(list(folder.iterdir())):04d}"  # parts of one second would share a name
    writer = EventsWriter(str(folder / "events"), suffix)
    writer.write_event(Event(step=first, session_log=SessionLog(status=SessionLog.START)))

    def log(iteration: int, row: dict[str, float]) -> None:
        for name, value in row.items():
            writer.write_event(Event(wall_time=time.time(), step=iteration, summary=scalar(name, value)))
        writer.flush()

    return log, writer.close


def _wandb(project: str, run: Path, config: Mapping[str, Any], first: int) -> Backend:
    """One run there per run folder. Steps only rise at W&B: of a row that a resume repeats, the first stays."""
    os.environ.setdefault("WANDB_INIT_TIMEOUT", "30")  # seconds; its own default is 90
    os.environ.setdefault("WANDB_FINISH_TIMEOUT", "60")  # its own waits for ever; `wandb sync` uploads the rest
    import wandb

    path = run / ".wandb_id"
    ident = path.read_text() if path.is_file() else os.urandom(4).hex()
    path.write_text(ident)
    told = {"project": project, "name": run.name, "dir": str(run), "config": dict(config), "reinit": "create_new"}
    there = wandb.init(id=ident, resume="allow", **told)
    return lambda iteration, row: there.log(row, step=iteration), there.finish


def _mlflow(uri: str, run: Path, config: Mapping[str, Any], first: int) -> Backend:
    """One run there per run folder, in the experiment rayft. A row that a resume repeats is not logged again."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # its own 7 hold a run up for minutes
    import mlflow

    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment("rayft")
    path = run / ".mlflow_id"
    there = mlflow.start_run(path.read_text() if path.is_file() else None, run_name=run.name, nested=True)
    ident, last = there.info.run_id, there.data.metrics.get("iteration", -math.inf)
    if not path.is_file():
        sections = {k: v if isinstance(v, Mapping) else {"": v} for k, v in config.items()}
        flat = {f"{section}.{k}".strip("."): v for section, told in sections.items() for k, v in told.items()}
        mlflow.log_params({key: str(value)[:500] for key, value in flat.items()})
        path.write_text(ident)

    def log(iteration: int, row: dict[str, float]) -> None:
        if iteration > last:
            mlflow.log_metrics({**row, "iteration": iteration}, step=iteration, run_id=ident)

    return log, mlflow.end_run
