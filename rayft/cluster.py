"""Joining a Ray cluster: is it there, may we in, does it run our versions, has it room. One sentence where not.

Ray itself waits for minutes, or for ever without a word; every check here ends within ``wait`` seconds.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import platform
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray._private.state import state
from ray.exceptions import AuthenticationError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayft.plan import actors
from rayft.spec import RunSpec
from rayft.storage import Place, patiently, plainly
from rayft.store import versions

WAIT, WAIT_FOR_NODES = 30.0, 600.0  # seconds; the second where the cluster can start nodes
CLIENT = "RAYFT_CLIENT"  # the versions of whoever submitted this process as a job
PROBE = "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1]); print('in')"
PROBE_TIMEOUT = 20.0
MOST_NODES = 1000  # of one kind that are thought of

Bundle = Mapping[str, float]


# -- is it there, and may we in


def reachable(address: str | None) -> None:
    """A ``ValueError`` within seconds where no Ray answers at ``address``, or does not let us in."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not address or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        why = f"no Ray answers at {address} ({error.strerror or error})"
        raise ValueError(f"{why}; start one with `ray start --head`, or leave --address out") from None
    if address.startswith("ray://"):
        return
    said = _knock(address)
    if any(word in said for word in ("InvalidAuthToken", "AuthenticationError", "authentication token", "RAY_AUTH_")):
        raise ValueError(refused(address))
    if said != "in":
        raise ValueError(
            f"what answers at {address} is no Ray that can be joined; give the head's HOST:6379, and the dashboard's "
            "http://HOST:8265 to `rayft submit` alone"
        )


def refused(address: str) -> str:
    """What to do about a token that is wrong or missing. The token itself is never told."""
    mode = os.environ.get("RAY_AUTH_MODE", "token").lower()
    if mode != "token":
        return (
            f"{address} wants a token and RAY_AUTH_MODE={mode} sends none: set RAY_AUTH_MODE=token, and the "
            "cluster's token in ~/.ray/auth_token"
        )
    if os.environ.get("RAY_AUTH_TOKEN"):
        where = "the environment variable RAY_AUTH_TOKEN"
    else:
        path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
        where = f"{path}" if path.is_file() else f"{path}, which does not exist"
    return (
        f"{address} does not take this client's token, which is read from {where}: put the cluster's token there, "
        "from the same file on its head (mode 600)"
    )


def _knock(address: str) -> str:
    """Asked by a process of its own: Ray's client tries for ever at a port that speaks something else."""
    command = [sys.executable, "-c", PROBE, address]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_TIMEOUT, check=False)
    except subprocess.TimeoutExpired as error:
        return (error.stderr or b"").decode(errors="replace")
    return done.stdout.strip() or done.stderr


def join(address: str | None) -> None:
    """Connects to the cluster at ``address``, or starts a Ray here."""
    logging.getLogger("ray.rllib").setLevel(logging.ERROR)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if ray.is_initialized():
        return
    try:
        ray.init(address=address, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    except AuthenticationError:
        raise ValueError(refused(address or "Ray")) from None
    except ConnectionError:
        here = "on this machine" if address == "auto" else f"at {address}"
        raise ValueError(f"no Ray answers {here}; start one with `ray start`, or leave --address out") from None
    except RuntimeError as error:
        if "ersion mismatch" not in str(error):
            raise
        lines = [line.strip() for line in str(error).splitlines() if "Ray:" in line or "Python:" in line]
        theirs, ours = lines[: len(lines) // 2], lines[len(lines) // 2 :]
        told = f"the cluster runs {', '.join(theirs)} and this process {', '.join(ours)}" if theirs else str(error)
        raise ValueError(f"{told}; install the cluster's versions here, or these there") from None
    if address is not None:
        same_versions()


# -- does it run our versions


def same_versions(timeout: float = 60.0) -> None:
    """Refuses nodes that import another rayft than this process: what is sent by reference would differ there."""
    ours = versions()["rayft"]
    for host, theirs in _on_every_node(_version, timeout):
        if isinstance(theirs, RayError):
            last = (str(theirs).strip().splitlines() or [type(theirs).__name__])[-1][:200]
            raise ValueError(f"node {host} cannot start a process of this project ({last}); see its logs")
        if theirs != ours:
            what = f"has rayft {theirs}" if theirs else "has no rayft"
            raise ValueError(f"node {host} {what} and this process {ours}: install the same on every node")


def _on_every_node(work: Callable[[], Any], timeout: float) -> Iterator[tuple[str, Any]]:
    """(host, what ``work`` returns there, or the error) of every node that is alive."""
    asked = []
    for node in [node for node in ray.nodes() if node["Alive"]]:
        on = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        there = ray.remote(num_cpus=0, max_retries=0)(work).options(scheduling_strategy=on)
        asked.append((node["NodeManagerAddress"], there.remote()))
    end = time.monotonic() + timeout
    for host, ref in asked:
        try:
            yield host, ray.get(ref, timeout=max(0.1, end - time.monotonic()))
        except RayError as error:
            yield host, error


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("rayft")
    except PackageNotFoundError:
        return ""


def own_versions() -> str:
    """What the other side is to have as well."""
    told = versions()
    return f"rayft {told['rayft']}, ray {told['ray']}, python {'.'.join(platform.python_version_tuple()[:2])}"


def same_as_client() -> None:
    """In a job: refuses to run what another version submitted."""
    theirs, ours = os.environ.get(CLIENT), own_versions()
    if theirs is not None and theirs != ours:
        raise ValueError(
            f"this job was submitted by {theirs}, and the cluster has {ours}: install the same on both, or ship the "
            "working tree with --working-dir"
        )


# -- has it room


def wanted(spec: RunSpec) -> dict[str, list[Bundle]]:
    """What a run's actors reserve, by their kind."""
    return {
        name.removesuffix("s"): [{k: v for k, v in each.items() if v}] * number
        for name, number, each in actors(spec)
        if number
    }


def lacking(kinds: Mapping[str, Sequence[Bundle]], nodes: Sequence[Bundle]) -> str:
    """Why these bundles do not fit on these nodes, or nothing. In all, and each on a single node; dear ones first."""
    left = [dict(node) for node in nodes]
    total = {k: sum(node.get(k, 0.0) for node in nodes) for node in nodes for k in node}
    resources = sorted({k for bundles in kinds.values() for bundle in bundles for k in bundle})
    for kind in resources:
        asked = sum(bundle.get(kind, 0.0) for bundles in kinds.values() for bundle in bundles)
        if asked > total.get(kind, 0.0):
            return f"this run's actors ask for {asked:g} {kind}, Ray has {total.get(kind, 0.0):g}"
    every = [(name, bundle) for name, bundles in kinds.items() for bundle in bundles]
    rare = {kind: sum(kind in node for node in nodes) for kind in resources}
    every.sort(key=lambda one: (min((rare[k] for k in one[1]), default=0), *(-v for _, v in sorted(one[1].items()))))
    for name, bundle in every:
        node = min((n for n in left if _fits(bundle, n)), key=lambda n: (len(n), sum(n.values())), default=None)
        if node is None:
            there = "; ".join(_told(node, resources) for node in nodes) or "none"
            full = any(_fits(bundle, node) for node in nodes)
            how = "there is no room left for one" if full else "no node has that much"
            return f"each {name} asks for {_told(bundle, list(bundle))} on one node and {how}: nodes have {there}"
        for kind, number in bundle.items():
            node[kind] -= number
    return ""


def _fits(bundle: Bundle, node: Bundle) -> bool:
    return all(node.get(kind, 0.0) >= number for kind, number in bundle.items())


def _told(bundle: Bundle, kinds: Sequence[str]) -> str:
    return ", ".join(f"{bundle.get(kind, 0.0):g} {kind}" for kind in kinds) or "nothing"


def nodes_now() -> list[Bundle]:
    """Resources of every node that is alive, without Ray's own entries."""
    return [_plain(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def free_now() -> list[Bundle]:
    """What of them nobody has reserved."""
    return [_plain(node) for node in state.available_resources_per_node().values()]


def _plain(node: Bundle) -> Bundle:
    own, memory = ("node:", "accelerator_type:"), ("memory", "object_store_memory")
    return {k: v for k, v in node.items() if not k.startswith(own) and k not in memory}


def could_start() -> list[Bundle]:
    """Nodes that the cluster's autoscaler may start, as far as it has told; those it has started are among them."""
    config = state.get_cluster_config()
    groups = () if config is None else config.node_group_configs
    return [dict(group.resources) for group in groups for _ in range(min(int(group.max_count), MOST_NODES))]


def has_room(
    kinds: Mapping[str, Sequence[Bundle]],
    wait: float | None,
    say: Callable[[str], None],
    now: Callable[[], Sequence[Bundle]] = nodes_now,
    more: Callable[[], Sequence[Bundle]] = could_start,
    free: Callable[[], Sequence[Bundle]] = free_now,
) -> None:
    """Waits until the cluster has room for the run, or says what is missing and what there is."""
    if missing := lacking(kinds, now()):
        scales = not lacking(kinds, [*now(), *more()])
        seconds = wait if wait is not None else WAIT_FOR_NODES if scales else WAIT
        how = "the cluster may start nodes for it" if scales else "no node is announced"
        say(f"{missing}; waiting up to {seconds:g} s, {how}")
        with _asked_for(kinds, scales):
            missing = _once_there(kinds, now, seconds)
        if missing:
            what = "lower resources or scoring.actors, join a larger cluster, or give it longer with --wait SECONDS"
            raise ValueError(f"{missing}, also after {seconds:g} s: {what}")
    if taken := lacking(kinds, free()):
        long = "until others leave room; --wait SECONDS gives up" if wait is None else f"up to {wait:g} s"
        say(f"{taken} free; waiting {long}")
        if _once_there(kinds, free, math.inf if wait is None else wait):
            raise ValueError(f"{taken} free, also after {wait:g} s: wait for the others, or lower resources")


def _once_there(kinds: Mapping[str, Sequence[Bundle]], nodes: Callable[[], Sequence[Bundle]], seconds: float) -> str:
    """What is still missing when it is there, or the time is over."""
    end = time.monotonic() + seconds
    while (missing := lacking(kinds, nodes())) and time.monotonic() < end:
        time.sleep(min(0.5, max(0.0, end - time.monotonic())))
    return missing


@contextlib.contextmanager
def _asked_for(kinds: Mapping[str, Sequence[Bundle]], scales: bool) -> Iterator[None]:
    """The autoscaler starts nodes for what is asked, and nothing asks before the run starts."""
    from ray.autoscaler.sdk import request_resources

    if scales:
        request_resources(bundles=[dict(bundle) for bundles in kinds.values() for bundle in bundles])
    try:
        yield
    finally:
        if scales:
            request_resources(bundles=[])


# -- can it see what the config names


def sees(home: Place, timeout: float = 60.0) -> None:
    """Refuses a folder of a sweep that a node does not reach: its trials would fail there, one by one."""
    if len(nodes_now()) < 2:
        return
    name = f".seen-{uuid.uuid4().hex[:8]}"
    patiently(lambda: home.write(name, b""))
    try:
        for host, there in _on_every_node(lambda: home.has(name), timeout):
            if there is not True:
                why = f" ({plainly(getattr(there, 'cause', there))})" if isinstance(there, RayError) else ""
                raise ValueError(
                    f"node {host} does not see {home.uri}{why}: give storage=s3://BUCKET/FOLDER or another URI that "
                    "all nodes reach, or an output= folder that they share"
                )
    finally:
        patiently(lambda: home.delete(name))


def hidden_files(tree: Any, seen: Sequence[Path], key: str = "") -> Iterator[tuple[str, str]]:
    """(key, path) of every local file that the config names outside the folders ``seen`` by the cluster."""
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from hidden_files(value, seen, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, list | tuple):
        for number, value in enumerate(tree):
            yield from hidden_files(value, seen, f"{key}[{number}]")
    elif isinstance(tree, str) and tree.startswith(("/", "~")) and key.partition(".")[0] not in ("output", "storage"):
        where = tree.rpartition(":")[0] if ".py:" in tree else tree
        path = Path(where).expanduser()
        if path.exists() and not any(path.resolve().is_relative_to(folder) for folder in seen):
            yield key, where
