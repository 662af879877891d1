"""What a user sees of a run: a live line in a terminal, JSON lines elsewhere, events when quiet; a table at the end."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

SHOWN = {
    "reward": "reward_mean",
    "kl": "kl",
    "attained": "evaluate/attained",
    "frontier": "evaluate/frontier_share",
    "calls": "reward_calls",
    "hits": "cache_hits",
    "failed": "reward_failed",
    "chains/s": "chains_per_s",
}
SHOWN_IF_ANY = ("hits", "failed")


class Terminal:
    """A progress bar with the numbers that matter; evaluated values stay until the next."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.seen: dict[str, float] = {}
        text = TextColumn("[bold]{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn()
        self.progress = Progress(*text, TimeRemainingColumn(), TextColumn("{task.fields[said]}"), console=self.console)
        self.task = self.progress.add_task("run", total=None, said="")
        self.progress.start()

    def row(self, row: Mapping[str, float], total: int) -> None:
        self.seen |= {label: row[key] for label, key in SHOWN.items() if key in row}
        told = {label: value for label, value in self.seen.items() if value > 0 or label not in SHOWN_IF_ANY}
        said = "  ".join(f"{label} {value:,.4g}" for label, value in told.items())
        self.progress.update(self.task, total=total, completed=row["iteration"], said=said)

    def event(self, text: str) -> None:
        self.console.print(text, style="yellow", markup=False)  # a reward's own words may hold brackets

    def close(self) -> None:
        self.progress.stop()


class JsonLines:
    """One JSON object per iteration and per event, on standard output."""

    def row(self, row: Mapping[str, float], total: int) -> None:
        told = {name: value if math.isfinite(value) else None for name, value in row.items()}
        print(json.dumps({**told, "iterations": total}), flush=True)

    def event(self, text: str) -> None:
        print(json.dumps({"event": text}), flush=True)

    def close(self) -> None:
        """Nothing to end."""


class Quiet:
    """Events only, on standard error."""

    def row(self, row: Mapping[str, float], total: int) -> None:
        """Nothing."""

    def event(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing to end."""


def choose(quiet: bool) -> Any:
    """The display for this standard output."""
    return Quiet() if quiet else Terminal() if sys.stdout.isatty() else JsonLines()


def before_after(told: Mapping[str, float]) -> Table:
    """The table a run ends with: before, after, and what was attainable."""
    table = Table(title="before and after")
    for heading in ("", "pretrained", "fine-tuned", "attainable"):
        table.add_column(heading, justify="left" if not heading else "right")

    def cell(name: str) -> str:
        return f"{told[name]:.4f}" if name in told and told[name] == told[name] else "-"

    def share(name: str) -> str:
        return f"{cell(name)} [{cell(f'{name}_low')}, {cell(f'{name}_high')}]" if cell(name) != "-" else "-"

    table.add_row("reward", cell("reward_pretrained"), cell("reward"), "")
    for kind in ("part", "watch", "metric"):
        for name in (name for name in told if name.startswith(f"{kind}/") and f"{name}_pretrained" in told):
            label = f"{kind}: {name.removeprefix(f'{kind}/')}"
            table.add_row(escape(label), cell(f"{name}_pretrained"), cell(name), "")
    table.add_row("KL (nats)", "0", cell("kl"), "")
    if "objective" in told:
        table.add_row("J", cell("reward_pretrained"), cell("objective"), f"{cell('optimum')} = J*")
        table.add_row("attained", "0", share("attained"), "1")
    table.add_row("frontier share", "", share("frontier_share"), "1")
    table.add_row("diversity", cell("diversity_pretrained"), cell("diversity"), "")
    table.add_row("undecodable", "", cell("undecodable"), "")
    return table


def show(table: Table) -> None:
    """Prints a table as wide as it needs to be where there is no terminal."""
    Console(width=None if sys.stdout.isatty() else 100).print(table)
