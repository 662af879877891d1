"""A folder of things that are wrong, each in its own way: YAML, Python, weights and runs."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import torch
from safetensors.torch import save_file
from test_store import make_run
from torch import nn

CODE = '''
import os
from torch import nn
from rayft.domain import Domain
from rayft.reward import Reward

NUMBER = 3

class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.layer = nn.Linear(2, 2)
    def forward(self, x, t):
        return self.layer(x)

class Picky(nn.Module):
    def forward(self, x):
        return x

class Flat(nn.Module):
    def forward(self, x, t):
        return x.sum(-1)

class Mute:
    """No __call__."""

class Unfinished(Reward):
    """No __call__ of its own."""

class Fragile(Reward):
    def __init__(self, receptor):
        self.file = open(receptor)
    def __call__(self, samples):
        return [0.0 for _ in samples]

class Broken(Domain):
    event_shape = (2,)
    def __init__(self):
        raise KeyError("data")
    def schedule(self): ...
    def denoiser(self): ...

class Timeless(Broken):
    def __init__(self):
        pass
    def schedule(self):
        return 1 / 0

def loss(samples):
    return [0.0 for _ in samples]
'''

PLAIN = """
algorithm: ppo
domain: {name: plain, network: ./mine.py:Net, event_shape: [2], betas: [0.1, 0.2, 0.3]}
reward: ./mine.py:loss
training: {chains: 8, minibatch_size: 8}
"""


class Evil:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def fill(shelf):
    """Makes them."""
    texts = {
        "empty.yaml": "",
        "list.yaml": "- algorithm\n- ppo\n",
        "word.yaml": "ppo",
        "broken.yaml": "algorithm: ppo\ndomain: toy\nreward: [quadratic\nseed: 3\n",
        "tab.yaml": "algorithm: ppo\ntraining:\n\tlr: 1\n",
        "deep.yaml": "algorithm: " + "[" * 3000 + "]" * 3000,
        "twice.yaml": "algorithm: ppo\ndomain: toy\nreward: quadratic\ntraining: {lr: 1}\ntraining: {alpha: 1}\n",
        "misspelt.yaml": "algorithm: ppo\ndomain: toy\nrewrad: quadratic\n",
        "bare.yaml": "seed: 1\n",
        "no_domain.yaml": "algorithm: ppo\nreward: quadratic\n",
        "no_reward.yaml": "algorithm: ppo\ndomain: toy\n",
        "nameless.yaml": "algorithm: ppo\ndomain: {num_steps: 50}\nreward: quadratic\n",
        "plain.yaml": PLAIN,
        "pretrain.yaml": "domain: {name: toy, weights: null}\npretrain: {steps: 1}\n",
        "no_data.yaml": "domain: {name: plain, network: ./mine.py:Net, event_shape: [2], betas: [0.1, 0.2]}\n",
        "mine.py": CODE,
        "raising.py": "raise RuntimeError('no licence\\nfor this')\n",
        "typo.py": "def f(:\n",
        "number.py": "spec = 3\n",
        "unpicklable.pt": "not a zip, not a pickle",
    }
    for name, text in texts.items():
        (shelf / name).write_text(text)
    (shelf / "binary.yaml").write_bytes(bytes(range(256)))
    (shelf / "folder").mkdir()
    save_file(nn.Linear(3, 3).state_dict(), shelf / "other.safetensors")
    (shelf / "cut.safetensors").write_bytes((shelf / "other.safetensors").read_bytes()[:-20])
    torch.save(nn.Linear(2, 2).state_dict(), shelf / "other.pt")
    (shelf / "cut.pt").write_bytes((shelf / "other.pt").read_bytes()[:-200])
    torch.save({"model": nn.Linear(2, 2).state_dict()}, shelf / "nested.pt")
    evil = pickle.dumps(Evil(shelf / "executed"))
    (shelf / "evil.pt").write_bytes(evil)
    torch.save(Evil(shelf / "executed"), shelf / "evil_zip.pt")
    break_runs(shelf / "made")


def break_runs(made):
    """Runs whose checkpoint is damaged or not what it seems; ``good`` is whole."""
    good = make_run(made, "name=good")

    def broken(name, damage):
        run = shutil.copytree(good, made / name)
        damage(run / "checkpoints/iteration_000002")

    def card(**changes):
        def damage(folder):
            told = {**json.loads((folder / "card.json").read_text()), **changes}
            (folder / "card.json").write_text(json.dumps({k: v for k, v in told.items() if v is not None}))

        return damage

    def cut(name):
        return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - 100)

    other = {"num_steps": 50}
    broken("cut_card", cut("card.json"))
    broken("cut_weights", cut("weights.safetensors"))
    broken("no_weights", lambda folder: (folder / "weights.safetensors").unlink())
    broken("other_shape", lambda folder: shutil.copy(made.parent / "other.safetensors", folder / "weights.safetensors"))
    broken("other_domain", card(domain={"name": "toy_masked", **other}))
    broken("other_schedule", card(domain={"name": "toy", "num_steps": 60}))
    broken("gone_domain", card(domain={"name": "proteins"}))
    broken("newer", card(format=99, versions={"rayft": "7.1"}))
    broken("half_card", card(chain=None))
    broken("list_card", lambda folder: (folder / "card.json").write_text("[]"))
    broken(
        "altered", lambda folder: (folder / "rllib/state.pkl").write_bytes(pickle.dumps(Evil(made.parent / "executed")))
    )
    broken("empty", shutil.rmtree)
    broken("bad_config", lambda folder: (folder.parents[1] / "config.yaml").write_text("algorithm: [ppo\n"))
    broken("no_config", lambda folder: (folder.parents[1] / "config.yaml").unlink())
