"""EDM's checkpoints for the command line: two files become one .safetensors, and go back.

    tensors = the network's own state dict,    metadata["edm"] = EDM's settings as JSON

The settings come back as they were, so JSON's lack of tuples, sets, bytes and complex numbers is made up for by tags:
every object below the first is {kind: content}.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from envs.molecules import edm
from envs.molecules.edm import EDMModel
from rayft.domain import Denoiser, Domain

SUFFIX, KEY = ".safetensors", "edm"
KINDS: dict[str, Callable[[Any], Any]] = {
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "dict": dict,
    "bytes": bytes.fromhex,
    "complex": lambda parts: complex(*parts),
}


class EDM:
    """The format "edm" of ``rayft import`` and ``rayft export``."""

    @staticmethod
    def read(path: Path) -> EDMModel:
        """A model of EDM's folder, or of a file that ``keep`` wrote."""
        return read(path)

    @staticmethod
    def of(domain: Domain, network: Denoiser, source: str) -> EDMModel:
        """A run's network as a model."""
        from envs.molecules.edm_domain import EDMMolecules

        if not isinstance(domain, EDMMolecules):
            raise ValueError(f"{source} is of {type(domain).__name__}; EDM's format takes runs on molecules_edm")
        return domain.model_of(network)

    @staticmethod
    def keep(model: EDMModel, path: Path) -> str:
        """Writes one .safetensors, and says what it is and how it is used."""
        keep(model, path)
        return "\n".join([*described(model), f"in {path}; next: {next_command(model, path)}"])

    @staticmethod
    def write(model: EDMModel, folder: Path) -> str:
        """Writes EDM's two files."""
        edm.write(folder, model)
        return "\n".join([*described(model), f"as EDM's own code loads it in {folder}"])


def read(path: str | Path) -> EDMModel:
    """EDM's folder, or a file that ``keep`` wrote. No code runs, and torch's random numbers stay where they are."""
    path = Path(path)
    with torch.random.fork_rng(devices=[]):
        return _kept(path) if path.is_file() else edm.read(path)


def keep(model: EDMModel, path: Path) -> None:
    """One .safetensors, whole or not at all."""
    told = json.dumps({name: _packed(value) for name, value in model.arguments.items()})
    state = {key: value.detach().cpu().contiguous() for key, value in model.denoiser.state_dict().items()}
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(save(state, {KEY: told}))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def described(model: EDMModel) -> list[str]:
    """What a model is, in two lines."""
    told, num_weights = model.arguments, sum(p.numel() for p in model.denoiser.parameters())
    atoms = "heavy atoms" if model.remove_h else "all atoms"
    features = f"{model.denoiser.num_features} features each{', a charge among them' if model.include_charges else ''}"
    properties = f"told {', '.join(model.conditioning)}" if model.conditioning else "unconditional"
    return [
        f"EDM of {told['n_layers']} layers of width {told['nf']}, {num_weights:,} weights; {atoms}, {features}",
        f"T = {model.schedule.num_steps}, {told['diffusion_noise_schedule']} with precision "
        f"{told['diffusion_noise_precision']}; {properties}",
    ]


def next_command(model: EDMModel, path: Path) -> str:
    """What draws from a kept model."""
    asked = [f"domain.at.{name}=0" for name in model.conditioning]
    where = str(path) if path.is_absolute() or str(path).startswith("../") else f"./{path}"
    return shlex.join(["rayft", "sample", "molecules_edm", f"domain.model={where}", *asked, "--out", "molecules.sdf"])


def _kept(path: Path) -> EDMModel:
    """The model in a file."""
    try:
        with safe_open(path, "pt") as file:
            held = (file.metadata() or {}).get(KEY)
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        raise ValueError(f"{path} is damaged or no .safetensors; make it again with `rayft import edm`") from None
    if held is None:
        raise ValueError(f"{path} holds no settings of EDM; give EDM's folder, or what `rayft import edm` made of it")
    try:
        arguments: Mapping[str, Any] = {name: _unpacked(value) for name, value in json.loads(held).items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(f"the settings in {path} are damaged; make it again with `rayft import edm`") from None
    edm.check(arguments, str(path))
    edm.fit(state, edm.claimed(arguments).state_dict(), str(path))
    net = edm.network(arguments)
    net.load_state_dict(state)
    return EDMModel(net.eval(), edm.schedule_of(arguments), arguments)


def _packed(value: Any) -> Any:
    """A plain value as JSON has it."""
    match value:
        case dict():
            return {"dict": [[_packed(key), _packed(part)] for key, part in value.items()]}
        case tuple() | set() | frozenset():
            return {type(value).__name__: [_packed(part) for part in value]}
        case list():
            return [_packed(part) for part in value]
        case bytes():
            return {"bytes": value.hex()}
        case complex():
            return {"complex": [value.real, value.imag]}
    return value


def _unpacked(value: Any) -> Any:
    """The plain value again. Equal strings become one, as they are in a pickle of parsed arguments."""
    if isinstance(value, list):
        return [_unpacked(part) for part in value]
    if isinstance(value, dict):
        ((kind, content),) = value.items()
        return KINDS[kind](_unpacked(content))
    return sys.intern(value) if isinstance(value, str) else value
