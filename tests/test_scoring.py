"""Rewards in a run: composition, cache, budget, failures, watching, overlap; what a user sees of them."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from rayft.algorithms.config import DiffusionConfig
from rayft.cli import main
from rayft.reward import Reward
from rayft.rewards.service import RewardService
from rayft.spec import algorithm, parse
from rayft.table import Table

SMALL: dict[str, Any] = {
    "algorithm": "ppo",
    "domain": "toy",
    "reward": "quadratic",
    "iterations": 3,
    "chain": {"num_steps": 10},
    "training": {"alpha": 0.5, "chains": 64, "minibatch_size": 64},
    "evaluate": {"every": 0, "chains": 64, "pretrained_chains": 256},
}

FILE = """
import numpy as np

CALLS = []


def right(samples):
    return [float(x[0]) for x in samples]


def up(samples):
    return [float(x[1]) for x in samples]


def fails_on_the_left(samples):
    if any(x[0] < 0 for x in samples):
        raise RuntimeError("left of zero")
    return [float(x[0]) for x in samples]


def both(samples, conditions, metadata):
    return np.array([x[0] for x in samples]), {"height": [x[1] for x in samples]}
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(FILE)
    return str(tmp_path / "mine.py")


def small(**changed: Any) -> DiffusionConfig:
    tree = {**SMALL, **changed}
    for key in ("training", "evaluate"):
        tree[key] = {**SMALL[key], **changed.get(key, {})}
    return parse(tree).checked()


@pytest.fixture
def serve(ray_session) -> Iterator[Callable[[DiffusionConfig], RewardService]]:
    """Makes what scores for a run, without the run."""
    made: list[RewardService] = []

    def service(config: DiffusionConfig) -> RewardService:
        world, told = config.build_domain(), config.section("scoring")
        made.append(RewardService(config.recipe(world), world.decoder, world.canonical, world.rewards, told))
        made[-1].start()
        return made[-1]

    yield service
    for one in made:
        one.stop()


def run(tmp_path: Path, *overrides: str, name: str = "one", **changed: Any) -> tuple[int, Path]:
    (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**SMALL, **changed}))
    code = main(["run", str(tmp_path / f"{name}.yaml"), f"output={tmp_path / 'runs'}", "--quiet", *overrides])
    return code, tmp_path / "runs" / name


def rows(folder: Path) -> list[dict[str, float]]:
    return Table(folder / "metrics.csv").rows


POINTS = np.random.default_rng(0).normal(size=(64, 2))


@pytest.fixture(scope="module")
def plain(ray_session, tmp_path_factory) -> Path:
    """The folder of a run that wrote down its scores."""
    folder = tmp_path_factory.mktemp("plain")
    code, made = run(folder, f"scoring.cache={folder / 'scores.sqlite'}")
    assert code == 0
    return made


# -- several rewards as one


def test_parts_are_weighted_logged_on_their_own_and_the_same_for_every_purpose(ray_session, file):
    parts = {"right": {"name": f"{file}:right", "weight": 0.25}, "up": {"name": f"{file}:up", "weight": 0.75}}
    algo = small(reward={"name": "combine", "aggregate": "sum", "parts": parts}).build_algo()
    draw = algo.collect("train", algo.draw_function(), 64)
    scores = algo.score(draw)
    np.testing.assert_allclose(scores.rewards, draw.events @ [0.25, 0.75], rtol=1e-6)
    np.testing.assert_allclose(scores.parts["up"], draw.events[:, 1], rtol=1e-6)
    result = algo.train()
    assert result["reward_mean"] == pytest.approx(0.25 * result["part/right"] + 0.75 * result["part/up"])
    algo.stop()


def test_an_expensive_part_is_called_only_where_the_cheap_one_lets_it_through(serve, file):
    parts = {
        "right": {"name": f"{file}:right", "weight": 0.0},
        "up": {"name": f"{file}:up", "only_if": {"right": 0.5}, "otherwise": -1.0},
    }
    service = serve(small(reward={"name": "combine", "aggregate": "sum", "parts": parts}))
    scores = service.score(POINTS, {}, "train", iteration=0)
    passed = POINTS[:, 0] >= 0.5
    assert 0 < passed.sum() < 64
    assert scores.num_calls == 64 + passed.sum()
    np.testing.assert_allclose(scores.rewards, np.where(passed, POINTS[:, 1], -1.0), rtol=1e-6)


def test_a_curriculum_moves_the_training_reward_and_never_the_evaluated_one(serve, file):
    parts = {"right": {"name": f"{file}:right", "weight": {0: 0.0, 2: 1.0}}, "up": {"name": f"{file}:up"}}
    service = serve(small(reward={"name": "combine", "aggregate": "sum", "parts": parts}))
    early = service.score(POINTS, {}, "train", iteration=0).rewards
    middle = service.score(POINTS, {}, "train", iteration=1).rewards
    final = service.score(POINTS, {}, "evaluate").rewards
    np.testing.assert_allclose(early, POINTS[:, 1], rtol=1e-6)
    np.testing.assert_allclose(middle, POINTS @ [0.5, 1.0], rtol=1e-6)
    np.testing.assert_allclose(final, POINTS.sum(1), rtol=1e-6)


def test_a_z_score_is_of_the_pretrained_samples_and_survives_a_checkpoint(ray_session, file, tmp_path):
    parts = {"right": {"name": f"{file}:right", "transform": {"zscore": {}}}}
    config = small(reward={"name": "combine", "aggregate": "sum", "parts": parts})
    algo = config.build_algo()
    algo.train()
    scored = algo.pretrained.rewards
    assert scored.mean() == pytest.approx(0, abs=1e-9)
    assert scored.std() == pytest.approx(1)
    algo.save_to_path(str(tmp_path / "saved"))
    fitted = algo.rewards.recipe.state()
    algo.stop()
    other = config.build_algo()
    assert other.rewards.recipe.state() != fitted
    other.restore_from_path(str(tmp_path / "saved"))
    assert other.rewards.recipe.state() == fitted
    other.stop()


def test_numbers_that_a_reward_returns_beside_its_scores_are_logged_and_kept_by_the_cache(ray_session, file):
    algo = small(reward=f"{file}:both", scoring={"cache": "memory"}).build_algo()
    assert np.isfinite(algo.train()["part/both.height"])
    events = np.array([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0]])
    for calls in (2, 0):
        scores = algo.rewards.score(events, {})
        assert scores.num_calls == calls
        assert scores.parts["both.height"].tolist() == [2.0, 4.0, 2.0]
    algo.stop()


# -- samples it fails on


@pytest.mark.parametrize("told", [{}, {"on_failure": "floor", "floor": -7.0}], ids=["drop", "floor"])
def test_failed_samples_are_dropped_or_have_the_floor_and_are_counted_either_way(serve, file, told):
    service = serve(small(reward=f"{file}:fails_on_the_left", scoring={"max_failed": 1.0, **told}))
    scores, left = service.score(POINTS, {}), POINTS[:, 0] < 0
    assert scores.num_failed == left.sum() > 0
    assert (scores.rewards[left] == -7.0).all() if told else np.isnan(scores.rewards[left]).all()
    np.testing.assert_allclose(scores.rewards[~left], POINTS[~left, 0], rtol=1e-6)


def test_too_many_failures_stop_the_run_with_their_reasons(ray_session, file, tmp_path, capfd):
    code, _ = run(tmp_path, "scoring.max_failed=0.1", reward=f"{file}:fails_on_the_left")
    said = capfd.readouterr().err
    assert code == 2
    assert re.search(
        r"failed on \d+ of 256 samples, more than scoring.max_failed = 0.1: raised: RuntimeError: left", said
    )


def test_a_user_is_told_what_failed_and_why(ray_session, file, tmp_path, capfd):
    code, folder = run(tmp_path, "scoring.max_failed=1", reward=f"{file}:fails_on_the_left")
    assert code == 0
    assert "RuntimeError: left of zero" in capfd.readouterr().err
    told = json.loads((folder / "rewards.json").read_text())
    assert "RuntimeError: left of zero" in json.dumps(told)
    assert sum(row["reward_failed"] for row in rows(folder)) > 0
    assert np.isfinite([row["learner/total_loss"] for row in rows(folder)]).all()


# -- what is paid


def test_a_second_run_with_the_cache_pays_nothing(plain, tmp_path):
    scores = plain.parents[1] / "scores.sqlite"
    code, folder = run(tmp_path, f"scoring.cache={scores}", name="second")
    assert code == 0
    assert [row["reward_calls"] for row in rows(plain)] == [256 + 64, 256 + 128, 256 + 192 + 64]
    assert [row["reward_calls"] for row in rows(folder)] == [0, 0, 0]
    assert [row["reward_mean"] for row in rows(folder)] == [row["reward_mean"] for row in rows(plain)]
    with sqlite3.connect(scores) as file:
        assert file.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_equal_samples_of_one_call_are_paid_once(serve, file):
    service = serve(small(reward=f"{file}:right", scoring={"cache": "memory"}))
    events = np.repeat(np.arange(8.0).reshape(4, 2), 5, axis=0)
    scores = service.score(events, {})
    assert scores.num_calls == 4
    assert scores.num_hits == 16
    assert scores.rewards.tolist() == events[:, 0].tolist()
    assert service.score(events, {}).num_calls == 0


def test_the_budget_of_calls_ends_a_run_cleanly_before_it_is_overdrawn(ray_session, tmp_path, capfd):
    code, folder = run(tmp_path, "scoring.max_reward_calls=520", "iterations=50")
    assert code == 0
    told = rows(folder)
    assert told[-1]["iteration"] == 3
    assert told[-1]["reward_calls"] == 256 + 3 * 64
    assert "scoring.max_reward_calls is 520" in json.loads((folder / "run.json").read_text())["status"]
    assert (folder / "report.html").is_file()
    code, _ = run(tmp_path, "scoring.max_reward_calls=300", name="two")
    assert code == 2
    assert "scoring.max_reward_calls is 300" in capfd.readouterr().err


# -- held-out rewards


def test_watched_rewards_are_told_before_and_after_and_never_optimised(plain, file, tmp_path):
    code, folder = run(tmp_path, "evaluate.every=1", watch={"height": f"{file}:up"})
    assert code == 0
    last = rows(folder)[-1]
    assert np.isfinite([last["evaluate/watch/height"], last["evaluate/watch/height_pretrained"]]).all()
    kept = np.load(folder / "evaluations" / "pretrained.npz")
    np.testing.assert_allclose(kept["watch/height"], kept["x_0"][:, 1], rtol=1e-6)
    assert [row["reward_mean"] for row in rows(plain)] == [row["reward_mean"] for row in rows(folder)]


# -- drawing while scoring


def test_pieces_of_a_draw_are_scored_in_their_places(ray_session, file):
    algo = small(reward=f"{file}:right", scoring={"micro_batches": 5, "actors": 1}).build_algo()
    pieces = algo.draw_scored(0)
    assert [len(piece.draw.events) for piece in pieces] == [13, 13, 13, 13, 12]
    for piece in pieces:
        np.testing.assert_allclose(piece.scores.result().rewards, piece.draw.events[:, 0], rtol=1e-6)
    assert np.isfinite(algo.train()["reward_mean"])
    algo.stop()


def test_with_staleness_the_next_draw_is_of_the_weights_before(ray_session, file):
    algo = small(reward=f"{file}:right", scoring={"staleness": 1}).build_algo()
    algo.train()
    ahead = algo.ahead[0].draw.chains.x
    fresh = algo.collect("train", algo.draw_function(), 64).chains.x
    assert (ahead[-1] == fresh[-1]).all()
    assert not np.allclose(ahead, fresh)
    assert np.isfinite(algo.train()["reward_mean"])
    algo.horizon = 3
    algo.train()
    assert algo.ahead is None
    algo.stop()


class Spread(Reward):
    """Scores a sample by its distance from the others."""

    groupwise = True

    def __call__(self, samples: Any) -> np.ndarray:
        return np.linalg.norm(np.stack(samples) - np.mean(samples, axis=0), axis=1)


def test_a_groupwise_reward_sees_the_whole_batch_and_refuses_pieces_of_it(serve):
    expected = np.linalg.norm(POINTS - POINTS.mean(axis=0), axis=1)
    scores = serve(small().reward(Spread, actors=2)).score(POINTS, {}, "train")
    np.testing.assert_allclose(scores.rewards, expected, rtol=1e-5)
    with pytest.raises(ValueError, match="would show it only a piece"):
        small().reward(Spread).scoring(micro_batches=2).validate()


def test_algorithms_that_pay_for_payoffs_are_metered_as_such(ray_session):
    for name, purpose in (("rgdm", "payoff"), ("ppo", "train")):
        assert algorithm(name)().algo_class.pays_for == purpose
