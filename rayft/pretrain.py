"""``rayft pretrain``: plain denoising on a domain's data, the first line of R's Algorithm 1, from YAML to a card.

    runs/NAME/  weights.safetensors  card.json  metrics.csv  state.pt

The weights are the moving average; the card says all that made them, and what they are worth.
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import save

from rayft import domain as domains
from rayft import imports, store
from rayft.bench import Bench
from rayft.chain import Policy, reverse_process, sample
from rayft.denoise import PretrainSettings, Sampled, denoising_loss
from rayft.seeds import torch_generator
from rayft.settings import CountOrZero, check, sentence
from rayft.spec import FolderName, Named, load_tree, override, split
from rayft.ticker import Ticker
from rayft.training import Training

MEASURED = 4096  # events of the stored weights' own loss
CHAINS = 256  # sampled at a time: every x_t of a chain is held meanwhile


class PretrainSpec(BaseModel):
    """A pretraining as YAML."""

    model_config = ConfigDict(extra="forbid")

    domain: Named
    pretrain: dict[str, Any] = Field(default_factory=dict)
    name: FolderName = "pretrain"
    seed: CountOrZero = 0
    output: str = "runs"

    def settings(self) -> PretrainSettings:
        """The checked numbers."""
        told = dict(self.pretrain)
        if isinstance(told.get("evaluate"), Mapping):
            told["evaluate"] = check("pretrain.evaluate", Sampled, told["evaluate"])
        return check("pretrain", PretrainSettings, told)


def read(file: str, overrides: Sequence[str]) -> PretrainSpec:
    """The spec in a file or a shipped config, with overrides on top."""
    tree, name = load_tree(file)
    tree = override({"name": name, **tree}, overrides)
    for key in tree:
        if key not in PretrainSpec.model_fields:
            hint = imports.nearest(key, PretrainSpec.model_fields)
            raise ValueError(f"no key {key!r}{hint}; a pretraining has {', '.join(PretrainSpec.model_fields)}")
    try:
        return PretrainSpec.model_validate({k: v for k, v in tree.items() if v is not None})
    except ValidationError as error:
        raise ValueError(sentence("", error)) from None


def main(file: str, overrides: Sequence[str], resume: bool, quiet: bool) -> str | None:
    """Reads the YAML, trains, and says where the weights are; nothing after Ctrl-C."""
    spec = read(file, overrides)
    settings = spec.settings()
    domain = domains.build(*split(spec.domain, "domain"))
    if settings.evaluate is not None:
        check_metrics(domain)
    domains.try_out(domain)
    training = Training(domain, settings, spec.seed, Path(spec.output) / spec.name, spec.domain)
    if not training.run(resume, quiet):
        command = shlex.join(["rayft", "pretrain", file, *overrides, "--resume"])
        print(f"saved at step {training.step} of {settings.steps}; continue with: {command}", file=sys.stderr)
        return None
    out, card = finish(training, spec)
    if settings.evaluate is not None:
        card["metrics"] = evaluated(training, settings.evaluate.num, quiet)
        write_card(training.folder, card)
    return f"weights in {out}, last mean loss {training.loss:.4f}"


def finish(training: Training, spec: PretrainSpec) -> tuple[Path, dict[str, Any]]:
    """Writes the averaged weights and their card, and puts them, as stored, into the averaged network."""
    settings, net = training.settings, training.learner.average
    assert net is not None
    out = training.folder / "weights.safetensors"
    dtype = getattr(torch, settings.weights_dtype)
    kept = {k: v.to("cpu", dtype if v.is_floating_point() else v.dtype) for k, v in net.state_dict().items()}
    large = [k for k, v in kept.items() if not bool(v.isfinite().all())]
    if large:
        what = f"{large[0]} does not fit pretrain.weights_dtype {settings.weights_dtype}"
        raise ValueError(f"{what}: resume with another; the state is kept")
    out.with_suffix(".tmp").write_bytes(save({k: v.contiguous().clone() for k, v in kept.items()}))
    out.with_suffix(".tmp").replace(out)
    domains.load_weights(net, out)
    card = {
        "domain": spec.domain,
        "pretrain": asdict(settings),
        "seed": spec.seed,
        "steps": training.step,
        "loss": training.loss,
        "weights_loss": own_loss(training),
        "valid_loss": training.table.last("valid_loss", math.nan),
        "seconds": training.seconds,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(training.learner.device),
        "parameters": sum(p.numel() for p in net.parameters()),
        "sha256": hashlib.sha256(out.read_bytes()).hexdigest(),
        "versions": store.versions(),
    }
    card = {k: v for k, v in card.items() if v == v}  # without a held-out loss that there is not
    write_card(training.folder, card)
    return out, card


def own_loss(training: Training) -> float:
    """The averaged weights' loss on fresh events of the data."""
    domain, size, net = training.domain, training.settings.batch_size, training.learner.average
    assert net is not None
    pieces = range(math.ceil(MEASURED / size))
    told = domain, domain.schedule(), net, size
    with torch.no_grad():
        losses = [float(denoising_loss(*told, torch_generator(training.seed, n, "card"))) for n in pieces]
    return sum(losses) / len(losses)


def check_metrics(domain: domains.Domain) -> None:
    """Whether there is a measure of the domain's samples, before hours of training."""
    if domain.metrics is None:
        what = f"pretrain.evaluate needs metrics and {type(domain).__name__} has none"
        raise ValueError(f"{what}: set Domain.metrics, or leave pretrain.evaluate out")
    imports.load(domain.metrics)


def evaluated(training: Training, num: int, quiet: bool) -> dict[str, float]:
    """The domain's metrics of ``num`` samples of the averaged weights' reverse chain."""
    domain, net, device = training.domain, training.learner.average, training.learner.device
    assert net is not None
    policy = Policy(net, reverse_process(domain.schedule()), domain.space, net.prediction)
    bench, samples, events, contexts = Bench(domain, policy, policy, device, torch.float32), [], [], []
    with Ticker("sample", num, 0, quiet) as ticker:
        for start in range(0, num, CHAINS):
            generator = torch_generator(training.seed, start, "evaluate")
            x_T, context = bench.start(min(CHAINS, num - start), generator)  # noqa: N806
            events.append(sample(policy, x_T, context, generator).x_0.cpu().numpy())
            contexts.append({k: v.cpu().numpy() for k, v in context.items()})
            samples += domains.decoded(domain, events[-1], contexts[-1])
            ticker.tick(len(samples), {})
    try:
        whole = {k: np.concatenate([one[k] for one in contexts]) for k in contexts[0]}
        return {k: float(v) for k, v in domain.measure(samples, np.concatenate(events), whole).items()}
    except Exception as error:
        what = f"{domain.metrics} failed on {num} samples: {imports.reason(error)}"
        raise ValueError(f"{what}; the weights are in {training.folder}") from error


def write_card(folder: Path, card: Mapping[str, Any]) -> None:
    store.write_text(folder / "card.json", json.dumps(card, indent=1))


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
