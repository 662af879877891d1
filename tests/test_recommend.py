"""T's Figure 3 on six cases: what is measured, what follows from it, and that the command it names is one."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from rayft.cli import main
from rayft.recommend import Advice, Measured, choose, command, differentiable, measure
from rayft.spec import configs, known_algorithms, read

SLOW = """
import time
from rayft.reward import Reward

class Slow(Reward):
    def __init__(self, seconds):
        self.seconds = seconds

    def __call__(self, samples):
        time.sleep(self.seconds * len(samples))
        return [float(x[0]) for x in samples]
"""
FREE = Measured(True, 1e-5, 1e-4, 50, 1500.0, 512, 1e10, 0.2, 0.0)
BLACK = replace(FREE, differentiable=False)
CASES = {  # T's recommendation for each
    "differentiable": (FREE, "backprop"),
    "differentiable, memory short": (replace(FREE, memory=5e6), "backprop"),
    "differentiable, no memory at all": (replace(FREE, memory=1e5), "ppo"),
    "black box": (BLACK, "ppo"),
    "black box, dear": (replace(BLACK, score_s=0.1), "rwmle"),
    "only scores from a laboratory": (replace(BLACK, score_s=60.0), "backprop"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_six_cases_get_what_the_tutorial_recommends(case):
    found, expected = CASES[case]
    advice = choose(found)
    assert advice.algorithm == expected
    assert advice.algorithm in known_algorithms()
    read("toy_ppo", [f"algorithm={expected}", "training={alpha: 0.5}", *advice.settings]).checked()


def test_a_laboratorys_scores_are_learned_and_a_short_memory_is_eked_out():
    assert "training.surrogate=3" in choose(CASES["only scores from a laboratory"][0]).settings
    assert set(choose(CASES["differentiable, memory short"][0]).settings) == {
        "training.checkpoint=true",
        "training.microbatches=16",
    }


def test_where_weights_would_fall_on_a_handful_of_samples_they_are_not_advised():
    advice = choose(replace(BLACK, score_s=0.1, effective=0.001))
    assert advice.algorithm == "ppo"
    assert "0.10%" in advice.why


@pytest.mark.parametrize(
    ("found", "guide"), [(FREE, "tweedie"), (BLACK, "mc"), (replace(BLACK, score_s=60.0), "best_of_n")]
)
def test_without_training_a_guide_is_advised(found, guide):
    assert choose(found, training=False).algorithm == guide


def test_what_is_measured_is_so(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    told = [f"reward={tmp_path}/slow.py:Slow", "reward.seconds=0.1"]
    spec = read("toy_ppo", told)
    found = measure(spec, 16)
    assert not found.differentiable
    assert 0.1 <= found.score_s < 1
    assert 0 < found.draw_s < found.score_s / 10  # 0.0003 s on a quiet core
    assert found.num_steps == 50
    assert 500 < found.bytes_a_transition < 5000  # six hidden layers' worth of 64 floats, and the input
    assert choose(found).algorithm == "rwmle"


def test_the_command_line_answers_for_a_person_and_for_a_program(capsys):
    assert main(["recommend", "toy_ppo", "--num", "64"]) == 0
    said = capsys.readouterr().out
    assert "rayft run toy_ppo algorithm=backprop" in said
    assert main(["recommend", "toy_rgdm", "--num", "64", "--json", "--memory-gb", "1e-6"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["algorithm"] == "ppo"
    assert told["measured"]["memory"] == 1000
    assert "temperature" not in told["command"]
    assert main(["recommend", "toy_ppo", "reward=stripes", "--num", "64", "--no-training"]) == 0
    assert "--guide mc" in capsys.readouterr().out


def test_a_command_keeps_what_was_typed_and_what_both_algorithms_have():
    advice = Advice("ppo", (), "")
    assert command(advice, "x.yaml", read("toy_ppo")) == "rayft run x.yaml algorithm=ppo"
    typed = ["reward=stripes", "training.lr=1e-4"]
    line = command(advice, "toy_rgdm", read("toy_rgdm", typed), typed)
    first, _, training = line.partition(" 'training=")
    assert first == "rayft run toy_rgdm reward=stripes training.lr=1e-4 algorithm=ppo"
    assert "lr: 0.0001" in training and "temperature" not in training


RUNS = [name for name, path in configs().items() if "algorithm" in yaml.safe_load(path.read_text())]
SMALL = {"molecules": [f"domain.data={Path(__file__).parent / 'golden/molecules/dsgdb9nsd'}"]}  # not all of QM9


@pytest.mark.parametrize("name", RUNS)
def test_every_command_it_can_print_for_a_shipped_run_is_accepted(name):
    typed = SMALL.get(name.partition("_")[0], [])
    spec = read(name, typed)
    smooth = differentiable(spec.checked())
    base = FREE if smooth else BLACK
    cases = [base, replace(base, memory=5e6), replace(base, memory=1e5), replace(base, score_s=0.1)]
    found = [choose(replace(one, chains=min(spec.config().settings().chains, 512))) for one in cases]
    found.append(choose(replace(base, score_s=60.0)))
    assert {advice.algorithm for advice in found} == ({"backprop", "ppo"} if smooth else {"backprop", "ppo", "rwmle"})
    for advice in found:
        run, file, *told = shlex.split(command(advice, name, spec, typed).removeprefix("rayft "))
        assert (run, file) == ("run", name)
        again = read(name, told)
        assert again.search is None and again.algorithm == advice.algorithm
        again.checked()
