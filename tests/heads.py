"""A Ray of its own for tests of the cluster's door: head, dashboard and job server with their own ports and folder."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass

PORTS = ("port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port")


@dataclass(frozen=True)
class Head:
    """Where it listens."""

    dashboard: str
    address: str


@contextlib.contextmanager
def head(environment: Mapping[str, str], num_cpus: int = 4, resources: Mapping[str, float] | None = None):
    """Up while the block lasts."""
    folder = tempfile.mkdtemp(prefix="rft", dir="/tmp")
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    told = {"num-cpus": num_cpus, "temp-dir": folder, "object-store-memory": 100_000_000, **ports}
    told |= {"node-ip-address": "127.0.0.1", "dashboard-host": "127.0.0.1", "resources": json.dumps(resources or {})}
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    inherited = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")}
    own = {
        "OMP_NUM_THREADS": "1",
        "RAY_TMPDIR": folder,
        "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
    }
    process = subprocess.Popen(
        [*command, *(f"--{name}={value}" for name, value in told.items())],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=inherited | own | environment,
        start_new_session=True,
    )
    try:
        up = Head(f"http://127.0.0.1:{ports['dashboard-port']}", f"127.0.0.1:{ports['port']}")
        _until_it_answers(up.dashboard, process)
        yield up
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(number: int) -> list[int]:
    """That nobody listens at."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def _until_it_answers(url: str, process: subprocess.Popen, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, "the head did not start"
        try:
            urllib.request.urlopen(f"{url}/api/version", timeout=5).close()
            return
        except urllib.error.HTTPError:
            return  # it wants a token
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the head does not answer")
