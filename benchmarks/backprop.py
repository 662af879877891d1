"""What reward backpropagation holds in memory, by the length of the chain: whole, computed again, and truncated.

One update of the toy's network, 1,024 chains, each way and length in a process of its own; MB are the peak over what
the process had before. Truncated with checkpoints it should not grow with T.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time

import torch

from benchmarks import _ceiling, _result
from envs.toy.domain import Toy
from rayft import domain as domains
from rayft.chain import Policy, reverse_process
from rayft.pathwise import Cut, climb
from rayft.seeds import torch_generator

CHAINS, K, ALPHA = 1024, 10, 0.5
LENGTHS = (50, 200, 1000)
WAYS = {"whole": (None, False), "again": (None, True), "truncated": (K, False), "truncated_again": (K, True)}


def main() -> None:
    parser = _result.arguments(__doc__)
    parser.add_argument("--one", nargs=2, metavar=("WAY", "T"), help="this way and length, in this process")
    told = parser.parse_args()
    if told.one:
        print(json.dumps(update(told.one[0], int(told.one[1]))))
        return
    result, lines = _result.Result("backprop"), []
    lengths = LENGTHS[:2] if told.quick else LENGTHS
    for way in WAYS:
        found = [measured(way, length) for length in lengths]
        for length, (megabytes, seconds) in zip(lengths, found, strict=True):
            result.figures[f"memory_mb/{way}/{length}"] = _result.Figure(megabytes)
            result.figures[f"seconds/{way}/{length}"] = _result.Figure(seconds)
        lines.append([way, *(f"{megabytes:.0f} MB, {seconds:.2f} s" for megabytes, seconds in found)])
    said = f"{CHAINS:,} chains; truncated to the last {K} transitions; again: each computed again for its gradient."
    _result.show("one update by reward backpropagation", ("", *(f"T = {n}" for n in lengths)), lines, said)
    result.write(_result.folder(told))


def measured(way: str, length: int) -> tuple[float, float]:
    """(MB, seconds) in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.backprop", "--one", way, str(length)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def update(way: str, length: int) -> tuple[float, float]:
    """(MB over what was there, seconds) of one gradient of J."""
    torch.set_num_threads(1)
    domain = Toy(num_steps=length, weights=None)
    process = reverse_process(domain.schedule())
    policy = Policy(domains.pretrained(domain), process, domain.space)
    reference = Policy(domains.pretrained(domain).requires_grad_(False), process, domain.space)
    steps, again = WAYS[way]
    cut = Cut(steps or length, again)
    gradient(policy, reference, Cut(1, again), 8)  # what torch needs once
    before, start = _peak(), time.perf_counter()
    gradient(policy, reference, cut, CHAINS)
    return _peak() - before, time.perf_counter() - start


def gradient(policy: Policy, reference: Policy, cut: Cut, num: int) -> None:
    """dJ/dtheta, left in the network."""
    length = policy.process.num_steps

    def noise(step: int) -> torch.Tensor:
        return torch.randn(num, 2, generator=torch_generator(0, 0, "path", step))

    early = torch.randint(min(cut.steps + 1, length), length + 1, (num,), generator=torch_generator(0, 0, "early"))
    x_0, kl = climb(policy, reference, noise(0), {}, noise, cut, early)
    (ALPHA * kl - _ceiling.quadratic(x_0)).mean().backward()


def _peak() -> float:
    """Most memory that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
