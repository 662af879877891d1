"""The metrics of a run: one row an iteration, appended to a CSV as it happens, written as Parquet at the end."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rayft.store import write_text


class Table:
    """Rows of numbers whose columns may grow: a new column rewrites the file, in one piece."""

    def __init__(self, path: Path) -> None:
        self.path, self.columns = path, ["iteration"]
        self.rows: list[dict[str, float]] = []
        if path.is_file():
            with path.open(newline="") as file:
                reader = csv.DictReader(file)
                self.columns = list(reader.fieldnames or self.columns)
                whole = [line for line in reader if None not in line.values()]
            self.rows = [{k: float(v) for k, v in line.items() if v != ""} for line in whole]

    def add(self, row: Mapping[str, float]) -> None:
        """Appends one row."""
        self.rows.append(dict(row))
        new = [name for name in row if name not in self.columns]
        if new or not self.path.is_file():
            self.columns += new
            self._write()
            return
        with self.path.open("a", newline="") as file:
            file.write(self._line(self.rows[-1]))

    def truncate(self, iteration: int) -> None:
        """Forgets rows after ``iteration``: they will happen again."""
        kept = [row for row in self.rows if row["iteration"] <= iteration]
        if len(kept) != len(self.rows):
            self.rows = kept
            self._write()

    def last(self, name: str, default: float) -> float:
        """The newest value of a column."""
        return next((row[name] for row in reversed(self.rows) if name in row), default)

    def to_parquet(self, path: Path) -> None:
        """The same rows, typed; absent cells are null."""
        columns = {name: pa.array([row.get(name) for row in self.rows], pa.float64()) for name in self.columns}
        pq.write_table(pa.table(columns), path)

    def _line(self, row: Mapping[str, float]) -> str:
        return ",".join(repr(row[name]) if name in row else "" for name in self.columns) + "\n"

    def _write(self) -> None:
        write_text(self.path, ",".join(self.columns) + "\n" + "".join(self._line(row) for row in self.rows))
