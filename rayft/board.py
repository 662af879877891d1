"""What a user sees of a sweep: a live table in a terminal, a line of JSON per finished trial elsewhere."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from typing import Any, Protocol

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from rayft.sweep import Outcome, number

NUM_LISTED = 20
NUM_REASONS = 6


class Board(Protocol):
    """Who is told how the sweep goes."""

    def shows(self, found: Sequence[Outcome], total: int) -> None: ...

    def ended(self, outcome: Outcome) -> None: ...

    def event(self, text: str) -> None: ...

    def close(self) -> None: ...


class Terminal:
    """The best trials and those that run, drawn again with every row."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.live = Live(console=self.console, refresh_per_second=4)
        self.live.start()

    def shows(self, found: Sequence[Outcome], total: int) -> None:
        running = [one for one in found if one.status == "running"]
        best = [one for one in found if one.status != "running"][: max(0, NUM_LISTED - len(running))]
        shown = [one for one in found if one in running or one in best]
        self.live.update(ranking(shown, f"{len(found) - len(running)} of {total} trials ended"))

    def ended(self, outcome: Outcome) -> None:
        """In the table."""

    def event(self, text: str) -> None:
        self.console.print(text, style="yellow", markup=False)

    def close(self) -> None:
        self.live.update("")
        self.live.stop()


class JsonLines:
    """One object per trial that has ended and per event, on standard output."""

    def shows(self, found: Sequence[Outcome], total: int) -> None:
        """Nothing."""

    def ended(self, outcome: Outcome) -> None:
        told = {name: number(outcome.best, name) for name in ("objective", "reward", "kl")}
        told = {name: value if math.isfinite(value) else None for name, value in told.items()}
        line = {"trial": outcome.name, "status": outcome.status, "iteration": outcome.last.get("iteration", 0)}
        print(json.dumps({**line, **told, **outcome.values, "reason": outcome.reason}), flush=True)

    def event(self, text: str) -> None:
        print(json.dumps({"event": text}), flush=True)

    def close(self) -> None:
        """Nothing to end."""


class Quiet:
    """Events only, on standard error."""

    def shows(self, found: Sequence[Outcome], total: int) -> None:
        """Nothing."""

    def ended(self, outcome: Outcome) -> None:
        """Nothing."""

    def event(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing to end."""


def choose(quiet: bool) -> Board:
    """The board for this standard output."""
    return Quiet() if quiet else Terminal() if sys.stdout.isatty() else JsonLines()


def ranking(found: Sequence[Outcome], title: str) -> Table:
    """Trials, the best first; below them why some were stopped or failed."""
    keys = list(dict.fromkeys(key for one in found for key in one.values))
    table = Table(title=title)
    table.add_column("trial", no_wrap=True)
    for key in keys:
        table.add_column(escape(_short(key, keys)), justify="right")
    for heading in ("objective", "reward", "KL", "iteration"):
        table.add_column(heading, justify="right")
    table.add_column("status")
    table.caption_justify = "left"
    reasons = [f"{one.name} {one.status}: {one.reason}" for one in found if one.reason]
    few = reasons[:NUM_REASONS] + ([f"and {len(reasons) - NUM_REASONS} more"] if len(reasons) > NUM_REASONS else [])
    table.caption = escape("\n".join(few)) if few else None
    for one in found:
        cells = [shown(one.values.get(key)) for key in keys]
        cells += [shown(number(one.best, name)) for name in ("objective", "reward", "kl")]
        table.add_row(one.name, *map(escape, cells), str(one.last.get("iteration", 0)), one.status)
    return table


def shown(value: Any) -> str:
    """A cell."""
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "-"
    return "-" if value is None else str(value)


def _short(key: str, keys: Sequence[str]) -> str:
    """Its last part, where no other key ends so."""
    last = key.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in keys) == 1 else key
