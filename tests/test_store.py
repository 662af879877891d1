"""Checkpoints: whole or absent, read by anyone without opening a pickle, resumed by their owner alone."""

from __future__ import annotations

import numpy as np

from rayft import domain, loop, spec, store


def make_run(folder, *overrides, iterations=(2,)):
    """A run folder as `rayft run toy_ppo` leaves it, without the running."""
    told = spec.read("toy_ppo", [f"output={folder}", *overrides])
    run = loop.create_folder(told)
    for iteration in iterations:
        add_checkpoint(run, told.full(), iteration)
    return run


def add_checkpoint(run, told, iteration, shift=0.0, state=lambda path: (path / "state.pkl").write_bytes(b"state")):
    """One checkpoint of it: the domain's own weights, moved by ``shift``."""
    world = domain.build(told["domain"]["name"], {k: v for k, v in told["domain"].items() if k != "name"})
    schedule, num_steps = world.schedule(), told["chain"]["num_steps"]
    schedule = schedule if num_steps is None else schedule.respace(num_steps)
    weights = {k: v.numpy() + np.float32(shift) for k, v in world.denoiser().state_dict().items()}
    named = {k: told[k] for k in ("algorithm", "domain", "reward", "chain")}
    card = {"iteration": iteration, **named, "alpha_bar": schedule.alpha_bar.tolist(), "config": told}
    return store.save(run / "checkpoints" / f"iteration_{iteration:06d}", {"weights": weights}, card, state)
