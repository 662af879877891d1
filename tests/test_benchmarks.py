"""The benchmarks run, and write what they promise."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest

from benchmarks import _every, _result, molecules, shapes, table1, table_every
from envs.molecules.domain import Molecules
from envs.shapes import distances
from envs.shapes.domain import Shapes
from rayft.spec import known_algorithms
from rayft.verdict import Samples

ROOT = Path(__file__).parents[1]


def figures(name: str, out: Path, *more: str) -> dict[str, float]:
    """The numbers of ``python -m benchmarks.NAME --quick``, every one of them finite."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--out", str(out), *more]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads((out / f"{name}.json").read_text())
    assert told.pop("machine")["cpus"] >= 1
    assert told.pop("versions")["ray"].startswith("2.")
    assert all(math.isfinite(value) for value in told.values())
    for figure in (key.removesuffix("/low") for key in told if key.endswith("/low")):
        assert told[f"{figure}/low"] <= told[figure] <= told[f"{figure}/high"]
    return told


def test_a_part_measured_elsewhere_leaves_the_machine_of_the_others(tmp_path: Path, monkeypatch):
    def written(partial: bool, threads: int, *names: str) -> dict:
        monkeypatch.setattr(_result, "machine", lambda: {"torch_threads": threads})
        _result.Result("some", {name: _result.Figure(1.0) for name in names}, partial).write(tmp_path)
        return json.loads((tmp_path / "some.json").read_text())

    assert "parts" not in written(False, 1, "a/x", "b/x")
    told = written(True, 2, "a/x")
    assert told["machine"] == {"torch_threads": 1} and told["parts"].keys() == {"a"}
    assert told["parts"]["a"]["machine"] == {"torch_threads": 2}
    assert written(True, 3, "b/x")["parts"].keys() == {"a", "b"}
    assert written(True, 1, "a/x")["parts"].keys() == {"b"}
    assert "parts" not in written(False, 2, "a/x", "b/x")


def test_the_best_of_n_is_chosen_among_samples_of_one_size(monkeypatch):
    monkeypatch.setattr(molecules, "BATCH", 30)
    _, mask, _ = molecules.drawn(Molecules(num_steps=1, weights=None), 80, "beta", of=4)
    sizes = mask.sum(1).reshape(20, 4)
    assert (sizes == sizes[:, :1]).all() and len(set(sizes[:, 0])) > 1


def test_a_bank_larger_than_memory_may_be_is_read_in_little(tmp_path: Path):
    told = figures("rgdm", tmp_path, "--only", "bank")
    assert told["bank/size_gb"] > 1 > told["bank/rss_gb"]


def test_no_size_of_clouds_pays_for_importing_what_all_of_them_need(monkeypatch):
    imported = []

    def timed(*_told: object) -> float:
        imported.append(distances.pot.cache_info().currsize)
        return 1.0

    monkeypatch.setattr(shapes, "_seconds", timed)
    distances.pot.cache_clear()
    assert "emd/power" in shapes.movers(quick=True)
    assert len(imported) > 2 and set(imported) == {1}


@pytest.mark.slow
def test_the_overhead_benchmark_runs_and_no_ratio_is_absurd(tmp_path: Path):
    told = figures("overhead", tmp_path)
    assert told["runner/local/wide"] > 0.6 and told["learner/update"] > 0.5
    assert told["runner/remote/wide"] > 0.2
    assert told["runner/local/small"] > 0.5


@pytest.mark.slow
def test_the_optimum_benchmark_runs_and_nothing_exceeds_the_ceiling(tmp_path: Path):
    told = figures("optimum", tmp_path)
    ceiling = told["attained/exact_ceiling/0.5"]
    assert ceiling == pytest.approx(0.983, abs=0.003)
    for algorithm in ("ceiling", "ppo", "rwmle"):
        assert 0 < told[f"attained/{algorithm}/0.5"] < ceiling + 0.005
        assert told[f"seconds/{algorithm}"] > 0
    assert told["frontier/rgdm/best"] > 0
    assert "<svg" in (tmp_path / "optimum.svg").read_text()


@pytest.mark.slow
def test_truncated_backpropagation_holds_as_much_for_long_chains_as_for_short_ones(tmp_path: Path):
    told = figures("backprop", tmp_path)
    assert told["memory_mb/truncated_again/200"] < told["memory_mb/truncated_again/50"] + 4
    assert told["memory_mb/whole/200"] > 3 * told["memory_mb/whole/50"]
    assert told["memory_mb/again/200"] < 0.2 * told["memory_mb/whole/200"]


@pytest.mark.slow
def test_the_mixture_benchmark_trains_in_turns_with_whatever_it_is_told(tmp_path: Path):
    other = tmp_path / "other.py"
    other.write_text(
        "for line in open(0):\n    print(0.25 if line.strip() == 'gap' else int(line) / 100, flush=True)\n"
    )
    told = figures("gfn", tmp_path, "--theirs", f"{sys.executable} {other}")
    assert told["torchgfn/elbo_gap_theirs"] == 0.25
    assert told["torchgfn/ms_theirs"] == pytest.approx(10)
    assert told["torchgfn/time_ratio"] > 0
    assert told["torchgfn/elbo_gap_exact"] == pytest.approx(0.075, abs=0.03)
    assert told["torchgfn/elbo_gap_exact/default"] == pytest.approx(0.165, abs=0.05)
    assert told["torchgfn/elbo_gap_ours"] > 0


@pytest.mark.slow
def test_the_pay_off_benchmark_runs_and_a_sweep_pays_once(tmp_path: Path):
    told = figures("rgdm", tmp_path)
    assert told["sweep/reward_calls_ratio"] == pytest.approx(1.0, abs=0.01)
    assert told["sweep/calls_saved"] > 1.2
    assert 0.8 < told["step/vs_ddpm"] < 1.6
    assert told["wait/finished_bank"] < 0.2
    assert told["frontier/rgdm/quadratic"] <= 1.02


@pytest.mark.slow
def test_the_rewards_benchmark_runs_and_poison_is_found_exactly(tmp_path: Path):
    told = figures("rewards", tmp_path)
    assert told["poison/exact"] == 1
    assert told["cache/20k_seconds"] < 2


@pytest.mark.slow
def test_the_shapes_benchmark_runs_and_the_engine_costs_little_beside_the_network(tmp_path: Path):
    told = figures("shapes", tmp_path)
    assert 0.8 < told["sample/vs_bare"] < 2
    assert told["emd/minutes_50x50"] > 0
    assert 0 < told["emd/power"] < 4


@pytest.mark.slow
def test_every_algorithm_and_guide_has_a_place_in_the_picture(tmp_path: Path):
    command = [sys.executable, "-m", "benchmarks.optimum", "--all", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads((tmp_path / "every.json").read_text())
    for target in _every.TARGETS:
        for method in _every.methods(target):
            assert math.isfinite(told[f"reward/{method}/{target}"]) and told[f"calls/{method}/{target}"] > 0
            assert told.get(f"attained/{method}/{target}", 0) < 1.02
        assert "<svg" in (tmp_path / f"every_{target}.svg").read_text()


def test_memory_that_was_freed_before_a_job_hides_nothing_of_its_own():
    block = np.ones(40_000_000)
    del block
    before = _every._from_here()
    block = np.ones(20_000_000)
    assert _every._peak() - before == pytest.approx(block.nbytes / 2**20, abs=20)


def test_reward_and_kl_of_a_method_are_told_and_no_kl_where_there_is_none():
    known, result = _every.Known(0.0, 1.0, math.nan), _result.Result("every")
    rows = [_every.Row(0.5, kl, None, 1.0, 10, 1.0) for kl in (1.0, 2.0)]
    _every.tell("ppo", "stripes", rows, known, result)
    _every.tell("smc", "stripes", [_every.Row(0.5, None, None, 1.0, 10, 1.0)], known, result)
    assert result.figures["kl/ppo/stripes"].value == 1.5
    assert "kl/smc/stripes" not in result.figures and result.figures["reward/smc/stripes"].value == 0.5


@pytest.mark.slow
@pytest.mark.parametrize("task", table_every.TASKS)
def test_the_table_of_domains_runs_one_iteration_of_its_first_row(task):
    command = [sys.executable, "-m", "benchmarks.table_every", "--quick", "--only", task]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for word in ("reward", "valid", "unique", "diversity", "minutes"):
        assert word in done.stdout


def test_the_table_of_domains_has_a_config_for_every_algorithm():
    for row in table_every.QUEUE:
        assert (ROOT / "tune_configs" / f"{row.name}.yaml").is_file()
    assert set(table_every.ALGORITHMS) == set(known_algorithms())


def test_a_cloud_drawn_again_is_not_unique():
    rng = np.random.default_rng(0)
    told = {"kl": np.zeros(64), "groups": None, "undecodable": np.zeros(64), "context": {}}
    some = rng.normal(size=(64, *Shapes(num_points=48).event_shape)).astype(np.float32)
    fresh = Samples(rewards=np.zeros(64), x_0=some, metrics={"diversity": 1.0}, **told)
    again = Samples(rewards=np.zeros(64), x_0=np.repeat(some[:32], 2, 0), metrics={"diversity": 1.0}, **told)
    distance = table_every.scale(fresh)
    assert table_every.looked_at(fresh, distance)["unique"] == 1
    assert table_every.looked_at(again, distance)["unique"] == 0


def test_the_committed_rows_of_the_toy_say_one_thing():
    """J is r - alpha KL: exactly for the best of n, elsewhere but for what sampling the KL twice scatters."""
    rows = {path.stem: json.loads(path.read_text()) for path in (_result.RESULTS / "every").glob("*.json")}
    assert len(rows) > 100
    for name, row in rows.items():
        if row["objective"] is not None:
            method, target, _ = name.rsplit("-", 2)
            told = row["reward"] - _every.TARGETS[target].alpha * row["kl"]
            assert row["objective"] == pytest.approx(told, abs=1e-9 if method == "best_of_n" else 0.05), name
    assert len({round(row["objective"], 6) for name, row in rows.items() if name.startswith("tweedie-quadratic")}) == 1
    told = json.loads((_result.RESULTS / "every.json").read_text())
    for target in _every.TARGETS:
        for method in set(_every.methods(target)) - {"best_of_n"}:
            assert told.get(f"attained/{method}/{target}", 0.0) < told[f"ceiling/{target}"] + 0.001, (method, target)


def test_table_1_knows_how_much_a_mean_of_draws_scatters():
    """Draws of 50 of the same 200 clouds, against the same measured on many other 200 clouds."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(400):
        clouds = rng.normal(size=200)
        draws = [float(clouds[rng.permutation(200)[:50]].mean()) for _ in range(20)]
        rows.append({"num": 200, "broken": 0, "references": {"all": 50}, "draws": {"all/mmd_cd": draws}})
    truly = np.var([np.mean(row["draws"]["all/mmd_cd"]) for row in rows])
    assert np.mean([table1.within(row, "all/mmd_cd") for row in rows]) == pytest.approx(truly, rel=0.15)
    seeds = table1.over_seeds(rows[:3], "all/mmd_cd")
    assert seeds.value == pytest.approx(np.mean([row["draws"]["all/mmd_cd"] for row in rows[:3]]))
    assert table1.within({"num": 200, "draws": {"hit/voxnet": [1.0]}}, "hit/voxnet") > 0


def test_table_1_calls_a_tie_a_tie():
    one = table1.Measured(0.10, 0.01**2)
    assert table1.tied(one, table1.Measured(0.127, 0.01**2))
    assert not table1.tied(one, table1.Measured(0.129, 0.01**2))
    told = dict.fromkeys(table1.SHOWN, one)
    found = {"rgdm": told, "tpm": {**told, "all/mmd_cd": table1.Measured(0.12, 1e-4)}}
    found["ppo"] = {**told, "all/mmd_cd": table1.Measured(0.2, 1e-4), "all/one_nn": table1.Measured(0.48, 1e-4)}
    assert table1.best(found, "all/mmd_cd") == ["rgdm", "tpm"]
    assert table1.best(found, "all/one_nn") == ["ppo"]


def test_table_1_tells_what_the_kept_weights_reached_and_what_the_whole_run_cost(tmp_path, monkeypatch):
    told = "iteration,time_s,reward_calls,evaluate/kl\n1,10,64,\n2,20,128,3.5\n3,30,192,9.5\n"
    (tmp_path / "metrics.csv").write_text(told)
    for kept, found in ((2, {"kl": 3.5}), (3, {"kl": 9.5}), (1, {}), (0, {})):
        monkeypatch.setattr(table1.store, "load", lambda run, kept=kept: SimpleNamespace(iteration=kept))
        assert table1.paid(tmp_path) == {**found, "reward_calls": 192, "time_s": 30}


def test_table_1_draws_what_is_at_hand_and_tells_what_its_classifiers_are_worth(tmp_path, monkeypatch):
    monkeypatch.setattr(table1, "RUNS", tmp_path)
    clouds = np.random.default_rng(0).normal(size=(9, 64, 3))
    table1.picture("seat", tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()
    for method in ("pretrained", "rgdm"):
        np.savez_compressed(tmp_path / f"seat-{method}-0.npz", clouds=clouds.astype(np.float16))
    table1.picture("seat", tmp_path / "seat.svg")
    drawn = ElementTree.parse(tmp_path / "seat.svg").getroot()
    told = [text.text for text in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert told[1] == "pretrained" and told[3] == "rgdm" and told[4].endswith("% hit")
    assert len(list(drawn.iter("{http://www.w3.org/2000/svg}image"))) == 2 * 7
    monkeypatch.setattr(table1, "RESULTS", tmp_path)
    assert table1.worth("seat", "pointnet") == {}
    card = {"folds": {"accuracy": 0.96, "standard_error": 0.02, "calibration_error": 0.01}}
    card["folds_uncalibrated"] = {"calibration_error": math.nan}
    (tmp_path / "seat-pointnet.json").write_text(json.dumps(card))
    found = table1.worth("seat", "pointnet")
    assert set(found) == {"accuracy", "calibration_error"}
    assert found["accuracy"].low == pytest.approx(0.96 - 1.96 * 0.02)


@pytest.mark.parametrize("category", table1.TARGETS)
def test_table_1_holds_methods_against_each_other_that_start_from_the_same_weights(category):
    rows = [row for row in table1.QUEUE if row.category == category and row.file.is_file()]
    told = [json.loads(row.file.read_text())["weights"] for row in rows if row.method != "conditional"]
    assert len(set(told)) == 1  # a model with labels is trained by itself


def test_table_1_has_every_method_on_every_category():
    names = [row.name for row in table1.QUEUE]
    assert len(names) == len(set(names)) == len(table1.METHODS) * sum(table1.SEEDS.values()) + len(table1.TRIED)
    for method in (*table1.TRAINED, *(config for config, _ in table1.TRIED.values())):
        assert (ROOT / "tune_configs" / f"shapes_helicopter_{method}.yaml").is_file()
