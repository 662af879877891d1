"""cluster.yaml and its overlays, as far as they can be judged without a cloud: what Ray refuses, what stands open."""

from __future__ import annotations

import copy
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import ray
import yaml
from packaging.requirements import Requirement
from ray.autoscaler._private.util import prepare_config, validate_config

from rayft import __version__

ROOT = Path(__file__).resolve().parents[1]
FILES = ["cluster.yaml", "cluster/gcp.yaml", "cluster/on_premise.yaml"]
CLOUDS = FILES[:2]
STARTS = ("head_start_ray_commands", "worker_start_ray_commands")
IMAGE = f"REGISTRY/rayft:{__version__}"


def told(name):
    return yaml.safe_load((ROOT / name).read_text())


def kuberay():
    return list(yaml.safe_load_all((ROOT / "cluster/kuberay.yaml").read_text()))


def groups(cluster):
    return [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]


def container(group):
    (found,) = group["template"]["spec"]["containers"]
    return found


# -- files for `ray up`


@pytest.mark.parametrize("name", FILES)
def test_ray_takes_the_file(name):
    prepared = prepare_config(copy.deepcopy(told(name)))
    validate_config(prepared)
    assert prepared["max_workers"] >= 2


@pytest.mark.parametrize("name", FILES)
def test_every_node_runs_this_ray_and_this_wheel(name):
    config = told(name)
    (setup,) = [line for line in config["setup_commands"] if "setup.sh" in line]
    _, _, version, extras = setup.split()
    assert version == ray.__version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (pin,) = {Requirement(line).specifier for line in project["dependencies"] if line.startswith("ray[")}
    assert pin.contains(version)
    assert set(extras.split(",")) <= project["optional-dependencies"].keys()
    for local in ("cluster/setup.sh", "dist"):
        assert local in config["file_mounts"].values()
    assert subprocess.run(["bash", "-n", ROOT / "cluster/setup.sh"]).returncode == 0


@pytest.mark.parametrize("name", FILES)
def test_every_start_of_ray_asks_for_the_token_and_the_dashboard_stays_at_home(name):
    config = told(name)
    starts = {key: [line for line in config[key] if "ray start" in line] for key in STARTS}
    for lines in starts.values():
        assert len(lines) == 1
        assert re.search(r"\bRAY_AUTH_MODE=token (.* )?ray start\b", lines[0])
        assert "unset OMP_NUM_THREADS;" in lines[0], "ray up sets it to 1, and nproc believes it"
    (head,) = starts["head_start_ray_commands"]
    assert "--dashboard-host=127.0.0.1" in head
    assert "ray-client-server-port" not in head


@pytest.mark.parametrize("name", FILES)
def test_the_token_is_a_file_of_the_user_s_and_stands_in_none_of_ours(name):
    text = (ROOT / name).read_text()
    assert told(name)["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "RAY_AUTH_TOKEN" not in text
    assert not re.search(r"\b[0-9a-f]{32,}\b", text)
    assert "chmod 600 ~/.ray/auth_token" in (ROOT / "cluster/setup.sh").read_text()


def test_git_takes_no_token():
    paths = ["auth_token", ".ray/auth_token", "cluster/auth_token"]
    ignored = subprocess.run(["git", "check-ignore", *paths], cwd=ROOT, capture_output=True, text=True)
    if ignored.returncode == 128:
        pytest.skip("no git checkout")
    assert ignored.stdout.split() == paths


def test_nothing_but_ssh_is_open_to_the_world():
    for name in FILES:
        for rule in told(name)["provider"].get("security_group", {}).get("IpPermissions", []):
            assert (rule["FromPort"], rule["ToPort"]) == (22, 22), name
    assert told("cluster.yaml")["provider"]["security_group"]["GroupName"]


@pytest.mark.parametrize("name", CLOUDS)
def test_reward_nodes_are_spot_and_offer_reward_learners_have_gpus_and_both_go_when_idle(name):
    config = told(name)
    kinds = config["available_node_types"]
    assert set(kinds) == {"head", "reward", "learner"}
    assert config["head_node_type"] == "head"
    assert config["idle_timeout_minutes"] <= 15
    assert kinds["reward"]["resources"] == {"CPU": 16, "reward": 16}
    assert kinds["learner"]["resources"]["GPU"] == 1
    assert all("reward" not in kinds[kind]["resources"] for kind in ("head", "learner"))
    assert "spot" in yaml.safe_dump(kinds["reward"]) or "preemptible: true" in yaml.safe_dump(kinds["reward"])
    assert sum(kinds[kind]["max_workers"] for kind in ("reward", "learner")) == config["max_workers"]
    assert all(kinds[kind]["min_workers"] == 0 for kind in ("reward", "learner"))


def test_hosts_of_one_s_own_are_known_to_the_autoscaler_that_knows_hosts():
    config = told("cluster/on_premise.yaml")
    assert "RAY_enable_autoscaler_v2=0" in config["head_start_ray_commands"][1]
    assert r"""--resources="{\"reward\":$reward}""" in config["worker_start_ray_commands"][1]


# -- Kubernetes


def test_every_pod_asks_for_the_token_of_a_secret_and_nothing_of_the_cluster_is_public():
    cluster, policy = kuberay()
    assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
    spec = cluster["spec"]
    assert spec["rayVersion"] == ray.__version__
    assert spec["authOptions"] == {"mode": "token", "secretName": "rayft-token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert "RAY_AUTH_TOKEN" not in yaml.safe_dump(cluster)
    assert policy["kind"] == "NetworkPolicy"
    (rule,) = policy["spec"]["ingress"]
    own = {"podSelector": {"matchLabels": {"ray.io/cluster": cluster["metadata"]["name"]}}}
    assert rule == {"from": [own]}
    assert policy["spec"]["podSelector"] == own["podSelector"]


def test_pods_have_one_image_and_what_ray_is_told_is_what_kubernetes_gives():
    cluster, _ = kuberay()
    assert {container(group)["image"] for group in groups(cluster)} == {IMAGE}
    for group in groups(cluster):
        resources = container(group)["resources"]
        assert resources["limits"] == resources["requests"], "Ray reads the limits, Kubernetes places by the requests"
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    reward, learner = cluster["spec"]["workerGroupSpecs"]
    assert yaml.safe_load(yaml.safe_load(reward["rayStartParams"]["resources"])) == {"reward": 16}
    assert container(learner)["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert cluster["spec"]["enableInTreeAutoscaling"]
    assert all(group["minReplicas"] == 0 for group in (reward, learner))


def test_the_image_is_this_version_on_this_ray():
    text = (ROOT / "cluster/Dockerfile").read_text()
    assert IMAGE in text
    assert f"ARG RAY={ray.__version__}-py311" in text
