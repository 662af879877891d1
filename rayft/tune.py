"""``rayft tune``: many runs of one YAML, their hyper-parameters drawn by its ``search:`` block, on Ray Tune.

    search -> Tune (who runs, who is stopped) -> Trial (a run) -> rows.jsonl -> tables, best checkpoint, report

A sweep is a folder, or one on a storage that every machine reaches and one here that is sent there. What is paid once
for all trials lies in it: the samples that price J*, and RGDM's pay-off bank.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import yaml
from ray import tune

from rayft import board, cluster, comeback, display, loop, mirror, steer, storage, store, sweep, sweep_page
from rayft import search as searches
from rayft import spec as specs
from rayft.search import Search
from rayft.sweep import Outcome
from rayft.trial import Told, Trial

ENVIRONMENT = {  # how Tune is told to be quiet, to note the state of trials often, and to leave Ctrl-C to us
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "2",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


@dataclass
class Sweep:
    """A sweep and its folder."""

    spec: specs.RunSpec
    search: Search
    folder: Path
    view: board.Board
    interrupted: bool = False
    calls: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    problem: str = ""  # why the last send failed

    def __post_init__(self) -> None:
        self.home = home_of(self.spec, self.folder)
        self.mirror = None if self.spec.storage is None else mirror.Mirror(self.folder, self.home)

    def execute(self, resume: bool) -> list[Outcome]:
        """Runs to the end; outcomes, the best first. ``sweep.json`` says how it ended."""
        before = _spent(self.folder) if resume else 0.0
        began = time.monotonic()
        facts = {**loop.facts(self.spec), "trials": self.search.trials, "seconds": before}
        self.note(status="running", started=loop.now(), command=sys.argv, **facts)
        try:
            with self.signals(), _environment():
                tuner = self.restored() if resume else self.tuner()
                results = tuner.fit()
        except BaseException as error:
            self.note(status=f"failed: {error or type(error).__name__}")
            raise
        self.seconds = before + time.monotonic() - began
        limit = self.search.told.time_limit_s
        late = limit is not None and time.monotonic() - began >= limit
        status = "interrupted" if self.interrupted else f"stopped after {limit:g} s" if late else "finished"
        self.note(status=status, finished=loop.now(), seconds=self.seconds)
        return self.finish(results)

    # -- what Tune is told

    def tuner(self) -> tune.Tuner:
        """A fresh sweep."""
        told, seed = self.search.told, self.spec.seed
        random.seed(seed)  # pbt asks Python's and numpy's own generators
        np.random.seed(seed)  # noqa: NPY002
        at_once = concurrency(self.spec, self.search)
        pbt = told.scheduler == "pbt"
        searcher = steer.sampler(self.search, seed, 0 if pbt else at_once)
        return tune.Tuner(
            self.trainable(),
            param_space=steer.param_space(self.search),
            tune_config=tune.TuneConfig(
                metric="score",
                mode="max",
                num_samples=1 if self.search.sampler == "grid" else self.search.trials,
                search_alg=searcher,
                scheduler=steer.scheduler(self.search, self.folder, self.spec.iterations),
                time_budget_s=told.time_limit_s,
                reuse_actors=True,
                trial_name_creator=steer.name_of,
                trial_dirname_creator=steer.name_of,
            ),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=self.home.root,
                storage_filesystem=self.files,
                callbacks=self.callbacks(),
                checkpoint_config=steer.checkpoints(self.search),
                failure_config=tune.FailureConfig(max_failures=self.spec.checkpoint.max_failures),
                verbose=0,
            ),
        )

    def restored(self) -> tune.Tuner:
        """The sweep as it was last noted: finished trials stay, the others go on from their checkpoints."""
        path, space = f"{self.home.root}/trials", steer.param_space(self.search)
        found = tune.Tuner.restore(path, self.trainable(), param_space=space, storage_filesystem=self.files)
        own: Any = found._local_tuner
        own.get_run_config().callbacks = self.callbacks()
        if isinstance(own._tune_config.scheduler, steer.Rungs):
            own._tune_config.scheduler.folder = str(self.folder)  # where it was begun may be another machine
        return found

    @property
    def files(self) -> Any:
        """Tune finds its own way to a disk."""
        return None if self.home.local else self.home.files

    def trainable(self) -> Any:
        told = Told(self.search.banked(self.home.child("bank").uri), self.home, os.getcwd(), self.search.objective)
        return tune.with_resources(tune.with_parameters(Trial, told=told), request(self.spec))

    def callbacks(self) -> list[Any]:
        return steer.callbacks(self.folder.resolve(), self.view, self.search.trials, self.spec.track, self.send)

    # -- what is left on disk

    def finish(self, results: Any) -> list[Outcome]:
        """Tables, the best checkpoint, its YAML, and the page."""
        self.fetch()
        rows = sweep.read_rows(self.folder)
        found, self.calls = sweep.outcomes(rows, ended=True), sweep.paid(rows)
        if found:
            sweep.write_tables(self.folder, found)
        best = sweep.winner(found)
        if best is not None:
            self.keep(best, results)
        self.note(calls=dict(self.calls))
        sweep_page.write(self.folder)
        self.send()
        return found

    def fetch(self) -> None:
        """What trials left at the storage for the page."""
        if self.mirror is None:
            return
        try:
            for name in storage.patiently(self.home.listing):
                if name.startswith(("pretrained-", "signal-")):
                    self.mirror.fetch(name)
        except (OSError, pa.ArrowException) as error:
            self.view.event(f"the page lacks what lies at {self.home.uri} ({storage.plainly(error)})")

    def send(self) -> None:
        """To the storage. What cannot be sent is told once, and goes with the next row."""
        before, self.problem = self.problem, "" if self.mirror is None else self.mirror.send()
        if self.problem and not before:
            self.view.event(f"the sweep {self.problem}")

    def keep(self, best: Outcome, results: Any) -> None:
        """<sweep>/best and best.yaml."""
        mine = [one for one in results if Path(one.path).name == best.name]
        known = [pair for one in mine for pair in one.best_checkpoints if pair[1].get("score", -math.inf) > -math.inf]
        if known:
            temporary = self.folder / ".best.tmp"
            shutil.rmtree(temporary, ignore_errors=True)
            max(known, key=lambda pair: pair[1]["score"])[0].to_directory(str(temporary))
            shutil.rmtree(self.folder / "best", ignore_errors=True)
            temporary.rename(self.folder / "best")
        tree = searches.with_values(self.search.tree, best.values)
        tree["name"] = f"{self.folder.name}-best"
        head = (
            f"# {best.name} of the sweep {self.folder.name}: {self.search.objective} {best.objective:.4g} at iteration "
            f"{best.best['iteration']}\n# rayft run {self.folder / 'best.yaml'}\n"
        )
        plain = {key: value for key, value in tree.items() if value not in (None, {}, [])}
        store.write_text(self.folder / "best.yaml", head + yaml.safe_dump(plain, sort_keys=False))

    def note(self, **values: Any) -> None:
        """Adds to ``sweep.json``, without which nobody finds the sweep at its storage."""
        told = {"name": self.folder.name, **_told(self.folder), **values}
        store.write_text(self.folder / "sweep.json", json.dumps(told, indent=1, default=str))
        self.send()

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """The first Ctrl-C ends the sweep once it is noted, the second at once."""

        def ask(number: int, frame: Any) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
            self.view.event("stopping; Ctrl-C again to stop at once")
            os.kill(os.getpid(), signal.SIGUSR1)  # Tune ends at this

        def early(number: int, frame: Any) -> None:
            raise KeyboardInterrupt

        numbers = {signal.SIGINT: ask, signal.SIGTERM: ask, signal.SIGUSR1: early}
        before = {number: signal.signal(number, handler) for number, handler in numbers.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def asked(
    file: str | None, overrides: Sequence[str], resume: str | bool | None, trust: bool = False
) -> tuple[specs.RunSpec, Path | None]:
    """(the spec, the folder of the sweep that goes on)."""
    spec = None if file is None else specs.read(file, overrides)
    folder, away = comeback.meant(resume, spec, trust, sweep=True)
    if folder is None:
        if spec is None:
            what = "resume: give the folder of a sweep, or its YAML" if resume else "tune: give a YAML with a search: "
            raise ValueError(f"nothing to {what}{'' if resume else 'block, or the name of a shipped config'}")
        return spec, None
    own = opened(folder, away, trust)
    if spec is not None and _lasting(spec) != _lasting(own):
        raise ValueError(f"{folder} was begun with another config, which a sweep keeps; resume it by its folder alone")
    return own, folder


def _lasting(spec: specs.RunSpec) -> dict[str, Any]:
    """The config without where it lies and what it is called there."""
    return {key: value for key, value in spec.full().items() if key not in ("name", "output", "storage")}


def opened(folder: Path, away: str | None = None, trust: bool = False) -> specs.RunSpec:
    """The spec of an existing sweep, which is this user's: resuming unpickles what Tune left there."""
    if not (folder / mirror.SWEEP).is_file():
        raise ValueError(f"{folder} is not a sweep: it has no sweep.json; give the folder that `rayft tune` printed")
    spec = comeback.opened(folder, away)
    home = home_of(spec, folder)
    if not storage.patiently(lambda: home.has("trials/tuner.pkl")):
        raise ValueError(f"{folder} was stopped before its first trial; start it again without --resume")
    if not trust:
        mirror.owned(home, storage.patiently(home.listing))
    return spec


def home_of(spec: specs.RunSpec, folder: Path) -> storage.Place:
    """Where a sweep's trials and what they share lie: on its storage, else in its folder."""
    here = folder.resolve()
    return storage.place(str(here)) if spec.storage is None else storage.place(spec.storage).child(here.name)


def tried(spec: specs.RunSpec) -> Search:
    """The search of a spec, after all checks that need no Ray."""
    search = searches.read(spec)
    spec.tried()
    return search


def run(spec: specs.RunSpec, search: Search, folder: Path | None, quiet: bool) -> int:
    """A sweep from its start, or from where the one in ``folder`` ended; the command's exit code."""
    concurrency(spec, search)
    resume = folder is not None
    folder = folder or loop.create_folder(spec)
    sweeping = Sweep(spec, search, folder, board.choose(quiet))
    try:
        _seen(sweeping, resume)
        found = sweeping.execute(resume)
    finally:
        sweeping.view.close()
    print(f"report: {folder / 'report.html'}", file=sys.stderr)
    display.show(board.ranking(found, f"{search.objective}, the best first"))
    print(sweep.cost_line(sweeping.calls, sweeping.seconds, len(found)))
    if sweeping.interrupted:
        where = folder if sweeping.mirror is None else sweeping.home.uri
        print(f"saved; continue with: rayft tune --resume {where}", file=sys.stderr)
        return 130
    if sweep.winner(found) is None:
        raise ValueError(sweep.failure(found))
    print(f"best: {folder / 'best'}, and as a run of its own: rayft run {folder / 'best.yaml'}")
    return 0


def _seen(sweeping: Sweep, resume: bool) -> None:
    try:
        cluster.sees(sweeping.home)
    except ValueError:
        if not resume:
            shutil.rmtree(sweeping.folder)
        raise


def plan(spec: specs.RunSpec) -> str:
    """What would be done, for a terminal. Starts nothing."""
    search = tried(spec)
    told, need = search.told, request(spec)
    cpus, each = os.cpu_count() or 1, need.required_resources.get("CPU", 0.0)
    at_once = int(cpus // each) if each else search.trials
    lines = [
        yaml.safe_dump(spec.full(), sort_keys=False),
        f"trials: {search.trials}, of {spec.iterations} iterations, evaluated every {search.every}",
        *(f"  {key}: {drawn}" for key, drawn in search.space.items()),
        f"scheduler: {told.scheduler}; sampler: {search.sampler}; objective: {search.objective}",
        f"pay-off bank: {'shared by all trials' if search.shared else 'none'}",
        f"one trial reserves {_resources(need)}; with {cpus} CPUs {at_once} at a time",
    ]
    return "\n".join(lines)


def request(spec: specs.RunSpec) -> Any:
    """What one trial reserves; all it starts runs inside this."""
    config = spec.checked()
    return config.algo_class.default_resource_request(config)  # type: ignore[union-attr]


def concurrency(spec: specs.RunSpec, search: Search) -> int:
    """Trials at a time, or a ``ValueError`` where Ray has no room for one."""
    return min(room(request(spec), ray.nodes()), search.told.max_concurrent or search.trials)


def room(need: Any, nodes: Sequence[Mapping[str, Any]]) -> int:
    """Trials that fit at a time, or a ``ValueError``: Tune would wait for room without a word."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    wanted = {kind: number for kind, number in need.required_resources.items() if number}
    have = {kind: sum(node.get(kind, 0.0) for node in alive) for kind in wanted}
    fits = min((int(have[kind] // number) for kind, number in wanted.items()), default=10**6)
    placed = all(any(all(node.get(k, 0.0) >= v for k, v in one.items()) for node in alive) for one in need.bundles)
    if fits and placed:
        return fits
    has = ", ".join(f"{number:g} {kind}" for kind, number in have.items())
    raise ValueError(
        f"one trial needs {_resources(need)} and Ray has {has}: lower resources or scoring.actors, or join a larger "
        "cluster with --address"
    )


def _resources(need: Any) -> str:
    return ", ".join(f"{number:g} {kind}" for kind, number in need.required_resources.items() if number)


def _told(folder: Path) -> dict[str, Any]:
    path = folder / "sweep.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _spent(folder: Path) -> float:
    """Seconds that it ran, and until its last row where it was killed."""
    told, rows = _told(folder), folder / "rows.jsonl"
    seconds = float(told.get("seconds", 0.0))
    if told.get("status") == "running" and rows.is_file():
        seconds += max(0.0, rows.stat().st_mtime - datetime.fromisoformat(told["started"]).timestamp())
    return seconds


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    levels = {name: logging.getLogger(name).level for name in ("ray.tune", "ray.rllib", "ray.train", "ray.data")}
    os.environ.update({name: value for name, value in ENVIRONMENT.items() if before[name] is None})
    for name in levels:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
