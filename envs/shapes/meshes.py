"""Meshes in folders by class, as point clouds, several processes at a time.

ROOT/class/x.off  or  ROOT/group/class/x.off,    a level of train and test folders may lie in between

A file is read in another process than this one: a file that crashes it, or never ends, costs itself and no other. Which
points are drawn depends on the file's name within ROOT alone, not on how many processes there are.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from envs.shapes.data import Skipped, seed_of
from envs.shapes.surface import SUFFIXES, UnusableError, open3d, sample

PARTS = {"train", "test", "val", "valid", "validation"}  # folders by which a data set is split
ANONYMOUS = {"model", "model_normalized"}  # file names that leave the name to the folder, as ShapeNet's do
PER_WORKER = 32  # files below which another process costs more than it saves


@dataclass(frozen=True)
class Mesh:
    """A file, and what its folders say about it. ``name`` is its path in the data set."""

    path: Path
    name: str
    kind: tuple[str, str]
    """(group, class); the group is '' where the folders have one level."""


def listed(folder: str | Path) -> list[Mesh]:
    """The files of ROOT/class/, ROOT/group/class/ and of these with a level train, test ... anywhere in between."""
    root = Path(folder).expanduser()
    found = [
        path
        for path in sorted(root.rglob("*"))
        if path.suffix.lower() in SUFFIXES
        and not any(part.startswith((".", "__MACOSX")) for part in path.relative_to(root).parts)
        and path.is_file()
    ]
    if not found:
        raise ValueError(
            f"{root} holds no file of {', '.join(SUFFIXES)}; give a folder ROOT/class/ or ROOT/group/class/"
        )
    inside: dict[Path, set[str]] = {}
    for path in found:
        for child in [path, *path.parents]:
            if child == root:
                break
            inside.setdefault(child.parent, set()).add(child.name if child != path else "")
    return [Mesh(path, _text(path.relative_to(root)), _kind(path, root, inside)) for path in found]


def _kind(path: Path, root: Path, inside: dict[Path, set[str]]) -> tuple[str, str]:
    folders = [*reversed(path.relative_to(root).parents)][1:]
    if path.stem in ANONYMOUS and len(folders) > 1:
        folders = folders[: -2 if folders[-1].name == "models" else -1]
    # A class may be called train: only where all the folders beside it say so too is it a part of the data.
    levels = [_text(Path(level.name)) for level in folders if not inside[root / level.parent] <= PARTS]
    if not levels:
        return "", _text(Path(root.resolve().name))
    return ("", levels[0]) if len(levels) == 1 else (levels[0], levels[1])


def _text(path: Path) -> str:
    return path.as_posix().encode("utf-8", "replace").decode()


def sampled(
    files: Sequence[Mesh],
    num_points: int,
    num_workers: int | None = None,
    time_limit: float = 60.0,
    max_megabytes: float = 200.0,
    seed: int = 0,
) -> tuple[np.ndarray, list[Mesh], Skipped]:
    """Clouds [file, num_points, 3] of the files that give one, these files, and what is the matter with the others.

    Clouds of meshes are around zero. ``num_workers`` processes, by default one per core, die with this one.
    """
    for name, value in {"num_points": num_points, "num_workers": num_workers or 1}.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}; give a whole number of at least 1")
    clouds = np.empty((len(files), num_points, 3), np.float32)
    told: list[dict[str, Any]] = [{}] * len(files)
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for place in range(len(files)):
        waiting.put(place)
    limits = {"num_points": num_points, "time_limit": time_limit, "max_megabytes": max_megabytes}
    workers = [_Worker() for _ in range(num_workers or min(os.cpu_count() or 1, -(-len(files) // PER_WORKER)))]

    def work(worker: _Worker) -> None:
        while (place := _next(waiting)) is not None:
            file = files[place]
            job = {"path": os.fspath(file.path), "seed": seed_of(seed, file.name), **limits}
            told[place], points = worker.ask(job)
            if points:
                clouds[place] = np.frombuffer(points, np.float32).reshape(num_points, 3)

    try:
        with ThreadPoolExecutor(max(1, len(workers))) as threads:
            try:
                for done in [threads.submit(work, worker) for worker in workers]:
                    done.result()
            except BaseException:
                while _next(waiting) is not None:  # the threads end with what they are at
                    pass
                for worker in workers:
                    worker.kill()
                raise
    finally:
        for worker in workers:
            worker.end()
    skipped = Skipped()
    for file, answer in zip(files, told, strict=True):
        if "reason" in answer:
            skipped.add(answer["reason"], file.name)
        for note in answer.get("notes", ()):
            skipped.note(note, file.name)
    good = [place for place, answer in enumerate(told) if "reason" not in answer]
    return clouds if len(good) == len(files) else clouds[good], [files[place] for place in good], skipped


def _next(waiting: queue.SimpleQueue[int]) -> int | None:
    try:
        return waiting.get_nowait()
    except queue.Empty:
        return None


class _Worker:
    """A process that samples one file after the other; after its death the next file starts another."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, job: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        """What it says about a file, and the points where there are any."""
        while True:
            process = self.process or self._start()
            assert process.stdin and process.stdout
            try:
                process.stdin.write(json.dumps(job).encode() + b"\n")
                process.stdin.flush()
            except BrokenPipeError:  # died before it was asked
                self.end()
                continue
            line = process.stdout.readline()
            answer = json.loads(line) if line.endswith(b"\n") else {}
            size = 0 if "reason" in answer else 12 * job["num_points"]
            points = process.stdout.read(size) if answer else b""
            if answer and len(points) == size:
                return answer, points
            code = process.wait()
            self.end()
            if code == -signal.SIGALRM:
                return {"reason": f"that took more than {job['time_limit']:g} seconds"}, b""
            return {"reason": f"that ended the process which read it (code {code})"}, b""

    def _start(self) -> subprocess.Popen[bytes]:
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-P", "-m", "envs.shapes.meshes"]
        pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=nothing, env=environment)
        assert self.process.stdout
        first = self.process.stdout.readline()
        problem = json.loads(first)["problem"] if first else f"it ended with code {self.process.wait()}"
        if problem:
            self.end()
            raise ValueError(f"a process that reads meshes could not be started: {problem}")
        return self.process

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()

    def end(self) -> None:
        self.kill()
        process, self.process = self.process, None
        if process is not None:
            process.communicate()  # closes the pipes


def _serve() -> None:
    """The process's own side: one line of JSON per file in, one out, and after it the points."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # it ends the process, whatever C++ is busy with
    with os.fdopen(os.dup(1), "wb") as answers, open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)  # what libraries print is no answer
        try:
            open3d()
            problem = ""
        except ValueError as error:
            problem = str(error)
        answers.write(json.dumps({"problem": problem}).encode() + b"\n")
        answers.flush()
        for line in sys.stdin.buffer:
            job = json.loads(line)
            signal.setitimer(signal.ITIMER_REAL, job.pop("time_limit"))
            try:
                points, notes = sample(**job)
                told, content = {"notes": notes}, points.tobytes()
            except UnusableError as error:
                told, content = {"reason": str(error)}, b""
            except Exception as error:
                told, content = {"reason": f"on which Open3D fails ({type(error).__name__})"}, b""
            signal.setitimer(signal.ITIMER_REAL, 0)
            answers.write(json.dumps(told).encode() + b"\n" + content)
            answers.flush()


if __name__ == "__main__":
    _serve()
