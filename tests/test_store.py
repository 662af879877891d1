"""Checkpoints: whole or absent, read by anyone without opening a pickle, resumed by their owner alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from rayft import domain, loop, spec, store
from rayft.cli import main


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


def weights_of(checkpoint):
    return {name: value.copy() for name, value in checkpoint.weights().items()}


@pytest.fixture
def run(tmp_path):
    """A run with one checkpoint, of iteration 2."""
    return make_run(tmp_path)


@pytest.fixture
def told(run):
    return spec.open_folder(run).full()


# -- round trip


def test_a_checkpoint_comes_back_bit_for_bit(run, told):
    saved = add_checkpoint(run, told, 4, shift=0.25)
    found = store.load(run)
    assert found.path == saved.path and found.iteration == 4
    expected = {k: v + 0.25 for k, v in domain.build("toy", {}).denoiser().state_dict().items()}
    assert {k: v.dtype for k, v in found.weights().items()} == {k: np.dtype("float32") for k in expected}
    for name, value in found.weights().items():
        np.testing.assert_array_equal(value, expected[name].numpy())
    assert found.card == json.loads(json.dumps(saved.card))
    assert found.card["config"] == told


def test_the_network_of_a_checkpoint_is_the_one_that_was_saved(run, told):
    add_checkpoint(run, told, 4, shift=0.01)
    world = domain.build("toy", {})
    net, pretrained = store.load(run).network(world), world.denoiser()
    x, t = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)), torch.arange(1, 6)
    with torch.no_grad():
        for value in pretrained.state_dict().values():
            value += 0.01
        torch.testing.assert_close(net(x, t, {}), pretrained(x, t, {}), rtol=0, atol=0)
    assert not net.training


def test_the_moving_average_is_what_is_read_where_there_is_one(run, told):
    checkpoint = store.load(run)
    average = {k: v + 1 for k, v in checkpoint.weights().items()}
    named = {k: checkpoint.card[k] for k in ("iteration", "domain", "chain", "alpha_bar", "config")}
    both = {"weights": checkpoint.weights(), "ema": average}
    saved = store.save(run / "checkpoints/iteration_000004", both, named, lambda path: None)
    for name, value in store.load(saved.path).weights().items():
        np.testing.assert_array_equal(value, average[name])


def test_a_card_says_what_a_number_may_depend_on(run):
    card = store.load(run).card
    assert card["format"] == store.FORMAT
    assert {"python", "rayft", "ray", "torch", "numpy", "gymnasium"} <= set(card["versions"])
    assert card["torch_threads"] == torch.get_num_threads()
    assert len(card["alpha_bar"]) == 51


# -- which one is meant


def test_a_run_stands_for_its_best_checkpoint_else_its_newest(run, told):
    saved = [add_checkpoint(run, told, iteration) for iteration in (4, 6)]
    assert store.load(run).iteration == 6
    store.mark_best(run, saved[0], 0.5)
    assert store.load(run).iteration == 4
    assert store.newest(run).iteration == 6


@pytest.mark.parametrize("pointer", ["", "{", "[]", "{}", '{"name": 3}', '{"name": "iteration_000099"}'])
def test_a_damaged_pointer_to_the_best_falls_back_on_the_newest(run, pointer):
    (run / "checkpoints/best.json").write_text(pointer)
    assert store.best(run) is None
    assert store.load(run).iteration == 2


def test_pruning_keeps_the_newest_and_the_best(run, told):
    saved = {iteration: add_checkpoint(run, told, iteration) for iteration in (4, 6, 8, 10)}
    store.mark_best(run, saved[4], 0.9)
    store.prune(run, 2)
    assert names(run) == ["iteration_000004", "iteration_000008", "iteration_000010"]


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir() if path.is_dir())


# -- whole or absent


@pytest.mark.parametrize("error", [RuntimeError("cannot pickle"), KeyboardInterrupt()])
def test_a_state_that_fails_leaves_no_half_checkpoint(run, told, error):
    def fail(path):
        (path / "half.pkl").write_bytes(b"half")
        raise error

    with pytest.raises(type(error)):
        add_checkpoint(run, told, 4, state=fail)
    assert store.newest(run).iteration == 2
    add_checkpoint(run, told, 4)
    assert names(run) == ["iteration_000002", "iteration_000004"]
    assert [path.name for path in store.newest(run).state.iterdir()] == ["state.pkl"]


KILLED = """
import os, signal, sys
from pathlib import Path
from test_store import add_checkpoint
from rayft import spec, store

run = Path(sys.argv[1])
told = spec.open_folder(run).full()
add_checkpoint(run, told, 90)  # imports and reads what it will, once
WATCHED = ("open", "os.mkdir", "os.rename", "shutil.rmtree")  # a deletion names its file without the folder


def save_until(last, iteration):
    seen = 0

    def watch(event, arguments):
        nonlocal seen
        if event in ("os.remove", "os.rmdir") or (event in WATCHED and "checkpoints" in str(arguments[0])):
            seen += 1
            if seen == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    add_checkpoint(run, told, iteration, shift=0.5)
    store.prune(run, 1)


for iteration in (90, 92):  # one that is there already, and a new one
    for moment in range(1, 1000):
        for before in (2, 90):
            add_checkpoint(run, told, before)
        child = os.fork()
        if child == 0:
            save_until(moment, iteration)
            os._exit(0)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        folders = list((run / "checkpoints").glob("iteration_*"))
        assert folders, "the one before is gone"
        for folder in folders:
            whole = store.load(folder)
            store.trusted(whole, False)
            whole.network(whole.domain())
        if not killed:
            break
    print(moment > 10, [path.name for path in (run / "checkpoints").iterdir()])
"""


def test_killed_at_any_file_operation_every_checkpoint_is_whole_or_absent(run):
    """SIGKILL at the first, second, ... file operation of saving and pruning, until one attempt gets through."""
    command = [sys.executable, "-c", KILLED, str(run)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=os.path.dirname(__file__), check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["True ['iteration_000090']", "True ['iteration_000092']"], "and no litter"


# -- a full disk


TIGHT = '''
import os, resource
scored = 0

def tight(samples):
    """The reward; from the second iteration on (8 samples were the pretrained model's) no file may pass LIMIT bytes."""
    global scored
    scored += len(samples)
    if scored > 8 + 16 and "LIMIT" in os.environ:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["LIMIT"]), resource.RLIM_INFINITY))
    return [float(-(s**2).sum()) for s in samples]
'''
SMALL = "training.chains=16 training.minibatch_size=16 chain.num_steps=4 evaluate.chains=8 evaluate.pretrained_chains=8"


@pytest.mark.parametrize(
    ("limit", "full"), [pytest.param(20_000, "the weights", marks=pytest.mark.slow), (60_000, "RLlib's state")]
)
def test_a_full_disk_costs_one_checkpoint_and_the_run_goes_on_from_the_one_before(ray_session, tmp_path, limit, full):
    (tmp_path / "tight.py").write_text(TIGHT)
    resume = "rayft run --resume runs/toy_ppo"
    told = ["iterations=3", "checkpoint.every=1", "evaluate.every=0", "track.tensorboard=false"]
    told += ["scoring.isolate=false", *SMALL.split()]
    command = ["run", "toy_ppo", "reward=./tight.py:tight", *told]
    done = subprocess.run(
        [sys.executable, "-m", "rayft.cli", *command],
        cwd=tmp_path,
        env={**os.environ, "LIMIT": str(limit)},
        capture_output=True,
        text=True,
        check=False,
    )
    run = tmp_path / "runs/toy_ppo"
    assert done.returncode == 2 and done.stderr.count("\n") == 1, f"{full}: {done.stderr}"
    assert done.stderr.startswith("rayft: checkpoint iteration_000002 could not be written"), done.stderr
    assert "File too large" in done.stderr
    assert done.stderr.endswith(f"the one before it is whole: free some space, then continue with: {resume}\n")
    assert names(run) == ["iteration_000001"]
    store.trusted(store.load(run), False)
    assert main(["run", "--resume", str(run)]) == 0
    assert store.newest(run).iteration == 3


# -- whose state is opened


def test_the_hash_notices_any_change_of_the_state(tmp_path):
    folder = tmp_path / "state"
    (folder / "learner").mkdir(parents=True)
    (folder / "a.pkl").write_bytes(b"one")
    (folder / "learner/b.pkl").write_bytes(b"two")
    whole = store.tree_hash(folder)
    changes = {
        "a byte": lambda f: (f / "a.pkl").write_bytes(b"onE"),
        "a byte more": lambda f: (f / "a.pkl").write_bytes(b"one "),
        "a new file": lambda f: (f / "c.pkl").write_bytes(b""),
        "a file less": lambda f: (f / "learner/b.pkl").unlink(),
        "another name": lambda f: (f / "a.pkl").rename(f / "z.pkl"),
        "another folder": lambda f: (f / "learner/b.pkl").rename(f / "b.pkl"),
        "contents that moved": lambda f: [(f / "a.pkl").write_bytes(b"onet"), (f / "learner/b.pkl").write_bytes(b"wo")],
        "contents that changed places": lambda f: [
            (f / "a.pkl").write_bytes(b"two"),
            (f / "learner/b.pkl").write_bytes(b"one"),
        ],
    }
    digests = [whole]
    for what, change in changes.items():
        changed = shutil.copytree(folder, tmp_path / what)
        assert store.tree_hash(changed) == whole
        change(changed)
        digests.append(store.tree_hash(changed))
    assert len(set(digests)) == len(changes) + 1


def test_state_that_changed_since_its_card_is_opened_with_trust_only(run):
    checkpoint = store.load(run)
    store.trusted(checkpoint, trust=False)
    (checkpoint.state / "state.pkl").write_bytes(b"other")
    with pytest.raises(ValueError, match=r"not what its card.json describes.*--trust"):
        store.trusted(checkpoint, trust=False)
    store.trusted(checkpoint, trust=True)


@pytest.mark.skipif(os.getuid() != 0, reason="only root may give a file to another user")
@pytest.mark.parametrize("what", [".", "card.json", "rllib/state.pkl"])
def test_state_of_another_user_is_opened_with_trust_only(run, what):
    checkpoint = store.load(run)
    os.chown(checkpoint.path / what, 4242, -1)
    with pytest.raises(ValueError, match=r"another user \(uid 4242\).*--trust"):
        store.trusted(checkpoint, trust=False)
    store.trusted(checkpoint, trust=True)


def test_a_checkpoint_goes_on_only_with_what_it_was_made_with(run, told):
    checkpoint = store.load(run)
    store.continues(checkpoint, told)
    store.continues(checkpoint, {**told, "iterations": 7, "evaluate": {}})
    for key, other in {"algorithm": "rwmle", "domain": {"name": "toy_masked"}, "chain": {"num_steps": 3}}.items():
        with pytest.raises(ValueError, match=f"was made with {key} .* cannot go on with"):
            store.continues(checkpoint, {**told, key: other})
