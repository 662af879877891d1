"""EDM's published checkpoints: `args.pickle` (its settings) and `generative_model_ema.npy` (a state dict, by torch).

    alpha_bar_t = sigmoid(-gamma_t),    gamma[0 .. T] a table in the state dict

The pickle is read by an unpickler that knows a namespace and plain values only, so that no file can run code.
"""

from __future__ import annotations

import builtins
import io
import pickle
import re
import reprlib
import warnings
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from envs.molecules.egnn import EGNN
from rayft.schedule import Schedule, cosine, from_alpha_bar, polynomial

ARGUMENTS = "args.pickle"
LARGEST_PICKLE = 1 << 20
PLAIN = (type(None), bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset)
ELEMENTS, HYDROGEN = (6, 7, 8, 9), 1
OLDER = {"normalization_factor": 1, "aggregation_method": "sum", "ema_decay": 0.9999}  # where a file does not say
PUBLISHED = {  # of the unconditional models of QM9
    "dataset": "qm9",
    "remove_h": False,
    "include_charges": True,
    "conditioning": [],
    "context_node_nf": 0,
    "condition_time": True,
    "model": "egnn_dynamics",
    "nf": 256,
    "n_layers": 9,
    "attention": True,
    "tanh": True,
    "norm_constant": 1,
    "inv_sublayers": 1,
    "sin_embedding": False,
    "normalization_factor": 1,
    "aggregation_method": "sum",
    "probabilistic_model": "diffusion",
    "diffusion_steps": 1000,
    "diffusion_noise_schedule": "polynomial_2",
    "diffusion_noise_precision": 1e-5,
    "diffusion_loss_type": "l2",
    "normalize_factors": [1, 4, 10],
}
NAMES = (  # ours -> EDM's, each applied in turn
    (r"^embed\.", "embedding."),
    (r"^read\.", "embedding_out."),
    (r"^layers\.(\d+)\.messages\.(\d+)\.", r"e_block_\1.gcl_\2."),
    (r"^layers\.(\d+)\.move\.(pairs\.)?", r"e_block_\1.gcl_equiv.coord_mlp."),
    (r"\.pairs\.", ".edge_mlp."),
    (r"\.node_", ".node_mlp."),
    (r"\.attention\.", ".att_mlp.0."),
    (r"\.first\.", ".0."),
    (r"\.second\.", ".2."),
    (r"\.last\.", ".4."),
)


@dataclass(frozen=True)
class EDMModel:
    """A checkpoint: the network, its schedule, and EDM's settings, whole and as they were read."""

    denoiser: EGNN
    schedule: Schedule
    arguments: Mapping[str, Any]

    @property
    def norm_values(self) -> tuple[float, float, float]:
        """What positions, one-hot elements and charges were divided by."""
        x, one_hot, charge = self.arguments["normalize_factors"]
        return float(x), float(one_hot), float(charge)

    @property
    def include_charges(self) -> bool:
        """Whether the last feature is the charge Z."""
        return self.arguments["include_charges"]

    @property
    def remove_h(self) -> bool:
        """Whether the molecules are their heavy atoms."""
        return self.arguments["remove_h"]

    @property
    def elements(self) -> tuple[int, ...]:
        """Atomic numbers, in the order of the one-hot features."""
        return ELEMENTS if self.remove_h else (HYDROGEN, *ELEMENTS)

    @property
    def conditioning(self) -> tuple[str, ...]:
        """The properties in ``context["property"]``, each as (value - mean) / mean absolute deviation over QM9."""
        return tuple(self.arguments["conditioning"])


def read(folder: str | Path) -> EDMModel:
    """The model of a folder with EDM's two files."""
    folder = Path(folder)
    arguments = _arguments(folder / ARGUMENTS)
    check(arguments, str(folder / ARGUMENTS))
    schedule, path = schedule_of(arguments), folder / _weights_name(arguments)
    state = _state(path)
    fit(state, expected(claimed(arguments), schedule), str(path))
    table = torch.sigmoid(-state["gamma.gamma"].double())
    if not torch.allclose(table, schedule.alpha_bar, rtol=0, atol=1e-6):
        what = f"{arguments['diffusion_noise_schedule']} at T = {schedule.num_steps}"
        raise ValueError(f"the table gamma.gamma in {path} is not that of {what}; one of {ARGUMENTS} and it is changed")
    net = network(arguments)
    net.load_state_dict({key: state[edm_key(key)] for key in net.state_dict()})
    return EDMModel(net.eval(), schedule, arguments)


def write(folder: str | Path, model: EDMModel) -> None:
    """Both files, as EDM's own code loads them."""
    folder = Path(folder)
    check(model.arguments, "the model's arguments")
    schedule = schedule_of(model.arguments)
    state = {key: value.cpu() for key, value in expected(model.denoiser, schedule).items()}
    fit(state, expected(claimed(model.arguments), schedule), "the model's network")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ARGUMENTS).open("wb") as file:
        pickle.dump(Namespace(**model.arguments), file, protocol=4)
    torch.save(state, folder / _weights_name(model.arguments))


def schedule_of(arguments: Mapping[str, Any]) -> Schedule:
    """The schedule of checked settings. EDM's cosine leaves out the first of T + 2 points, which has no noise."""
    if arguments["diffusion_noise_schedule"] == "cosine":
        return from_alpha_bar(cosine(arguments["diffusion_steps"] + 1).alpha_bar[1:])
    power = float(arguments["diffusion_noise_schedule"].removeprefix("polynomial_"))
    return polynomial(arguments["diffusion_steps"], power, arguments["diffusion_noise_precision"])


def network(arguments: Mapping[str, Any]) -> EGNN:
    """A fresh network of checked settings."""
    given = OLDER | dict(arguments)
    return EGNN(
        num_features=len(ELEMENTS) + (not given["remove_h"]) + given["include_charges"],
        num_steps=given["diffusion_steps"],
        num_properties=given["context_node_nf"],
        width=given["nf"],
        num_layers=given["n_layers"],
        num_inv_sublayers=given["inv_sublayers"],
        attention=given["attention"],
        tanh=given["tanh"],
        sin_embedding=given["sin_embedding"],
        norm_constant=given["norm_constant"],
        normalization_factor=given["normalization_factor"],
    )


def claimed(arguments: Mapping[str, Any]) -> EGNN:
    """The same without numbers or memory for them, which a file may claim more of than there is."""
    with torch.device("meta"):
        return network(arguments)


def expected(net: EGNN, schedule: Schedule) -> dict[str, Tensor]:
    """EDM's state dict of a network, in EDM's order."""
    gamma = (1 - schedule.alpha_bar).log() - schedule.alpha_bar.log()
    weights = {edm_key(key): value.detach() for key, value in net.state_dict().items()}
    return {"buffer": torch.zeros(1), "gamma.gamma": gamma.float(), **weights}


def edm_key(key: str) -> str:
    """EDM's name of one of our weights."""
    for ours, theirs in NAMES:
        key = re.sub(ours, theirs, key)
    return f"dynamics.egnn.{key}"


def _weights_name(arguments: Mapping[str, Any]) -> str:
    averaged = arguments.get("ema_decay", OLDER["ema_decay"]) != 0
    return "generative_model_ema.npy" if averaged else "generative_model.npy"


def check(arguments: Mapping[str, Any], source: str) -> None:
    """The first setting that we cannot reproduce, in a sentence."""
    given = OLDER | dict(arguments)
    for name, (allowed, test) in SETTINGS.items():
        if name not in given:
            raise ValueError(f"{source} has no {name!r}; an EDM checkpoint that can be read has {allowed}")
        if not test(given[name]):
            raise ValueError(f"{source}: {name} is {reprlib.repr(given[name])}; what can be read has {allowed}")
    if given["context_node_nf"] != len(given["conditioning"]):
        has = f"context_node_nf {given['context_node_nf']} for conditioning {given['conditioning']!r}"
        raise ValueError(f"{source} has {has}; what can be read has one number for each property")


def _one_of(*values: Any) -> tuple[str, Callable[[Any], bool]]:
    return " or ".join(map(repr, values)), lambda given: type(given) in map(type, values) and given in values


def _whole(least: int) -> tuple[str, Callable[[Any], bool]]:
    return f"a whole number from {least} to 10000", lambda given: type(given) is int and least <= given <= 10_000


def _number(least: float, most: float) -> tuple[str, Callable[[Any], bool]]:
    return f"a number from {least:g} to {most:g}", lambda given: _is_number(given) and least <= given <= most


def _is_number(given: Any) -> bool:
    return type(given) in (int, float)


def _are_norms(given: Any) -> bool:
    return isinstance(given, list | tuple) and len(given) == 3 and all(_is_number(v) and 0 < v < 1e6 for v in given)


def _are_names(given: Any) -> bool:
    return isinstance(given, list | tuple) and all(isinstance(name, str) for name in given)


def _is_schedule(given: Any) -> bool:
    return isinstance(given, str) and re.fullmatch(r"cosine|polynomial_[1-9]([0-9]|\.[0-9]+)?", given) is not None


TRUE_OR_FALSE = _one_of(True, False)
SETTINGS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "model": _one_of("egnn_dynamics"),
    "probabilistic_model": _one_of("diffusion"),
    "dataset": _one_of("qm9", "qm9_second_half"),
    "condition_time": _one_of(True),
    "diffusion_noise_schedule": (
        "'cosine' or a polynomial schedule such as 'polynomial_2', no learned one",
        _is_schedule,
    ),
    "diffusion_steps": _whole(1),
    "diffusion_noise_precision": _number(1e-9, 0.1),
    "normalize_factors": ("three positive numbers", _are_norms),
    "remove_h": TRUE_OR_FALSE,
    "include_charges": TRUE_OR_FALSE,
    "conditioning": ("a list of properties' names", _are_names),
    "context_node_nf": _whole(0),
    "nf": _whole(1),
    "n_layers": _whole(1),
    "inv_sublayers": _whole(1),
    "attention": TRUE_OR_FALSE,
    "tanh": TRUE_OR_FALSE,
    "sin_embedding": TRUE_OR_FALSE,
    "norm_constant": _number(0, 1e6),
    "normalization_factor": _number(1e-6, 1e6),
    "aggregation_method": _one_of("sum"),
}


class _RefusedError(Exception):
    """A global that a pickle may not name."""


class _Unpickler(pickle.Unpickler):
    """Knows a namespace and sets; all other plain values need no global."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content))
        self.namespace = type("Namespace", (), {})  # a file can set attributes of a class: not those of argparse's

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("argparse", "Namespace"):
            return self.namespace
        if module in ("builtins", "__builtin__") and name in ("set", "frozenset", "complex"):
            return getattr(builtins, name)
        raise _RefusedError(f"{module}.{name}")


def _arguments(path: Path) -> dict[str, Any]:
    """The namespace in a pickle, as a dict; no code runs."""
    if not path.is_file():
        raise ValueError(f"no {path}; an EDM checkpoint is a folder with {ARGUMENTS} and generative_model_ema.npy")
    if path.stat().st_size > LARGEST_PICKLE:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes; EDM's settings take about 1,000, so it is another file"
        )
    try:
        reader = _Unpickler(path.read_bytes())
        found = reader.load()
        arguments = dict(vars(found)) if type(found) is reader.namespace else None
        plain = arguments is not None and _is_plain(arguments) and all(isinstance(key, str) for key in arguments)
    except _RefusedError as refused:
        asked = reprlib.repr(str(refused))
        raise ValueError(f"{path} asks for {asked}, which could run code; it should be a Namespace of values") from None
    except Exception:  # a damaged pickle fails in as many ways as there are opcodes
        raise ValueError(f"{path} is damaged; it should be a pickled argparse.Namespace") from None
    if arguments is None or not plain:
        raise ValueError(f"{path} holds a {type(found).__name__}; it should be an argparse.Namespace of plain values")
    return arguments


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(part) for pair in value.items() for part in pair)
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_plain, value))
    return type(value) in PLAIN


def _state(path: Path) -> dict[str, Tensor]:
    """The tensors of a torch state dict (EDM calls the file .npy)."""
    if not path.is_file():
        raise ValueError(f"no {path}; an EDM checkpoint is a folder with {ARGUMENTS} and {path.name}")
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception:  # whatever bytes make torch, zipfile or pickle raise
            raise ValueError(f"{path} is damaged or holds more than tensors; it should be EDM's state dict") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds a {type(state).__name__}; it should be EDM's state dict, names and tensors")
    return state


def fit(state: Mapping[str, Tensor], needed: Mapping[str, Tensor], source: str) -> None:
    """Every tensor as the settings have it, and finite."""
    for key in [*needed, *state]:
        has, needs = _kind(state.get(key)), _kind(needed.get(key))
        if has != needs:
            raise ValueError(f"{source} does not fit the settings: {key!r} is {has}, it should be {needs}")
        if not bool(state[key].isfinite().all()):
            raise ValueError(f"{source}: {key!r} is not finite; the training behind it has failed, take an earlier one")


def _kind(value: Tensor | None) -> str:
    return "absent" if value is None else f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
