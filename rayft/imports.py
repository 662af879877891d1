"""Objects by name: ``package.module:Name`` or ``path/to/file.py:Name``, with errors that say what is there."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import reprlib
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from importlib.metadata import entry_points
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from types import ModuleType, NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import cloudpickle


def nearest(name: str, known: Iterable[str]) -> str:
    """' (did you mean X?)' for a misspelt name, '' where nothing is near."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {found[0]!r}?)" if found else ""


def registered(group: str, name: str, what: str) -> Any:
    """The object that an installed package brings under this entry point."""
    known = {point.name: point.value for point in entry_points(group=group)}
    if name not in known:
        raise ValueError(f"no {what} {name!r}{nearest(name, known)}; there are {', '.join(sorted(known)) or 'none'}")
    return load(known[name])


def load(path: str) -> Any:
    """The object at an import path or in a file. A ``ValueError`` names what is missing."""
    where, colon, name = path.rpartition(":")
    if not colon or not where or not name:
        raise ValueError(f"{path!r} is not an import path; write 'package.module:Name' or './file.py:Name'")
    module = _from_file(Path(where)) if where.endswith(".py") else _from_package(where)
    if not hasattr(module, name):
        public = [key for key in vars(module) if not key.startswith("_")]
        raise ValueError(f"{where} has no {name!r}{nearest(name, public)}")
    return getattr(module, name)


def path_of(thing: Any) -> str:
    """The import path that ``load`` turns back into ``thing``."""
    source = getattr(sys.modules.get(thing.__module__), "__rayft_file__", None)
    return f"{source or thing.__module__}:{thing.__qualname__}"


def portable(thing: Any) -> Any:
    """What another process can make ``thing`` from: an import path where it is installed, else the packed object."""
    if isinstance(thing, str | bytes):
        return thing
    if inspect.isclass(thing) or inspect.isfunction(thing):
        path, module = path_of(thing), sys.modules.get(thing.__module__)
        if "<" not in path and (hasattr(module, "__rayft_file__") or _installed(module)):
            return path
    return pack(thing)


def pack(thing: Any) -> bytes:
    """An object with its code, where only this process can import it (a notebook, a script, a folder of tests)."""
    kind = thing if inspect.isclass(thing) or inspect.isfunction(thing) else type(thing)
    module = sys.modules.get(getattr(kind, "__module__", ""))
    by_value = module is not None and module.__name__ != "__main__" and not _installed(module)
    if by_value:
        cloudpickle.register_pickle_by_value(module)
    try:
        return cloudpickle.dumps(thing)
    except Exception as error:
        raise ValueError(f"{thing} cannot be sent to another process: {reason(error)}") from error
    finally:
        if by_value:
            cloudpickle.unregister_pickle_by_value(module)


def unpack(packed: bytes) -> Any:
    """The object again."""
    return cloudpickle.loads(packed)


def _installed(module: ModuleType | None) -> bool:
    """Whether any process of this installation can import it: rayft itself, site-packages, the standard library."""
    if module is None or module.__name__ == "__main__":
        return False
    if module.__name__.partition(".")[0] in ("rayft", "envs"):
        return True
    found = getattr(module, "__file__", None)
    roots = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}
    return found is None or any(Path(found).is_relative_to(root) for root in roots)


def absolute(path: str, base: Path | None = None) -> str:
    """A file's import path made independent of the working directory; others unchanged."""
    where, colon, name = path.rpartition(":")
    if not colon or not where.endswith(".py"):
        return path
    return f"{((base or Path.cwd()) / where).resolve()}:{name}"


def check_arguments(target: Any, kwargs: Mapping[str, Any], what: str) -> None:
    """Refuses keyword arguments that ``target`` does not take, before anything is built."""
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    named = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for key in kwargs:
        if key not in named:
            allowed = ", ".join(named) or "nothing"
            raise ValueError(f"{what} takes no {key!r}{nearest(key, named)}; it takes {allowed}")
    missing = [n for n in named if parameters[n].default is inspect.Parameter.empty and n not in kwargs]
    if missing:
        raise ValueError(f"{what} needs {', '.join(missing)}; give {'it' if len(missing) == 1 else 'them'} in the YAML")


PLAIN: dict[Any, tuple[Any, str]] = {
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    bool: (bool, "true or false"),
    str: ((str, PathLike), "text"),
    NoneType: (NoneType, "null"),
}


def check_plain(target: Any, kwargs: Mapping[str, Any], what: str) -> None:
    """Refuses values of another kind than ``target`` says, where it asks for numbers, text, true or false, or null."""
    try:
        hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except Exception:  # a hint may name what only a type checker imports
        return
    for key, value in kwargs.items():
        kinds = _kinds(hints.get(key, Any))
        if all(kind in PLAIN for kind in kinds) and not any(_is(kind, value) for kind in kinds):
            asked = " or ".join(PLAIN[kind][1] for kind in kinds)
            raise ValueError(f"{what}: {key} is {reprlib.repr(value)}; it should be {asked}")


def _kinds(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _is(kind: Any, value: Any) -> bool:
    return isinstance(value, PLAIN[kind][0]) and (kind is bool or not isinstance(value, bool))


def construct(target: Any, kwargs: Mapping[str, Any], what: str) -> Any:
    """``target(**kwargs)``; whatever goes wrong in the user's code is a ``ValueError`` that says where."""
    check_arguments(target, kwargs, what)
    try:
        return target(**kwargs)
    except Exception as error:
        raise ValueError(f"{what}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """An exception in a few words; a ``ValueError`` speaks for itself."""
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return f"{kind}{error}"[:300]


def _from_package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if name == missing or name.startswith(missing + "."):
            raise ValueError(f"no module {missing!r}; is it installed, or is the path misspelt?") from None
        raise ValueError(f"{name} needs the module {missing!r}, which is not installed") from None
    except Exception as error:
        raise ValueError(f"{name} could not be imported: {type(error).__name__}: {error}") from error


def _from_file(path: Path) -> ModuleType:
    path = path.expanduser().resolve()
    if not path.is_file():
        raise ValueError(f"no file {path}; an import path to a file looks like './file.py:Name'")
    name = f"rayft_file_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    module.__dict__["__rayft_file__"] = str(path)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, Exception):
            raise ValueError(f"{path} could not be imported: {type(error).__name__}: {error}") from error
        raise
    return module
