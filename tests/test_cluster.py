"""Three hosts, the real `ray up` with a token, a run and a sweep, and a node that is killed under them.

What a run counts must not show that a node died: the same iterations, the same calls, the same bits as on one machine.
"""

from __future__ import annotations

import contextlib
import csv
import os
import secrets
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from hosts import Host, hosts, missing, ssh
from test_packaging import SOURCES

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(missing() is not None, reason=str(missing()))]
ROOT = Path(__file__).resolve().parents[1]
DASHBOARD = "http://localhost:8265"

REWARD = """
import time

def near(samples):
    time.sleep(0.004 * len(samples))
    return [-float((x[0] - 0.8) ** 2 + (x[1] - 0.6) ** 2) / 2 for x in samples]
"""
RUN = {
    "algorithm": "ppo",
    "domain": "toy",
    "reward": "./slow.py:near",
    "iterations": 30,
    "resources": {"torch_threads": 1, "num_env_runners": 1},
    "scoring": {"actors": 1},
    "training": {"alpha": 0.5, "chains": 128, "minibatch_size": 2048},
    "evaluate": {"every": 0, "chains": 128, "pretrained_chains": 256},
    "checkpoint": {"every": 10},
}
SWEEP = {
    "algorithm": "ppo",
    "domain": "toy",
    "reward": "quadratic",
    "iterations": 12,
    "resources": {"torch_threads": 1},
    "training": {"alpha": 0.5, "chains": 256, "minibatch_size": 2048},
    "evaluate": {"every": 6, "chains": 128, "pretrained_chains": 512},
    "search": {"space": {"training.lr": {"grid": [1e-3, 3e-4]}}, "scheduler": "none", "objective": "attained"},
}
PLACED = "scoring.resources={reward: 1}"


@dataclass(frozen=True)
class Site:
    """A user's machine, the hosts of the cluster, and a folder that all of them see."""

    client: Host
    nodes: list[Host]
    key: Path
    shared: Path
    token: str

    @property
    def checkout(self) -> Path:
        return self.shared / "checkout"

    def line(self, command: str) -> str:
        """A command as it is run on the user's machine."""
        told = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        told |= {"RAY_AUTH_MODE": "token", "OMP_NUM_THREADS": "1"}
        return " ".join(f"export {k}='{v}';" for k, v in told.items()) + f" cd {self.checkout}; {command}"

    def run(self, command: str) -> str:
        done = ssh(self.client, self.key, self.line(command))
        (self.shared / "said.log").open("a").write(done.stdout + done.stderr)
        assert done.returncode == 0, (command, done.stdout[-3000:], done.stderr[-3000:])
        return done.stdout

    @contextlib.contextmanager
    def begun(self, name: str, command: str) -> Iterator[subprocess.Popen[bytes]]:
        """A command that goes on meanwhile; what it says is in ``name``.log."""
        log = (self.shared / f"{name}.log").open("wb")
        process = ssh(self.client, self.key, self.line(command), log)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def submitted(name: str, command: str) -> str:
    """The command that submits a job and follows it to its end."""
    return f"ray job submit --address {DASHBOARD} --submission-id {name} --working-dir {name} -- {command}"


@contextlib.contextmanager
def lap(what: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    print(f"{what}: {time.monotonic() - start:.1f} s", flush=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[Site]:
    """The hosts; the user's checkout with its wheel, its token and its jobs; nodes whose images have the dependencies."""
    shared = tmp_path_factory.mktemp("site")
    with hosts(["client", "head", "worker1", "worker2"], shared) as (client, *nodes):
        site = Site(client, nodes, shared / "key", shared, secrets.token_hex(32))
        site.checkout.mkdir()
        for name in [*SOURCES, "cluster", "cluster.yaml"]:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, site.checkout / name)
        wheel = [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            "dist",
            ".",
        ]
        subprocess.run(wheel, cwd=site.checkout, check=True)
        token = client.home / ".ray/auth_token"
        token.parent.mkdir(mode=0o700)
        token.touch(mode=0o600)
        token.write_text(site.token)
        for node in nodes:
            _image(node)
        told = yaml.safe_load((ROOT / "cluster/on_premise.yaml").read_text())
        told["provider"] |= {"head_ip": nodes[0].address, "worker_ips": [node.address for node in nodes[1:]]}
        told["auth"] = {"ssh_user": "root", "ssh_private_key": str(site.key)}
        (site.checkout / "mine.yaml").write_text(yaml.safe_dump(told, width=1000))
        for name, spec in (("run", RUN), ("sweep", SWEEP)):
            (site.checkout / name).mkdir()
            (site.checkout / name / "slow.py").write_text(REWARD)
            (site.checkout / name / f"{name}.yaml").write_text(yaml.safe_dump(spec))
        yield site


def _image(node: Host) -> None:
    """An environment that has everything but rayft, where the set-up commands look for one."""
    env = node.home / ".rayft/env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", env], check=True)
    (packages,) = env.glob("lib/python*/site-packages")
    (packages / "image.pth").write_text(sysconfig.get_paths()["purelib"])
    program = env / "bin/ray"
    program.write_text(f"#!{env}/bin/python\nfrom ray.scripts.scripts import main\n\nmain()\n")
    program.chmod(0o755)


def until(holds, seconds: float, what: str):
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < end, what
        time.sleep(0.5)
    return found


def rows(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.open())) if file.exists() else []


def test_a_run_and_a_sweep_outlive_a_node_and_nothing_shows_it(site):
    out = site.shared / "storage"
    with lap("the same run on one machine"):
        site.run(f"cd run && RAY_AUTH_MODE=disabled rayft run run.yaml --quiet output={out}/alone")
    with lap("ray up"):
        site.run("ray up -y --no-config-cache mine.yaml")
    with site.begun("dashboard", "ray dashboard --no-config-cache mine.yaml"):
        with lap("three nodes"):
            until(lambda: alive(site) == 3, 120, "three nodes")
        run = submitted("run", f"rayft run run.yaml --address auto '{PLACED}' output={out}")
        sweep = submitted("sweep", f"rayft tune sweep.yaml --address auto output={out}")
        with site.begun("run", run) as running, site.begun("sweep", sweep) as sweeping:
            with lap("run and sweep"):
                until(lambda: len(rows(out / "run/metrics.csv")) >= 5, 120, "five iterations")
                killed = next(
                    node for node in site.nodes if any("RewardActor" in line for line in node.pids().values())
                )
                raylet = next(pid for pid, line in killed.pids().items() if "/raylet/raylet " in line)
                os.kill(raylet, signal.SIGKILL)
                at = len(rows(out / "run/metrics.csv"))
                with lap(f"killed {killed.name} in iteration {at}, the next after"):
                    until(lambda: len(rows(out / "run/metrics.csv")) > at + 1, 120, "another iteration")
                assert running.wait(240) == 0, (site.shared / "run.log").read_text()[-3000:]
                assert sweeping.wait(240) == 0, (site.shared / "sweep.log").read_text()[-3000:]
        alone, ours = rows(out / "alone/run/metrics.csv"), rows(out / "run/metrics.csv")
        assert [row["iteration"] for row in ours] == [row["iteration"] for row in alone]
        assert [row["reward_calls"] for row in ours] == [row["reward_calls"] for row in alone]
    with lap("ray down"):
        site.run("ray down -y mine.yaml")


def alive(site: Site) -> int:
    code = f"from ray.job_submission import JobSubmissionClient as C; import ray; print(C('{DASHBOARD}').get_version())"
    done = ssh(site.client, site.key, site.line(f'python -c "{code}"'))
    return 3 if done.returncode == 0 else 0
