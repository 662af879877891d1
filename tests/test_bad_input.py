"""What a user can get wrong: one sentence that names it and says what to do, exit code 2, and nothing is started."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys

import pytest
import ray
import wrong_files
import yaml

from rayft.algorithms.ppo import PPOConfig
from rayft.cli import main


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    shelf = tmp_path_factory.mktemp("shelf")
    wrong_files.fill(shelf)
    return shelf


RUN, PLAIN_RUN, PRETRAIN = "run toy_ppo", "run plain.yaml", "pretrain pretrain.yaml"

# what was done: (command line, words that the sentence holds)
CASES = {
    # the command line itself
    "an unknown command": ("trian toy_ppo", "'trian'", "'run'"),
    "no command": ("", "COMMAND", "--help"),
    "an unknown option": ("run toy_ppo --verbose", "--verbose", "--help"),
    "nothing to run": ("run", "nothing to run", "YAML"),
    # unknown keys
    "a misspelt section": (f"{RUN} trainig.lr=1", "no key 'trainig'", "did you mean 'training'"),
    "a misspelt key in the file": ("run misspelt.yaml", "no key 'rewrad'", "did you mean 'reward'"),
    "a misspelt training key": (f"{RUN} training.minibatchsize=8", "training", "did you mean 'minibatch_size'"),
    "a key of RLlib that would be ignored": (f"{RUN} training.train_batch_size=8", "training", "'train_batch_size'"),
    "a training key that is no setting": (f"{RUN} training.env=x", "training has no key 'env'"),
    "a key of another algorithm": ("run toy_rwmle training.clip=0.1", "training has no key 'clip'"),
    "a misspelt chain key": (f"{RUN} chain.num_step=3", "chain has no key", "did you mean 'num_steps'"),
    "a misspelt evaluate key": (f"{RUN} evaluate.evry=3", "evaluate has no key", "did you mean 'every'"),
    "a misspelt scoring key": (f"{RUN} scoring.actor=3", "scoring has no key", "did you mean 'actors'"),
    "a misspelt resource": (f"{RUN} resources.num_learner=1", "resources has no key", "did you mean 'num_learners'"),
    "a misspelt checkpoint key": (f"{RUN} checkpoint.keeep=1", "checkpoint has no key", "did you mean 'keep'"),
    "a misspelt tracker": (f"{RUN} track.tensorbord=false", "track has no key", "did you mean 'tensorboard'"),
    "a misspelt reward argument": (f"{RUN} reward.center=[0,0]", "takes no 'center'", "did you mean 'centre'"),
    "a misspelt domain argument": (f"{RUN} domain.numsteps=9", "takes no 'numsteps'", "did you mean 'num_steps'"),
    "a domain argument named as one of ours": (f"{RUN} domain.path=x", "takes no 'path'"),
    # wrong types
    "a word for a number": (f"{RUN} training.lr=abc", "training.lr is 'abc'", "number"),
    "a switch for a number": (f"{RUN} training.lr=yes", "training.lr is True", "a number"),
    "a switch for a seed": (f"{RUN} seed=on", "seed is True", "a number"),
    "half an iteration": (f"{RUN} iterations=1.5", "iterations is 1.5", "integer"),
    "a list for a number": (f"{RUN} training.chains=[1,2]", "training.chains is [1, 2]", "integer"),
    "a number for a section": (f"{RUN} training=3", "training is 3", "dictionary"),
    "a number for resources": (f"{RUN} resources=3", "resources is 3", "mapping"),
    "an unknown precision": (f"{RUN} training.precision=float16", "training.precision is 'float16'", "'float64'"),
    "an unknown sigma": (f"{RUN} chain.sigma=delta", "chain.sigma is 'delta'", "'gamma'"),
    "a number for the algorithm": (f"{RUN} algorithm=3", "algorithm is 3", "string"),
    "a list for the domain": (f"{RUN} domain=[1,2]", "domain.name is [1, 2]", "import path"),
    "a number for the reward": (f"{RUN} reward.name=3", "reward.name is 3", "import path"),
    # impossible numbers
    "no steps": (f"{RUN} chain.num_steps=0", "chain.num_steps is 0", "greater than or equal to 1"),
    "more steps than the model has": (f"{RUN} chain.num_steps=51", "51", "1 to 50"),
    "a step size of zero": (f"{RUN} training.lr=0", "training.lr is 0", "greater than 0"),
    "a negative step size": (f"{RUN} training.lr=-1", "training.lr is -1", "greater than 0"),
    "a step size that is no number": (f"{RUN} training.lr=.nan", "training.lr is nan", "finite"),
    "an endless step size": (f"{RUN} training.lr=.inf", "training.lr is inf", "finite"),
    "alpha 0 where it divides": ("run toy_rwmle training.alpha=0", "training.alpha is 0", "greater than 0"),
    "a negative alpha": (f"{RUN} training.alpha=-0.1", "training.alpha is -0.1", "greater than or equal to 0"),
    "an average that never moves": (f"{RUN} training.ema=1", "training.ema is 1", "less than 1"),
    "no trust region": (f"{RUN} training.target_kl=0", "training.target_kl is 0", "greater than 0"),
    "no chains": (f"{RUN} training.chains=0", "training.chains is 0", "greater than or equal to 1"),
    "a minibatch larger than the batch": (f"{RUN} training.chains=8", "minibatch_size is 4096", "400", "lower it"),
    "a minibatch that two learners cannot share": (
        f"{RUN} training.minibatch_size=63 resources.num_learners=2",
        "minibatch_size is 63",
        "multiple",
        "= 2",
    ),
    "a minibatch that microbatches do not divide": (f"{RUN} training.microbatches=3", "4096", "multiple", "= 3"),
    "more runners than chains": (
        f"{RUN} training.chains=2 training.minibatch_size=10 resources.num_env_runners=3",
        "training.chains is 2",
        "3 runners",
    ),
    "a chain without noise": (f"{RUN} chain.sigma=gamma chain.eta=0", "chain.eta is 0", "greater than 0"),
    "more noise than the chain has": (f"{RUN} chain.sigma=gamma chain.eta=2", "eta is 2", "0 < eta <= 1"),
    "eta where it does nothing": (f"{RUN} chain.eta=0.5", "eta is 0.5", "set sigma to 'gamma'"),
    "a negative seed": (f"{RUN} seed=-1", "seed is -1", "greater than or equal to 0"),
    "a negative resource": (f"{RUN} resources.num_gpus_per_learner=-1", "num_gpus_per_learner is -1", "equal to 0"),
    "no checkpoint to keep": (f"{RUN} checkpoint.keep=0", "checkpoint.keep is 0", "equal to 1"),
    # files
    "a missing file": ("run nowhere.yaml", "no file 'nowhere.yaml'", "rayft configs"),
    "a misspelt shipped config": ("run toy_poo", "toy_poo", "did you mean 'toy_ppo'"),
    "a folder": ("run folder", "folder is a folder", "YAML"),
    "an empty file": ("run empty.yaml", "empty.yaml holds nothing", "mapping"),
    "a list": ("run list.yaml", "list.yaml holds list", "mapping"),
    "a word": ("run word.yaml", "word.yaml holds str", "mapping"),
    "an unclosed bracket": ("run broken.yaml", "broken.yaml, line 4", "not YAML"),
    "a tab": ("run tab.yaml", "tab.yaml, line 3", "not YAML"),
    "a section written twice": ("run twice.yaml", "twice.yaml, line 5", "'training' is there twice"),
    "a binary file": ("run binary.yaml", "binary.yaml", "not YAML"),
    "brackets within brackets": ("run deep.yaml", "deep.yaml", "nests", "too deeply"),
    "a Python file without a spec": ("run mine.py", "mine.py", "no 'spec'"),
    "a Python file whose spec is a number": ("run number.py", "number.py", "spec is int", "dict"),
    "a Python file that raises": ("run raising.py", "raising.py", "RuntimeError: no licence for this"),
    "a Python file that does not parse": ("run typo.py", "typo.py", "SyntaxError"),
    # overrides
    "an override without =": (f"{RUN} seed", "'seed' is not an override", "key=value"),
    "an override without a key": (f"{RUN} =3", "'=3' is not an override", "key=value"),
    "an override of a number as a mapping": (f"{RUN} iterations.x=1", "iterations is 200, not a mapping"),
    "an override that is not YAML": (f"{RUN} training.lr=[1", "training.lr", "'[1'", "quote it"),
    # algorithm
    "no algorithm": ("run bare.yaml", "algorithm is missing", "algorithm, domain and reward"),
    "an unknown algorithm": (f"{RUN} algorithm=ppoo", "no algorithm 'ppoo'", "did you mean 'ppo'", "rwmle"),
    "something that is no algorithm": (f"{RUN} algorithm=./mine.py:Net", "is not an algorithm", "DiffusionConfig"),
    "the base of all algorithms": (
        f"{RUN} algorithm=rayft.algorithms.config:DiffusionConfig",
        "is not an algorithm",
        "subclass",
    ),
    # domain
    "no domain": ("run no_domain.yaml", "domain is missing", "algorithm, domain and reward"),
    "a domain without a name": ("run nameless.yaml", "domain has no name", "domain: NAME"),
    "an unknown domain": (f"{RUN} domain=toi", "no domain 'toi'", "did you mean 'toy'", "import path"),
    "something that is no domain": (f"{RUN} domain=./mine.py:Net", "is not a Domain", "subclass"),
    "a domain that does not build": (f"{RUN} domain=./mine.py:Broken", "Broken", "KeyError: 'data'"),
    "a domain whose schedule fails": (f"{RUN} domain=./mine.py:Timeless", "schedule", "ZeroDivisionError"),
    "a domain that is abstract": (f"{RUN} domain=rayft.domain:Domain", "rayft.domain:Domain", "abstract"),
    "a word for a domain's number": (f"{RUN} domain.num_steps=abc", "domain toy", "num_steps"),
    "a domain's number out of range": (f"{RUN} domain.num_steps=0", "domain toy"),
    # reward
    "no reward": ("run no_reward.yaml", "reward is missing", "algorithm, domain and reward"),
    "an unknown reward": (f"{RUN} reward=quadratik", "no reward 'quadratik'", "did you mean 'quadratic'", "stripes"),
    "a reward of another domain": (f"{RUN} reward=spread", "no reward 'spread'", "this domain has quadratic"),
    "a reward in a missing module": (f"{RUN} reward=nowhere.rewards:R", "no module 'nowhere'", "installed"),
    "a reward in a missing file": (f"{RUN} reward=./nowhere.py:R", "no file", "nowhere.py"),
    "a reward that its file lacks": (f"{RUN} reward=./mine.py:Fragil", "no 'Fragil'", "did you mean 'Fragile'"),
    "a reward in a file that raises": (f"{RUN} reward=./raising.py:R", "raising.py", "no licence for this"),
    "a number for a reward object": (f"{RUN} reward=./mine.py:NUMBER", "is int, not a Reward", "function f(samples)"),
    "a reward class that cannot be called": (f"{RUN} reward=./mine.py:Mute", "without __call__(samples)"),
    "an abstract reward": (f"{RUN} reward=./mine.py:Unfinished", "abstract", "__call__"),
    "a reward without its argument": (f"{RUN} reward=./mine.py:Fragile", "needs receptor", "YAML"),
    "a reward that does not build": (
        f"{RUN} reward=./mine.py:Fragile reward.receptor=nowhere.pdb",
        "Fragile",
        "No such file",
        "nowhere.pdb",
    ),
    "a shipped reward that does not build": (f"{RUN} reward.centre=[1]", "reward quadratic", "give two numbers"),
    "arguments for a function": ("run plain.yaml reward.size=3", "function", "size", "class"),
    # a user's own network
    "a beta of zero": (f"{PLAIN_RUN} domain.betas=[0,0.1]", "betas", "strictly between 0 and 1"),
    "a beta above one": (f"{PLAIN_RUN} domain.betas=[0.1,1.5]", "betas", "strictly between 0 and 1"),
    "no betas": (f"{PLAIN_RUN} domain.betas=[]", "schedule", "T >= 1"),
    "words for betas": (f"{PLAIN_RUN} domain.betas=[a,b]", "betas is ['a', 'b']", "linear"),
    "an unknown schedule": (f"{PLAIN_RUN} domain.betas.name=linaer", "betas is [0.1"),
    "a misspelt schedule": (f"{PLAIN_RUN} 'domain.betas={{name: linaer}}'", "'linaer'", "did you mean 'linear'"),
    "a schedule without its length": (f"{PLAIN_RUN} 'domain.betas={{name: cosine}}'", "'cosine' needs num_steps"),
    "a schedule of no steps": (f"{PLAIN_RUN} 'domain.betas={{name: linear, num_steps: 0}}'", "T >= 1"),
    "no event": (f"{PLAIN_RUN} domain.event_shape=[]", "event_shape is []", "[1, 28, 28]"),
    "a word for an event": (f"{PLAIN_RUN} domain.event_shape=wide", "event_shape is 'wide'", "[1, 28, 28]"),
    "an unknown prediction": (f"{PLAIN_RUN} domain.prediction=noise", "prediction is 'noise'", "eps, x0, v"),
    "a clock that starts at 7": (f"{PLAIN_RUN} domain.first_timestep=7", "first_timestep is 7", "from 0 or from 1"),
    "a network that is a number": (f"{PLAIN_RUN} domain.network=./mine.py:NUMBER", "is int", "torch.nn.Module"),
    "a network that is no module": (f"{PLAIN_RUN} domain.network=./mine.py:Mute", "gives Mute", "torch.nn.Module"),
    "a network's misspelt argument": (
        f"{PLAIN_RUN} domain.network_arguments.widht=3",
        "takes no 'widht'",
        "did you mean 'width'",
    ),
    "a network that takes no t": (f"{PLAIN_RUN} domain.network=./mine.py:Picky", "fails on x_t", "TypeError"),
    "a network that loses the shape": (f"{PLAIN_RUN} domain.network=./mine.py:Flat", "gives (2,)", "keep the shape"),
    "an event the network cannot take": (f"{PLAIN_RUN} domain.event_shape=[3]", "fails on x_t of shape (2, 3)"),
    # weights
    "missing weights": (f"{PLAIN_RUN} domain.weights=nowhere.pt", "no weights at nowhere.pt", "state dict"),
    "weights of another shape": (f"{PLAIN_RUN} domain.weights=other.safetensors", "does not fit Net", "layer.weight"),
    "weights with other names": (f"{PLAIN_RUN} domain.weights=other.pt", "does not fit Net", "missing"),
    "weights within another dict": (f"{PLAIN_RUN} domain.weights=nested.pt", "does not fit Net", "missing"),
    "truncated safetensors": (f"{PLAIN_RUN} domain.weights=cut.safetensors", "cut.safetensors is damaged"),
    "a truncated .pt": (f"{PLAIN_RUN} domain.weights=cut.pt", "cut.pt is damaged", "state_dict()"),
    "a text as .pt": (f"{PLAIN_RUN} domain.weights=unpicklable.pt", "unpicklable.pt is damaged", "state_dict()"),
    "a pickle with code": (f"{PLAIN_RUN} domain.weights=evil.pt", "evil.pt", "more than tensors", "state_dict()"),
    "an archive with code": (f"{PLAIN_RUN} domain.weights=evil_zip.pt", "evil_zip.pt", "more than tensors"),
    "a start from missing weights": (f"{RUN} weights=./nope.safetensors", "no weights at", "nope.safetensors"),
    "a start from other weights": (f"{RUN} weights=other.safetensors", "other.safetensors", "does not fit"),
    "a start from code": (f"{RUN} weights=evil.pt", "evil.pt", "more than tensors"),
    # where things are written
    "a name with a folder in it": (f"{RUN} name=a/b", "'a/b'", "separator"),
    "a name that climbs": (f"{RUN} name=..", "'..'", "dot"),
    "no name": (f"""{RUN} "name=''" """, "''", "folder"),
    "an output below a file": (f"{RUN} output=mine.py/runs", "cannot write to mine.py/runs", "output=FOLDER"),
    "an output where nobody writes": (f"{RUN} output=/proc/rayft", "cannot write to /proc/rayft", "output=FOLDER"),
    "a tracker that is not installed": (f"{RUN} track.mlflow=http://x", "track.mlflow", "pip install rayft[mlflow]"),
    "a cluster that is not there": (f"{RUN} --address 127.0.0.1:1", "no Ray answers at 127.0.0.1:1", "ray start"),
    # resuming
    "resuming nothing": ("run --resume nowhere", "nowhere is not a run", "config.yaml"),
    "resuming a name that never ran": (f"{RUN} --resume", "no run named 'toy_ppo'", "without --resume"),
    "resuming a folder": ("run --resume folder", "folder is not a run", "config.yaml"),
    "resuming a damaged config": ("run --resume made/bad_config", "config.yaml, line", "not YAML"),
    "resuming state that was altered": ("run --resume made/altered", "unpickles", "--trust"),
    "resuming another chain": (f"{RUN} output=made name=good chain.num_steps=10 --resume", "chain", "'num_steps': 10"),
    "resuming another algorithm": (f"{RUN} output=made name=good algorithm=rwmle --resume", "algorithm ppo", "rwmle"),
    "resuming a newer format": ("run --resume made/newer", "newer rayft (7.1", "upgrade"),
    "resuming a damaged card": ("run --resume made/cut_card", "card.json is truncated", "earlier"),
    # checkpoints
    "a missing checkpoint": ("evaluate nowhere", "nowhere is neither a run nor a checkpoint", "card.json"),
    "a file for a checkpoint": ("sample mine.py", "mine.py is neither a run nor a checkpoint"),
    "a run without a checkpoint": ("evaluate made/empty", "no whole checkpoint"),
    "a truncated card": ("evaluate made/cut_card", "card.json is truncated", "earlier"),
    "a card with half its keys": ("sample made/half_card", "lacks chain", "earlier"),
    "a card that is a list": ("sample made/list_card", "card.json is not the card", "run"),
    "truncated weights": ("sample made/cut_weights", "weights.safetensors is missing or truncated", "earlier"),
    "no weights": ("export made/no_weights out.pt", "weights.safetensors is missing or truncated"),
    "a checkpoint of another shape": ("sample made/other_shape", "does not fit ToyDenoiser", "it should be"),
    "a checkpoint of another domain": ("evaluate made/other_domain", "does not fit MaskedToyDenoiser", "missing"),
    "a checkpoint whose domain has another schedule": (
        "evaluate made/other_schedule",
        "another noise schedule",
        "domain",
    ),
    "a checkpoint of a domain that is not installed": ("sample made/gone_domain", "no domain 'proteins'"),
    "a checkpoint of a newer format": ("export made/newer out.pt", "newer rayft (7.1, format 99)", "upgrade"),
    # the other commands
    "no chains to evaluate with": ("evaluate made/good --chains 0", "--chains", "'0'", "at least 1"),
    "a word for chains": ("evaluate made/good --chains many", "--chains", "'many'", "at least 1"),
    "a negative temperature": ("evaluate made/good --alpha -1", "--alpha", "'-1'", "above 0"),
    "a temperature that is no number": ("evaluate made/good --alpha nan", "--alpha", "'nan'", "above 0"),
    "a negative seed to sample with": ("sample made/good --seed=-3", "--seed", "'-3'", "at least 0"),
    "no samples": ("sample made/good --num 0", "--num", "'0'", "at least 1"),
    "samples into a missing folder": ("sample made/good --num 2 --out no/x.npz", "cannot write no/x.npz", "missing"),
    "samples onto a folder": ("sample made/good --num 2 --out folder", "folder", "directory"),
    "an export to an unknown format": ("export made/good net.onnx", "net.onnx ends in .onnx", ".safetensors or .pt"),
    "an export into a missing folder": ("export made/good no/net.pt", "cannot write no/net.pt", "missing"),
    "a report of no run": ("report folder", "folder is not a run", "config.yaml"),
    "a report of a run without its config": ("report made/no_config", "is not a run", "config.yaml"),
    "a copy onto a file": ("configs --copy mine.py", "mine.py", "exists"),
    # pretraining
    "a misspelt pretraining section": (f"{PRETRAIN} pretrian.steps=3", "no key 'pretrian'", "did you mean 'pretrain'"),
    "a misspelt pretraining key": (f"{PRETRAIN} pretrain.step=3", "pretrain has no key", "did you mean 'steps'"),
    "no pretraining steps": (f"{PRETRAIN} pretrain.steps=0", "pretrain.steps is 0", "equal to 1"),
    "a pretraining of an unknown domain": (f"{PRETRAIN} domain=toi", "no domain 'toi'", "did you mean 'toy'"),
    "a pretraining of no domain": (f"{PRETRAIN} domain=", "domain is missing"),
    "a pretraining without data": ("pretrain no_data.yaml", "Plain has no data set", "Domain.data"),
    "a pretraining below a file": (f"{PRETRAIN} output=mine.py/runs", "mine.py", "path"),
    "a pretraining that climbs": (f"{PRETRAIN} name=x/../../y", "'x/../../y'", "separator"),
    "resuming no pretraining": (f"{PRETRAIN} --resume", "nothing to resume", "state.pt"),
}


def contents(folder):
    """Every file and folder below, but Python's own."""
    return {path for path in folder.rglob("*") if "__pycache__" not in path.parts}


if importlib.util.find_spec("mlflow"):
    del CASES["a tracker that is not installed"]


@pytest.mark.parametrize("what", CASES)
def test_a_mistake_ends_in_one_sentence_and_starts_nothing(what, shelf, monkeypatch, capfd):
    command, *words = CASES[what]
    monkeypatch.chdir(shelf)
    before, ray_before = contents(shelf), ray.is_initialized()
    code = main(shlex.split(command))
    out, said = capfd.readouterr()
    assert code == 2, said
    assert said.startswith("rayft: ") and said.count("\n") == 1, said
    assert len(said) < 500, said
    assert [word for word in words if word not in said] == [], said
    assert out == ""
    assert contents(shelf) == before, "something was written"
    assert ray.is_initialized() == ray_before, "Ray was started"


@pytest.mark.parametrize(
    "commands",
    [
        ["run toy_ppo weights=evil.pt"],
        pytest.param(["run toy_ppo training.lr=-1", "sample made/cut_weights"], marks=pytest.mark.slow),
    ],
)
def test_a_mistake_leaves_nothing_else_on_the_screen_of_a_real_process(shelf, commands):
    waiting = [
        subprocess.Popen([sys.executable, "-m", "rayft.cli", *command.split()], cwd=shelf, stderr=subprocess.PIPE)
        for command in commands
    ]
    for command, process in zip(commands, waiting, strict=True):
        said = process.communicate(timeout=120)[1].decode()
        assert (process.returncode, said.count("\n"), said[:7]) == (2, 1, "rayft: "), (command, said)


SMALL = "training.chains=16 training.minibatch_size=16 chain.num_steps=4 evaluate.chains=8 evaluate.pretrained_chains=8"

REWARDS = """
def three(samples):
    return [0.0, 1.0, 2.0]

def mean(samples):
    return 0.5

def words(samples):
    return ["good" for _ in samples]

def raising(samples):
    raise KeyError("affinity")

def silent(samples):
    return [None for _ in samples]
"""

# a reward that is wrong: what the sentence says of it
AT_RUN_TIME = {
    "three": "returned: 3 scores for 1 samples; return one number per sample",
    "mean": "returned: float '0.5'; return one number per sample",
    "words": "returned: str 'good' as a score; return numbers",
    "raising": "raised: KeyError: 'affinity'",
    "silent": "the reward failed on all 8 samples",
}


@pytest.mark.parametrize(
    ("reward", "actors"),
    [
        *((reward, 0) for reward in AT_RUN_TIME),
        ("raising", 1),
        *(pytest.param(reward, 1, marks=pytest.mark.slow) for reward in AT_RUN_TIME if reward != "raising"),
    ],
)
def test_a_reward_that_always_fails_ends_in_one_sentence(ray_session, tmp_path, capfd, reward, actors):
    (tmp_path / "rewards.py").write_text(REWARDS)
    told = [f"reward={tmp_path}/rewards.py:{reward}", f"output={tmp_path / 'runs'}", f"scoring.actors={actors}"]
    code = main(["run", "toy_ppo", *SMALL.split(), *told])
    said = capfd.readouterr().err
    assert code == 2
    assert said.startswith("rayft: the reward failed on all 8 samples") and said.count("\n") == 1, said
    assert AT_RUN_TIME[reward] in said


def test_asking_for_more_than_the_machine_has_does_not_wait_for_ever(ray_session, tmp_path, capfd):
    code = main(["run", "toy_ppo", "resources.num_env_runners=3", "scoring.actors=2", f"output={tmp_path}"])
    said = capfd.readouterr().err
    assert code == 2
    assert "ask for 5 CPU, Ray has 4" in said and "scoring.actors" in said
    assert contents(tmp_path) == set()


# section, key, a value that it cannot have
BAD_VALUES = [
    ("training", "lr", -1),
    ("training", "lr", "abc"),
    ("training", "lr", None),
    ("training", "lr", float("nan")),
    ("training", "lr", True),
    ("training", "alpha", -0.5),
    ("training", "clip", [1]),
    ("training", "chains", 0),
    ("training", "chains", 2.5),
    ("training", "ema", 1),
    ("training", "precision", "half"),
    ("training", "target_kl", float("inf")),
    ("training", "minibatch_size", 10**9),
    ("training", "microbatches", 7),
    ("chain", "num_steps", 0),
    ("chain", "num_steps", 1000),
    ("chain", "eta", 0.5),
    ("evaluate", "chains", -1),
    ("evaluate", "min_diversity", 1),
    ("scoring", "actors", "two"),
]


@pytest.mark.parametrize(("section", "key", "value"), BAD_VALUES)
def test_yaml_python_and_tune_meet_the_same_sentence(tmp_path, capfd, section, key, value):
    told = {"algorithm": "ppo", "domain": "toy", "reward": "quadratic", section: {key: value}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(told))
    assert main(["run", str(tmp_path / "run.yaml"), f"output={tmp_path}"]) == 2
    sentence = capfd.readouterr().err.removeprefix("rayft: ").strip()
    assert section in sentence or key in sentence

    config = PPOConfig().domain("toy").reward("quadratic")
    getattr(config, section)(**{key: value})
    searched = PPOConfig().domain("toy").reward("quadratic")
    searched.update_from_dict({key if section == "training" else f"{section}_{key}": value})
    for one in (config, searched):
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
            one.validate()
