"""One reward brought in four ways, class, function, program and service, from files outside the project: same scores.

The reward counts a letter, times the sample's own ``scale``; an empty text is a failure, and the length is logged.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayft.reward import arity, build, check
from rayft.score import DECODE, Done, Part, Task, Told, Work, Workbench

TEXTS = ["banana", "", "kiwi", "aaa", "mango", "banana"]
SCALES = np.array([1.0, 1.0, 2.0, 0.5, -3.0, 10.0])
EXPECTED = [3.0, np.nan, 0.0, 1.5, -3.0, 30.0]
NODE = shutil.which("node")

PYTHON = """
import numpy as np
from rayft.reward import DifferentiableReward, Reward

class Letters(Reward):
    def __init__(self, letter, all_together=False):
        self.letter, self.groupwise = letter, all_together

    def __call__(self, samples, conditions):
        if self.groupwise:
            return [len(samples)] * len(samples)
        if "bad" in samples:
            raise KeyError("no such fruit")
        scores = [c["scale"] * s.count(self.letter) if s else None for s, c in zip(samples, conditions)]
        return scores, {"length": [len(s) for s in samples]}

def letters(samples, conditions, metadata):
    if "bad" in samples:
        raise KeyError("no such fruit")
    letter = {"train": "a", "watch": "i"}[metadata[0]["purpose"]]
    scores = [c["scale"] * s.count(letter) if s else np.nan for s, c in zip(samples, conditions)]
    return np.array(scores), {"length": np.array([len(s) for s in samples])}

def together(samples, conditions, metadata):
    return np.full(len(samples), len(samples))

together.groupwise = True

class Bowl(DifferentiableReward):
    def __init__(self, power):
        self.power = power

    def value(self, x_0, context):
        return -(x_0.abs() ** self.power).flatten(1).sum(1) + x_0.sin().flatten(1).prod(1)
"""

PROGRAM = """
import json, os, sys, time
letter, mode = sys.argv[1:]
for line in sys.stdin:
    question = json.loads(line)
    samples, conditions = question["samples"], question["conditions"]
    if mode == "together":
        scores = [len(samples)] * len(samples)
    else:
        scores = [c["scale"] * s.count(letter) if s else None for s, c in zip(samples, conditions)]
    answer = {"id": question["id"], "scores": scores, "info": {"length": [len(s) for s in samples]}}
    if "bad" in samples:
        if mode == "dies":
            sys.exit("no such fruit")
        if mode == "closes":
            os.close(1)
            time.sleep(20)
        if mode == "rubbish":
            print("{'id': fruit")
        if mode == "late":
            print(json.dumps({**answer, "id": question["id"] - 1, "scores": [77.0] * len(samples)}))
    print(json.dumps(answer))
"""

JAVASCRIPT = """
const letter = process.argv[2]
require('readline').createInterface({ input: process.stdin }).on('line', line => {
  const { id, samples, conditions } = JSON.parse(line)
  if (samples.includes('bad')) process.exit(5)
  const scores = samples.map((s, i) => s ? conditions[i].scale * (s.split(letter).length - 1) : null)
  console.log(JSON.stringify({ id, scores, info: { length: samples.map(s => s.length) } }))
})
"""

SERVICE = """
import json, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        samples, conditions = question["samples"], question["conditions"]
        letter, mode = self.path.strip("/").split("/")
        if mode == "together":
            scores = [len(samples)] * len(samples)
        else:
            scores = [c["scale"] * s.count(letter) if s else None for s, c in zip(samples, conditions)]
        body = json.dumps({"scores": scores, "info": {"length": [len(s) for s in samples]}}).encode()
        status, size = 200, len(body)
        if "bad" in samples:
            if mode == "never":
                time.sleep(20)
            status = {"status500": 500, "redirect": 302}.get(mode, 200)
            body = {"rubbish": b"<p>" + b"." * (len(body) - 3)}.get(mode, body)
            size = 9999 if mode == "half" else size
            self.close_connection = mode == "half"
        self.send_response(status)
        self.send_header("Content-Length", str(size))
        self.send_header("Location", "http://elsewhere.example/" if status == 302 else "/")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass

server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
server.daemon_threads = True
print(server.server_address[1], flush=True)
server.serve_forever()
"""

FILES = {"rewards.py": PYTHON, "score.py": PROGRAM, "score.js": JAVASCRIPT, "serve.py": SERVICE}


@dataclass
class Found:
    """What a workbench said of some samples."""

    values: np.ndarray
    errors: dict[int, str] = field(default_factory=dict)
    extras: dict[str, np.ndarray] = field(default_factory=dict)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder outside the project with all that a user wrote."""
    found = tmp_path_factory.mktemp("user")
    for name, text in FILES.items():
        (found / name).write_text(textwrap.dedent(text))
    return found


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """The service, as a process of its own."""
    with subprocess.Popen([sys.executable, str(folder / "serve.py")], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        process.kill()


@pytest.fixture
def bring(folder: Path, address: str) -> Any:
    """(path, arguments) of the reward, as a YAML would have them."""

    def brought(way: str, mode: str = "well", **more: Any) -> tuple[str, dict[str, Any]]:
        together = mode == "together"
        if way == "class":
            return f"{folder}/rewards.py:Letters", {"letter": "a", "all_together": together}
        if way == "function":
            return f"{folder}/rewards.py:{'together' if together else 'letters'}", {}
        if way == "http":
            return "http", {"url": f"{address}/a/{mode}", "retries": 0, "timeout": 0.5, "groupwise": together, **more}
        script = [NODE, str(folder / "score.js")] if way == "node" else [sys.executable, str(folder / "score.py")]
        return "command", {"run": [*script, "a", mode], "groupwise": together, **more}

    return brought


WAYS = ["class", "function", "command", "http"]
needs_node = pytest.mark.skipif(NODE is None, reason="no node here")
ALL_WAYS = [*WAYS, pytest.param("node", marks=needs_node)]


def score(brought: tuple[str, dict[str, Any]], samples: Any, context: dict[str, Any], purpose: str = "train") -> Found:
    """All samples through one workbench, in this process."""
    path, arguments = brought
    check(path, arguments)
    bench, rows = Workbench(Told((Part("it", path, arguments),))), np.arange(len(samples))
    found = Found(np.full(len(samples), np.nan))
    work = Work(0, rows, samples, context, (Task(0, rows),), metadata={"purpose": purpose, "iteration": 0})
    for said in bench.run(work):
        if isinstance(said, Done) and said.part != DECODE:
            found.values[said.rows] = said.values
            found.errors |= said.errors
            for name, column in said.extras.items():
                found.extras.setdefault(name, np.full(len(samples), np.nan))[said.rows] = column
    return found


@pytest.mark.parametrize("way", ALL_WAYS)
def test_however_it_is_brought_its_scores_are_the_same(bring, way):
    found = score(bring(way), TEXTS, {"scale": SCALES})
    np.testing.assert_array_equal(found.values, EXPECTED)
    assert set(found.errors) == {1}
    assert found.errors[1].startswith("returned: ")
    assert found.extras["length"].tolist() == [6, 0, 4, 3, 5, 6]


@pytest.mark.parametrize("way", ["command", "http"])
@pytest.mark.parametrize("batch_size", [2, 64])
def test_scores_keep_their_places_whatever_the_batch(bring, way, batch_size):
    texts = ["a" * number for number in range(1, 150)]
    found = score(bring(way, batch_size=batch_size), texts, {"scale": np.ones(149)})
    np.testing.assert_array_equal(found.values, np.arange(1, 150))


@pytest.mark.parametrize("way", ALL_WAYS)
def test_a_poisoned_sample_is_blamed_alone(bring, way):
    texts = [*TEXTS[:3], "bad", *TEXTS[3:]]
    found = score(bring(way, "dies" if way == "command" else "status500"), texts, {"scale": np.insert(SCALES, 3, 1.0)})
    np.testing.assert_array_equal(found.values, np.insert(EXPECTED, 3, np.nan))
    assert set(found.errors) == {1, 3}
    assert found.errors[3].partition(": ")[0] in ("raised", "wire")


def test_a_function_is_told_what_the_call_is_for(bring):
    found = score(bring("function"), ["kiwi"], {"scale": np.ones(1)}, purpose="watch")
    assert found.values.tolist() == [2.0]


@pytest.mark.parametrize("way", WAYS)
def test_a_groupwise_reward_sees_all_samples_at_once(bring, way):
    texts = [str(number) for number in range(200)]
    found = score(bring(way, "together"), texts, {"scale": np.ones(200)})
    assert found.values.tolist() == [200.0] * 200
    assert found.errors == {}


def test_a_groupwise_reward_fails_as_one(bring):
    path, arguments = bring("command", "dies")
    found = score((path, arguments | {"groupwise": True}), ["banana", "bad"], {"scale": np.ones(2)})
    assert np.isnan(found.values).all()
    assert all("exit code 1; its stderr: no such fruit" in found.errors[row] for row in (0, 1))


@pytest.mark.parametrize(
    ("way", "mode", "said"),
    [
        ("command", "dies", "ended with exit code 1; its stderr: no such fruit"),
        pytest.param("command", "closes", "closed its pipe and ran on", marks=pytest.mark.slow),
        ("command", "rubbish", "answered what is not JSON: \"{'id': fruit\""),
        ("command", "late", "when asked"),
        ("http", "status500", "/a/status500 answered with status 500 Internal Server Error (1 attempts)"),
        ("http", "half", '/a/half gave half an answer with status 200: \'{"scores": [1'),
        ("http", "never", "/a/never gave no whole answer within 0.5 s"),
        ("http", "rubbish", "/a/rubbish answered what is not JSON: '<p>"),
        ("http", "redirect", "/a/redirect answered with status 302 Found and redirects to http://elsewhere.example/"),
    ],
)
def test_the_other_side_fails_on_one_sample_and_no_score_is_lost_or_swapped(bring, way, mode, said):
    texts, scales = ["banana", "bad", "aa", "a", "kiwi"], np.array([1.0, 1.0, 2.0, 3.0, 1.0])
    found = score(bring(way, mode, batch_size=3), texts, {"scale": scales})
    np.testing.assert_array_equal(found.values, [3.0, np.nan, 4.0, 3.0, 0.0])
    assert set(found.errors) == {1}
    assert said in found.errors[1]


def test_a_service_that_is_down_fails_every_sample_and_each_says_so(bring):
    path, arguments = bring("http")
    found = score((path, arguments | {"url": "http://127.0.0.1:9/a/well"}), TEXTS, {"scale": SCALES})
    assert np.isnan(found.values).all()
    assert all("http://127.0.0.1:9/a/well gave no answer" in found.errors[row] for row in range(len(TEXTS)))


def test_a_differentiable_reward_has_the_gradient_of_its_scores(folder):
    path, arguments = f"{folder}/rewards.py:Bowl", {"power": 3}
    x_0 = np.random.default_rng(0).normal(size=(5, 2, 3))
    values = score((path, arguments), list(x_0), {}).values
    np.testing.assert_allclose(values, -(np.abs(x_0) ** 3).sum(axis=(1, 2)) + np.sin(x_0).prod(axis=(1, 2)), rtol=1e-12)
    reward: Any = build(path, arguments)
    assert arity(reward) == 1
    asked = torch.from_numpy(x_0).requires_grad_()
    (gradient,) = torch.autograd.grad(reward.value(asked, {}).sum(), asked)
    step = 1e-5
    for place in np.ndindex(2, 3):
        nudge = np.zeros((2, 3))
        nudge[place] = step
        above, below = (score((path, arguments), list(x_0 + way * nudge), {}).values for way in (1, -1))
        np.testing.assert_allclose(gradient[(slice(None), *place)].numpy(), (above - below) / (2 * step), atol=1e-8)
