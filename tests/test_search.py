"""The ``search:`` block: what it may say, what it means, and that every mistake is one sentence before Ray starts."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from ray.tune import Checkpoint
from ray.tune.execution.placement_groups import PlacementGroupFactory

from rayft import objective, search, spec, steer, storage, store, sweep, sweep_page, tune
from rayft.cli import main
from rayft.verdict import Samples, judge

RUN = """
algorithm: rgdm
domain: toy
reward: quadratic
iterations: 24
training: {num_candidates: 8}
evaluate: {every: 4, chains: 64, pretrained_chains: 256}
"""
LR = "space: {training.lr: {loguniform: [1e-4, 1e-2]}}"


def told(block, run=RUN, **more):
    """The spec of a run with a search block, through YAML."""
    tree = yaml.safe_load(run) | {"search": yaml.safe_load(block)}
    return spec.parse(tree | more)


BAD = {
    "space: {}": "search.space is empty",
    "trials: 3": "search.space is empty",
    "{space: {training.lr: {loguniform: [1e-4, 1e-2]}}, trails: 3}": "no key 'trails' (did you mean 'trials'?)",
    "space: {training.lr: {loguniorm: [1e-4, 1e-2]}}": "no distribution 'loguniorm' (did you mean 'loguniform'?)",
    "space: {training.lr: 0.1}": "search.space.training.lr is 0.1; give it one distribution",
    "space: {training.lr: {uniform: [1, 2], choice: [1]}}": "give it one distribution",
    "space: {training.lr: {uniform: 0.1}}": "should be a list",
    "space: {training.lr: {uniform: [0.1]}}": "should be the numbers [low, high]",
    "space: {training.lr: {uniform: [0.1, x]}}": "should be the numbers [low, high]",
    "space: {training.lr: {uniform: [0.1, .inf]}}": "should be the numbers [low, high]",
    "space: {training.lr: {uniform: [0.2, 0.1]}}": "the first number should be below the second",
    "space: {training.lr: {loguniform: [0, 0.1]}}": "a logarithm needs numbers above 0",
    "space: {training.lr: {quniform: [0.1, 0.2, 0.5]}}": "has a step of 0.5",
    "space: {training.num_epochs: {randint: [1, 2.5]}}": "should be whole numbers",
    "space: {training.lr: {choice: []}}": "is a choice of nothing",
    "space: {training.temprature: {uniform: [0.1, 1]}}": "no key 'temprature' (did you mean 'temperature'?)",
    "space: {trainin.lr: {uniform: [0.1, 1]}}": "no key 'trainin' (did you mean 'training'?)",
    "space: {training.lr.x: {uniform: [0.1, 1]}}": "training.lr",
    "space: {domain.size: {choice: [1, 2]}}": "takes no 'size'",
    "space: {training.temperature: {choice: [0.3, -1]}}": "training.temperature = -1: training.temperature is -1",
    "space: {training.temperature: {uniform: [-1, 1]}}": "training.temperature is -1",
    "space: {training.radius_unit: {choice: [sigma, sigmoid]}}": "training.radius_unit is 'sigmoid'",
    "space: {evaluate.every: {choice: [1, 2]}}": "evaluate.every, which has to be the same for all trials",
    "space: {iterations: {choice: [1, 2]}}": "has to be the same for all trials",
    f"{{{LR}, scheduler: ashes}}": "search.scheduler is 'ashes'",
    f"{{{LR}, reduction: 1}}": "search.reduction is 1",
    f"{{{LR}, trials: 0}}": "search.trials is 0",
    f"{{{LR}, objective: atained}}": "(did you mean 'attained'?)",
    f"{{{LR}, objective: attained}}": "needs an alpha for the attained share",
    f"{{{LR}, objective: {{}}}}": "search.objective is empty",
    f"{{{LR}, objective: {{rewrad: 1}}}}": "no 'rewrad' (did you mean 'reward'?)",
    f"{{{LR}, objective: {{watch/other: 1}}}}": "no 'watch/other'",
    f"{{{LR}, objective: reward_at_kl}}": "a budget search.kl in nats go together",
    f"{{{LR}, objective: reward, kl: 3}}": "a budget search.kl in nats go together",
    f"{{{LR}, sampler: grid}}": "training.lr is loguniform and the sampler is grid",
    "{space: {training.lr: {grid: [0.1, 0.2]}}, sampler: optuna}": "training.lr is a grid and the sampler is optuna",
    "{space: {training.lr: {grid: [0.1, 0.2]}}, trials: 3}": "the grid has 2 points",
    f"{{{LR}, grace: 25}}": "search.grace is 25, more than iterations = 24",
    f"{{{LR}, scheduler: none, grace: 4}}": "search.grace is for scheduler asha",
    f"{{{LR}, scheduler: pbt, perturb_every: 6}}": "make it a multiple of evaluate.every = 4",
    f"{{{LR}, scheduler: pbt, sampler: optuna}}": "scheduler pbt draws its own values",
    f"{{{LR}, scheduler: pbt, trials: 3}}": "pbt needs at least 4",
    f"{{{LR}, scheduler: pbt, max_concurrent: 2}}": "search.max_concurrent is not for pbt",
    "{space: {chain.num_steps: {choice: [10, 20]}}, scheduler: pbt}": "cannot change while a run goes on",
    "{space: {training.ema: {choice: [0, 0.9]}}, scheduler: pbt}": "(did you mean 'training.lr'?)",
    "{space: {seed: {choice: [0, 1]}}, bank: shared}": "seed is searched and decides what a pay-off bank holds",
    "space: {training.bank: {choice: [a, b]}}": "training.bank is searched",
    "space: {training.radius: {choice: [0, 1.0, 1.5]}}": "with 3 radii it must be a multiple",
}


@pytest.mark.parametrize("block", BAD)
def test_every_mistake_in_a_search_block_is_one_sentence(block):
    with pytest.raises(ValueError, match=r"search|training|seed|evaluate|scheduler|chain|domain") as error:
        search.read(told(block))
    assert BAD[block] in str(error.value), error.value
    assert "\n" not in str(error.value)


def test_a_mistake_ends_the_command_before_ray_starts(tmp_path, monkeypatch, capsys):
    (tmp_path / "s.yaml").write_text(RUN + "search: {space: {training.temprature: {uniform: [0.1, 1]}}}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("Ray was started"))
    assert main(["tune", "s.yaml"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "did you mean 'temperature'?" in err
    assert [path.name for path in tmp_path.iterdir()] == ["s.yaml"]


def test_run_and_tune_each_refuse_what_is_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["run", "toy_rgdm_asha"]) == 2
    assert "`rayft tune`" in capsys.readouterr().err
    assert main(["tune", "toy_rgdm"]) == 2
    assert "`rayft run`" in capsys.readouterr().err
    assert main(["tune", "--resume", "."]) == 2
    assert "is not a sweep" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_attained_shares_at_searched_alphas_are_not_compared():
    run = "{algorithm: ppo, domain: toy, reward: quadratic, evaluate: {every: 4}, training: {alpha: 0.5}}"
    block = "{space: {training.alpha: {uniform: [0.1, 1]}}, objective: attained}"
    with pytest.raises(ValueError, match=r"set evaluate\.alpha"):
        search.read(told(block, run))
    assert search.read(told(block, run, evaluate={"every": 4, "alpha": 0.5})).objective.weights == {"attained": 1}


def test_a_schedule_needs_evaluations_to_compare():
    with pytest.raises(ValueError, match=r"evaluate\.every is 0"):
        search.read(told(LR, evaluate={"every": 0}))
    with pytest.raises(ValueError, match=r"evaluate\.every is 25 and iterations is 24, so asha would compare no"):
        search.read(told(LR, evaluate={"every": 25}))
    assert search.read(told(f"{{{LR}, scheduler: none}}", evaluate={"every": 25})).every == 25
    assert search.read(told(f"{{{LR}, scheduler: none}}", evaluate={"every": 0})).every == 24


def test_scientific_notation_and_nested_keys_are_read():
    flat = search.read(told("space: {training.lr: {loguniform: [1e-4, 1e-2]}}")).space
    nested = search.read(told("space: {training: {lr: {loguniform: [1e-4, 1e-2]}}}")).space
    assert flat == nested == {"training.lr": search.Distribution("loguniform", (1e-4, 1e-2))}


@pytest.mark.parametrize(
    ("kind", "values", "ends"),
    [("uniform", (0.5, 2.0), (0.5, 2.0)), ("randint", (1, 5), (1, 4)), ("choice", (3, 1), (3, 1))],
)
def test_the_ends_of_a_distribution_are_what_it_can_draw(kind, values, ends):
    assert search.Distribution(kind, values).ends == ends


@pytest.mark.parametrize(
    ("drawn", "value", "clipped"),
    [
        (("loguniform", (0.1, 1.0)), 1.2, 1.0),
        (("uniform", (0.1, 1.0)), 0.08, 0.1),
        (("quniform", (0.5, 2.0, 0.5)), 1.2, 1.0),
        (("randint", (1, 5)), 6, 4),
        (("choice", (1, 2)), 2, 2),
    ],
)
def test_pbt_stays_inside_the_space(drawn, value, clipped):
    space = {"training.lr": search.Distribution(*drawn)}
    assert steer.inside(space, {"training.lr": value, "other": 7}) == {"training.lr": clipped, "other": 7}


def test_a_shared_bank_holds_every_radius_of_the_space():
    listed = search.read(told("space: {training.radius: {choice: [2.0, 0.5]}, training.lr: {choice: [1e-3]}}"))
    assert listed.shared
    assert listed.banked("here")["training"] == {"num_candidates": 8, "bank": "here", "radii": [0.5, 2.0]}
    drawn = search.read(told("space: {training.radius: {loguniform: [0.25, 2.0]}}")).banked("here")["training"]["radii"]
    np.testing.assert_allclose(drawn, [0.25, 0.5, 1.0, 2.0])  # four, because eight candidates cannot be dealt to five
    five = search.read(told("space: {training.radius: {uniform: [1, 16]}}", training={"num_candidates": 10}))
    np.testing.assert_allclose(five.banked("here")["training"]["radii"], [1, 2, 4, 8, 16])
    three = search.read(told("space: {training.radius: {choice: [0.5, 1.0, 4.0]}}")).banked("here")["training"]["radii"]
    assert three == [0.5, 1.0, 2.0, 4.0], "between shells every radius can be read; three cannot be dealt to"


def test_a_bank_is_not_shared_where_trials_would_need_several():
    assert not search.read(told("space: {seed: {choice: [0, 1]}}")).shared
    assert not search.read(told(f"{{{LR}, bank: own}}")).shared
    ppo = "{algorithm: ppo, domain: toy, reward: quadratic}"
    assert not search.read(told(LR, ppo)).shared
    with pytest.raises(ValueError, match="bank: shared is for rgdm"):
        search.read(told(f"{{{LR}, bank: shared}}", ppo))


def test_every_shipped_sweep_is_read(capsys):
    names = [name for name in spec.configs() if name.startswith("toy_rgdm_")]
    assert {"toy_rgdm_asha", "toy_rgdm_pbt", "toy_rgdm_optuna", "toy_rgdm_grid"} <= set(names)
    for name in names:
        if spec.read(name).search is None:
            continue
        found = search.read(spec.read(name))
        assert found.shared and found.trials >= 4, name
        assert main(["tune", name, "--dry-run"]) == 0
        assert f"trials: {found.trials}" in capsys.readouterr().out


def verdict(reward=1.0, kl=2.0):
    """Of a policy whose samples all have one reward and one KL."""
    rng = np.random.default_rng(0)
    shape = {"groups": None, "undecodable": np.arange(400) < 100, "x_0": rng.normal(size=(50, 2)), "context": {}}
    before = Samples(rng.normal(size=400), np.zeros(400), **shape)
    return judge(before, Samples(np.full(400, reward), np.full(400, kl), **shape), None)


def test_a_mix_is_the_weighted_sum_and_validity_what_decodes():
    told = objective.Objective({"reward": 2.0, "kl": -0.5, "validity": 4.0})
    assert told.read(verdict()) == (2.0 * 1.0 - 0.5 * 2.0 + 4.0 * 0.75, "")


def test_over_the_budget_of_kl_nothing_counts():
    told = objective.Objective({"reward": 1.0}, max_kl=1.5)
    assert told.read(verdict(kl=1.5)) == (1.0, "")
    value, why = told.read(verdict(kl=2.0))
    assert math.isnan(value) and why == "its KL of 2 nats is over search.kl = 1.5"


def test_what_is_refused_says_why():
    value, why = objective.Objective({"attained": 1.0}).read(verdict())
    assert math.isnan(value) and why.startswith("no attained: ")


def test_an_objective_may_weigh_what_the_domain_measures():
    block = "{space: {training.lr: {uniform: [1e-4, 1e-3]}}, objective: {reward: 1, metric/uniqueness: 0.2}}"
    run = (
        "{algorithm: ppo, domain: molecules, reward: qed, iterations: 4, training: {alpha: 0.5}, evaluate: {every: 4}}"
    )
    goal = search.read(told(block, run)).objective
    with pytest.raises(ValueError, match="no 'metric/uniqueness'"):
        search.read(told(block, run.replace("molecules", "toy").replace("qed", "quadratic")))
    found = verdict()
    measured = replace(found.policy, metrics={"uniqueness": 0.5, "validity": 0.9})
    assert goal.read(replace(found, policy=measured)) == (pytest.approx(1.1), "")
    value, why = goal.read(replace(found, policy=replace(measured, metrics={"unique": 0.5})))
    assert math.isnan(value) and why.startswith("no metric/uniqueness: the domain measures metric/unique")


def node(cpus, gpus=0.0, alive=True):
    return {"Alive": alive, "Resources": {"CPU": cpus, "GPU": gpus}}


def test_trials_at_a_time_are_what_the_machine_holds():
    need = PlacementGroupFactory([{"CPU": 1}, {"CPU": 1}])
    assert tune.room(need, [node(5.0)]) == 2
    assert tune.room(need, [node(3.0), node(1.0), node(9.0, alive=False)]) == 2


@pytest.mark.parametrize(
    ("bundles", "nodes"),
    [([{"CPU": 3}], [node(2.0)]), ([{"CPU": 3}], [node(2.0), node(2.0)]), ([{"CPU": 1, "GPU": 1}], [node(4.0)])],
)
def test_too_small_a_machine_is_said_at_once(bundles, nodes):
    with pytest.raises(ValueError, match=r"one trial needs .* and Ray has"):
        tune.room(PlacementGroupFactory(bundles), nodes)


def row(trial, step, objective, **more):
    return {"trial": trial, "step": step, "iteration": 2 * step, "objective": objective, "values": {"a": 1}, **more}


def test_a_trial_counts_once_however_often_its_rows_are_there():
    rows = [row("b", 1, 0.5, paid={"payoff": 3}), row("a", 1, 0.7), row("b", 2, 0.9, status="finished")]
    rows += [
        {"trial": "b", "ended": "stopped"},
        row("a", 1, 0.7, paid={"payoff": 4}),
        row("c", 1, math.nan, reason="x"),
    ]
    found = sweep.outcomes(rows, ended=True)
    assert [(one.name, one.status, one.objective) for one in found[:2]] == [
        ("b", "finished", 0.9),
        ("a", "unfinished", 0.7),
    ]
    assert found[2].name == "c" and math.isnan(found[2].objective)
    assert sweep.paid(rows) == {"payoff": 7}
    assert sweep.failure(found[2:]) == "none of 1 trials has an objective: x"


def test_the_pareto_front_is_what_no_other_beats_in_both():
    points = [(1.0, 0.5), (0.5, 0.6), (2.0, 0.9), (3.0, 0.8), (0.5, 0.1)]
    assert sweep_page.pareto(points) == [(0.5, 0.6), (2.0, 0.9)]


def test_choices_of_text_and_numbers_fit_into_one_table():
    values = [{"k": "a"}, {"k": 2}, {"k": [1, 2]}]
    found = [sweep.Outcome(str(i), "finished", "", {"values": v}, {}, []) for i, v in enumerate(values)]
    assert sweep.table(found).column("k").to_pylist() == ['"a"', "2", "[1, 2]"]


class Named(SimpleNamespace):
    """As much of Tune's trial as schedulers look at."""

    def __str__(self):
        return self.name


def test_a_resumed_asha_compares_with_what_was_there_before(tmp_path):
    def asked(score):
        rungs = steer.Rungs(str(tmp_path), time_attr="iteration", metric="score", mode="max", max_t=9, grace_period=2)
        for name in ("trial_00000", "trial_00001"):
            rungs.on_trial_add(SimpleNamespace(), Named(name=name, trial_id=name))
        return rungs.on_trial_result(None, Named(name="b", trial_id="trial_00001"), {"iteration": 2, "score": score})

    assert asked(0.1) == "CONTINUE", "nobody to compare with"
    (tmp_path / "rows.jsonl").write_text(json.dumps(row("trial_00000", 1, 0.5, score=0.5)) + "\n")
    assert (asked(0.1), asked(0.9)) == ("STOP", "CONTINUE")


def test_a_checkpoint_that_was_dropped_is_replaced_by_the_newest_whole_one(home, tmp_path):
    from rayft.trial import still_there

    trial = storage.place(home)
    (tmp_path / "rllib").mkdir()
    (tmp_path / "rllib/state").write_bytes(b"weights")
    card = {"rllib_sha256": store.tree_hash(tmp_path / "rllib")}
    for number, state in enumerate((b"weights", b"weights", b"wei")):  # of the last one not all has arrived
        trial.write(f"checkpoint_{number:06d}/card.json", json.dumps({**card, "step": number + 2}).encode())
        trial.write(f"checkpoint_{number:06d}/rllib/state", state)

    def noted(name):
        return SimpleNamespace(checkpoint=Checkpoint(f"{trial.root}/{name}", trial.files), metrics={})

    there, dropped, lost = noted("checkpoint_000000"), noted("checkpoint_000009"), noted("none/checkpoint_000000")
    assert still_there(there) and there.checkpoint.path == f"{trial.root}/checkpoint_000000"
    assert still_there(dropped) and dropped.metrics == {"training_iteration": 3}
    assert dropped.checkpoint.path == f"{trial.root}/checkpoint_000001"
    assert not still_there(lost)
