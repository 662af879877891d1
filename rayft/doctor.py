"""Is this machine ready? One row per thing that has gone wrong for somebody: what was found, and what to do about it.

``ok`` is True, False (a run would fail) or None (worth knowing, nothing fails). Only the standard library is imported
here, so that a broken installation can still be looked at; torch and Open3D are imported by their own checks.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata, util
from importlib.machinery import PathFinder
from pathlib import Path

GIB = 1024**3
RAY_PORTS = {6379: "cluster", 8265: "dashboard", 10001: "client"}

# libusb comes with the machine or with a PyPI package; loaded first, the package's makes the import work without root.
IMPORT_OPEN3D = """
import ctypes, importlib.util
if importlib.util.find_spec("libusb_package"):
    import libusb_package
    ctypes.CDLL(str(libusb_package.get_library_path()), mode=ctypes.RTLD_GLOBAL)
import open3d
print(open3d.__version__)
"""


@dataclass(frozen=True)
class Check:
    """One row; ``remedy`` says what to do where ``ok`` is not True."""

    name: str
    ok: bool | None
    found: str
    remedy: str = ""


def checks() -> Iterator[Check]:
    """Every check, in the order in which one failure explains the next."""
    yield from _packages()
    yield _torch()
    yield _envs()
    yield _optional("rdkit", "molecules")
    yield _optional("tblite", "xtb")
    yield _optional("vina", "docking")
    yield _optional("aiohttp_cors", "cluster")
    yield _open3d()
    yield _ray_token()
    yield _ray_ports()
    if (shm := Path("/dev/shm")).is_dir():
        size = shutil.disk_usage(shm).total / GIB
        yield Check("/dev/shm", size >= 2 or None, f"{size:.1f} GiB", "small for Ray: docker run --shm-size=4g")
    yield _folder("runs", Path("runs"), GIB, "start from a folder with room, or name another one for the runs")
    yield _folder("data", data_folder(), 0, "set RAYFT_DATA to a folder that you can write")


def render(checks: Iterable[Check]) -> int:
    """Prints the table; 1 where something would fail, else 0."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table, rows = Table("", "check", "found", "what to do", box=None, pad_edge=False), list(checks)
    for check in rows:
        mark = {True: "[green]ok[/]", None: "[yellow]--[/]", False: "[red]NO[/]"}[check.ok]
        table.add_row(mark, Text(check.name), Text(check.found), Text("" if check.ok else check.remedy))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    return int(any(check.ok is False for check in rows))


def data_folder() -> Path:
    """Where data sets lie: ``$RAYFT_DATA``, or ~/.cache/rayft."""
    return Path(os.environ.get("RAYFT_DATA") or "~/.cache/rayft").expanduser()


def envs_folder() -> Path | None:
    """What ``import envs`` finds. The working directory comes first, as it does on Ray's workers."""
    spec = PathFinder.find_spec("envs", [str(Path.cwd()), *sys.path]) or util.find_spec("envs")
    if spec is None:
        return None
    found = Path(spec.origin or next(iter(spec.submodule_search_locations or []))).resolve()
    return found.parent if found.name == "__init__.py" else found


def _packages() -> Iterator[Check]:
    """Python and what pyproject.toml asks for: pinned packages always get a row, the others where they are wrong."""
    try:
        from packaging.requirements import Requirement
        from packaging.specifiers import SpecifierSet

        about = metadata.metadata("rayft")
    except (ImportError, metadata.PackageNotFoundError) as error:
        yield Check("rayft", False, f"not installed ({error})", "pip install -e . in its repository")
        return
    python, wanted = platform.python_version(), about["Requires-Python"]
    yield Check("Python", SpecifierSet(wanted).contains(python), python, f"rayft needs Python {wanted}")
    yield Check("rayft", True, f"{about['Version']} in {Path(__file__).parent}")
    for requirement in map(Requirement, about.get_all("Requires-Dist") or []):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        version, bounds = _version(requirement.name), requirement.specifier
        right = bool(version) and bounds.contains(version, prereleases=True)
        if not right or any(bound.operator in ("<", "<=", "==") for bound in bounds):
            remedy = f"pip install '{requirement}'"
            yield Check(f"{requirement.name} {bounds}", right, version or "not installed", remedy)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _torch() -> Check:
    try:
        torch = importlib.import_module("torch")
    except Exception as error:  # a broken shared library is an OSError, a broken build anything
        return Check("devices", False, f"torch: {_last_line(str(error))}", "reinstall torch for this machine")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if not devices and torch.backends.mps.is_available():
        devices = ["MPS"]
    threads = f"{torch.get_num_threads()} threads on {os.cpu_count()} cores"
    return Check("devices", True, f"{', '.join(devices) or 'CPU only'}; {threads}")


def _envs() -> Check:
    own, found = Path(__file__).resolve().parents[1] / "envs", envs_folder()
    if found is None:
        return Check("envs", False, "not found", "reinstall rayft: its package of domains is missing")
    return Check("envs", found == own, str(found), f"it hides rayft's own {own}: rename it, or start from elsewhere")


def _optional(module: str, extra: str) -> Check:
    if util.find_spec(module) is None:
        return Check(module, None, "not installed", f"pip install 'rayft[{extra}]', for {extra}")
    return Check(module, True, _version(module) or "installed")


def _open3d() -> Check:
    """In a process of its own: a missing library can end the process that imports Open3D."""
    present = _optional("open3d", "shapes")
    if not present.ok:
        return present
    command, remedy = [sys.executable, "-P", "-c", IMPORT_OPEN3D], "pip install --force-reinstall 'rayft[shapes]'"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        return Check("open3d", False, "import took more than 120 s", remedy)
    if done.returncode == 0:
        return Check("open3d", True, _last_line(done.stdout))
    return Check("open3d", False, _last_line(done.stderr) or f"import ended with exit code {done.returncode}", remedy)


def _ray_token() -> Check:
    """Ray 2.59 and later start local clusters with a token; every node of a larger one needs the same."""
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    if mode.lower() != "token" or os.environ.get("RAY_AUTH_TOKEN"):
        return Check("Ray's token", True, f"from the environment, RAY_AUTH_MODE={mode}")
    if not token.is_file():
        return Check("Ray's token", None, f"no {token} yet", "for a cluster, make one and copy it to every node")
    rights = token.stat().st_mode & 0o777
    ok = os.access(token, os.R_OK) and (not rights & 0o077 or None)
    return Check("Ray's token", ok, f"{token}, mode {rights:o}", f"make it yours alone: chmod 600 {token}")


def _ray_ports() -> Check:
    taken = []
    for port, use in RAY_PORTS.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                taken.append(f"{port} ({use})")
    found = f"in use: {', '.join(taken)}" if taken else f"{', '.join(map(str, RAY_PORTS))} free"
    return Check("Ray's ports", None if taken else True, found, "a Ray may run here already: see `ray status`")


def _folder(name: str, folder: Path, need: int, remedy: str) -> Check:
    """Can be made and written, with ``need`` bytes free. Tried out: permission bits do not stop root, a mount does."""
    folder = folder.absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            free = shutil.disk_usage(there).free
    except OSError as error:
        return Check(name, False, f"{folder}: {there} cannot be written ({error.strerror})", remedy)
    return Check(name, free >= need, f"{folder}, {free / GIB:.1f} GiB free", remedy)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1][:200]
