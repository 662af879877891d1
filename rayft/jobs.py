"""Runs and sweeps as jobs of a cluster: submit, follow, look, stop, over the head's dashboard port.

    submit: check -> ship the working tree -> `rayft run FILE ... --address auto` on the head -> follow its log

A job prints what a run prints without a terminal, one JSON object a row, so whoever follows shows it as its own.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shlex
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from rayft import cluster, imports
from rayft import spec as specs
from rayft.plan import size_of
from rayft.store import versions

ENDED = ("SUCCEEDED", "STOPPED", "FAILED")
STOP_TIMEOUT = 120  # seconds for the iteration in hand and its checkpoint
HEAD_TIMEOUT = 30  # seconds
LEFT_OUT = ["*.egg-info", ".pytest_cache", ".ruff_cache", ".mypy_cache", ".hypothesis", "node_modules", "*.tmp"]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Asked:
    """What is to run, and from where."""

    file: str | None
    overrides: Sequence[str] = ()
    name: str | None = None
    tune: bool = False
    resume: str | bool | None = None
    trust: bool = False
    wait: float | None = None
    working_dir: str | None = None  # the working tree; here by default
    installed: bool = False  # ship nothing but the config


# -- the cluster's door


def door(address: str | None) -> str:
    """The dashboard's address, from the command line or the environment."""
    for where, told in {
        "--address": address,
        "RAY_API_SERVER_ADDRESS": os.environ.get("RAY_API_SERVER_ADDRESS"),
        "RAY_ADDRESS": os.environ.get("RAY_ADDRESS"),
    }.items():
        if told:
            if not told.startswith(("http://", "https://")):
                raise ValueError(f"{where} is {told}: jobs go to the head's dashboard, http://HEAD:8265")
            return told.rstrip("/")
    raise ValueError("which cluster? give --address http://HEAD:8265, or set RAY_API_SERVER_ADDRESS")


def connect(address: str | None) -> Any:
    """A client of the job server, after its token and its version of Ray were found right."""
    found = door(address)
    url = urlsplit(found)
    try:
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient
    except ImportError:
        raise ValueError("jobs need a package that is not installed: pip install 'rayft[cluster]'") from None
    try:
        port = url.port or (443 if url.scheme == "https" else 80)
        socket.create_connection((url.hostname or "", port), timeout=10).close()
        with _alone(found):
            client = JobSubmissionClient(found)
        for name in ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging"):
            logging.getLogger(name).setLevel(logging.WARNING)
        theirs = client._do_request("GET", "/api/version").json()["ray_version"]
    except AuthenticationError:
        raise ValueError(cluster.refused(found)) from None
    except RuntimeError as error:
        if "ray[default]" not in str(error):
            raise ValueError(f"what answers at {found} is no Ray ({' '.join(str(error).split())[:120]})") from None
        raise ValueError("jobs need a package that is not installed: pip install 'rayft[cluster]'") from None
    except (OSError, ValueError, KeyError) as error:
        why = f"no Ray dashboard answers at {found} ({getattr(error, 'strerror', None) or type(error).__name__})"
        raise ValueError(
            f"{why}; it needs ray[default] on the head, and from outside a tunnel: ssh -L 8265:localhost:8265 HEAD"
        ) from None
    ours = versions()["ray"]
    if theirs != ours:
        raise ValueError(f"the cluster runs Ray {theirs} and this machine {ours}; install the same on both")
    return client


@contextlib.contextmanager
def _alone(address: str) -> Iterator[None]:
    """To Ray the environment's address stands above the one that it is given."""
    before = {name: os.environ.get(name) for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")}
    os.environ.update(dict.fromkeys(before, address))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


# -- submit


def submit(client: Any, asked: Asked) -> str:
    """The job's name, once the cluster has taken it."""
    spec = None if asked.file is None else specs.read(asked.file, asked.overrides)
    if spec is None and not (isinstance(asked.resume, str) and "://" in asked.resume):
        raise ValueError("nothing to submit: give a YAML, or --resume with the URI of a run, such as s3://BUCKET/NAME")
    if spec is not None and bool(spec.search) != asked.tune:
        raise ValueError(
            f"{spec.name} has {'a' if spec.search else 'no'} search: block: submit it "
            f"{'with' if spec.search else 'without'} --tune"
        )
    name = _free_name(client, asked, spec)
    with shipped(asked, spec) as (folder, where, file), tempfile.TemporaryDirectory() as scratch:
        environment = {
            "PYTHONUNBUFFERED": "1",
            "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_TIMEOUT),
            cluster.CLIENT: cluster.own_versions(),
        }
        runtime: dict[str, Any] = {"env_vars": environment}
        if folder is not None:
            left_out = [] if spec is None or Path(spec.output).is_absolute() else [f"/{spec.output}"]
            runtime["working_dir"] = str(packed(folder, left_out, Path(scratch) / "tree.zip"))
        there = f"cd {shlex.quote(where)} && " if where else ""
        command = there + entrypoint(asked, spec, file, name)
        try:
            _taken(client, entrypoint=command, submission_id=name, runtime_env=runtime)
        except (RuntimeError, ValueError) as error:
            said = " ".join(str(error).split())
            if "already exists" in said:
                raise ValueError(_in_use(client, name)) from None
            raise ValueError(f"the cluster did not take the job: {said[:300]}") from None
    return name


def packed(folder: Path, left_out: Sequence[str], target: Path) -> Path:
    """The tree as one file, without what .gitignore and .rayignore name; refused where Ray would not take it."""
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env import packaging

    excludes = [*get_runtime_env_default_excludes(), *LEFT_OUT, *left_out]
    packaging.create_package(str(folder), target, include_gitignore=True, excludes=excludes)
    size = target.stat().st_size
    if size >= packaging.GCS_STORAGE_MAX_SIZE:
        raise ValueError(_too_large(folder, size, packaging.GCS_STORAGE_MAX_SIZE))
    return target


def _taken(client: Any, **told: Any) -> None:
    """A head that has just come up has nobody yet to start jobs."""
    end = time.monotonic() + HEAD_TIMEOUT
    while True:
        try:
            client.submit_job(**told)
            return
        except RuntimeError as error:
            if "try again later" not in str(error) or time.monotonic() > end:
                raise
        time.sleep(1)


def entrypoint(asked: Asked, spec: Any, file: str | None, name: str) -> str:
    """The command that the cluster runs. A relative ``output`` is below the home of the head's user."""
    words = ["python", "-m", "rayft.cli", "tune" if asked.tune else "run", *([file] if file else []), *asked.overrides]
    if asked.resume is None:
        words.append(f"name={json.dumps(name)}")
    line = " ".join(shlex.quote(word) for word in words)
    if spec is not None and not Path(spec.output).is_absolute():
        line += f' output="$HOME"/{shlex.quote(spec.output)}'
    line += " --address auto"
    line += f" --wait {asked.wait:g}" if asked.wait is not None else ""
    line += " --trust" if asked.trust else ""
    if asked.resume is not None:
        line += " --resume" + (f" {shlex.quote(asked.resume)}" if isinstance(asked.resume, str) else "")
    return line


@contextlib.contextmanager
def shipped(asked: Asked, spec: Any) -> Iterator[tuple[Path | None, str, str | None]]:
    """(folder to ship, folder in it to start from, the config's name there), what it names being in sight."""
    if asked.installed:
        if asked.working_dir:
            raise ValueError("--installed ships no working tree: leave --working-dir out, or --installed")
        if spec is None or asked.file in specs.configs():
            yield None, "", asked.file
            return
        _in_sight(asked, spec, [])
        with tempfile.TemporaryDirectory() as folder:
            tree, name = specs.load_tree(asked.file or "")
            (Path(folder) / f"{name}.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
            yield Path(folder), "", f"{name}.yaml"
        return
    folder, here = Path(asked.working_dir or ".").resolve(), Path.cwd().resolve()
    if not folder.is_dir():
        raise ValueError(f"--working-dir is {folder}, which is no folder")
    where = here.relative_to(folder).as_posix() if here.is_relative_to(folder) and here != folder else ""
    if spec is None or (not Path(asked.file or "").is_file() and asked.file in specs.configs()):
        yield folder, where, asked.file
        return
    file = Path(asked.file or "").resolve()
    if not file.is_relative_to(folder):
        raise ValueError(
            f"{file} is not in the working tree {folder} that is shipped: name a folder that holds it with "
            "--working-dir, or ship the config alone with --installed"
        )
    _in_sight(asked, spec, [folder])
    yield folder, where, os.path.relpath(file, folder / where)


def _in_sight(asked: Asked, spec: Any, folders: Sequence[Path]) -> None:
    """Refuses a config that names what only this machine has."""
    told = spec.model_dump()
    for key, path in cluster.hidden_files(told, folders):
        what = "on the storage" if asked.installed else f"in the working tree, below {folders[0]},"
        raise ValueError(
            f"{key} is {path}, a file of this machine that the cluster does not see: put it {what} and name it there"
        )
    written = " ".join([Path(asked.file or "").read_text(), *asked.overrides])
    for key, path in cluster.hidden_files(told, []):
        if path in written:
            relative = os.path.relpath(path, Path(asked.file or "").resolve().parent)
            raise ValueError(
                f"{key} is {path}, which the cluster has elsewhere: write it from the config on, as ./{relative}"
            )


def _free_name(client: Any, asked: Asked, spec: Any) -> str:
    """``--name``, else that of the run, with a number where finished jobs have it."""
    ran = asked.resume.split("?")[0].rstrip("/").rpartition("/")[2] if isinstance(asked.resume, str) else None
    name = asked.name or ran or spec.name
    if not NAME.fullmatch(name):
        raise ValueError(f"a job cannot be named {name!r}: give --name letters, digits, dots, - and _ alone")
    taken = {job.submission_id: str(job.status) for job in client.list_jobs() if job.submission_id}
    if name in taken and (asked.name or taken[name] not in ENDED):
        raise ValueError(_in_use(client, name))
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name}-{number}"
        if taken.get(free, "FAILED") not in ENDED:
            raise ValueError(_in_use(client, free))
    return free


def _in_use(client: Any, name: str) -> str:
    status = str(client.get_job_status(name))
    what = "follow it with `rayft logs {0} --follow`, end it with `rayft stop {0}`" if status not in ENDED else ""
    what = what.format(name) or f"continue its run with --resume {name}"
    return f"the job name {name} is in use there ({status.lower()}): {what}, or give another with --name"


def _too_large(folder: Path, size: int, limit: int) -> str:
    files = (path for path in folder.rglob("*") if path.is_file() and not {".git", ".venv"} & set(path.parts))
    sizes = sorted(((path.stat().st_size, path.relative_to(folder)) for path in files), reverse=True)
    largest = ", ".join(f"{path} ({size_of(size)})" for size, path in sizes[:3])
    return (
        f"the working tree {folder} packs to {size_of(size)} and Ray ships {size_of(limit)} at most; the largest files "
        f"are {largest}: name what the job does not need in .gitignore or .rayignore, ship another folder with "
        "--working-dir, or the config alone with --installed"
    )


# -- look, and stop


def known(client: Any, name: str) -> Any:
    """The job's details, or a ``ValueError`` with the nearest name."""
    jobs = {job.submission_id: job for job in client.list_jobs() if job.submission_id}
    if name not in jobs:
        there = f"there are {', '.join(sorted(jobs))}" if jobs else "there is none"
        raise ValueError(f"no job {name!r}{imports.nearest(name, list(jobs))}; {there}")
    return jobs[name]


def stop(client: Any, name: str) -> str:
    """Asks the job to end after its iteration, saved; what was done, in words."""
    job = known(client, name)
    if str(job.status) in ENDED:
        return f"{name} is over already: {str(job.status).lower()}"
    client.stop_job(name)
    return (
        f"{name} ends after its iteration, saved, or after {STOP_TIMEOUT} s; continue with: rayft submit FILE "
        f"--resume {name}"
    )
