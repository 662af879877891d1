"""Three hosts, the real `ray up` with a token, a run and a sweep, and a node that is killed under them.

What a run counts must not show that a node died: the same iterations, the same calls, the same bits as on one machine.
"""

from __future__ import annotations

import contextlib
import csv
import importlib
import json
import os
import pkgutil
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from hosts import Host, missing, ssh
from sites import DASHBOARD, ROOT, Site, lap, opened, until

from rayft import store

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(missing() is not None, reason=str(missing()))]
AGENT = 52365  # where each node's agent listens
METRICS = {8080, 44217, 44227}  # Prometheus's; they know no token, as cluster/on_premise.yaml says

# What needs no token: the page that asks for it, how it is handed in, and whether somebody is alive.
PUBLIC = {"/", "/favicon.ico", "/api/authentication_mode", "/api/authenticate", "/api/gcs_healthz"}
PUBLIC |= {"/api/healthz", "/api/local_raylet_healthz"}

REWARD = """
import time

def near(samples):
    time.sleep(0.003 * len(samples))
    return [-float((x[0] - 0.8) ** 2 + (x[1] - 0.6) ** 2) / 2 for x in samples]
"""
COMMON = {
    "algorithm": "ppo",
    "domain": "toy",
    "reward": "./slow.py:near",
    "training": {"alpha": 0.5, "chains": 128, "minibatch_size": 2048},
}
RUN = COMMON | {
    "iterations": 20,
    "resources": {"torch_threads": 1, "num_env_runners": 1, "num_cpus_per_env_runner": 0.5},
    "scoring": {"actors": 2, "num_cpus_per_actor": 0.25},
    "evaluate": {"every": 0, "chains": 128, "pretrained_chains": 256},
}
SWEEP = COMMON | {
    "iterations": 12,
    "resources": {"torch_threads": 1},
    "scoring": {"actors": 1, "num_cpus_per_actor": 0.25, "resources": {"reward": 0.25}},
    "evaluate": {"every": 4, "chains": 64, "pretrained_chains": 256},
    "search": {"space": {"training.lr": {"grid": [1e-3, 3e-4]}}, "scheduler": "none", "objective": "reward"},
}


ONE_ON_EACH = "'scoring.resources={reward: 1.5}'"  # of the 2 that a host with two cores offers


def submitted(name: str, told: str) -> str:
    """The command that submits a job and follows it to its end."""
    return f"cd {name} && rayft submit {name}.yaml --address {DASHBOARD} {told}"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[Site]:
    """A site with two jobs, each a folder of its own."""
    with opened(tmp_path_factory.mktemp("site")) as site:
        for name, spec in (("run", RUN), ("sweep", SWEEP)):
            (site.checkout / name).mkdir()
            (site.checkout / name / "slow.py").write_text(REWARD)
            (site.checkout / name / f"{name}.yaml").write_text(yaml.safe_dump(spec))
        yield site


def test_a_run_and_a_sweep_outlive_a_node_and_nothing_shows_it(site):
    out = site.shared / "storage"
    with up(site, out):
        _check_nodes(site)
        _check_doors(site)
        _check_jobs(site, out)
        assert not _leaks(site)
    assert not _processes(site.nodes[0], "gcs_server") and not _processes(site.nodes[0], "raylet")
    assert not _leaks(site)


@pytest.mark.slow
def test_a_run_outlives_a_node_that_is_cut_off(site):
    """Nobody there has died: it works on, and nobody hears of it."""
    out = site.shared / "cut"
    with up(site, out):
        with site.begun("run", submitted("run", f"{ONE_ON_EACH} output={out}")) as running:
            until(lambda: len(rows(out / "run")) >= 4, 120, "the middle")
            away = site.nodes[1]
            assert _processes(away, "RewardActor")
            num = len(rows(out / "run"))
            with away.cut_off():
                with lap(f"{away.name} cut off under iteration {num + 1}; until the next is there"):
                    until(lambda: len(rows(out / "run")) > num + 1, 180, "another iteration")
                assert running.wait(240) == 0, site.log("run").read_text()[-3000:]
        same_counts_and_weights(out / "run", out / "alone/run")


@pytest.mark.slow
def test_the_readme_word_by_word(site):
    """Its block of commands, one after the other; hosts stand for AWS, and a folder that all see for the bucket."""
    text = (ROOT / "README.md").read_text()
    block = text[text.index("## On a cluster") :]
    lines = [line.strip() for line in block[block.index("    export") : block.index("\n\n`rayft submit`")].splitlines()]
    (site.checkout / "cluster.yaml").write_text((site.checkout / "mine.yaml").read_text())
    (site.checkout / "slow.py").write_text(REWARD)
    (site.checkout / "my.yaml").write_text(yaml.safe_dump(RUN | {"resources": {"torch_threads": 1}, "iterations": 4}))
    before, open_tunnel = "", contextlib.ExitStack()
    with open_tunnel:
        for number, line in enumerate(lines):
            command = line.partition("  #")[0].strip().replace("s3://bucket", f"file://{site.shared}/bucket")
            if command.startswith("export "):
                before += f"{command}; "
            elif command.startswith("ray dashboard"):
                open_tunnel.enter_context(site.begun("tunnel", before + command))
                until(lambda: site.nodes_by_state()["ALIVE"] == 3, 180, "a cluster of three nodes")
            else:
                command = command.removeprefix("make wheel && ")  # what `opened` has done, for hosts have no way out
                with lap(command):
                    said = site.run(f"line{number}", before + command)
                assert not command.startswith("rayft status") or "my" in said
    rows_there = rows(site.shared / "bucket/runs/my")
    assert [float(row["iteration"]) for row in rows_there] == [1, 2, 3, 4]


@contextlib.contextmanager
def up(site: Site, out: Path) -> Iterator[None]:
    """`ray up`, three nodes, and `ray down`; meanwhile the run is made on one machine too."""
    alone = f"cd run && RAY_AUTH_MODE=disabled rayft run run.yaml --quiet output={out}/alone"
    with site.begun("alone", alone) as on_one_machine:
        with lap("ray up"):
            site.run("up", "ray up -y --no-config-cache mine.yaml")
        with site.begun("dashboard", "ray dashboard --no-config-cache mine.yaml"):
            with lap("three nodes"):
                until(lambda: site.nodes_by_state()["ALIVE"] == 3, 120, "a cluster of three nodes")
            assert on_one_machine.wait(120) == 0, site.log("alone").read_text()
            yield
    with lap("ray down"):
        site.run("down", "ray down -y mine.yaml")


def _check_nodes(site: Site) -> None:
    """Every node has this code, which is not installed again, and the token in a file that its user alone can read."""
    (setup,) = yaml.safe_load((site.checkout / "mine.yaml").read_text())["setup_commands"]
    for node in site.nodes:
        (installed,) = node.home.glob(".rayft/env/lib/python*/site-packages/rayft")
        for path in (ROOT / "rayft").rglob("*.py"):
            assert (installed / path.relative_to(ROOT / "rayft")).read_bytes() == path.read_bytes(), path
        since = (installed / "__init__.py").stat().st_ctime
        assert ssh(node, site.shared / "key", setup).returncode == 0
        assert (installed / "__init__.py").stat().st_ctime == since
        assert (node.home / ".bashrc").read_text().count("rayft/env") == 1
        assert (node.home / ".ray/auth_token").stat().st_mode & 0o777 == 0o600


def _check_doors(site: Site) -> None:
    """What somebody without the token finds: no dashboard from afar, no route of it, and of other ports the metrics."""
    head = site.nodes[0]
    routes = [(method, f"{DASHBOARD}{path}") for method, path in _routes("DashboardHead", "Subprocess")]
    agents = _routes("DashboardAgent")
    routes += [(method, f"http://{node.address}:{AGENT}{path}") for node in site.nodes for method, path in agents]
    assert len(routes) > 60
    for (method, url), (status, _) in zip(routes, site.ask(routes), strict=True):
        public = re.sub(r"^http://[^/]+", "", url) in PUBLIC
        assert status != 0 and (public or status == 401), (method, url, status)
    assert 8265 not in head.listening()
    ports = [(node, port) for node in site.nodes for port in sorted(node.listening())]
    said = site.ask([("GET", f"http://{node.address}:{port}/metrics") for node, port in ports])
    open_ports = {port for (_, port), (status, _) in zip(ports, said, strict=True) if status == 200}
    assert open_ports == METRICS
    assert all(str(port) in (ROOT / "cluster/on_premise.yaml").read_text() for port in METRICS)


def _routes(*tables: str) -> list[tuple[str, str]]:
    """(method, path) of every route that Ray's dashboard, or the agents, have."""
    from ray.dashboard import modules, optional_utils
    from ray.dashboard.subprocesses import routes

    for module in pkgutil.walk_packages(modules.__path__, f"{modules.__name__}."):
        importlib.import_module(module.name)
    importlib.import_module("ray.dashboard.http_server_head")
    importlib.import_module("ray.dashboard.http_server_agent")
    found = [getattr(optional_utils, f"{t}RouteTable", None) or getattr(routes, f"{t}RouteTable") for t in tables]
    return [
        (method, re.sub(r"{.+?}", "1", path))
        for table in found
        for method, bound in table._bind_map.items()
        for path in bound
    ]


def _check_jobs(site: Site, out: Path) -> None:
    """Both jobs go on while the node that scores for them is killed, and count as if it had not been."""
    run, sweep = f"{ONE_ON_EACH} output={out}", f"--tune output={out}"
    with (
        lap("run and sweep"),
        site.begun("run", submitted("run", run)) as running,
        site.begun("sweep", submitted("sweep", sweep)) as sweeping,
    ):
        until(lambda: len(rows(out / "run")) >= 4 and (out / "sweep/rows.jsonl").exists(), 120, "the middle")
        killed = max(site.nodes[1:], key=lambda node: len(_processes(node, "Trainable")))
        trials, num = len(_processes(killed, "Trainable")), len(rows(out / "run"))
        assert _processes(killed, "RewardActor"), "each of the workers has one of the run's"
        assert not _processes(site.nodes[0], "RewardActor"), "the head offers no reward"
        assert num < RUN["iterations"], "it was over before anything was killed"
        (raylet,) = _processes(killed, "/raylet/raylet ")
        os.kill(raylet, signal.SIGKILL)
        with lap(f"{killed.name} killed under iteration {num + 1} and {trials} trial(s); until the next is there"):
            until(lambda: len(rows(out / "run")) > num + 1, 120, "another iteration")
        with lap("until the node is back"):
            until(lambda: site.nodes_by_state() == {"ALIVE": 3, "DEAD": 1}, 180, "the node")
        assert running.wait(240) == 0, site.log("run").read_text()[-3000:]
        assert sweeping.wait(240) == 0, site.log("sweep").read_text()[-3000:]

    same_counts_and_weights(out / "run", out / "alone/run")
    told = json.loads((out / "sweep/sweep.json").read_text())
    chains, evaluated = SWEEP["training"]["chains"], SWEEP["evaluate"]["chains"]
    assert (told["status"], told["trials"]) == ("finished", 2)
    read = [json.loads(line) for line in (out / "sweep/rows.jsonl").read_text().splitlines()]
    at = [(row["trial"], row["iteration"]) for row in read if "ended" not in row]
    assert set(at) == {(f"trial_0000{trial}", iteration) for trial in (0, 1) for iteration in (4, 8, 12)}
    assert len(at) <= 6 + 2 * trials, "a killed trial may have told a row, and died before that was saved"
    assert told["calls"] == {"pretrained": 256, "train": len(at) * 4 * chains, "evaluate": len(at) * evaluated}


def same_counts_and_weights(run: Path, other: Path) -> None:
    """As if it had run on one machine."""
    ours, alone = rows(run), rows(other)
    for count in ("iteration", "reward_calls", "chains", "reward_failed", "reward_mean", "kl"):
        assert [row[count] for row in ours] == [row[count] for row in alone], count
    found, expected = store.newest(run), store.newest(other)
    assert found is not None and expected is not None
    weights = found.weights()
    for name, value in expected.weights().items():
        np.testing.assert_array_equal(weights[name], value)


def _processes(node: Host, name: str) -> list[int]:
    return [pid for pid, line in node.pids().items() if name in line]


def rows(run: Path) -> list[dict[str, str]]:
    file = run / "metrics.csv"
    return list(csv.DictReader(file.open())) if file.exists() else []


def _leaks(site: Site) -> list[str]:
    """Where the token is found, other than in the files that are for it: this repository, every log, every process."""
    token = site.token.encode()
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    files = [ROOT / name for name in tracked.stdout.split("\0") if name]
    files += [path for path in site.shared.rglob("*") if path.name != "auth_token"]
    for host in (site.client, *site.nodes):
        files += [Path(f"/proc/{pid}/{part}") for pid in host.pids() for part in ("environ", "cmdline")]
    found = []
    for path in files:
        with contextlib.suppress(OSError):
            found += [str(path)] * (path.is_file() and not path.is_symlink() and token in path.read_bytes())
    return found
