"""Guides by name: each is a file of this folder with ``Settings`` and ``build(settings, ground)``, and nothing else.

build(settings, ground) -> Policy, whose chains are drawn;  or Draw, what chooses among whole events
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from rayft import guidance
from rayft.chain import Policy
from rayft.guidance.base import Draw, Ground, by_chains
from rayft.imports import nearest
from rayft.settings import check

SHARED = ("base", "fit", "gradient", "keep", "registry", "value", "walks")


def names() -> list[str]:
    """The guides there are."""
    found = [module.name for module in pkgutil.iter_modules(guidance.__path__)]
    return sorted(name for name in found if name not in SHARED)


def settings(name: str, values: Mapping[str, Any]) -> Any:
    """A guide's checked numbers, or a ``ValueError`` of one sentence."""
    known = names()
    if name not in known:
        raise ValueError(f"no guide {name!r}{nearest(name, known)}; there are {', '.join(known)}")
    return check("guide", _module(name).Settings, values)


def name_of(told: Any) -> str:
    """The guide whose settings these are."""
    return type(told).__module__.rpartition(".")[2]


def build(told: Any, ground: Ground) -> Policy | Draw:
    """The guide with these settings, ready to be drawn from."""
    return _module(name_of(told)).build(told, ground)


def drawing(found: Policy | Draw, ground: Ground) -> Draw:
    """What draws events, whichever a guide is."""
    return by_chains(ground.bench, found) if isinstance(found, Policy) else found


def _module(name: str) -> Any:
    return importlib.import_module(f"{guidance.__name__}.{name}")
