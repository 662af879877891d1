"""What a person brings along in a file of their own, and what they write to have a run that is soon over."""

SMALL = [
    "training.chains=16",
    "training.minibatch_size=32",
    "chain.num_steps=4",
    "evaluate.every=0",
    "evaluate.chains=64",
    "evaluate.pretrained_chains=128",
    "checkpoint.every=1",
]

USER_CODE = '''
import torch
from torch import nn

from rayft.domain import Domain
from rayft.reward import Reward


class Net(nn.Module):
    """A user's own network; it knows nothing of rayft."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, width), nn.SiLU(), nn.Linear(width, 3))

    def forward(self, x, t):
        return self.layers(torch.cat([x, t.unsqueeze(1) / 100], 1))


class Bright(Reward):
    undecodable = -1.0

    def __init__(self, gain: float = 1.0):
        self.gain = gain

    def __call__(self, samples):
        return [self.gain * float(s.sum()) for s in samples]


class Mute(Reward):
    pass


class NotCallable:
    pass


def brightness(samples):
    return [float(s.sum()) for s in samples]


def not_a_network(width=3):
    return width


NUMBER = 3
'''
