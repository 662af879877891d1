"""``rayft sample`` of a domain: its pretrained model, its formats, the best only, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from rayft.cli import main

MINE = """
import numpy as np
from pathlib import Path
from envs.toy.domain import Toy

class Mine(Toy):
    formats = {".txt": "./mine.py:text", ".bad": "./mine.py:bad"}
    decoder = "./mine.py:right"

class Own(Mine):
    formats = {".npz": "./mine.py:arrays"}

def right(x_0, context):
    return [None if x < -1 else round(float(x), 1) for x in x_0[:, 0]]

def text(path, samples, columns):
    kept = [i for i, sample in enumerate(samples) if sample is not None]
    told = [" ".join([str(samples[i]), *(f"{name}={column[i]:g}" for name, column in columns.items())]) for i in kept]
    path.write_text("\\n".join(told))
    return len(kept)

def arrays(path, samples, columns):
    with path.open("wb") as file:
        np.savez(file, sample=[np.nan if sample is None else sample for sample in samples], **columns)
    return sum(sample is not None for sample in samples)

def bad(path, samples, columns):
    path.write_text("half")
    raise ValueError("the pen broke; buy another")

def near(samples):
    return [-abs(sample - 0.8) for sample in samples]
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The name of a domain in a folder of its own: the toy, of which one number is kept."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    return "./mine.py:Mine"


def test_a_pretrained_model_is_sampled_into_a_format_of_its_domain(mine, tmp_path, capfd):
    told = ["sample", mine, "--num", "300", "--num-steps", "10"]
    assert main([*told, "--out", "a.txt"]) == 0
    lines = (tmp_path / "a.txt").read_text().splitlines()
    said = f"{len(lines)} of 300 samples in a.txt: index; {300 - len(lines)} decode to nothing\n"
    assert capfd.readouterr().out == said
    assert 100 < len(lines) < 300
    assert [float(line.split()[0]) >= -1 for line in lines] == [True] * len(lines)
    assert main([*told, "--out", "b.TXT"]) == 0
    assert (tmp_path / "b.TXT").read_text() == (tmp_path / "a.txt").read_text(), "the same seed, the same samples"
    assert main([*told, "--seed", "1", "--out", "c.txt"]) == 0
    assert (tmp_path / "c.txt").read_text() != (tmp_path / "a.txt").read_text()
    assert main([*told, "--out", "d.npz"]) == 0
    with np.load("d.npz") as found:
        assert found.files == ["x_0"] and found["x_0"].shape == (300, 2)
        assert [str(round(float(x), 1)) for x in found["x_0"][:, 0] if x >= -1] == [line.split()[0] for line in lines]
    assert {path.name for path in tmp_path.glob("*.*")} == {"mine.py", "a.txt", "b.TXT", "c.txt", "d.npz"}


def test_the_top_are_the_highest_scores_once_each_and_never_what_decodes_to_nothing(mine, tmp_path, capfd):
    told = ["sample", mine, "--num", "300", "--num-steps", "10", "--reward", "./mine.py:near", "--top", "7"]
    assert main([*told, "--out", "top.txt"]) == 0
    assert capfd.readouterr().out == "7 samples in top.txt: index, reward\n"
    lines = [line.split() for line in (tmp_path / "top.txt").read_text().splitlines()]
    rewards = [float(reward.removeprefix("reward=")) for _, _, reward in lines]
    assert rewards == sorted(rewards, reverse=True) and rewards[0] == 0
    assert len({sample for sample, _, _ in lines}) == 7
    assert main([*told, "--out", "top.npz"]) == 0
    with np.load("top.npz") as found:
        assert found.files == ["x_0", "index", "reward"]
        assert [f"index={i}" for i in found["index"]] == [index for _, index, _ in lines]
        np.testing.assert_allclose(found["x_0"][:, 0], [float(sample) for sample, _, _ in lines], atol=0.051)


@pytest.mark.parametrize("out", ["a.npz", "b"])
def test_a_domain_may_write_an_npz_of_its_own_with_all_that_the_engines_has(out, mine, tmp_path, capfd):
    told = ["sample", "./mine.py:Own", "--num", "300", "--num-steps", "10", "--reward", "./mine.py:near"]
    assert main([*told, "--out", out]) == 0
    with np.load(out) as found:
        assert found.files == ["sample", "x_0", "reward"]
        np.testing.assert_allclose(
            found["sample"], np.where(found["x_0"][:, 0] < -1, np.nan, found["x_0"][:, 0]), atol=0.051
        )
        good = np.isfinite(found["sample"]).sum()
    said = f"{good} of 300 samples in {out}: x_0, reward; {300 - good} decode to nothing\n"
    assert capfd.readouterr().out == said


@pytest.mark.parametrize(
    ("told", "why"),
    [
        (["toy", "--out", "x.sdf"], "x.sdf ends in .sdf; samples of Toy are written as .npz"),
        (["./mine.py:Mine", "--out", "x.csv"], "samples of Mine are written as .txt, .bad, .npz"),
        (["./mine.py:Own", "--out", "x.csv"], "samples of Own are written as .npz"),
        (["./mine.py:Mine", "--out", "x.bad"], "the pen broke; buy another"),
        (["toy", "--top", "3"], "--top takes the highest scores: add --score, or --reward NAME"),
        (
            ["toy", "--score"],
            "toy is a domain and has no reward of its own; give one with --reward: quadratic, stripes",
        ),
        (["toi"], "no run or checkpoint toi, and no domain of that name (did you mean 'toy'?); the domains are"),
        (["toy", "--reward", "quadratc"], "no reward 'quadratc' (did you mean 'quadratic'?)"),
        (
            ["toy", "training.lr=1"],
            "'training.lr=1' is not for sampling; it takes domain.KEY=value and reward.KEY=value",
        ),
        (["toy", "domain.weights=no.pt"], "no weights at no.pt"),
        (["toy", "--num-steps", "99"], "99"),
    ],
)
def test_what_cannot_be_sampled_is_said_in_a_sentence_and_leaves_nothing(told, why, mine, tmp_path, capfd):
    assert main(["sample", *told, "--num", "4"]) == 2
    out, err = capfd.readouterr()
    assert why in err and err.count("\n") == 1 and out == ""
    assert {path.name for path in tmp_path.iterdir()} <= {"mine.py", "__pycache__"}
