"""One Ray for the whole session, and one torch thread, so that tests do not fight over the cores."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import buckets
import users

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # read when ray is imported; otherwise it writes ~/.ray/auth_token
os.environ.update(buckets.KEYS)  # Ray's workers have what is there when it starts

import pytest
import torch
from jaxtyping import install_import_hook

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started deaf to Ctrl-C
CHECKED = ("schedule", "space", "chain", "credit", "losses", "payoff")
install_import_hook([f"rayft.{name}" for name in CHECKED], "beartype.beartype")  # shapes are checked in tests only


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A place in a bucket of an S3 server of its own: ``bucket.format("runs")``."""
    with buckets.bucket() as uri:
        yield uri


@pytest.fixture(params=["disk", "s3"])
def home(request, tmp_path) -> str:
    """The URI of a folder of this test alone, on a disk and in a bucket."""
    if request.param == "disk":
        return (tmp_path / "store").as_uri()
    return request.getfixturevalue("bucket").format(tmp_path.name)


@pytest.fixture
def user_file(tmp_path) -> Path:
    """A module of the user's own."""
    path = tmp_path / "mine.py"
    path.write_text(users.USER_CODE)
    return path


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Callable[[str], None]:
    """Makes this process a machine of that name: its copies lie elsewhere."""
    return lambda name: monkeypatch.setenv("RAYFT_DATA", str(tmp_path / name))


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A real local Ray with four logical CPUs."""
    import ray

    ray.init("local", num_cpus=4, include_dashboard=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()
