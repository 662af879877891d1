"""One Ray for the whole session, and one torch thread, so that tests do not fight over the cores."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator

import buckets

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # read when ray is imported; otherwise it writes ~/.ray/auth_token
os.environ.update(buckets.KEYS)  # Ray's workers have what is there when it starts

import pytest
import torch
from jaxtyping import install_import_hook

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started deaf to Ctrl-C
CHECKED = ("schedule", "space", "chain", "credit", "losses", "payoff")
install_import_hook([f"rayft.{name}" for name in CHECKED], "beartype.beartype")  # shapes are checked in tests only


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A real local Ray with four logical CPUs."""
    import ray

    ray.init("local", num_cpus=4, include_dashboard=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()
