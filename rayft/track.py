"""Where the rows of metrics.csv also go: TensorBoard, Weights & Biases, MLflow.

A tracker shows each iteration once, also after a resume that goes back a few, and never costs a run anything: it is
opened at the first row, and the first failure is one warning, then silence.
"""

from __future__ import annotations

import importlib
import math
import os
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rayft.settings import STRICT


@dataclass(frozen=True)
class TrackSettings:
    """Who is told about every iteration, besides metrics.csv."""

    __pydantic_config__ = STRICT

    tensorboard: bool = True
    """Event files in the run's folder tensorboard/."""
    wandb: str | None = None
    """Project at Weights & Biases; the environment says who logs in, and WANDB_MODE=offline works without network."""
    mlflow: str | None = None
    """Tracking URI of MLflow, such as http://host:5000; sqlite: URIs need the full mlflow, not mlflow-skinny."""


class Tracker(Protocol):
    """Someone who is told about every iteration."""

    def log(self, iteration: int, row: Mapping[str, float]) -> None:
        """One row. Iterations rise, but for the step back of a resume."""
        ...

    def close(self) -> None:
        """No row follows."""
        ...


def open_trackers(spec: TrackSettings, run: Path, config: Mapping[str, Any]) -> list[Tracker]:
    """Those that ``spec`` names. A missing package is a ``ValueError`` now; everything else waits for the first row."""
    found: list[Tracker] = []
    if spec.tensorboard:
        found.append(Guarded("TensorBoard", lambda iteration: TensorBoard(run, iteration)))
    if spec.wandb is not None:
        _require("wandb", "init")
        found.append(Guarded("Weights & Biases", lambda _: WandB(spec.wandb, run, config)))
    if spec.mlflow is not None:
        _require("mlflow", "MlflowClient")
        found.append(Guarded("MLflow", lambda _: MLflow(spec.mlflow, run, config)))
    return found


class Guarded:
    """Leaves out what is not finite; opens its tracker at the first row and drops it at the first failure."""

    def __init__(self, name: str, opens: Callable[[int], Tracker]) -> None:
        self.name, self.opens, self.tracker, self.failed = name, opens, None, False

    def log(self, iteration: int, row: Mapping[str, float]) -> None:
        if self.failed:
            return
        try:
            self.tracker = self.tracker or self.opens(iteration)
            self.tracker.log(iteration, {k: float(v) for k, v in row.items() if math.isfinite(v)})
        except Exception as error:
            self._drop(error)

    def close(self) -> None:
        tracker, self.tracker = self.tracker, None
        try:
            if tracker is not None:
                tracker.close()
        except Exception as error:
            self._drop(error)

    def _drop(self, error: Exception) -> None:
        self.failed = True
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        warnings.warn(f"{self.name} failed ({reason}) and is told nothing more; metrics.csv holds every row", stacklevel=4)


class TensorBoard:
    """Event files. Rows from the first iteration on that an earlier process wrote are purged."""

    def __init__(self, run: Path, first: int) -> None:
        from tensorboardX import SummaryWriter

        folder = run / "tensorboard"
        parts = len(list(folder.glob("events.out.tfevents.*")))  # a name is a second: two parts in one need the suffix
        purge = first if parts else None
        self.writer = SummaryWriter(str(folder), purge_step=purge, filename_suffix=f".{parts:03d}")

    def log(self, iteration: int, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            self.writer.add_scalar(name, value, iteration)
        self.writer.flush()  # a killed run must not lose rows that its checkpoint will not repeat

    def close(self) -> None:
        self.writer.close()


class WandB:
    """One run at W&B per run folder. Steps must rise there: of a row that a resume repeats, the first is kept."""

    def __init__(self, project: str | None, run: Path, config: Mapping[str, Any]) -> None:
        import wandb

        ident = _remembered(run, "wandb", lambda: uuid.uuid4().hex[:8])
        told: dict[str, Any] = {"project": project, "name": run.name, "dir": str(run), "config": dict(config)}
        self.run = wandb.init(id=ident, resume="allow", reinit="create_new", **told)

    def log(self, iteration: int, row: Mapping[str, float]) -> None:
        self.run.log(dict(row), step=iteration)

    def close(self) -> None:
        self.run.finish(quiet=True)


class MLflow:
    """One MLflow run per run folder. A row that a resume repeats is not logged again."""

    def __init__(self, uri: str | None, run: Path, config: Mapping[str, Any]) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # MLflow's 7 hold a run up for minutes
        from mlflow import MlflowClient

        self.client = MlflowClient(tracking_uri=uri)
        self.ident = _remembered(run, "mlflow", lambda: self._create(run, config))
        self.last = self.client.get_run(self.ident).data.metrics.get("iteration", -math.inf)
        self.client.update_run(self.ident, status="RUNNING")

    def _create(self, run: Path, config: Mapping[str, Any]) -> str:
        from mlflow.entities import Param

        found = self.client.get_experiment_by_name("rayft")
        experiment = found.experiment_id if found else self.client.create_experiment("rayft")
        ident = self.client.create_run(experiment, run_name=run.name).info.run_id
        params = [Param(key, str(value)[:500]) for key, value in _flat(config)]
        for start in range(0, len(params), 100):
            self.client.log_batch(ident, params=params[start : start + 100])
        return ident

    def log(self, iteration: int, row: Mapping[str, float]) -> None:
        if iteration <= self.last:
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        told = {**row, "iteration": float(iteration)}
        self.client.log_batch(self.ident, metrics=[Metric(k, v, now, iteration) for k, v in told.items()])

    def close(self) -> None:
        self.client.set_terminated(self.ident)


def _require(package: str, name: str) -> None:
    try:
        found = importlib.import_module(package)
    except ImportError:
        found = None
    if not hasattr(found, name):  # the folder wandb/ that W&B leaves behind can be imported too
        raise ValueError(f"track.{package} needs the package {package}, which is missing: pip install rayft[{package}]")


def _remembered(run: Path, name: str, make: Callable[[], str]) -> str:
    """The run's name at the tracker's, made once and kept in the run folder."""
    path = run / f".{name}_id"
    if not path.is_file():
        path.write_text(make())
    return path.read_text().strip()


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
