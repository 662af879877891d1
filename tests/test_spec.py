"""A run as it is written: YAML, Python or a shipped config, with overrides on top, and every default in one place."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from rayft import loop, spec
from rayft.algorithms.config import SECTIONS
from rayft.cli import main
from rayft.settings import defaults
from rayft.track import TrackSettings

ROOT = Path(__file__).parent.parent
SHIPPED = sorted((ROOT / "tune_configs").glob("*.yaml"))
MINIMAL = {"algorithm": "ppo", "domain": "toy", "reward": "quadratic"}

PYTHON = """
import numpy as np
from torch import nn
from rayft.domain import Plain

class Net(nn.Module):
    def __init__(self, width=2):
        super().__init__()
        self.layer = nn.Linear(2, 2)
    def forward(self, x, t):
        return self.layer(x)

class Near:
    def __init__(self, centre):
        self.centre = np.asarray(centre)
    def __call__(self, samples):
        return [-float(((s - self.centre) ** 2).sum()) for s in samples]

def flat(samples):
    return [0.0 for _ in samples]

spec = {
    "algorithm": "ppo",
    "domain": {"name": Plain, "network": Net, "event_shape": (2,), "betas": np.linspace(0.1, 0.3, 3)},
    "reward": {"name": Near, "centre": np.ones(2)},
    "training": {"chains": 8, "minibatch_size": np.int64(8)},
}
"""


def written(tmp_path, told=None, name="my.yaml"):
    path = tmp_path / name
    path.write_text(yaml.safe_dump(MINIMAL | (told or {})))
    return str(path)


# -- overrides

OVERRIDES = {
    "seed=3": ("seed", 3),
    "training.lr=1e-4": ("training.lr", 1e-4),
    "training.lr=0.0001": ("training.lr", 1e-4),
    "training.grad_clip=null": ("training.grad_clip", None),
    "evaluate.max_kl=": ("evaluate.max_kl", None),
    "chain.sigma=gamma": ("chain.sigma", "gamma"),
    "resources.num_learners=2": ("resources.num_learners", 2),
    "track.tensorboard=no": ("track.tensorboard", False),
    "output=a=b": ("output", "a=b"),
    "reward=stripes": ("reward", {"name": "stripes"}),
    "reward.centre=[0, 1]": ("reward", {"name": "quadratic", "centre": [0, 1]}),
    "reward.centre=[1e-1, 2E+0]": ("reward", {"name": "quadratic", "centre": [0.1, 2.0]}),
    "domain.num_steps=60": ("domain", {"name": "toy", "num_steps": 60}),
    "checkpoint={every: 2, keep: 3}": ("checkpoint", {"every": 2, "keep": 3, "max_failures": 3}),
}


@pytest.mark.parametrize("assignment", OVERRIDES)
def test_an_override_changes_the_key_it_names(tmp_path, assignment):
    plain, changed = spec.read(written(tmp_path)).full(), spec.read(written(tmp_path), [assignment]).full()
    key, wanted = OVERRIDES[assignment]
    first, _, rest = key.partition(".")
    expected = wanted if not rest else {**plain[first], rest: wanted}
    assert changed == {**plain, first: expected}


def test_the_last_override_wins_and_none_touches_the_file(tmp_path):
    file = written(tmp_path, {"training": {"lr": 0.5, "alpha": 0.2}})
    before = Path(file).read_text()
    training = spec.read(file, ["training.lr=1", "training.lr=2"]).full()["training"]
    assert (training["lr"], training["alpha"]) == (2.0, 0.2)
    assert Path(file).read_text() == before


def test_a_new_reward_leaves_the_old_ones_arguments_behind(tmp_path):
    file = written(tmp_path, {"reward": {"name": "quadratic", "centre": [0, 1]}})
    assert spec.read(file, ["reward=stripes"]).reward == {"name": "stripes"}
    assert spec.read(file, ["reward=stripes", "reward.width=2"]).reward == {"name": "stripes", "width": 2}


def test_yaml_anchors_and_merges_are_understood(tmp_path):
    (tmp_path / "my.yaml").write_text(
        "algorithm: ppo\ndomain: toy\nreward: quadratic\n"
        "training: &numbers {chains: 64, minibatch_size: 32}\nevaluate: {<<: {chains: 32}, every: 2}\n"
    )
    told = spec.read(str(tmp_path / "my.yaml")).full()
    assert (told["training"]["chains"], told["evaluate"]["chains"], told["evaluate"]["every"]) == (64, 32, 2)


# -- names and paths


def test_a_run_is_named_after_its_file_unless_it_says_otherwise(tmp_path):
    assert spec.read(written(tmp_path, name="docking.yaml")).name == "docking"
    assert spec.read(written(tmp_path, {"name": "mine"}, name="docking.yaml")).name == "mine"
    assert spec.read("toy_ppo").name == "toy_ppo"


def test_a_path_in_a_yaml_is_beside_the_yaml_and_one_in_an_override_is_here(tmp_path, monkeypatch):
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    (home / "mine.py").write_text(PYTHON)
    (here / "other.py").write_text(PYTHON)
    file = written(home, {"reward": "./mine.py:flat", "weights": "../start.pt", "output": "./runs"})
    told = spec.read(file)
    assert told.reward == {"name": f"{home}/mine.py:flat"}
    assert (told.weights, told.output) == (f"{tmp_path}/start.pt", f"{home}/runs")
    told = spec.read(file, ["reward=./other.py:flat", "output=runs", "weights="])
    assert told.reward == {"name": f"{here}/other.py:flat"}
    assert (told.weights, told.output) == (None, "runs")
    told.tried()


def test_a_yaml_means_the_same_from_any_folder(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(PYTHON)
    file = written(tmp_path, {"reward": "./mine.py:flat"})
    told = []
    for folder in (tmp_path, ROOT):
        monkeypatch.chdir(folder)
        told.append(spec.read(file).full())
    assert told[0] == told[1]


def test_a_python_file_may_name_its_own_classes_and_hold_arrays(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(PYTHON)
    told = spec.read(str(tmp_path / "mine.py"))
    source = f"{tmp_path}/mine.py"
    assert told.name == "mine"
    assert told.reward == {"name": f"{source}:Near", "centre": [1.0, 1.0]}
    assert told.domain["network"] == f"{source}:Net"
    assert told.domain["betas"] == pytest.approx([0.1, 0.2, 0.3])
    monkeypatch.chdir(ROOT)
    assert spec.parse(yaml.safe_load(yaml.safe_dump(told.full()))).full() == told.full()  # plain YAML, of any folder
    told.tried()


# -- defaults


def test_every_default_is_the_dataclass_own(tmp_path):
    told = spec.read(written(tmp_path)).full()
    config = spec.algorithm("ppo")()
    classes = {
        **SECTIONS,
        "training": config.settings_class,
        "resources": spec.ResourceSettings,
        "checkpoint": spec.CheckpointSettings,
        "track": TrackSettings,
    }
    for section, cls in classes.items():
        assert told[section] == defaults(cls), section
    assert {k: getattr(config, k) for k in told["training"]} == told["training"]
    for section in SECTIONS:
        assert {k: getattr(config, f"{section}_{k}") for k in told[section]} == told[section]


def test_every_key_of_a_run_reaches_the_algorithm(tmp_path):
    """Each number, moved off its default in YAML, is found again on RLlib's config."""
    moved = {
        "training": {"lr": 0.5, "chains": 64, "minibatch_size": 32, "ema": 0.5, "clip": 0.3, "alpha": 0.7},
        "chain": {"num_steps": 7, "sigma": "gamma", "eta": 0.5},
        "evaluate": {"every": 3, "chains": 9, "pretrained_chains": 11, "alpha": 0.4, "max_kl": 5.0},
        "scoring": {"actors": 1, "num_cpus_per_actor": 0.5, "undecodable": -2.0, "resources": {"reward": 0.5}},
        "resources": {"num_env_runners": 2, "num_learners": 1, "num_gpus_per_env_runner": 0.5},
    }
    config = spec.read(written(tmp_path, {**moved, "seed": 4, "weights": "w.pt"})).checked()
    for section, numbers in moved.items():
        for key, value in numbers.items():
            assert getattr(config, f"{section}_{key}" if section in SECTIONS else key) == value, (section, key)
    assert (config.seed, config.initial_weights) == (4, "w.pt")


def test_what_a_run_folder_keeps_says_the_whole_run_again(tmp_path):
    told = spec.read(written(tmp_path, {"training": {"alpha": 0.3}}), [f"output={tmp_path}", "chain.num_steps=9"])
    again = spec.open_folder(loop.create_folder(told))
    assert again.full() == told.full()
    for section in ("resources", "checkpoint", "track"):
        assert dataclasses.asdict(getattr(again, section)) == dataclasses.asdict(getattr(told, section))


def test_runs_of_one_name_get_folders_of_their_own(tmp_path):
    told = spec.read(written(tmp_path), [f"output={tmp_path / 'runs'}"])
    assert [loop.create_folder(told).name for _ in range(3)] == ["my", "my-2", "my-3"]


# -- what is shipped


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_config_is_valid_and_says_how_it_is_run(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = path.read_text()
    command = next((word for word in ("pretrain", "search") if word in yaml.safe_load(text)), "run")
    command = "tune" if command == "search" else command
    assert text.startswith("# ") and f"\n# rayft {command} {path.stem}" in text
    if command == "pretrain":
        quick = ["pretrain.steps=2", "pretrain.batch_size=4", "pretrain.compile=false", "--quiet"]
        if path.stem.startswith("molecules"):  # five molecules instead of QM9
            quick += [f"domain.data={ROOT / 'tests/golden/molecules/dsgdb9nsd'}"]
        quick += ["domain.width=16"] * ("model" in yaml.safe_load(text)["domain"])  # EDM's size takes its time
        assert main(["pretrain", path.stem, *quick]) == 0
        return
    assert main([command, path.stem, "--dry-run"]) == 0
    if command == "tune":
        return
    printed = capsys.readouterr().out
    told = yaml.safe_load(printed[: printed.index("\n\nchain: ")])
    assert told == spec.read(path.stem).full()
    for word in ("network:", "memory: about", "placement:", "1 x driver"):
        assert word in printed
    assert list(tmp_path.iterdir()) == []


def test_every_algorithm_has_a_shipped_config():
    assert {yaml.safe_load(path.read_text()).get("algorithm") for path in SHIPPED} >= set(spec.known_algorithms())
    assert set(spec.configs()) >= {path.stem for path in SHIPPED}
