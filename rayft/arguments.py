"""What each command of ``rayft`` takes on the command line. Standard library only: ``rayft --help`` answers at once."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

OVERRIDES: dict[str, Any] = {"nargs": "*", "metavar": "key=value"}
GUIDES = "mc, soft_q, tweedie, classifier, path_integral, smc or best_of_n; guide.KEY=value sets its numbers"


class _Parser(argparse.ArgumentParser):
    """A command line that is amiss is a user's mistake like any other."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")


def parse(
    commands: Sequence[Callable[[argparse.Namespace], int]], argv: Sequence[str] | None = None
) -> argparse.Namespace:
    """What was asked for; its ``command`` is the one of ``commands`` that is meant."""
    parser = _Parser(prog="rayft", description="Fine-tune diffusion models with RL on Ray.")
    found = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in commands:
        name = command.__name__.rstrip("_")  # of one that Python has a word for
        sub = found.add_parser(name, help=command.__doc__, description=command.__doc__)
        sub.set_defaults(command=command)
        OPTIONS[name](sub)
    told, rest = parser.parse_known_args(argv)  # key=value may also follow an option, which argparse forgets
    if rest and (not hasattr(told, "overrides") or any(text.startswith("-") for text in rest)):
        parser.error(f"not understood: {' '.join(rest)}")
    if rest:
        told.overrides += rest
    return told


# -- command by command


def _run(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("file", nargs="?", help="YAML, Python file with a `spec`, or shipped config (`rayft configs`)")
    sub.add_argument("overrides", **OVERRIDES, help="for example training.lr=1e-4 seed=3")
    _trained(sub, "RUN", "continue RUN (folder, name or URI), or the newest", "config, memory and placement")


def _tune(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("file", nargs="?", help="a run's YAML with a `search:` block, or a shipped config")
    sub.add_argument("overrides", **OVERRIDES, help="for example search.trials=8")
    _trained(sub, "SWEEP", "continue SWEEP (folder, name or URI), or the newest", "search and what it needs")


def _trained(sub: argparse.ArgumentParser, what: str, resume: str, plan: str) -> None:
    """What a run and a sweep have in common."""
    sub.add_argument("--resume", nargs="?", const=True, metavar=what, help=resume)
    sub.add_argument("--trust", action="store_true", help=f"resume although the {what.lower()} may not be your own")
    sub.add_argument("--dry-run", action="store_true", help=f"print the checked {plan}; start nothing")
    sub.add_argument("--quiet", action="store_true", help="print events and the final table only")
    sub.add_argument("--address", help="a Ray cluster to join; a local one is started otherwise")
    sub.add_argument("--wait", type=_seconds, metavar="SECONDS", help="for a cluster that lacks room (30 s)")


def _evaluate(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("checkpoint", help="a run folder (its best checkpoint) or a checkpoint folder")
    sub.add_argument("--chains", type=_count, default=4096)
    sub.add_argument("--pretrained-chains", type=_count, default=16384)
    sub.add_argument("--alpha", type=_positive, default=None, help="temperature of J and J*; the run's own by default")
    sub.add_argument("--seed", type=_seed, default=0)
    sub.add_argument("--json", action="store_true")


def _sample(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("source", help="a run folder (its best checkpoint), a checkpoint folder, or a domain (pretrained)")
    sub.add_argument(
        "overrides", **OVERRIDES, help="for example reward.reference=CCO, guide.alpha=0.5, or domain.KEY of a domain"
    )
    sub.add_argument("--num", type=_count, default=256, help="how many to draw (256)")
    sub.add_argument("--out", default="samples.npz", help=".npz, or a suffix of the domain's, such as .sdf or .csv")
    sub.add_argument("--seed", type=_seed, default=0)
    sub.add_argument("--num-steps", type=_count, help="timesteps of a domain's chain; its own by default")
    sub.add_argument("--score", action="store_true", help="add the run's reward of each sample")
    sub.add_argument("--reward", metavar="NAME", help="score with this reward instead; a domain has none of its own")
    sub.add_argument("--guide", metavar="NAME", help=f"lean towards the reward while sampling: {GUIDES}")
    sub.add_argument("--top", type=_count, metavar="N", help="keep the N highest scores, equal samples once")


def _score(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("what", nargs="?", help="a number of the pretrained model's samples, a file of samples, or a YAML")
    sub.add_argument("overrides", **OVERRIDES, help="for example reward.receptor=x.pdbqt")
    sub.add_argument("--reward", help="short name, package.module:Name or ./file.py:Name")
    sub.add_argument("--domain", help="whose pretrained model, where no YAML is given (toy)")
    sub.add_argument("--num", type=_count, default=512, help="samples of a YAML's pretrained model (512)")
    sub.add_argument("--seed", type=_seed, default=0)
    sub.add_argument("--json", action="store_true")


def _recommend(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("file", help="YAML, Python file with a `spec`, or shipped config; its algorithm is not looked at")
    sub.add_argument("overrides", **OVERRIDES, help="for example training.alpha=0.2")
    sub.add_argument("--no-training", action="store_true", help="guidance only: the model's weights stay as they are")
    sub.add_argument("--num", type=_count, default=128, help="pretrained samples to draw and score (128)")
    sub.add_argument("--memory-gb", type=_positive, help="memory for training, instead of what is free here")
    sub.add_argument("--seed", type=_seed, default=0)
    sub.add_argument("--json", action="store_true")


def _import(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("format", metavar="FORMAT", help="whose checkpoint it is, such as edm")
    sub.add_argument("source", metavar="DIR", help="the checkpoint, as it was published")
    sub.add_argument("--out", help="a .safetensors file, or a folder for it; DIR.safetensors here by default")
    sub.add_argument("--force", action="store_true", help="replace what is there")


def _export(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("format", nargs="?", metavar="FORMAT", help="one that `rayft import` reads, such as edm")
    sub.add_argument("checkpoint", help="a run folder (its best checkpoint), a checkpoint folder or an imported file")
    sub.add_argument("out", help=".safetensors or .pt; with FORMAT, a folder")
    sub.add_argument("--force", action="store_true", help="with FORMAT: replace what is in the folder")


def _report(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("run")


def _pretrain(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("file")
    sub.add_argument("overrides", **OVERRIDES)
    sub.add_argument("--resume", action="store_true")
    sub.add_argument("--quiet", action="store_true")


def _configs(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--copy", metavar="FOLDER", help="copy the YAMLs there")


def _doctor(sub: argparse.ArgumentParser) -> None:
    """Nothing."""


def _door(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--address", help="the head's dashboard, http://HEAD:8265; else RAY_API_SERVER_ADDRESS")


def _submit(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("file", nargs="?", help="YAML or Python file in the working tree, or a shipped config")
    sub.add_argument("overrides", **OVERRIDES, help="for example storage=s3://bucket/runs")
    _door(sub)
    sub.add_argument("--name", help="of the job and its run; the run's own by default")
    sub.add_argument("--tune", action="store_true", help="as `rayft tune`: FILE has a `search:` block")
    sub.add_argument("--resume", nargs="?", const=True, metavar="NAME", help="continue the run NAME, also by its URI")
    sub.add_argument("--trust", action="store_true", help="resume although the checkpoint is not provably your own")
    sub.add_argument("--wait", type=_seconds, metavar="SECONDS", help="for a cluster that lacks room (30 s)")
    sub.add_argument("--working-dir", metavar="DIR", help="the tree to ship instead of this folder; .gitignore holds")
    sub.add_argument("--installed", action="store_true", help="ship the config alone; rayft is installed there")
    sub.add_argument("--no-follow", action="store_true", help="return once the cluster has taken the job")
    sub.add_argument("--quiet", action="store_true", help="print events and the final table only")


def _status(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("name", nargs="?", help="a job; all of them by default")
    _door(sub)


def _stop(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("name", help="a job")
    _door(sub)


def _logs(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("name", help="a job")
    _door(sub)
    sub.add_argument("--follow", action="store_true", help="until its end, as a run of one's own is shown")


LOCAL = (_run, _tune, _evaluate, _sample, _score, _recommend, _import, _export, _report, _pretrain, _configs, _doctor)
TAKES = (*LOCAL, _submit, _status, _stop, _logs)
OPTIONS = {takes.__name__.removeprefix("_"): takes for takes in TAKES}


# -- kinds of values


def _seed(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} should be a whole number of at least 0")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} should be a number above 0")
    return value


def _seconds(text: str) -> float:
    return 0.0 if text == "0" else _positive(text)


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} should be a whole number of at least 1")
    return int(text)
