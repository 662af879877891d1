"""Ctrl-C, or SIGTERM, asks for an end that loses nothing; a second one ends the work at once."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def told_to_stop(first: Callable[[], None]) -> Iterator[None]:
    """Calls ``first`` at the first signal and raises ``KeyboardInterrupt`` at the second."""
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        first()

    before = {name: signal.signal(name, ask) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
