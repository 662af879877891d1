"""The command line. Every command ends in 0, in 2 with one sentence for a user's mistake, or in 130 after Ctrl-C."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rayft.arguments import parse


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``rayft``."""
    try:
        told = parse(COMMANDS, argv)
        return told.command(told)
    except ValueError as error:
        return _refuse(getattr(error, "cause", error))  # what an actor raised comes wrapped in its own traceback
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else error
        return _refuse(f"{what}; look at the path, its permissions and the space left")
    except KeyboardInterrupt:
        print("rayft: stopped at once; --resume continues from the last checkpoint", file=sys.stderr)
        return 130


def _refuse(why: object) -> int:
    print(f"rayft: {' '.join(str(why).split())}", file=sys.stderr)
    return 2


def run(told: argparse.Namespace) -> int:
    """Fine-tune as FILE says."""
    from rayft import cluster, comeback, store
    from rayft import spec as specs

    _sort_resume(told)
    spec = None if told.file is None else specs.read(told.file, told.overrides)
    folder, home = comeback.meant(told.resume, spec, told.trust)
    if spec is None:
        if folder is None:
            raise ValueError("nothing to run: give a YAML, a Python file with a spec, or the name of a shipped config")
        spec = comeback.opened(folder, home)
    if spec.search is not None:
        raise ValueError(f"{spec.name} has a search: block: start it with `rayft tune`, or take the block out")
    if told.dry_run:
        from rayft.plan import plan

        print(plan(spec))
        return 0
    spec.tried()
    cluster.same_as_client()
    cluster.reachable(told.address)
    found = None if folder is None else store.newest(folder)
    if found is not None:
        store.continues(found, spec.full())
        store.trusted(found, told.trust)
    return _run(told, spec, folder)


def _sort_resume(told: argparse.Namespace) -> None:
    """In `--resume key=value` no folder is meant, in `FOLDER --resume` no YAML."""
    if told.resume and told.file is not None and _is_run(told.file):
        told.resume, told.file = told.file, None
    if isinstance(told.resume, str) and re.match(r"[\w.]+=", told.resume) and not Path(told.resume).exists():
        told.overrides, told.resume = [*told.overrides, told.resume], True


def _is_run(text: str) -> bool:
    return "://" in text or (Path(text) / "config.yaml").is_file()


def _run(told: argparse.Namespace, spec: Any, folder: Path | None) -> int:
    from rayft import display, loop

    fresh = folder is None
    folder = loop.create_folder(spec) if folder is None else folder
    try:
        _start_ray(told.address, spec, told.wait)
    except (ValueError, KeyboardInterrupt):
        if fresh:
            shutil.rmtree(folder)
        raise
    view = display.choose(told.quiet)
    try:
        run = loop.Run(spec, folder, view, trust=told.trust)
        row = run.execute(resume=not fresh)
    finally:
        view.close()
    print(f"report: {folder / 'report.html'}", file=sys.stderr)
    display.show(display.before_after({k.removeprefix("evaluate/"): v for k, v in row.items() if "evaluate/" in k}))
    if run.interrupted:
        where = folder if run.mirror is None else run.mirror.there.uri
        print(f"saved; continue with: rayft run --resume {where}", file=sys.stderr)
        return 130
    return 0


def _start_ray(address: str | None, spec: Any, wait: float | None = None) -> None:
    from rayft import cluster

    cluster.join(address)
    if address is not None:
        cluster.has_room(cluster.wanted(spec), wait, lambda text: print(text, file=sys.stderr))
    elif lacking := cluster.lacking(cluster.wanted(spec), cluster.nodes_now()):
        raise ValueError(f"{lacking}; lower resources or scoring.actors, or join a larger cluster with --address")


def tune(told: argparse.Namespace) -> int:
    """Search hyper-parameters as FILE's search: block says."""
    from rayft import cluster
    from rayft import tune as tuning

    _sort_resume(told)
    spec, folder = tuning.asked(told.file, told.overrides, told.resume, told.trust)
    if told.dry_run:
        print(tuning.plan(spec))
        return 0
    found = tuning.tried(spec)
    cluster.same_as_client()
    cluster.reachable(told.address)
    cluster.join(told.address)
    if told.address is not None:
        one = {"trial": tuning.request(spec).bundles}
        cluster.has_room(one, told.wait, lambda text: print(text, file=sys.stderr))
    return tuning.run(spec, found, folder, told.quiet)


def evaluate(told: argparse.Namespace) -> int:
    """Hold a checkpoint against J* and the frontier, with fresh samples."""
    from rayft import comeback, display, store
    from rayft.offline import judged

    verdict = judged(
        store.load(comeback.located(told.checkpoint)), told.chains, told.pretrained_chains, told.alpha, told.seed
    )
    if told.json:
        print(json.dumps(verdict.scalars()))
    else:
        display.show(display.before_after(verdict.scalars()))
        for sentence in verdict.notes:
            print(sentence)
    return 0


def sample(told: argparse.Namespace) -> int:
    """Draw finished events from a checkpoint, or from a domain's pretrained model."""
    from rayft import comeback, sampling
    from rayft import source as sources

    scored = told.score or told.reward is not None
    if told.top is not None and not scored:
        raise ValueError("--top takes the highest scores: add --score, or --reward NAME")
    asked = sources.Asked(scored, told.reward, told.guide, told.num_steps, told.overrides)
    where = str(comeback.located(told.source)) if "://" in told.source else told.source
    source = sources.find(where, asked)
    out = _writable(Path(told.out))
    write = sampling.writer(source.domain, out)
    drawn = sampling.draw(source, told.num, told.seed)
    if told.top is not None:
        drawn = sampling.best(source.domain, drawn, told.top)
    print(sampling.save(source.domain, drawn, out, write, whole=told.top is None))
    return 0


def score(told: argparse.Namespace) -> int:
    """Score samples, and say whether a run could learn from the reward."""
    from rayft import display, learnable

    spec, what, whole = _asked(told)
    if spec.checked().section("scoring").actors:
        _start_ray(None, spec)
    finding = learnable.inspect(spec, what, told.seed, whole)
    if told.json:
        print(json.dumps(finding.told()))
        return 0
    display.show(learnable.table(finding))
    for sentence in learnable.verdict(finding):
        print(sentence)
    return 0


def _asked(told: argparse.Namespace) -> tuple[Any, int | str, bool]:
    """(the spec whose rewards are asked for, a number of samples or a file of them, whether it is a run's)."""
    from rayft import learnable
    from rayft import spec as specs

    what = told.what or ""
    if "=" in what and not Path(what).exists():
        told.overrides, what = [what, *told.overrides], ""
    samples = what.isdigit() or Path(what).suffix in learnable.FILES
    file = None if samples else what or None
    given = [f"{key}={value}" for key, value in (("reward", told.reward), ("domain", told.domain)) if value is not None]
    tree = [] if file else ["algorithm=ppo", "domain=toy"]
    if file is None and told.reward is None and not any(text.startswith("reward") for text in told.overrides):
        raise ValueError("nothing to score with: give --reward NAME, or a YAML")
    spec = specs.read(file, [*tree, *given, *told.overrides])
    if samples and not what.isdigit():
        return spec, what, False
    return spec, int(what) if samples else told.num, file is not None


def recommend(told: argparse.Namespace) -> int:
    """Say which algorithm suits FILE's model, reward and machine, and why."""
    from rayft import display
    from rayft import recommend as advice
    from rayft import spec as specs

    spec = specs.read(told.file, told.overrides, algorithm="ppo")
    memory = None if told.memory_gb is None else told.memory_gb * 1e9
    found = advice.measure(spec, told.num, told.seed, memory)
    chosen = advice.choose(found, not told.no_training)
    line = advice.command(chosen, told.file, None if told.no_training else spec, told.overrides)
    if told.json:
        print(json.dumps(advice.told(found, chosen, line)))
        return 0
    display.show(advice.table(found))
    for sentence in advice.sentences(chosen, line):
        print(sentence)
    return 0


def import_(told: argparse.Namespace) -> int:
    """Make another project's checkpoint one .safetensors that a domain takes."""
    form, source = _format(told.format), Path(told.source)
    own = f"{source.resolve().name}.safetensors"
    out = Path(own if told.out is None else told.out)
    out = out / own if out.is_dir() else out
    if out.suffix != ".safetensors":
        raise ValueError(f"--out is {out}; give a .safetensors file, or a folder that is there")
    print(form.keep(form.read(source), _free(_writable(out), told.force)))
    return 0


def export(told: argparse.Namespace) -> int:
    """Write the fine-tuned network as its own module loads it, or as another project's checkpoint."""
    from rayft import comeback, store

    source, out = comeback.located(told.checkpoint), Path(told.out)
    if told.format is None:
        from rayft.offline import exported

        print(f"weights in {exported(store.load(source), _writable(out))}")
        return 0
    form = _format(told.format)
    if (source / "card.json").is_file() or (source / "checkpoints").is_dir():
        checkpoint = store.load(source)
        domain = checkpoint.domain()
        model = form.of(domain, checkpoint.network(domain), told.checkpoint)
    else:
        model = form.read(source)
    print(form.write(model, _free(out, told.force)))
    return 0


def _format(name: str) -> Any:
    """Another project's checkpoints: a class of four functions that a domain registers as ``rayft.importers``.

    read(path), of(domain, network, name) -> model;    keep(model, file), write(model, folder) -> what is to be said
    """
    from rayft import imports

    return imports.registered("rayft.importers", name, "format")


def _free(path: Path, force: bool) -> Path:
    """Where nothing is replaced unless it is asked for."""
    if not force and path.exists() and (path.is_file() or any(path.iterdir())):
        raise ValueError(f"{path} is there already; give another, or --force to replace it")
    return path


def report(told: argparse.Namespace) -> int:
    """Write the report of a run or a sweep again from its files."""
    from rayft import comeback, spec, sweep_page
    from rayft import report as reports

    run = comeback.located(told.run)
    if (run / "sweep.json").is_file():
        print(sweep_page.write(run))
        return 0
    config = spec.open_folder(run).checked()
    print(reports.write(run, config.build_domain(), config.evaluation_alpha()))
    return 0


def pretrain(told: argparse.Namespace) -> int:
    """Train a denoiser on its domain's data."""
    from rayft import pretrain as training

    made = training.main(told.file, told.overrides, told.resume, told.quiet)
    if made is None:
        return 130
    print(made)
    return 0


def configs(told: argparse.Namespace) -> int:
    """List the shipped configs, or copy them."""
    from rayft import spec

    found = spec.configs()
    if told.copy is None:
        for name, path in found.items():
            print(f"{name:24} {path.read_text().splitlines()[0].removeprefix('# ')}")
        return 0
    target = Path(told.copy)
    target.mkdir(parents=True, exist_ok=True)
    for path in found.values():
        if (target / path.name).exists():
            raise ValueError(f"{target / path.name} exists; copy to another folder")
    for path in found.values():
        shutil.copy(path, target)
    print(f"{len(found)} configs in {target}")
    return 0


def doctor(told: argparse.Namespace) -> int:
    """Check this machine's installation."""
    from rayft import doctor as checks

    return checks.render(checks.checks())


def submit(told: argparse.Namespace) -> int:
    """Run FILE as a job of a cluster, and follow it."""
    from rayft import follow, jobs

    if told.resume and told.file is not None and "://" in told.file:
        told.resume, told.file = told.file, None
    keys = {key: getattr(told, key) for key in vars(jobs.Asked("")) if hasattr(told, key)}
    client = jobs.connect(told.address)
    name = jobs.submit(client, jobs.Asked(**keys))
    back = f"rayft logs {name} --follow --address {jobs.door(told.address)}"
    print(f"submitted {name}; come back with: {back}", file=sys.stderr)
    return 0 if told.no_follow else follow.follow(client, name, told.quiet)


def status(told: argparse.Namespace) -> int:
    """Say how the jobs of a cluster stand."""
    from rayft import display, follow, jobs

    client = jobs.connect(told.address)
    display.show(follow.table(jobs.known(client, told.name) if told.name else None, client))
    return 0


def stop(told: argparse.Namespace) -> int:
    """End a job after its iteration, saved."""
    from rayft import jobs

    print(jobs.stop(jobs.connect(told.address), told.name))
    return 0


def logs(told: argparse.Namespace) -> int:
    """Print a job's log, or follow it."""
    from rayft import follow, jobs

    client = jobs.connect(told.address)
    jobs.known(client, told.name)
    if told.follow:
        return follow.follow(client, told.name)
    print(client.get_job_logs(told.name), end="")
    return 0


def _writable(path: Path) -> Path:
    folder = path.resolve().parent
    if path.exists() and not path.is_file():
        kind = "a directory" if path.is_dir() else "a device"
        raise ValueError(f"cannot write {path}: it is {kind}; give the name of a file")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"cannot write {path}: {folder} is missing or not writable")
    return path


LOCAL = (run, tune, evaluate, sample, score, recommend, import_, export, report, pretrain, configs, doctor)
COMMANDS = (*LOCAL, submit, status, stop, logs)

if __name__ == "__main__":
    sys.exit(main())
