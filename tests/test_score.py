"""``rayft score``: whether a reward can be learnt from, what a run would pay, and rewards brought from anywhere."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from test_scoring import SMALL

from rayft.cli import main


def test_score_says_that_a_reward_is_learnable_and_what_a_run_would_pay(ray_session, tmp_path, capsys):
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(SMALL))
    assert main(["score", str(tmp_path / "one.yaml"), "--num", "200", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["learnable"]
    assert told["samples"] == told["calls"] == 200
    assert told["cost"]["calls"] == 3 * 64 + 64 + 256
    assert told["std"] > 0.1


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return [1.0 for _ in samples]", "all 256 scores are equal (1): there is nothing to learn from"),
        ("return [float(x[0] > 1.72) for x in samples]", "one and the same score"),
        ("return [None if x[0] < 0.5 else 1.0 * x[0] for x in samples]", "the reward fails on"),
    ],
)
def test_score_says_why_a_reward_is_not_learnable(ray_session, tmp_path, capsys, body, said):
    (tmp_path / "mine.py").write_text(f"def f(samples):\n    {body}\n")
    asked = ["score", "256", "--reward", f"{tmp_path}/mine.py:f", "scoring.max_failed=1", "scoring.timeout=5"]
    assert main(asked) == 0
    assert said in capsys.readouterr().out


def test_score_reads_a_file_of_samples(ray_session, tmp_path, capsys):
    (tmp_path / "words.smi").write_text("CC first\nCCC second\nC third\n")
    (tmp_path / "mine.py").write_text("def length(samples):\n    return [len(x) for x in samples]\n")
    asked = ["score", str(tmp_path / "words.smi"), "--reward", f"{tmp_path}/mine.py:length", "--json"]
    assert main(asked) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["samples"], told["mean"], told["min"], told["max"]) == (3, 2.0, 1.0, 3.0)


CLASS = """
class Right:
    def __init__(self, times=1.0):
        self.times = times

    def __call__(self, samples):
        return [self.times * float(x[0]) for x in samples]
"""
FUNCTION = """
def right(samples, conditions, metadata):
    assert len(samples) == len(conditions) == len(metadata)
    return [2 * float(x[0]) for x in samples], {"up": [float(x[1]) for x in samples]}
"""
PROGRAM = """
import json, sys

for line in sys.stdin:
    asked = json.loads(line)
    print(json.dumps({"id": asked["id"], "scores": [2 * x[0] for x in asked["samples"]]}), flush=True)
"""


class Service(BaseHTTPRequestHandler):
    """Scores by POST."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        body = json.dumps({"scores": [2 * x[0] for x in asked["samples"]]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *told: Any) -> None:
        """Nothing."""


@pytest.fixture
def brought(tmp_path: Path) -> Iterator[dict[str, list[str]]]:
    """Way -> how the command line names the same reward, brought that way from outside the project."""
    for name, text in (("of_class", CLASS), ("of_function", FUNCTION), ("program", PROGRAM)):
        (tmp_path / f"{name}.py").write_text(text)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield {
        "class": ["--reward", f"{tmp_path}/of_class.py:Right", "reward.times=2"],
        "function": ["--reward", f"{tmp_path}/of_function.py:right"],
        "command": ["--reward", "command", f"reward.run=[{sys.executable}, {tmp_path}/program.py]"],
        "http": ["--reward", "http", f"reward.url=http://127.0.0.1:{server.server_port}/score"],
    }
    server.shutdown()


@pytest.mark.parametrize("way", ["class", "function", "command", "http"])
def test_score_takes_a_reward_brought_in_each_of_the_four_ways(brought, tmp_path, capsys, monkeypatch, way):
    np.save(tmp_path / "points.npy", np.array([[1.0, 2.0], [-3.0, 0.0], [0.5, 0.5]]))
    monkeypatch.chdir(tmp_path)
    assert main(["score", str(tmp_path / "points.npy"), *brought[way], "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["samples"], told["failed"], told["min"], told["max"]) == (3, 0, -6.0, 2.0)
    assert main(["score", "40", *brought[way], "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["samples"], told["failed"], told["learnable"]) == (40, 0, True)
