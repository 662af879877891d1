"""A run as a user writes it: YAML (or a Python file's ``spec``) plus ``key=value`` overrides -> a checked RunSpec.

The names, defaults and checks of each section stay in its dataclass; this file only finds, merges and dispatches.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from rayft import adapt, algorithms, domain, imports, storage
from rayft.algorithms.base import open_service
from rayft.algorithms.config import SECTIONS, DiffusionConfig
from rayft.settings import STRICT, Count, CountOrZero, NonNegative, check, sentence
from rayft.track import TrackSettings, open_trackers


@dataclasses.dataclass(frozen=True)
class ResourceSettings:
    """RLlib's own names for who runs where."""

    __pydantic_config__ = STRICT

    torch_threads: Count | None = None
    """Threads of the driver's torch, all cores by default; 1 is fastest for small networks and on shared machines."""
    num_env_runners: CountOrZero = 0
    """Remote runners; 0 samples in the driver."""
    num_cpus_per_env_runner: NonNegative = 1
    """Logical CPUs each reserves."""
    num_gpus_per_env_runner: NonNegative = 0
    """GPU fraction each reserves, and samples on."""
    num_learners: CountOrZero = 0
    """Remote learners (DDP); 0 learns in the driver."""
    num_cpus_per_learner: NonNegative = 1
    """Logical CPUs each reserves."""
    num_gpus_per_learner: NonNegative = 0
    """GPU fraction each reserves, and learns on."""


@dataclasses.dataclass(frozen=True)
class CheckpointSettings:
    """What is kept of a run while it runs."""

    __pydantic_config__ = STRICT

    every: Count = 10
    """Iterations between checkpoints; the last iteration is always one."""
    keep: Count = 2
    """Newest checkpoints kept beside the best."""
    max_failures: CountOrZero = 3
    """Times a lost learner may be replaced from the last checkpoint before the run gives up."""


def _named(value: Any) -> Any:
    return value if isinstance(value, Mapping) else {"name": value}


def _folder_name(name: str) -> str:
    if not name or name.startswith(".") or set(name) & set("/\\\0"):
        raise ValueError(f"{name!r} names a folder in output, so it has no separator and no dot in front")
    return name


def _plain_folder(text: str) -> str:
    if storage.is_uri(text):
        raise ValueError(f"{text!r} is a URI and a run works in a folder here: keep it there with storage={text}")
    return text


def _kept_at(text: str) -> str:
    if not storage.is_uri(text) and not text.startswith("/"):
        raise ValueError(f"{text!r} is no URI: give s3://BUCKET/runs, file:///nfs/runs or an absolute path")
    return text


Named = Annotated[dict[str, Any], BeforeValidator(_named)]
Watched = list[str | dict[str, Any]] | dict[str, str | dict[str, Any]]
FolderName = Annotated[str, AfterValidator(_folder_name)]


class RunSpec(BaseModel):
    """Everything about a run. ``domain`` and ``reward`` are a name, or a mapping of ``name`` and arguments."""

    model_config = ConfigDict(extra="forbid")

    algorithm: str
    domain: Named
    reward: Named
    watch: Watched = Field(default_factory=list)
    name: FolderName = "run"
    seed: CountOrZero = 0
    iterations: Count = 100
    weights: str | None = None
    chain: dict[str, Any] = Field(default_factory=dict)
    training: dict[str, Any] = Field(default_factory=dict)
    evaluate: dict[str, Any] = Field(default_factory=dict)
    scoring: dict[str, Any] = Field(default_factory=dict)
    resources: ResourceSettings = ResourceSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    track: TrackSettings = TrackSettings()
    search: dict[str, Any] | None = None
    output: Annotated[str, AfterValidator(_plain_folder)] = "runs"
    """Folder in which a run works, on this machine."""
    storage: Annotated[str, AfterValidator(_kept_at)] | None = None
    """URI at which it is kept as well, and can be resumed from by any machine: s3://BUCKET/runs, file:///nfs/runs."""

    def config(self) -> DiffusionConfig:
        """The RLlib configuration, not yet validated."""
        config = algorithm(self.algorithm)()
        name, arguments = split(self.domain, "domain")
        config.domain(name).start_from(self.weights)
        config.domain_arguments = arguments
        name, arguments = split(self.reward, "reward")
        config.reward(name)
        config.reward_arguments = arguments
        config.watched = self.watch
        check("training", config.settings_class, self.training)  # RLlib's own keys are for Python: no YAML keeps them
        config.training(**self.training)
        for section in SECTIONS:
            getattr(config, section)(**getattr(self, section))
        told = dataclasses.asdict(self.resources)
        config.env_runners(**{k: v for k, v in told.items() if "env_runner" in k})
        config.learners(**{k: v for k, v in told.items() if "learner" in k})
        config.seed = self.seed
        return config

    def checked(self) -> DiffusionConfig:
        """The configuration, every value checked: all that can be known before Ray starts."""
        config = self.config()
        config.validate()
        return config

    def tried(self) -> DiffusionConfig:
        """``checked``, and what only building shows: network, weights and reward fit together.

        A network that may need its GPU, and a reward that has actors of its own, are built where they run.
        """
        config = self.checked()
        world = config.build_domain()
        if config.num_gpus_per_env_runner == config.num_gpus_per_learner == 0:
            domain.try_out(world, self.weights)
            told = config.settings()
            adapt.adapted(domain.pretrained(world), told.lora_rank, told.lora_scale, told.trainable)
        scoring = config.section("scoring")
        open_trackers(self.track, Path(), {})
        if scoring.actors == 0:
            rewards = open_service(config, world)
            try:
                rewards.start()
            finally:
                rewards.stop()
        return config

    def full(self) -> dict[str, Any]:
        """Every key with its value in force, defaults included, as plain YAML types."""
        config = self.checked()
        told = self.model_dump(exclude=None if self.search else {"search"})
        told["training"] = dataclasses.asdict(config.settings())
        for section in SECTIONS:
            told[section] = dataclasses.asdict(config.section(section))
        return told


def algorithm(name: str) -> type[DiffusionConfig]:
    """``ppo`` -> the Config class in rayft/algorithms/ppo.py; ``package.module:Name`` for one of the user's own."""
    if ":" in name:
        found = imports.load(name)
        if not (inspect.isclass(found) and issubclass(found, DiffusionConfig) and found is not DiffusionConfig):
            raise ValueError(f"{name} is not an algorithm: make it a subclass of DiffusionConfig")
        return found
    known = known_algorithms()
    if name not in known:
        raise ValueError(f"no algorithm {name!r}{imports.nearest(name, known)}; there are {', '.join(known)}")
    module = importlib.import_module(f"{algorithms.__name__}.{name}")
    return next(
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, DiffusionConfig) and value.__module__ == module.__name__
    )


def known_algorithms() -> list[str]:
    """The files of rayft/algorithms, by name."""
    names = [module.name for module in pkgutil.iter_modules(algorithms.__path__)]
    return sorted(name for name in names if name not in ("base", "chains", "config"))


def read(file: str | None, overrides: Sequence[str] = (), algorithm: str | None = None) -> RunSpec:
    """The spec in a file or a shipped config, with overrides on top; ``algorithm`` where it names none."""
    tree, name = ({}, "run") if file is None else load_tree(file)
    tree |= {} if algorithm is None or "algorithm" in tree else {"algorithm": algorithm}
    tree.setdefault("name", name)
    return parse(override(tree, overrides))


def parse(tree: Mapping[str, Any]) -> RunSpec:
    """A RunSpec from a mapping, or a ``ValueError`` of one sentence."""
    known = list(RunSpec.model_fields)
    for key in tree:
        if key not in known:
            raise ValueError(f"no key {key!r}{imports.nearest(str(key), known)}; a run has {', '.join(known)}")
    for section, cls in {
        "resources": ResourceSettings,
        "checkpoint": CheckpointSettings,
        "track": TrackSettings,
    }.items():
        value = tree.get(section) or {}
        if not isinstance(value, Mapping):
            raise ValueError(f"{section} is {value!r}; it should be a mapping such as {section}: {{...}}")
        check(section, cls, value)
    try:
        return RunSpec.model_validate({k: v for k, v in tree.items() if v is not None})
    except ValidationError as error:
        if error.errors()[0]["type"] == "missing":
            key = error.errors()[0]["loc"][0]
            raise ValueError(f"{key} is missing; a run needs algorithm, domain and reward") from None
        raise ValueError(sentence("", error)) from None


def load_tree(file: str) -> tuple[dict[str, Any], str]:
    """(mapping, name) of a YAML file, a Python file with a ``spec``, or a shipped config by name."""
    path = Path(file)
    if path.suffix == ".py":
        tree = imports.load(f"{path}:spec")
        if not isinstance(tree, Mapping):
            raise ValueError(f"{path}: spec is {type(tree).__name__}; make it a dict with the keys of a run's YAML")
        return _rooted(dict(tree), path.resolve().parent), path.stem
    if path.is_dir():
        raise ValueError(f"{file} is a folder; give a YAML in it, or continue a run with --resume {file}")
    if not path.is_file():
        shipped = configs()
        if file not in shipped:
            hint = imports.nearest(file, shipped)
            raise ValueError(f"no file {file!r} and no shipped config of that name{hint}; see `rayft configs`")
        path = shipped[file]
    try:
        tree = yaml.load(path.read_text(), _Loader)
    except RecursionError:
        raise ValueError(f"{path} nests its brackets too deeply to be read") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        raise ValueError(f"{path}{line} is not YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(tree, dict):
        kind = "nothing" if tree is None else type(tree).__name__
        raise ValueError(f"{path} holds {kind}; a run is a mapping with algorithm, domain and reward")
    return _rooted(tree, path.resolve().parent), path.stem


def open_folder(path: Path) -> RunSpec:
    """The spec of an existing run."""
    config = path / "config.yaml"
    if not config.is_file():
        raise ValueError(f"{path} is not a run: it has no config.yaml; resume with the folder that `rayft run` printed")
    return parse(load_tree(str(config))[0])


class _Loader(yaml.SafeLoader):
    """A key that is written twice is an error: the second would silently replace the first. 1e-4 is a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


_EXPONENT = re.compile(r"[-+]?[0-9]+([.][0-9]*)?[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("+-0123456789"))


def configs() -> dict[str, Path]:
    """Shipped YAMLs by name."""
    root = Path(str(resources.files("rayft.configs")))
    return {path.stem: path for path in sorted(root.glob("*.yaml"))}


def override(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """``a.b=value`` assignments, values read as YAML; ``reward=NAME`` replaces the reward and its arguments."""
    for assignment in overrides:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise ValueError(f"{assignment!r} is not an override; write key=value, for example training.lr=1e-4")
        try:
            value = _rooted(yaml.load(text, _Loader), Path.cwd())
        except (yaml.YAMLError, RecursionError):
            raise ValueError(f"the value of {key} is not YAML: {text!r}; quote it") from None
        put(tree, key, value)
    return tree


def put(tree: dict[str, Any], key: str, value: Any) -> None:
    """``tree[a][b] = value`` for the key ``a.b``; inner mappings are copied, so other trees stay as they are."""
    *path, last = key.split(".")
    node = tree
    for number, part in enumerate(path):
        inner = node.get(part)
        if inner is None or (number == 0 and part in ("domain", "reward") and not isinstance(inner, Mapping)):
            inner = {} if inner is None else {"name": inner}
        if not isinstance(inner, Mapping):
            raise ValueError(f"{key}: {'.'.join(path[: number + 1])} is {inner!r}, not a mapping")
        node[part] = dict(inner)
        node = node[part]
    node[last] = value


def _rooted(value: Any, root: Path) -> Any:
    """Strings that start with ./ or ../ are files beside the YAML; objects of a Python spec become import paths."""
    if isinstance(value, Mapping):
        return {str(k): _rooted(v, root) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rooted(v, root) for v in value]
    if isinstance(value, str) and value.startswith(("./", "../")):
        where, colon, name = value.rpartition(":")
        return (
            f"{(root / where).resolve()}:{name}" if colon and where.endswith(".py") else str((root / value).resolve())
        )
    if inspect.isclass(value) or inspect.isfunction(value):
        return imports.path_of(value)
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def split(named: Mapping[str, Any], what: str) -> tuple[Any, dict[str, Any]]:
    if "name" not in named:
        raise ValueError(f"{what} has no name; write {what}: NAME or {what}: {{name: NAME, argument: value}}")
    if not isinstance(named["name"], str):
        raise ValueError(f"{what}.name is {named['name']!r}; it should be a short name or an import path")
    return named["name"], {k: v for k, v in named.items() if k != "name"}
