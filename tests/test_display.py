"""What a terminal is told of a run."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from rayft import display


@pytest.fixture
def terminal():
    view = display.Terminal()
    yield view
    view.close()


def said(terminal, **row):
    terminal.row({"iteration": 1.0, "reward_mean": -1.5, "reward_calls": 1024.0, **row}, 10)
    return terminal.progress.tasks[0].fields["said"]


def test_failures_and_hits_are_shown_where_there_are_any(terminal):
    assert said(terminal) == "reward -1.5  calls 1,024"
    assert said(terminal, reward_failed=0.0, cache_hits=0.0) == "reward -1.5  calls 1,024"
    assert "failed 3" in said(terminal, reward_failed=3.0, cache_hits=0.0)
    line = said(terminal, reward_failed=0.0, cache_hits=2048.0)
    assert "failed" not in line
    assert "hits 2,048" in line


def test_an_event_may_hold_brackets(terminal, capsys):
    terminal.console.file = StringIO()
    terminal.event("dock failed on 3 of 9 samples: raised: [/red] [bold]x (3)")
    assert "raised: [/red] [bold]x (3)" in terminal.console.file.getvalue().replace("\n", " ")


def lines(told):
    console = Console(file=StringIO(), width=120)
    console.print(display.before_after(told))
    rows = [row.replace("│", "|").split("|") for row in console.file.getvalue().splitlines() if "│" in row]
    return {row[1].strip(): [cell.strip() for cell in row[2:-1]] for row in rows}


def test_watched_rewards_and_parts_have_rows_of_their_own():
    told = {"reward": 1.0, "reward_pretrained": 0.5, "kl": 2.0, "undecodable": 0.0}
    plain = lines(told)
    told |= {"part/qed": 0.25, "part/qed_pretrained": 0.125, "watch/sa[b]": float("nan"), "watch/sa[b]_pretrained": 3.0}
    found = lines(told)
    assert found["part: qed"] == ["0.1250", "0.2500", ""]
    assert found["watch: sa[b]"] == ["3.0000", "-", ""]
    assert {name: cells for name, cells in found.items() if name in plain} == plain
    assert len(found) == len(plain) + 2
