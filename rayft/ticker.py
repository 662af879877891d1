"""What a user sees of a training: a bar in a terminal, a JSON object a row elsewhere, nothing but events when quiet."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SHOWN = {"loss": "loss", "valid": "valid_loss", "samples/s": "samples_per_s"}
EVERY = 0.1  # seconds between two updates of the bar


class Ticker:
    """``what``: ``done`` of ``total`` so far."""

    def __init__(self, what: str, total: int, done: int, quiet: bool) -> None:
        self.terminal, self.quiet, self.total = sys.stdout.isatty() and not quiet, quiet, total
        self.console = Console(stderr=True)
        self.seen: dict[str, float] = {}
        text = TextColumn("[bold]{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn()
        rest = TimeRemainingColumn(), TextColumn("{task.fields[said]}")
        self.bar = Progress(*text, *rest, console=self.console, disable=not self.terminal)
        self.task = self.bar.add_task(what, total=total, completed=done, said="")
        self.drawn = 0.0

    def __enter__(self) -> Ticker:
        self.bar.start()
        return self

    def __exit__(self, *told: Any) -> None:
        self.bar.stop()

    def tick(self, done: int, row: Mapping[str, float]) -> None:
        """``done`` of all are done; ``row`` holds the numbers there are to tell, if any."""
        if row and not (self.terminal or self.quiet):
            print(json.dumps({**row, "steps": self.total}), flush=True)
        if self.terminal and (row or done == self.total or time.monotonic() - self.drawn > EVERY):
            self.drawn = time.monotonic()
            self.seen |= {label: row[key] for label, key in SHOWN.items() if key in row}
            said = "  ".join(f"{label} {number(value)}" for label, value in self.seen.items())
            self.bar.update(self.task, completed=done, said=said)

    def say(self, text: str) -> None:
        """An event."""
        if self.terminal:
            self.console.print(text, style="yellow", markup=False)
        elif self.quiet:
            print(text, file=sys.stderr, flush=True)
        else:
            print(json.dumps({"event": text}), flush=True)


def number(value: float) -> str:
    """Four digits, and all that stand before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
