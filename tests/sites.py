"""A user's machine and three hosts, as a reader of the README has them: a checkout, a wheel, a token.

cluster/on_premise.yaml is filled in as mine.yaml. What is run there is run as the user would, through SSH.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hosts import Host, hosts, ssh
from test_packaging import SOURCES

ROOT = Path(__file__).resolve().parents[1]
DASHBOARD = "http://localhost:8265"

# Asked where the user sits: [[method, url], ...] -> [[status, body], ...], and 0 where no HTTP was spoken.
ASK = """
import json, sys, urllib.error, urllib.request
from multiprocessing.pool import ThreadPool

def ask(told):
    head = {"Authorization": "Bearer " + open(sys.argv[1]).read()} if len(sys.argv) > 1 else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(told[1], method=told[0], headers=head), timeout=4) as found:
            return found.status, found.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, ""
    except Exception:
        return 0, ""

print(json.dumps(ThreadPool(16).map(ask, json.load(open("asked.json")))))
"""


@dataclass(frozen=True)
class Site:
    """A user's machine, the nodes of the cluster, and a folder that all of them see."""

    client: Host
    nodes: list[Host]
    shared: Path
    token: str = field(repr=False)

    @property
    def checkout(self) -> Path:
        return self.shared / "checkout"

    def log(self, name: str) -> Path:
        """What a command of this name said."""
        return self.shared / f"{name}.log"

    def run(self, name: str, command: str) -> str:
        """A command of the user's; what it said."""
        with self.begun(name, command) as process:
            assert process.wait() == 0, (command, self.log(name).read_text()[-3000:])
        return self.log(name).read_text()

    @contextlib.contextmanager
    def begun(self, name: str, command: str) -> Iterator[subprocess.Popen[bytes]]:
        """The same while it goes on."""
        told = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": ROOT}
        told |= {"RAY_AUTH_MODE": "token", "OMP_NUM_THREADS": "1"}
        line = " ".join(f"export {key}='{value}';" for key, value in told.items()) + f" cd {self.checkout}; {command}"
        with self.log(name).open("wb") as log:
            process = ssh(self.client, self.shared / "key", line, log)
            try:
                yield process
            finally:
                process.kill()
                process.wait()

    def ask(self, asked: Sequence[tuple[str, str]], *, token: bool = False) -> list[tuple[int, str]]:
        """(status, body) of each of these requests, made from the user's machine."""
        (self.checkout / "asked.json").write_text(json.dumps(asked))
        (self.checkout / "ask.py").write_text(ASK)
        return json.loads(self.run("ask", "python ask.py" + " ~/.ray/auth_token" * token))

    def nodes_by_state(self) -> Counter[str]:
        """How many nodes the dashboard calls ALIVE, and how many DEAD."""
        ((status, body),) = self.ask([("GET", f"{DASHBOARD}/nodes?view=summary")], token=True)
        nodes = json.loads(body)["data"]["summary"] if status == 200 else []
        return Counter(node["raylet"].get("state", "") for node in nodes)


@contextlib.contextmanager
def opened(shared: Path) -> Iterator[Site]:
    """Hosts, the user's checkout and token on one of them; at the end what `ray up` leaves in /tmp is gone too."""
    there = set(Path("/tmp").glob("ray[-_]*"))
    with hosts(["client", "head", "worker1", "worker2"], shared) as (client, *nodes):
        site = Site(client, nodes, shared, secrets.token_hex(32))
        _check_out(site.checkout)
        token = client.home / ".ray/auth_token"
        token.parent.mkdir(mode=0o700)
        token.touch(mode=0o600)
        token.write_text(site.token)
        for node in nodes:
            _image(node)
        told = yaml.safe_load((ROOT / "cluster/on_premise.yaml").read_text())
        told["provider"] |= {"head_ip": nodes[0].address, "worker_ips": [node.address for node in nodes[1:]]}
        told["auth"] = {"ssh_user": "root", "ssh_private_key": str(shared / "key")}
        (site.checkout / "mine.yaml").write_text(yaml.safe_dump(told, width=1000))
        yield site
    for path in set(Path("/tmp").glob("ray[-_]*")) - there:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _check_out(folder: Path) -> None:
    """This version with its wheel, as `make wheel` builds it."""
    folder.mkdir()
    for name in [*SOURCES, "cluster", "cluster.yaml"]:
        copy: Callable[..., Any] = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    wheel = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist", "."]
    subprocess.run([sys.executable, *wheel], cwd=folder, check=True)


def _image(node: Host) -> None:
    """An environment that has everything but rayft, where the set-up commands look for one."""
    env = node.home / ".rayft/env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", env], check=True)
    (packages,) = env.glob("lib/python*/site-packages")
    (packages / "image.pth").write_text(sysconfig.get_paths()["purelib"])
    program = env / "bin/ray"
    program.write_text(f"#!{env}/bin/python\nfrom ray.scripts.scripts import main\n\nmain()\n")
    program.chmod(0o755)


@contextlib.contextmanager
def lap(what: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    print(f"{what}: {time.monotonic() - start:.1f} s", flush=True)


def until(holds: Callable[[], Any], seconds: float, what: str) -> Any:
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < end, f"{what} has not come within {seconds:g} s"
        time.sleep(0.2)
    return found
