"""One pretraining in its folder: steps, a log, states to go on from, and an end that loses nothing.

    state.pt: all that the next step depends on    metrics.csv: a row every ``log_every`` steps

A state is written in one piece and never from numbers that are not finite, and batches have addresses: a training that
was stopped and resumed is, bit for bit, the training that was not.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rayft import imports, store
from rayft.denoise import LEVELS, Learner, PretrainSettings, denoising_loss, lr_share
from rayft.domain import Domain
from rayft.interrupt import told_to_stop
from rayft.peers import LostLearner, Peers
from rayft.resume import load_state, refuse_another, save_state, unfinished
from rayft.seeds import torch_generator
from rayft.table import Table
from rayft.ticker import Ticker

# what a resume may change: how it is done, not what
HOW = ("steps", "checkpoint_every", "log_every", "num_learners", "device", "compile", "evaluate", "weights_dtype")
COLUMNS = ["step", "loss", *(f"loss_{n}" for n in range(1, LEVELS + 1)), "valid_loss", "lr", "samples_per_s", "seconds"]
RECENT = 100  # steps whose mean is the final loss
HELD_OUT = 4096  # events of a held-out loss, the same ones every time


class Training:
    """A training under way. ``named`` is its domain as YAML has it: resuming refuses another than the state's."""

    def __init__(
        self, domain: Domain, settings: PretrainSettings, seed: int, folder: Path, named: Mapping[str, Any]
    ) -> None:
        device = device_of(settings)
        if settings.batch_size < settings.num_learners:
            what = f"pretrain.num_learners is {settings.num_learners} and a batch has {settings.batch_size} events"
            raise ValueError(f"{what}: lower it, or raise pretrain.batch_size")
        self.packed = imports.pack(domain) if settings.num_learners > 1 else b""  # before it has read its data
        if domain.data(1, torch_generator(seed, 0, "pretrain")) is None:
            raise ValueError(f"{type(domain).__name__} has no data set to pretrain on: implement Domain.data")
        self.domain, self.settings, self.seed, self.folder = domain, settings, seed, folder
        update = {k: v for k, v in asdict(settings).items() if k not in HOW}
        self.recipe = {"domain": dict(named), "seed": seed, "pretrain": update}
        self.learner, self.peers = Learner(domain, settings, seed, device), Peers(settings, device)
        self.step, self.saved, self.seconds, self.interrupted = 0, -1, 0.0, False
        self.pending: list[Tensor] = []  # losses that the device has not been asked for
        self.window: list[float] = []  # losses since the last row
        self.recent: list[float] = []
        self.levels = torch.zeros(2, LEVELS, device=device)

    @property
    def loss(self) -> float:
        """Mean over the last hundred steps."""
        return sum(self.recent) / max(len(self.recent), 1)

    @property
    def state(self) -> Path:
        return self.folder / "state.pt"

    # -- life

    def run(self, resume: bool = False, quiet: bool = True) -> bool:
        """To the end, or to the first Ctrl-C (``False``). The state is saved either way."""
        if resume:
            self.restore()
        elif (stopped := unfinished(self.state)) is not None:
            what = f"{self.folder} holds a training that stopped at step {stopped}"
            raise ValueError(f"{what}: continue it with --resume, start another with name=NAME, or delete the folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.table = open_table(self.folder / "metrics.csv", self.step)
        whole = False
        with (
            Ticker("pretrain", self.settings.steps, self.step, quiet) as ticker,
            told_to_stop(lambda: self.stop(ticker)),
        ):
            try:
                self.peers.open(self.packed, self.seed, self.learner)
                self.since = self.row_since = time.monotonic()
                self.iterate(ticker)
                self.seconds, whole = self.elapsed(), True
            finally:
                self.peers.close(whole)
        return not self.interrupted

    def iterate(self, ticker: Ticker) -> None:
        """Steps until the end, Ctrl-C, a loss that is no number or a lost learner."""
        self.row_step = self.step
        try:
            while self.step < self.settings.steps and not self.interrupted:
                self.advance(ticker)
        except (RuntimeError, LostLearner) as error:
            why = error if isinstance(error, LostLearner) else self.peers.lost()
            if why is None:
                raise
            if self.learner.device.type == "cpu":  # a GPU is still waiting for the lost one
                self.save()
            kept = f"the state of step {self.saved} is kept, continue with --resume"
            raise LostLearner(f"{why}: {kept if self.saved >= 0 else 'no state was saved yet'}") from None
        if self.saved != self.step:
            self.save()

    def advance(self, ticker: Ticker) -> None:
        """One step, and what falls due after it: row, then state, so that a state has its row."""
        self.peers.go(self.step)
        loss, levels = self.learner.step(self.step)
        self.pending.append(loss)
        self.levels += levels
        self.step += 1
        last = self.step == self.settings.steps
        checkpoint = last or self.step % self.settings.checkpoint_every == 0
        row = self.row() if last or self.step % self.settings.log_every == 0 else {}
        row |= self.held_out() if checkpoint else {}
        if row:
            self.table.add({"step": float(self.step), **row})
        if checkpoint:
            self.save()
        ticker.tick(self.step, {"step": self.step, **row} if row else {})

    # -- the log

    def read(self) -> None:
        """Losses from the device; the first that is no number ends the training."""
        self.peers.wait()
        losses = torch.stack(self.pending).tolist() if self.pending else []
        first = self.step - len(losses) + 1
        self.pending = []
        for number, loss in enumerate(losses, first):
            if not math.isfinite(loss):
                self.stop_at_nonsense(f"the loss was {loss} at step {number}")
        self.window += losses
        self.recent = [*self.recent, *losses][-RECENT:]

    def stop_at_nonsense(self, what: str) -> None:
        kept = f"{self.state} keeps step {self.saved}" if self.saved >= 0 else "no state was saved yet"
        raise ValueError(f"{what} of {self.settings.steps}; {kept}: start another with a smaller pretrain.lr")

    def row(self) -> dict[str, float]:
        """Means since the last row; a level of noise that no event had is left out."""
        self.read()
        sums, counts = self.levels.tolist()
        levels = {f"loss_{n}": s / c for n, (s, c) in enumerate(zip(sums, counts, strict=True), 1) if c}
        now, lr = time.monotonic(), self.settings.lr * lr_share(self.step - 1, self.settings)
        rate = (self.step - self.row_step) * self.settings.batch_size / max(now - self.row_since, 1e-9)
        row = {"loss": sum(self.window) / len(self.window), **levels, "lr": lr, "samples_per_s": rate}
        self.window, self.row_since, self.row_step = [], now, self.step
        self.levels.zero_()
        return {**row, "seconds": self.elapsed()}

    def held_out(self) -> dict[str, float]:
        """The averaged weights' loss on events that are not trained on, where the domain has some."""
        draw = self.domain.held_out
        if self.learner.average is None or draw(1, torch_generator(self.seed, 0, "held_out")) is None:
            return {}
        self.read()
        told = self.domain, self.domain.schedule(), self.learner.average, self.settings.batch_size
        pieces = range(math.ceil(HELD_OUT / self.settings.batch_size))
        with torch.no_grad():
            losses = [float(denoising_loss(*told, torch_generator(self.seed, n, "held_out"), draw)) for n in pieces]
        return {"valid_loss": sum(losses) / len(losses)}

    def elapsed(self) -> float:
        """Seconds of training, those before a resume included."""
        return self.seconds + time.monotonic() - self.since

    # -- the state

    def save(self) -> None:
        """In one piece; the one before stays where this one is no good."""
        self.read()
        told = self.learner.state()
        if not all(bool(v.isfinite().all()) for v in told["net"].values() if v.is_floating_point()):
            self.stop_at_nonsense(f"a weight is not finite after step {self.step}")
        told |= {"step": self.step, "steps": self.settings.steps, "seconds": self.elapsed(), "recipe": self.recipe}
        told |= {"window": self.window, "recent": self.recent, "levels": self.levels}
        try:
            save_state(self.state, told)
        except (OSError, RuntimeError) as error:
            kept = f"that of step {self.saved} is whole" if self.saved >= 0 else "there is none before it"
            raise ValueError(f"the state could not be written ({getattr(error, 'strerror', error)}); {kept}") from None
        self.saved = self.step

    def restore(self) -> None:
        """Takes up the state in the folder, if it was made with the same settings."""
        found = load_state(self.state)
        refuse_another(self.recipe, found["recipe"], self.state)
        self.learner.load(found, str(self.state))
        self.step = self.saved = found["step"]
        self.seconds, self.window, self.recent = found["seconds"], found["window"], found["recent"]
        self.levels.copy_(found["levels"])

    def stop(self, ticker: Ticker) -> None:
        """Ends the training after this step."""
        self.interrupted = True
        with contextlib.suppress(RuntimeError):  # it came while something was being printed
            ticker.say("stopping after this step; Ctrl-C again to stop at once")


def device_of(settings: PretrainSettings) -> torch.device:
    """Where learner 0 trains; a ``ValueError`` where there are fewer GPUs than learners."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if settings.device == "cpu" or (settings.device == "auto" and gpus == 0):
        return torch.device("cpu")
    if gpus < settings.num_learners:
        what = f"torch sees {gpus} GPUs and pretrain.num_learners is {settings.num_learners}"
        raise ValueError(f"{what}: each learner needs one, so lower it, or set pretrain.device to cpu")
    return torch.device("cuda", 0)


def open_table(path: Path, step: int) -> Table:
    """metrics.csv with its rows up to ``step``: later ones will happen again."""
    lines = path.read_text().splitlines()[1:] if path.is_file() and step else []
    whole = [line for line in lines if line.count(",") == len(COLUMNS) - 1]
    kept = [line for line in whole if float(line.partition(",")[0]) <= step]
    store.write_text(path, "\n".join([",".join(COLUMNS), *kept, ""]))
    return Table(path)
