"""Checkpoints on disk: weights anyone can read, a card that says what they are, and RLlib's state for resuming.

    iteration_000010/  card.json  weights.safetensors  [ema.safetensors]  rllib/

Written to a temporary folder, synced, renamed: a checkpoint is whole or absent. Everything but resuming reads only
the card and the safetensors; the pickles in ``rllib/`` are opened by ``resume`` alone, after ``trusted`` agreed.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from rayft import domain as domains
from rayft.bench import Bench
from rayft.chain import Policy, Process, reverse_process

FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder and its card."""

    path: Path
    card: dict[str, Any]

    @property
    def iteration(self) -> int:
        return int(self.card["iteration"])

    @property
    def state(self) -> Path:
        """RLlib's own state."""
        return self.path / "rllib"

    def weights(self) -> dict[str, np.ndarray]:
        """The network's state dict: the moving average where the run kept one."""
        name = "ema.safetensors" if (self.path / "ema.safetensors").is_file() else "weights.safetensors"
        try:
            return load_file(self.path / name)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{self.path / name} is missing or truncated ({error}); use an earlier one") from None

    def domain(self) -> domains.Domain:
        told = self.card["domain"]
        return domains.build(told["name"], {k: v for k, v in told.items() if k != "name"})

    def process(self, domain: domains.Domain) -> Process:
        chain = self.card["chain"]
        process = reverse_process(domain.schedule(), chain["sigma"], chain["eta"], chain["num_steps"])
        if process.schedule.alpha_bar.tolist() != self.card["alpha_bar"]:
            raise ValueError(
                f"{self.path} was made for another noise schedule than this domain's; give the domain it names"
            )
        return process

    def network(self, domain: domains.Domain) -> domains.Denoiser:
        """The fine-tuned network."""
        net = domain.denoiser()
        domains.fit(net, {k: torch.from_numpy(v) for k, v in self.weights().items()}, str(self.path))
        return net.eval()

    def bench(self, device: str = "cpu") -> Bench:
        """Where draws of the fine-tuned policy are made, with the pretrained model as its reference."""
        domain = self.domain()
        process, where = self.process(domain), torch.device(device)
        nets = [net.to(where).requires_grad_(False) for net in (self.network(domain), domains.pretrained(domain))]
        policies = [Policy(net, process, domain.space, net.prediction) for net in nets]
        return Bench(domain, policies[0], policies[1], where, torch.float32)


def save(
    folder: Path, weights: Mapping[str, Mapping[str, np.ndarray]], card: Mapping[str, Any], state: Callable[[Path], Any]
) -> Checkpoint:
    """Writes ``folder`` in one piece. ``weights``: file name -> state dict; ``state`` writes RLlib's part."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        for name, arrays in weights.items():
            save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, temporary / f"{name}.safetensors")
        (temporary / "rllib").mkdir()
        state(temporary / "rllib")
        full = {"format": FORMAT, **card, "versions": versions(), "torch_threads": torch.get_num_threads()}
        full["rllib_sha256"] = tree_hash(temporary / "rllib")
        (temporary / "card.json").write_text(json.dumps(full, indent=1))
        _sync(temporary)
        _drop(folder)
        temporary.rename(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"checkpoint {folder.name} could not be written ({reason}); the one before it is whole: "
            f"free some space, then continue with: rayft run --resume {folder.parents[1]}"
        ) from None
    return Checkpoint(folder, full)


def load(path: Path) -> Checkpoint:
    """The checkpoint in ``path``: a checkpoint folder, or a run folder (its best, else its newest)."""
    if (path / "checkpoints").is_dir():
        found = best(path) or newest(path)
        if found is None:
            raise ValueError(f"{path} holds no whole checkpoint yet")
        return found
    return _open(path)


def newest(run: Path) -> Checkpoint | None:
    """The last whole checkpoint of a run."""
    folders = sorted((run / "checkpoints").glob("iteration_*"), reverse=True)
    return next((_open(folder) for folder in folders if (folder / "card.json").is_file()), None)


def best(run: Path) -> Checkpoint | None:
    """The checkpoint that ``mark_best`` named."""
    pointer = run / "checkpoints" / "best.json"
    try:
        folder = pointer.with_name(json.loads(pointer.read_text())["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return _open(folder) if (folder / "card.json").is_file() else None


def mark_best(run: Path, checkpoint: Checkpoint, score: float) -> None:
    """Names the best checkpoint, in one piece."""
    write_text(run / "checkpoints" / "best.json", json.dumps({"name": checkpoint.path.name, "score": score}))


def prune(run: Path, keep: int) -> None:
    """Drops all but the ``keep`` newest and the best."""
    spared = best(run)
    for folder in sorted((run / "checkpoints").glob("iteration_*"))[:-keep]:
        if spared is None or folder != spared.path:
            _drop(folder)


def trusted(checkpoint: Checkpoint, trust: bool) -> None:
    """Refuses to unpickle state that this user does not own or that has changed since the card was written."""
    if trust:
        return
    how = "resume with --trust if you know where it comes from"
    owners = {path.lstat().st_uid for path in (checkpoint.path, *checkpoint.path.rglob("*"))}
    if hasattr(os, "getuid") and owners != {os.getuid()}:
        others = ", ".join(str(owner) for owner in sorted(owners - {os.getuid()}))
        raise ValueError(f"{checkpoint.path} belongs to another user (uid {others}) and resuming unpickles it; {how}")
    if tree_hash(checkpoint.state) != checkpoint.card.get("rllib_sha256"):
        raise ValueError(f"{checkpoint.state} is not what its card.json describes and resuming unpickles it; {how}")


def continues(checkpoint: Checkpoint, told: Mapping[str, Any]) -> None:
    """Refuses to go on with other weights, another chain or another algorithm than the checkpoint was made with."""
    then, now = checkpoint.card, told
    pairs = {key: (then[key], now[key]) for key in ("algorithm", "domain", "chain")}
    trained = then["config"]["training"], now["training"]
    for key in ("lora_rank", "lora_scale", "trainable"):
        pairs[f"training.{key}"] = (trained[0].get(key) or None, trained[1].get(key) or None)
    for key, (one, other) in pairs.items():
        if one != other:
            raise ValueError(
                f"{checkpoint.path} was made with {key} {one} and cannot go on with {other}; "
                f"resume with the same {key}, or start another run"
            )


def tree_hash(folder: Path) -> str:
    """One digest of every file's name and bytes."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """What a number may depend on."""
    found = {"python": platform.python_version()}
    for package in ("rayft", "ray", "torch", "numpy", "gymnasium"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def write_text(path: Path, text: str) -> None:
    """In one piece: a reader sees the old text or the new."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def _open(path: Path) -> Checkpoint:
    try:
        card = json.loads((path / "card.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path} is neither a run nor a checkpoint: it has no card.json") from None
    except ValueError:
        raise ValueError(f"{path / 'card.json'} is truncated; use an earlier checkpoint") from None
    if not isinstance(card, dict) or not isinstance(card.get("format"), int):
        raise ValueError(f"{path / 'card.json'} is not the card of a run's checkpoint; give the folder of a run")
    if card["format"] > FORMAT:
        needs = card.get("versions", {}).get("rayft", "a newer one")
        raise ValueError(
            f"{path} was written by a newer rayft ({needs}, format {card['format']}); upgrade rayft to read it"
        )
    missing = [key for key in ("iteration", "domain", "chain", "alpha_bar", "config") if key not in card]
    if missing:
        raise ValueError(f"{path / 'card.json'} lacks {', '.join(missing)}; use an earlier checkpoint")
    return Checkpoint(path, card)


def _drop(folder: Path) -> None:
    """Out of sight in one step, then gone: a deletion that is cut short leaves no half checkpoint behind."""
    for left in folder.parent.glob(".iteration_*.old"):
        shutil.rmtree(left, ignore_errors=True)
    if folder.is_dir():
        shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}.old")), ignore_errors=True)


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
