"""A folder behind a URI: S3, GCS, NFS or a plain path, through pyarrow. Files go up and come down whole, or not at all.

s3://BUCKET/runs?endpoint_override=HOST:9000&scheme=http    gs://BUCKET/runs    file:///nfs/runs    /nfs/runs
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from pyarrow import fs

Said = TypeVar("Said")

CHUNK = 8 << 20
TRIES, PAUSE = 3, 0.5  # attempts, and seconds before the second, which double
DEADLINE = 20.0  # seconds for a storage to prove that it can be written
FINAL = re.compile(  # errors that another attempt would meet again
    r"ACCESS_DENIED|NO_SUCH_BUCKET|NoSuchBucket|INVALID_ACCESS_KEY|SIGNATURE|UNRECOGNIZED_CLIENT|CREDENTIALS"
    r"|Forbidden|Unauthorized|PERMISSION_DENIED|Permission denied|Read-only|HTTP status code: 40[013]",
    re.IGNORECASE,
)


def is_uri(text: object) -> bool:
    """Whether it names something behind a URI rather than a path."""
    return isinstance(text, str) and bool(re.match(r"[a-z][a-z0-9+.-]*://", text))


@dataclass(frozen=True)
class Place:
    """A folder there. ``name`` below is a relative path of a file in it."""

    uri: str
    files: Any  # a pyarrow FileSystem
    root: str

    @property
    def name(self) -> str:
        return self.root.rstrip("/").rpartition("/")[2]

    @property
    def local(self) -> bool:
        """A disk that this machine has mounted, where files have owners and can be renamed."""
        return isinstance(self.files, fs.LocalFileSystem)

    def child(self, name: str) -> Place:
        """The folder ``name`` in this one."""
        path, mark, query = self._parts()
        return Place(f"{path.rstrip('/')}/{name}{mark}{query}", self.files, f"{self.root.rstrip('/')}/{name}")

    def parent(self) -> Place:
        path, mark, query = self._parts()
        up = self.root.rstrip("/").rpartition("/")[0]
        return Place(f"{path.rstrip('/').rpartition('/')[0]}{mark}{query}", self.files, up)

    def _parts(self) -> tuple[str, str, str]:
        return self.uri.partition("?") if is_uri(self.uri) else (self.uri, "", "")

    def listing(self, below: str = "") -> dict[str, int]:
        """Every file below, with its size; what is still being written is left out."""
        root = f"{self.root.rstrip('/')}/{below}".rstrip("/")
        found = self.files.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
        names = {one.path.removeprefix(self.root.rstrip("/")).lstrip("/"): one for one in found if one.is_file}
        return {name: one.size for name, one in sorted(names.items()) if not name.endswith(".part")}

    def folders(self) -> list[str]:
        """Names of the folders in this one."""
        found = self.files.get_file_info(fs.FileSelector(self.root, allow_not_found=True))
        return sorted(one.base_name for one in found if one.type == fs.FileType.Directory)

    def has(self, name: str) -> bool:
        return self.files.get_file_info(self._path(name)).is_file

    def changed(self, name: str) -> object:
        """Equal as long as nobody has written the file again; ``None`` where there is none."""
        found = self.files.get_file_info(self._path(name))
        return (found.mtime_ns, found.size) if found.is_file else None

    def read(self, name: str) -> bytes | None:
        """A small file, where there is one."""
        try:
            with self.files.open_input_stream(self._path(name)) as stream:
                return stream.read()
        except FileNotFoundError:
            return None

    def write(self, name: str, text: bytes) -> None:
        with self._written(name) as stream:
            stream.write(text)

    def put(self, source: Path, name: str) -> None:
        """Up, whole: S3 and GCS show an object once it is closed, a disk once it is renamed."""
        with source.open("rb") as file, self._written(name) as stream:
            while chunk := file.read(CHUNK):
                stream.write(chunk)

    def get(self, name: str, target: Path) -> None:
        """Down, whole."""
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
        try:
            with self.files.open_input_stream(self._path(name)) as stream, part.open("wb") as file:
                while chunk := stream.read(CHUNK):
                    file.write(chunk)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)

    def fetched(self, name: str) -> Path:
        """The file on this machine: itself on a disk, else a copy."""
        if self.local:
            return Path(self._path(name))
        path = cache_folder(self.child(name).uri)
        self.get(name, path)
        return path

    def delete(self, name: str) -> None:
        """Gone, if it was there."""
        with contextlib.suppress(FileNotFoundError):
            self.files.delete_file(self._path(name))
        folder = os.path.dirname(self._path(name))
        with contextlib.suppress(OSError):  # a bucket has no folders, and this one may hold other files
            while self.local and len(folder) > len(self.root.rstrip("/")):
                os.rmdir(folder)
                folder = os.path.dirname(folder)

    def _path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}"

    @contextlib.contextmanager
    def _written(self, name: str) -> Iterator[Any]:
        path = self._path(name)
        if not self.local:
            with self.files.open_output_stream(path) as stream:
                yield stream
            return
        os.makedirs(os.path.dirname(path), exist_ok=True)
        part = f"{path}.{uuid.uuid4().hex[:8]}.part"
        try:
            with open(part, "wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(part, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(part)


def place(uri: str, key: str = "storage") -> Place:
    """The folder at a URI, or at an absolute path. Looks at nothing there yet."""
    try:
        files, root = fs.FileSystem.from_uri(uri)
    except (pa.ArrowException, OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{key} is {uri}, which cannot be opened ({plainly(error)}): give s3://BUCKET/FOLDER, gs://BUCKET/FOLDER, "
            "file:///FOLDER or an absolute path"
        ) from None
    return Place(uri, files, root)


def ready(uri: str, key: str = "storage") -> Place:
    """The place, after a small file was written, found and deleted there; one sentence where that fails."""
    name = f".rayft-{uuid.uuid4().hex[:8]}"

    def prove() -> Place:
        found = place(uri, key)
        found.write(name, b"may be deleted")
        if name not in found.listing():
            raise OSError("what is written there is not found again")
        found.delete(name)
        return found

    try:
        return within(DEADLINE, prove)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(
            f"{key} is {uri}, where nothing can be written ({plainly(error)}): look at the name, the rights of this "
            "machine's credentials and the network, or give another"
        ) from None


def within(seconds: float, work: Callable[[], Said]) -> Said:
    """What ``work`` returns or raises; a ``TimeoutError`` where it takes longer, which no cloud's own client ends."""
    answer: list[Any] = []

    def run() -> None:
        try:
            answer.append((work(), None))
        except BaseException as error:
            answer.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not answer:
        raise TimeoutError(f"no answer within {seconds:g} s")
    said, error = answer[0]
    if error is not None:
        raise error
    return said


def patiently(work: Callable[[], Said]) -> Said:
    """Again after a pause where it fails for a reason that may pass."""
    for attempt in range(TRIES):
        try:
            return work()
        except (OSError, pa.ArrowException) as error:
            last = attempt == TRIES - 1 or isinstance(error, FileNotFoundError)
            if last or FINAL.search(str(error)):
                raise
        time.sleep(PAUSE * 2**attempt)
    raise AssertionError


def plainly(error: BaseException) -> str:
    """An error's core: what AWS or the disk said, without request numbers."""
    text = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
    found = re.search(r"AWS Error .*", text)
    text = re.sub(r"\s*\(Request ID:[^)]*\)", "", found[0] if found else text)
    return text[:200]


def cache_folder(uri: str) -> Path:
    """Where this machine keeps its copy of what lies at a URI."""
    home = Path(os.environ.get("RAYFT_DATA") or "~/.cache/rayft").expanduser()
    name = uri.partition("?")[0].rstrip("/").rpartition("/")[2]
    return home / "storage" / hashlib.sha256(uri.encode()).hexdigest()[:12] / name


def copy_down(there: Place, names: list[str], folder: Path) -> None:
    """Those files into ``folder``: all of them, or the folder is not there."""
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        for name in names:
            patiently(lambda name=name: there.get(name, temporary / name))
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
