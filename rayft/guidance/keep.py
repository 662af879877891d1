"""A fitted value as a file: a .safetensors that says whose it is, and is refused elsewhere.

value.safetensors = the critic's weights  +  {model, reward, alpha, level}
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from rayft import domain as domains
from rayft.chain import Policy
from rayft.guidance.base import Ground
from rayft.guidance.fit import FitSettings, tried
from rayft.guidance.value import Value

WHOSE = ("model", "reward", "alpha")


def kept(settings: FitSettings, ground: Ground, fitted: Callable[[], Value]) -> Value:
    """v of the file that the settings name, or fitted now, and written where a file is named."""
    if settings.value is None:
        return fitted()
    path = Path(settings.value)
    if path.exists():
        return opened(path, settings.alpha, ground)
    if path.suffix != ".safetensors" or not path.parent.is_dir():
        raise ValueError(f"guide.value is {path}; give a .safetensors file in a folder that is there")
    value = fitted()
    temporary = path.with_name(f".{path.name}.tmp")
    state = {k: v.detach().cpu().contiguous() for k, v in value.critic.state_dict().items()}
    save_file(state, temporary, {**whose(settings.alpha, ground), "level": repr(value.level)})
    temporary.replace(path)
    return value


def opened(path: Path, alpha: float, ground: Ground) -> Value:
    """v of a file, which must be of this model, reward and alpha."""
    try:
        with safe_open(path, framework="pt") as file:
            told = file.metadata() or {}
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is no whole .safetensors file ({error}); remove it, and it is written anew") from None
    if not {"level", *WHOSE} <= set(told):
        raise ValueError(f"{path} is no value that rayft fitted; give guide.value another name")
    for name, here in whose(alpha, ground).items():
        if told[name] != here:
            was = f"alpha {told[name]}, not {here}" if name == "alpha" else f"another {name}"
            raise ValueError(f"{path} was fitted for {was}; give guide.value another name, or remove the file")
    critic = tried(ground)
    domains.fit(critic, state, str(path))
    return Value(critic.requires_grad_(False), ground.bench.policy, alpha, float(told["level"]))


def whose(alpha: float, ground: Ground) -> dict[str, str]:
    """What a value is the value of."""
    reward = hashlib.blake2b(ground.reward.identity.encode(), digest_size=16).hexdigest()
    return {"model": _model(ground.bench.policy), "reward": reward, "alpha": repr(float(alpha))}


def _model(policy: Policy) -> str:
    """The base's weights and its chain."""
    found, process = hashlib.blake2b(digest_size=16), policy.process
    tables = {"alpha_bar": process.schedule.alpha_bar, "sigma": process.sigma, "timestep": process.schedule.timestep}
    state = policy.network.state_dict() if isinstance(policy.network, nn.Module) else {}
    for name, tensor in {**tables, **state}.items():
        found.update(f"{name}{tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()
