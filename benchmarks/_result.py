"""What every benchmark shares: its arguments, intervals, a table, and ``results/NAME.json``.

One flat object: figure name -> number, ``NAME/low`` and ``NAME/high`` where there is an interval, plus ``machine`` and
``versions``; under ``parts``, by the first word of a name, those of figures that were measured again elsewhere.
``--quick`` shows that a benchmark runs; its figures mean little and stay out of results/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy import stats

from rayft.store import versions, write_text

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Figure:
    """A number with its 95% interval, where there is one."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        interval = "" if self.low is None else f" [{self.low:.4g}, {self.high:.4g}]"
        return f"{self.value:.4g}{interval}"


@dataclass
class Result:
    """The figures of one benchmark, and where they are written."""

    name: str
    figures: dict[str, Figure] = field(default_factory=dict)
    partial: bool = False  # some of its parts alone were asked for

    def write(self, folder: Path | None) -> None:
        """``folder/NAME.json``, in one piece; nothing where there is no folder. What was not measured now is kept."""
        if folder is None:
            return
        path = folder / f"{self.name}.json"
        flat: dict[str, Any] = json.loads(path.read_text()) if path.is_file() and self.partial else {}
        for name, figure in self.figures.items():
            flat[name] = figure.value
            if figure.low is not None:
                flat |= {f"{name}/low": figure.low, f"{name}/high": figure.high}
        here: dict[str, Any] = {"machine": machine(), "versions": versions()}
        most = {key: flat.get(key, now) for key, now in here.items()}
        parts = flat.pop("parts", {}) | {name.partition("/")[0]: here for name in self.figures}
        others = {name: one for name, one in parts.items() if one != most}
        told = {**flat, **most, **({"parts": others} if others else {})}
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(told, indent=1, allow_nan=False) + "\n")
        print(f"wrote {path}")


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """``--quick`` and ``--out``; a benchmark adds its own."""
    parser = argparse.ArgumentParser(description=(doc or "").strip().splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under a minute, for CI: shows that it runs, no more")
    parser.add_argument("--out", type=Path, help=f"folder of the results (default {RESULTS}; with --quick: none)")
    return parser


def folder(told: argparse.Namespace) -> Path | None:
    """Where the results go."""
    return told.out or (None if told.quick else RESULTS)


def over_seeds(values: Sequence[float]) -> Figure:
    """The mean over seeds with Student's 95% interval; one seed has none."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Figure(mean)
    half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)
    return Figure(mean, mean - half, mean + half)


def over_rounds(rounds: Sequence[Sequence[float]], statistic: Callable[[np.ndarray], float]) -> Figure:
    """``statistic`` of rounds [round, column], with a bootstrap 95% interval over whole rounds."""
    table, rng = np.asarray(rounds, dtype=np.float64), np.random.default_rng(0)
    drawn = [statistic(table[rng.integers(len(table), size=len(table))]) for _ in range(2000)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Figure(statistic(table), float(low), float(high))


def show(title: str, headings: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "") -> None:
    """A table, 100 columns wide where there is no terminal; the first column is text."""
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=not number)
    for row in rows:
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row))
    Console(width=None if sys.stdout.isatty() else 100).print(table)


def machine() -> dict[str, object]:
    """What a time may depend on."""
    return {
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "torch_threads": torch.get_num_threads(),
    }


def _processor() -> str:
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
