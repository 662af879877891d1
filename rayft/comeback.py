"""Runs that exist already, here or on a storage: which one is meant by --resume, and by a path that is a URI."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rayft import mirror, storage
from rayft import spec as specs
from rayft.spec import RunSpec


def meant(
    resume: Any, spec: RunSpec | None, trust: bool = False, sweep: bool = False
) -> tuple[Path | None, str | None]:
    """(the folder of the run or sweep to go on with, brought from its storage where it is further there; that one)."""
    if resume is None:
        return None, None
    if isinstance(resume, str):
        if storage.is_uri(resume):
            there = storage.place(resume, "--resume")
            folder = Path(spec.output if spec else "runs") / there.name
            _brought(there, folder, trust)
            return folder, there.parent().uri
        if Path(resume).is_dir() or spec is None or "/" in resume:
            return Path(resume), None
    return (None, None) if spec is None else _named(resume if isinstance(resume, str) else None, spec, trust, sweep)


def _named(name: str | None, spec: RunSpec, trust: bool, sweep: bool) -> tuple[Path, str | None]:
    """The run or sweep ``name``; else the newest of the spec's name. Of one that lies in both, the further one."""
    begun = (path.parent for path in Path(spec.output).glob("*/config.yaml"))
    here = {folder.name for folder in begun if (folder / mirror.SWEEP).is_file() == sweep}
    there = None if spec.storage is None else storage.ready(spec.storage)
    away = set() if there is None else set(storage.patiently(there.folders))
    wanted = re.compile(re.escape(name) if name else rf"{re.escape(spec.name)}(-\d+)?")
    away = {one for one in away if wanted.fullmatch(one) and _is_sweep(there, one) == sweep}
    found = [one for one in here | away if wanted.fullmatch(one)]
    what, noted = ("sweep", mirror.SWEEP) if sweep else ("run", "run.json")
    if not found:
        where = spec.output if spec.storage is None else f"{spec.output} or {spec.storage}"
        raise ValueError(
            f"nothing to resume: no {what} named {name or spec.name!r} in {where}; start it without --resume"
        )

    def began(one: str) -> tuple[str, float]:
        told = there.child(one).read(noted) if there is not None and one in away else None
        path = Path(spec.output) / one / noted
        own = path.read_bytes() if path.is_file() else b"{}"
        times = [str(json.loads(text or b"{}").get("started", "")) for text in (told, own)]
        return max(times), path.stat().st_mtime if path.is_file() else 0.0

    chosen = max(found, key=began)
    folder = Path(spec.output) / chosen
    if there is not None and chosen in away:
        _brought(there.child(chosen), folder, trust)
    return folder, None


def _is_sweep(there: storage.Place | None, name: str) -> bool:
    return there is not None and storage.patiently(lambda: there.child(name).has(mirror.SWEEP))


def _brought(there: storage.Place, folder: Path, trust: bool) -> None:
    _said(there, lambda: mirror.bring(there, folder, whole=True, trust=trust))


def located(text: str) -> Path:
    """A path as it is; of a URI, the copy of what lies there without the state that only a resume reads."""
    if not storage.is_uri(text):
        return Path(text)
    there = storage.place(text, "the path")
    folder = storage.cache_folder(text)
    _said(there, lambda: mirror.bring(there, folder, whole=False))
    return folder


def _said(there: storage.Place, work: Callable[[], Any]) -> None:
    try:
        work()
    except OSError as error:
        raise ValueError(
            f"{there.uri} cannot be read ({storage.plainly(error)}): look at the name, the rights of this machine's "
            "credentials and the network"
        ) from None


def opened(folder: Path, home: str | None) -> RunSpec:
    """The spec of a run's folder, which goes on being kept where it was brought from."""
    spec = specs.open_folder(folder)
    return spec if home is None else spec.model_copy(update={"storage": home})
