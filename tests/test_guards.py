"""Guards speak when they should, once, and a run that left its budget ends with weights from within it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rayft import domain as domains
from rayft import loop, spec, store
from rayft.algorithms.config import EvaluateSettings
from rayft.guards import watch


def spoken(*rows, **settings):
    """(sentences, trips) of a fresh set of guards over some rows."""
    guards = watch(EvaluateSettings(**settings))
    trips = [trip for row in rows for guard in guards for trip in guard(row)]
    return [text for guard in guards for text in guard.said()], trips


def test_a_quiet_row_is_passed_over_in_silence():
    assert spoken({"iteration": 1.0, "kl": 0.5, "learner/total_loss": 0.1, "learner/guard_ratio": 1e-6}) == ([], [])


@pytest.mark.parametrize("row", [{"kl": 51.0}, {"evaluate/kl": 51.0}, {"kl": float("nan")}])
def test_leaving_the_kl_budget_stops_the_run(row):
    _, trips = spoken(row, max_kl=50.0)
    assert [trip.guard for trip in trips] == ["kl_budget"]


def test_a_guard_speaks_again_when_the_trouble_comes_back():
    said, _ = spoken({"guard_no_spread": 1.0}, {"guard_no_spread": 0.0}, {"guard_no_spread": 1.0})
    assert len(said) == 2


def test_without_a_budget_nothing_stops_the_run():
    assert spoken({"kl": 1e9}, max_kl=None) == ([], [])


@pytest.mark.parametrize(
    ("row", "word"),
    [
        ({"learner/total_loss": float("inf")}, "not finite"),
        ({"learner/guard_non_finite": 2.0}, "not finite"),
        ({"learner/guard_ratio": 0.5}, "before the first step"),
        ({"guard_no_spread": 1.0}, "nothing to learn"),
        ({"learner/update_shrunk_to": 0.05}, "lower training.lr"),
        ({"silent_timesteps": 3.0}, "at 3 timesteps"),
        (
            {"evaluate/diversity": 0.01, "evaluate/diversity_pretrained": 1.0, "evaluate/reward": 1.0},
            "one and the same",
        ),
        ({"evaluate/diversity": 1.0, "evaluate/diversity_pretrained": 1.0, "evaluate/reward": -1.0}, "fell below"),
    ],
)
def test_a_guard_says_its_sentence_once_per_spell(row, word):
    full = {"evaluate/diversity_pretrained": 1.0, "evaluate/reward_pretrained": 0.0, "evaluate/kl": 2.0, **row}
    said, trips = spoken(full, full, full)
    assert len(said) == 1
    assert word in said[0]
    assert not trips


class Listener:
    def __init__(self):
        self.said = []

    def row(self, row, total):
        """Not of interest."""

    def event(self, text):
        self.said.append(text)


def run_until_stopped(tmp_path, *overrides):
    small = [
        "training.chains=128",
        "training.minibatch_size=512",
        "evaluate.chains=128",
        "evaluate.pretrained_chains=256",
    ]
    told = spec.read("toy_ppo", [*small, "iterations=40", f"output={tmp_path}", *overrides])
    run = loop.Run(told, loop.create_folder(told), Listener())
    run.execute(resume=False)
    return run


def test_a_run_past_its_budget_goes_back_to_its_best_checkpoint(ray_session, tmp_path):
    run = run_until_stopped(tmp_path, "evaluate.max_kl=0.6", "evaluate.every=1", "training.lr=3e-3")
    status = json.loads((run.folder / "run.json").read_text())["status"]
    assert status.startswith("stopped: KL to the pretrained model")
    best = store.best(run.folder)
    assert best is not None
    assert any("rolled back to iteration" in text for text in run.display.said)
    events = [json.loads(line)["guard"] for line in (run.folder / "events.jsonl").read_text().splitlines()]
    assert "kl_budget" in events
    kept = store.load(run.folder).weights()
    assert all(np.array_equal(kept[k], v) for k, v in best.weights().items())
    final = store.newest(run.folder).weights()
    assert all(np.array_equal(final[k], v) for k, v in best.weights().items()), "the last checkpoint is past the budget"


def test_a_run_that_never_was_within_its_budget_keeps_the_pretrained_weights(ray_session, tmp_path):
    run = run_until_stopped(tmp_path, "evaluate.max_kl=1e-6", "evaluate.every=1")
    assert any("pretrained weights are kept" in text for text in run.display.said)
    kept = store.load(run.folder)
    pretrained = domains.pretrained(kept.domain()).state_dict()
    assert all(np.array_equal(kept.weights()[k], v.numpy()) for k, v in pretrained.items())
