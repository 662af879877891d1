"""Machines made from this one, for tests of clusters: each has a network, processes and an SSH server of its own.

All see one file system, which stands for shared storage.

    bridge 10.77.0.1 -- veth -- namespaces of one host: net, pid, mount, uts, ipc    with sshd as their process 1

A host ends with its sshd, and that with the process of the tests: the kernel then ends what else runs in it, so that
nothing has to be looked for. Needs root.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BRIDGE, NET = "rayft0", "10.77.0"
NEEDED = {"sshd": "openssh-server", "ssh": "openssh-client", "ip": "iproute2", "rsync": "rsync"}  # program -> package

SSHD = """\
Port 22
HostKey {folder}/host_key
AuthorizedKeysFile {key}.pub
PasswordAuthentication no
UsePAM no
StrictModes no
PidFile none
"""

# The host's own: /proc, its name, Ray's folders, its home, which the last but one of these names.
BOOT = """\
hostname {name}
mount --make-rprivate /
mount --bind {folder}/tmp /tmp/ray
mount --bind {folder}/passwd /etc/passwd
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run && mkdir /run/sshd
exec {sshd} -D -f {folder}/sshd_config -E {folder}/sshd.log
"""


def missing() -> str | None:
    """Why hosts cannot be made here, and what to do about it."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "hosts are made of Linux namespaces, which takes root: run as root, in a container with CAP_SYS_ADMIN"
    lacking = [package for program, package in NEEDED.items() if _found(program) is None]
    if lacking:
        return f"hosts need programs that are not here: apt-get install -y {' '.join(lacking)}"
    tried = subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True, text=True)
    return f"this kernel or container makes no namespaces: {tried.stderr.strip()}" if tried.returncode else None


def _found(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin")


@dataclass(frozen=True)
class Host:
    """One machine. ``home`` is what it sees as root's home."""

    name: str
    address: str
    folder: Path
    process: subprocess.Popen[bytes]

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def ray(self) -> Path:
        """What it sees as /tmp/ray: sessions and their logs."""
        return self.folder / "tmp"

    @contextlib.contextmanager
    def cut_off(self) -> Iterator[None]:
        """Runs on, and neither hears nor is heard."""
        _ip("link", "set", f"v{self.name}", "down")
        try:
            yield
        finally:
            _ip("link", "set", f"v{self.name}", "up")

    def pids(self) -> dict[int, str]:
        """Process id, as this machine sees it -> command line, of everything that runs there."""
        inside = _namespace(self.init)
        found = {}
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if folder.name.isdigit() and _namespace(int(folder.name)) == inside:
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found

    def listening(self) -> set[int]:
        """TCP ports on which other machines are heard."""
        found = set()
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/{self.init}/net/{table}").read_text().splitlines()[1:]:
                (address, port), state = line.split()[1].split(":"), line.split()[3]
                if state == "0A" and not address.endswith("0100007F"):
                    found.add(int(port, 16))
        return found

    @property
    def init(self) -> int:
        """Process 1 of the host, as this machine sees it."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return int(children.read_text().split()[0])


def _namespace(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/pid")


@contextlib.contextmanager
def hosts(names: Sequence[str], folder: Path) -> Iterator[list[Host]]:
    """Machines of these names, all opened by the key ``folder/key``; whatever happens, nothing of them is left."""
    key = folder / "key"
    with contextlib.ExitStack() as undo:
        _key(key)
        for name in (*names, None):  # of tests that were killed
            stale = ["netns", "del", name] if name else ["link", "del", BRIDGE]
            subprocess.run([_found("ip") or "ip", *stale], capture_output=True)
        _ip("link", "add", BRIDGE, "type", "bridge")
        undo.callback(_ip, "link", "del", BRIDGE)
        _ip("addr", "add", f"{NET}.1/24", "dev", BRIDGE)
        _ip("link", "set", BRIDGE, "up")
        ray = Path("/tmp/ray")  # a place to mount the hosts' own upon
        if not ray.exists():
            ray.mkdir()
            undo.callback(lambda: any(ray.iterdir()) or ray.rmdir())
        made = [undo.enter_context(_host(name, f"{NET}.{10 + i}", folder / name, key)) for i, name in enumerate(names)]
        for host in made:
            _reached(host, key)
        yield made


@contextlib.contextmanager
def _host(name: str, address: str, folder: Path, key: Path) -> Iterator[Host]:
    for part in ("home/.ssh", "tmp"):
        (folder / part).mkdir(parents=True)
    _key(folder / "host_key")
    lines = [line.split(":") for line in Path("/etc/passwd").read_text().splitlines()]
    homes = [":".join([*line[:5], str(folder / "home"), *line[6:]] if line[0] == "root" else line) for line in lines]
    (folder / "passwd").write_text("\n".join(homes) + "\n")
    (folder / "sshd_config").write_text(SSHD.format(folder=folder, key=key))
    boot = BOOT.format(name=name, folder=folder, sshd=_found("sshd"))
    with contextlib.ExitStack() as undo:
        _ip("netns", "add", name)
        undo.callback(_ip, "netns", "del", name)
        _ip("link", "add", f"v{name}", "type", "veth", "peer", "name", "eth0", "netns", name)
        undo.callback(_ip, "link", "del", f"v{name}")  # the namespace would take it along, some time later
        _ip("link", "set", f"v{name}", "master", BRIDGE, "up")
        for told in (f"addr add {address}/24 dev eth0", "link set lo up", "link set eth0 up"):
            _ip("-n", name, *told.split())
        _ip("-n", name, "route", "add", "default", "via", f"{NET}.1")
        apart = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--uts", "--ipc", "--kill-child=SIGKILL"]
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", name, *apart, "bash", "-euc", boot],
            stdin=subprocess.DEVNULL,
            stdout=(folder / "boot.log").open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        undo.callback(_end, process)
        yield Host(name, address, folder, process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a host: unshare takes its process 1 with it, and that one everything in its namespace."""
    process.kill()
    process.wait()


def _ip(*told: str) -> None:
    done = subprocess.run([_found("ip") or "ip", *told], capture_output=True, text=True)
    assert done.returncode == 0, (told, done.stderr)


def _key(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)


def ssh(host: Host, key: Path, command: str, log: Any = None) -> Any:
    """Runs a command there as a user would: what came of it, or with a ``log`` the process that is under way."""
    quiet = ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"]
    told = ["ssh", *quiet, "-o", "ConnectTimeout=5", "-i", str(key), f"root@{host.address}", command]
    if log is not None:
        return subprocess.Popen(told, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
    return subprocess.run(told, stdin=subprocess.DEVNULL, capture_output=True, text=True)


def _reached(host: Host, key: Path) -> None:
    end = time.monotonic() + 20
    while (done := ssh(host, key, "hostname")).stdout.strip() != host.name:
        log = (host.folder / "boot.log").read_text() + done.stderr
        assert time.monotonic() < end and host.process.poll() is None, log
        time.sleep(0.2)
