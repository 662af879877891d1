"""``rayft run --dry-run``: the checked config, what it will hold in memory, and who will run where. Starts nothing."""

from __future__ import annotations

import math

import yaml

from rayft import adapt
from rayft.chain import reverse_process
from rayft.domain import pretrained
from rayft.spec import RunSpec


def plan(spec: RunSpec) -> str:
    """Text for a terminal."""
    config = spec.tried()
    chain, settings = config.section("chain"), config.settings()
    domain = config.build_domain()
    steps = reverse_process(domain.schedule(), chain.sigma, chain.eta, chain.num_steps).num_steps
    net = pretrained(domain)
    weights = sum(p.numel() for p in net.parameters())
    net = adapt.adapted(net, settings.lora_rank, settings.lora_scale, settings.trainable)
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    where = "in adapters " if settings.lora_rank else ""
    width = 8 if settings.precision == "float64" else 4
    event = math.prod(domain.event_shape) * width
    rows = config.num_rows(steps)
    networks = 2 + (settings.ema > 0)
    learner = width * (weights * networks + trained * 4)
    batch = rows * event * 2 + (settings.chains * event)
    lines = [
        yaml.safe_dump(spec.full(), sort_keys=False),
        f"chain: {steps} transitions; {settings.chains} chains a iteration; {rows} transitions to learn from",
        f"network: {weights:,} weights, {trained:,} {where}trained; {networks} copies in every runner and learner",
        f"memory: about {size_of(learner)} per learner (weights, gradient, Adam, trust region) without activations; "
        f"about {size_of(batch)} for one iteration's chains and anchors",
        "placement:",
        *(f"  {line}" for line in placement(spec)),
    ]
    return "\n".join(lines)


def placement(spec: RunSpec) -> list[str]:
    """One line per kind of process with what each reserves."""
    return [
        f"{number} x {name}: {', '.join(f'{amount:g} {kind}' for kind, amount in each.items())} each"
        if number
        else f"{name}: in the driver"
        for name, number, each in [("driver", 1, {"CPU": 1.0, "GPU": 0.0}), *actors(spec)]
    ]


def actors(spec: RunSpec) -> list[tuple[str, int, dict[str, float]]]:
    """(what they are, how many, what each reserves) of all but the driver."""
    told = spec.resources
    runner = {"CPU": told.num_cpus_per_env_runner, "GPU": told.num_gpus_per_env_runner}
    learner = {"CPU": told.num_cpus_per_learner, "GPU": told.num_gpus_per_learner}
    return [
        ("runners", told.num_env_runners, runner),
        ("learners", told.num_learners, learner),
        *spec.checked().own_actors(),
    ]


def size_of(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"
