"""Processes ask Ray for exactly what the YAML says, on a machine that claims to have two GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from rayft.cluster import lacking, wanted
from rayft.spec import parse

RESOURCES = {
    "num_env_runners": 2,
    "num_cpus_per_env_runner": 0.5,
    "num_gpus_per_env_runner": 0.25,
    "num_learners": 1,
    "num_cpus_per_learner": 2,
    "num_gpus_per_learner": 1,
}
SCORING = {"actors": 2, "num_cpus_per_actor": 0.25, "num_gpus_per_actor": 0.125, "resources": {"reward": 1}}

SCRIPT = """
import json, sys
import ray
from rayft.spec import parse

told = json.loads(sys.argv[1])
ray.init(num_cpus=8, num_gpus=2, resources={"reward": 3}, include_dashboard=False, logging_level=40)
spec = parse({"algorithm": "ppo", "domain": "toy", "reward": "quadratic", "chain": {"num_steps": 4}, **told})
algo = spec.checked().build_algo()
assigned = lambda *_: ray.get_runtime_context().get_assigned_resources()
seen = {
    "runners": algo.env_runner_group.foreach_env_runner(assigned, local_env_runner=False),
    "learners": [result.get() for result in algo.learner_group.foreach_learner(assigned)],
    "actors": ray.get([a.__ray_call__.remote(assigned) for a in algo.rewards.crews[0].pool.actors]),
    "left": {k: ray.available_resources().get(k, 0.0) for k in ("CPU", "GPU", "reward")},
    "reward": algo.train()["reward_mean"],
}
request = type(algo).default_resource_request(algo.config)
seen["tune"] = request.required_resources
print("SEEN" + json.dumps(seen))
algo.stop()
"""


@pytest.mark.slow
def test_every_process_gets_the_placement_that_the_yaml_names():
    told = {"resources": RESOURCES, "scoring": SCORING, "training": {"chains": 64, "minibatch_size": 64}}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(told)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.partition("SEEN")[2].splitlines()[0])
    assert seen["runners"] == [{"CPU": 0.5, "GPU": 0.25}] * 2
    assert seen["learners"] == [{"CPU": 2.0, "GPU": 1.0}]
    assert seen["actors"] == [{"CPU": 0.25, "GPU": 0.125, "reward": 1}] * 2
    assert seen["left"] == {"CPU": 8 - 2 * 0.5 - 2 - 2 * 0.25, "GPU": 2 - 2 * 0.25 - 1 - 2 * 0.125, "reward": 1}
    assert seen["tune"] == {"CPU": 1 + 2 * 0.5 + 2 + 2 * 0.25, "GPU": 2 * 0.25 + 1 + 2 * 0.125, "reward": 2}


TOLD = {"algorithm": "rgdm", "domain": "toy", "reward": "quadratic"}


def test_what_a_cluster_lacks_is_named_with_what_it_has():
    scoring = {"actors": 3, "resources": {"reward": 2}}
    spec = parse({**TOLD, "scoring": scoring, "training": {"payoff_actors": 1}})
    asked = wanted(spec)
    assert lacking(asked, [{"CPU": 4.0, "reward": 8.0}]) == ""
    assert lacking(asked, [{"CPU": 4.0, "reward": 7.0}]) == "this run's actors ask for 8 reward, Ray has 7"
    assert lacking(asked, [{"CPU": 4.0}]) == "this run's actors ask for 8 reward, Ray has 0"
    assert lacking(asked, [{"CPU": 3.0, "reward": 8.0}]) == "this run's actors ask for 4 CPU, Ray has 3"


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"CPU": 2}, "resources names CPU; it is for custom ones"),
        ({"reward": 0}, "resources.reward is 0; it should be"),
    ],
)
def test_a_resource_that_has_its_own_setting_or_no_amount_is_refused(given, why):
    with pytest.raises(ValueError, match=why):
        parse({**TOLD, "scoring": {"resources": given}}).checked()
