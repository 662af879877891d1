"""One self-contained HTML page per run, from its files alone: what was reached, at what price, and what to beware of.

``readout`` makes the numbers, this file the text, report.html lays them out and draws. Nothing here stops a run: what
is missing is said on the page. A user's text passes through ``safe`` or, into the script, through ``to_json``.
"""

from __future__ import annotations

import html
import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from rayft import evaluate, gallery, readout, spec
from rayft.algorithms.config import SECTIONS
from rayft.domain import Domain
from rayft.evaluate import Estimate
from rayft.readout import Found, Means
from rayft.settings import defaults, explain
from rayft.track import TrackSettings
from rayft.verdict import Samples

PURPOSES = {  # what a reward was called for
    "train": "training draws",
    "payoff": "candidates",
    "evaluate": "the policy's samples",
    "pretrained": "samples before training",
    "watch": "held out",
    "score": "by hand",
}
WORTH = "effective/"  # columns of RGDM
NUM_LISTED = 8  # reasons, slowest samples, and about as many failed ones


def write(run: Path, domain: Domain | None, alpha: float | None) -> Path:
    """Writes ``run/report.html`` and returns its path. ``domain`` draws the samples, ``alpha`` prices J and J*."""
    found = readout.read(run, alpha)
    drawn = {"frontier": readout.frontier, "curves": readout.curves, "histogram": readout.histogram}
    drawn["picture"] = lambda found: gallery.picture(found, domain)
    drawn |= {"watch": lambda found: readout.together(found, "watch/")}
    drawn |= {"parts": lambda found: readout.together(found, "part/")}
    data = {name: found.attempt(f"The {name}", lambda make=make: make(found), None) for name, make in drawn.items()}
    text = {name: found.attempt(f"The {name}", lambda make=make: make(found), "") for name, make in TEXT.items()}
    sections = found.attempt("The domain's own part of this page", lambda: gallery.sections(found, domain), "")
    shown = {**data, **{name: text[name] for name in ("candidates", "costs")}, "missing": found.missing}
    told = {
        "title": safe(found.run.get("name", run.name)),
        "head": found.attempt("The head", lambda: _head(found), ""),
        "sections": sections,
        "missing": "".join(f"<p>{safe(sentence)}</p>" for sentence in dict.fromkeys(found.missing)),
        "data": to_json(data),
        **text,
        **{f"has_{name}": "" if value else "hidden" for name, value in shown.items()},
    }
    return lay_out("report.html", told, run)


def lay_out(frame: str, told: Mapping[str, str], folder: Path) -> Path:
    """Writes ``folder/report.html`` in one piece: a frame of this package, style and script, and what it is told."""
    from plotly.offline import get_plotlyjs

    def own(name: str) -> str:
        return Path(__file__).with_name(name).read_text("utf-8")

    page = {"style": own("page.css"), "script": own("page.js"), "plotly": get_plotlyjs(), **told}
    temporary = folder / ".report.html.tmp"
    temporary.write_text(Template(own(frame)).substitute(page), "utf-8", errors="replace")
    return temporary.replace(folder / "report.html")


# -- text


def _head(found: Found) -> str:
    run, verdict, (domain, reward) = found.run, found.verdict, (_named(found, key) for key in ("domain", "reward"))
    status = str(run.get("status", "status unknown"))
    seconds = float(run.get("seconds") or (found.rows or [{}])[-1].get("time_s", 0.0))
    day = str(run.get("finished") or run.get("started") or "")[:10]
    calls = next((row["reward_calls"] for row in reversed(found.rows) if "reward_calls" in row), None)
    paid = "" if calls is None else f", {calls:,.0f} reward calls"
    facts = [f"{_named(found, 'algorithm')} on {domain}", f"reward {reward}", f"seed {run.get('seed', 'unknown')}"]
    facts += [f"{seconds / 60:.1f} minutes" if seconds else "", day]
    if verdict is None:
        done = f"{found.rows[-1]['iteration']:.0f}" if found.rows else "0"
        text = f'<p class="verdict">No verdict <span>after {done} iterations{paid}.</span></p>'
    else:
        share, of, notes = (
            verdict.frontier_share,
            "of the reward gain that its KL can buy",
            [verdict.frontier_share.note],
        )
        if verdict.attained is not None and verdict.attained.share is not None:
            share, of, notes = verdict.attained.share, f"of the attainable objective at alpha {found.alpha:g}", []
        elif verdict.attained is not None:
            notes.insert(0, f"The attained share at alpha {found.alpha:g} is refused: {verdict.attained.refused}")
        known = not math.isnan(share.value)
        bound = f"{share.note.partition(':')[0]} " if share.note.startswith("at ") else ""
        said = "Reached" if share.value > 0 else "Worse than the pretrained model:"
        said = f"{said} {bound}{replace(share, note='')}"
        price = f"KL {found.reached[max(found.reached)][0]:.2f} nats{paid}"
        text = f'<p class="verdict">{said if known else "No share"} <span>{of}, {price}.</span></p>'
        text += "".join(f'<p class="soft">{safe(note[:1].upper() + note[1:])}.</p>' for note in notes if note)
        if known:
            ends = (f"--{k}:{100 * min(max(getattr(share, k), 0), 1):.1f}%" for k in ("value", "low", "high"))
            text += f'<div class="gauge" style="{";".join(ends)}"><i></i><b></b></div>'
            text += '<div class="scale"><span>pretrained</span><span>attainable</span></div>'
    warn = "" if status in ("finished", "running") else " warn"
    top = "".join(f"<span>{safe(fact)}</span>" for fact in facts if fact)
    return (
        f'<header class="top"><h1>{safe(run.get("name", found.path.name))}</h1>'
        f'<span class="badge{warn}">{safe(status)}</span>{top}</header>{text}'
    )


def _table(found: Found) -> str:
    verdict, tilt = found.verdict, found.tilt
    if verdict is None:
        return '<p class="soft">Nothing to compare yet.</p>'
    before, after, attained, none = verdict.pretrained, verdict.policy, verdict.attained, Estimate(math.nan, 0, 0, "")
    shares = [evaluate.undecodable_share(samples.undecodable) for samples in (before, after)]
    rows = [
        ("reward", "mean", readout.mean(before.rewards), readout.mean(after.rewards), tilt.reward if tilt else none),
        ("KL", "nats per chain", 0.0, readout.mean(after.kl, after.rewards), tilt.kl if tilt else none),
        ("frontier share", "of the reward gain that its KL can buy", none, verdict.frontier_share, 1.0),
        ("diversity", "mean distance between samples", readout.spread(before.x_0), readout.spread(after.x_0), none),
        ("undecodable", "share of samples", *shares, none),
    ]
    if attained is not None and found.alpha is not None:
        share = attained.share or Estimate(math.nan, 0, 0, attained.refused or "")
        told = (attained.baseline, attained.objective, attained.optimum)
        rows[2:2] = [
            ("J, its optimum J*", f"reward - {found.alpha:g} KL", *told),
            ("attained", "share of the way from pretrained to J*", 0.0, share, 1.0),
        ]
        if tilt is not None:
            rows[-2] = (*rows[-2][:4], evaluate.diversity(readout.optimum(before, found.alpha)))
    rows += _beside(before, after)
    last = 3 if attained is not None else 2
    heads = [("before", "pretrained"), ("run", "fine-tuned"), ("best", "optimum p*")][:last]
    head = "".join(f'<th><span class="dot {colour}"></span>{name}</th>' for colour, name in heads)
    body = "".join(
        f"<tr><th>{safe(name)}<small>{what}</small></th>"
        f"{''.join(f'<td>{_cell(cell)}</td>' for cell in cells[:last])}</tr>"
        for name, what, *cells in rows
    )
    sizes = f"{len(before.rewards):,} chains of the pretrained model and {len(after.rewards):,} of the fine-tuned one"
    return (
        f'<p class="soft">At iteration {max(found.reached)}, from {sizes}. Brackets hold 95% intervals.</p>'
        f'<div class="wide"><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _beside(before: Samples, after: Samples) -> list[tuple[Any, ...]]:
    """Rows of parts of the reward, of watched rewards and of the domain's metrics."""
    rows: list[tuple[Any, ...]] = []
    none = Estimate(math.nan, 0, 0, "")
    for prefix, kind, what in (("part/", "part", "its own scores"), ("watch/", "watch", "not optimised")):
        for name in (name for name in before.beside if name.startswith(prefix)):
            told = (readout.mean(one.beside.get(name, np.full(1, np.nan))) for one in (before, after))
            rows.append((f"{kind}: {name.removeprefix(prefix)}", what, *told, none))
    for name in dict.fromkeys([*before.metrics, *after.metrics]):
        values = [one.metrics.get(name, math.nan) for one in (before, after)]
        rows.append((f"metric: {name}", "of the domain", *(v if math.isfinite(v) else none for v in values), none))
    return rows


def _blank(found: Found) -> str:
    """How many samples the histogram of the reward cannot show."""
    sets = {"pretrained": found.pretrained, "fine-tuned": found.policy}
    told = {name: float(one.undecodable.mean()) for name, one in sets.items() if one is not None}
    shares = " and ".join(f"{share:.2%} of the {name} ones" for name, share in told.items())
    why = "samples that decode to nothing, whose reward is a constant"
    return f'<p class="soft">In no bin: {why}, {shares}.</p>' if any(told.values()) else ""


def _watched(found: Found) -> str:
    """What moved against the reward. A person must say which way is better: the page cannot know."""
    said, rise, fell = _flat(found, "watch/"), readout.optimised(found), readout.against(found)
    for name, fall in fell.items():
        name = f"<code>{safe(name)}</code>"
        said += (
            f'<p class="against"><b>{name} fell while the reward rose</b>: {name} by {_moved(fall)}, the reward by '
            f"{_moved(rise)}. If more of {name} is better, this is reward hacking.</p>"
        )
    if not fell and not math.isnan(rise.after):
        said += f'<p class="soft">No watched reward fell by more than {readout.CLEAR:g} standard errors while the '
        said += "reward rose.</p>"
    return said


def _parted(found: Found) -> str:
    return _flat(found, "part/")


def _flat(found: Found, prefix: str) -> str:
    names = (readout.together(found, prefix) or {"flat": []})["flat"]
    why = "is not drawn: its scores do not differ among the samples of the pretrained model."
    return "".join(f'<p class="soft">{safe(name)} {why}</p>' for name in names)


def _moved(told: Means) -> str:
    sure = f", {abs(told.num_errors):.3g} standard errors" if math.isfinite(told.num_errors) else ""
    return f"{abs(told.after - told.before):.3g} (from {told.before:.4g} to {told.after:.4g}{sure})"


def _costs(found: Found) -> str:
    """What each reward cost and where it failed; nothing where nothing was metered."""
    purposes = found.meter.get("purposes") or {}
    tallies = [(use, part, told) for use, by in purposes.items() for part, told in by["parts"].items()]
    if not tallies:
        return ""
    whole, body = found.attempt("The run's time", lambda: readout.elapsed(found), None), ""
    for use, by in purposes.items():
        gone = f"<small>{by['undecodable']:,} undecodable</small>" if by["undecodable"] else ""
        first = f"<th rowspan={max(1, len(by['parts']))}>{safe(use)}<small>{PURPOSES.get(use, '')}</small>{gone}</th>"
        for part, told in by["parts"].items() or [("", None)]:
            cells = ["-"] * 7 if told is None else _cost(told, whole)
            body += f"<tr>{first}<td>{safe(part)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
            first = ""
    names = ("for", "reward", "calls", "cache hits", "duplicates", "failed", "seconds a sample", "in all", "of the run")
    head = "".join(f"<th>{name}</th>" for name in names)
    lasted = f" The run took {in_units(whole)}; what is scored in parallel may add up to more." if whole else ""
    return (
        f'<p class="soft">{found.meter["total_calls"]:,} calls were paid. Seconds a sample: half of the samples took '
        f"no longer than the first number, 95% and 99% no longer than the others.{lasted}</p>"
        f'<div class="wide"><table class=costs><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f"{_trouble(tallies)}"
    )


def _cost(told: Mapping[str, Any], whole: float | None) -> list[str]:
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in told["failures"].items())
    times = " ".join(f"<span>{in_units(told['seconds'][q])}</span>" for q in ("p50", "p95", "p99"))
    total = told["seconds"]["total"]
    return [
        *(f"{told[name]:,}" for name in ("calls", "hits", "duplicates")),
        f"{told['failed']:,}<small>{safe(kinds)}</small>" if told["failed"] else "0",
        times if told["seconds"]["p50"] is not None else "-",
        in_units(total),
        f"{total / whole:.1%}" if whole else "-",
    ]


def _trouble(tallies: list[tuple[str, str, Mapping[str, Any]]]) -> str:
    """The commonest reasons, the slowest samples and the last failures of all tallies."""
    reasons: dict[tuple[str, str], list[Any]] = {}
    for _, part, told in tallies:
        for one in told["reasons"]:
            reasons.setdefault((part, one["reason"]), [0, one["label"]])[0] += one["count"]
    common = sorted(((count, *key, label) for key, (count, label) in reasons.items()), key=lambda row: -row[0])
    slow = [(one["seconds"], part, use, one["label"]) for use, part, told in tallies for one in told["slowest"]]
    slow = [(in_units(row[0]), *row[1:]) for row in sorted(slow, key=lambda row: -row[0])[:NUM_LISTED]]
    ends = [(part, use, told["last_failed"][::-1]) for use, part, told in tallies if told["last_failed"]]
    each = math.ceil(NUM_LISTED / max(1, len(ends)))
    failed = [(one["label"], part, use, one["reason"]) for part, use, last in ends for one in last[:each]]
    text = ""
    if common:
        kept = [(f"{count:,}", *row) for count, *row in common[:NUM_LISTED]]
        text += f"<h3>Commonest reasons</h3>{_listed(('failures', 'reward', 'reason', 'for example'), kept)}"
        few = len(common) - NUM_LISTED
        text += f'<p class="soft">and {few:,} other reasons, in rewards.json.</p>' if few > 0 else ""
    for title, heads, rows in (
        ("The last failed samples", ("sample", "reward", "for", "reason"), failed),
        ("The slowest samples", ("took", "reward", "for", "sample"), slow),
    ):
        text += f"<details><summary>{title}</summary>{_listed(heads, rows)}</details>" if rows else ""
    return text


def _listed(heads: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in heads)
    body = "".join(f"<tr>{''.join(f'<td>{safe(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table class=listed><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _candidates(found: Found) -> str:
    """How many equally weighted candidates each tenth of the timesteps was worth; nothing without a pay-off."""
    rows = [row for row in found.rows if any(name.startswith(WORTH) for name in row)]
    if not rows:
        return ""
    steps = [name.removeprefix(WORTH) for name in rows[-1] if name.startswith(WORTH)]
    steps.sort(key=lambda name: int(name.partition("-")[0]))
    worth = [[row[WORTH + name] for row in rows if math.isfinite(row.get(WORTH + name, math.nan))] for name in steps]
    cells = [
        (name, f"{min(sizes):,.0f}", f"{sizes[-1]:,.0f}") for name, sizes in zip(steps, worth, strict=True) if sizes
    ]
    return _listed(("timesteps", "at least", "last"), cells)


def _guards(found: Found) -> str:
    spoken: dict[tuple[str, str], list[Any]] = {}
    for event in found.events:
        spoken.setdefault((event.get("guard", ""), event.get("message", "")), []).append(event.get("iteration", "?"))
    said = "".join(
        f'<li>{safe(text)} <span class="soft">({safe(guard)}, iteration {safe(at[0])}'
        f"{f' and {len(at) - 1} more, the last {safe(at[-1])}' if len(at) > 1 else ''})</span></li>"
        for (guard, text), at in spoken.items()
    )
    return f"<ul>{said}</ul>" if said else '<p class="soft">No guard spoke.</p>'


def _settings(found: Found) -> str:
    known: dict[str, type] = {**SECTIONS, "track": TrackSettings, "resources": spec.ResourceSettings}
    known |= {"checkpoint": spec.CheckpointSettings}
    name = str(found.config.get("algorithm", ""))
    algorithm = found.attempt(f"The settings of algorithm {name!r}", lambda: spec.algorithm(name).settings_class, None)
    known |= {"training": algorithm} if algorithm else {}
    plain = {k: v for k, v in found.config.items() if not isinstance(v, Mapping)}
    text = ""
    for section, values in {"run": plain, **{k: v for k, v in found.config.items() if k not in plain}}.items():
        said, usual = (explain(known[section]), defaults(known[section])) if section in known else ({}, {})
        lines = ""
        for key, value in values.items():
            mark = "set" if key in usual and usual[key] != value else ""
            shown = "none" if value is None else value
            cells = f"<code>{safe(key)}</code>", f"<code>{safe(shown)}</code>", safe(said.get(key, ""))
            lines += f'<tr class="{mark}">{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        text += f"<tbody><tr><th colspan=3>{safe(section)}</th></tr>{lines}</tbody>" if lines else ""
    return f"<table class=settings>{text}</table>" if text else '<p class="soft">There is no config.yaml.</p>'


def _again(found: Found) -> str:
    run, where, config = found.run, shlex.quote(str(found.path)), shlex.quote(str(found.path / "config.yaml"))
    first, *rest = run.get("command") or [""]
    lines = {
        "The same run again, from its checked settings": f"rayft run {config}",
        "Continue it from its last checkpoint": f"rayft run --resume {where}",
        "Write this page again": f"rayft report {where}",
        "How it was last called": shlex.join(["rayft" if first.endswith("cli.py") else first, *map(str, rest)]),
    }
    keys = ("seed", "threads", "machine", "versions", "started", "finished", "status")
    flat = {k: ", ".join(f"{a} {b}" for a, b in v.items()) if isinstance(v := run.get(k), Mapping) else v for k in keys}
    told = "".join(f"<tr><td><code>{k}</code></td><td>{safe(v)}</td></tr>" for k, v in flat.items() if v is not None)
    calls = (f'<p class="soft">{name}:</p><pre>{safe(call)}</pre>' for name, call in lines.items() if call != "''")
    return f"{''.join(calls)}<table class=settings>{told}</table>"


def _beware(found: Found) -> str:
    attained = found.verdict.attained if found.verdict else None
    notes = [] if attained is None else [attained.note]
    notes += [f"{one.unmeasured}." for one in (found.policy, found.pretrained) if one and one.unmeasured][:1]
    if found.alpha is None:
        notes.append("No alpha is set, so there is no J*: the frontier stands in for it. evaluate.alpha sets one.")
    failed = sum(int((~np.isfinite(s.rewards)).sum()) for s in (found.pretrained, found.policy) if s)
    notes += [f"{failed:,} rewards of the evaluations failed and are left out of every number."] if failed else []
    notes.append(
        "The KL is that of whole chains, at least as large as that of finished samples: a share may be understated. "
        "A policy with Gaussian steps need not be able to reach 1."
    )
    notes.append("Intervals are over the samples of this one run. They do not speak for another seed.")
    return f"<ul>{''.join(f'<li>{safe(note)}</li>' for note in notes)}</ul>"


SAID = (_table, _blank, _watched, _parted, _candidates, _costs, _guards, _settings, _again, _beware)
TEXT = {make.__name__.removeprefix("_"): make for make in SAID}

# -- small things


def _cell(value: Estimate | float) -> str:
    if not isinstance(value, Estimate):
        return f"<b>{value:.4g}</b>"
    number, _, interval = str(replace(value, note="")).partition(" ")
    why = f'<small class="why">{safe(value.note)}</small>' if value.note else ""
    if math.isnan(value.value):
        return why
    number = "0" if value.value == 0 else number
    return f"<b>{number}</b> <small>{interval if value.high > value.low else ''}</small>{why}"


def _named(found: Found, key: str) -> str:
    value = found.config.get(key, found.run.get(key, "?"))
    return str(value.get("name", "?") if isinstance(value, Mapping) else value)


def in_units(seconds: float | None) -> str:
    """With the unit in which a person would say it."""
    if not seconds:
        return "-" if seconds is None else "0 s"
    units = {"h": 3600.0, "min": 60.0, "s": 1.0, "ms": 1e-3}
    unit, size = next(((unit, size) for unit, size in units.items() if seconds >= size), ("\u00b5s", 1e-6))
    number = seconds / size
    return f"{number:.3g} {unit}" if number < 999.5 else f"{number:,.0f} {unit}"


def safe(value: Any) -> str:
    return html.escape(str(value))


def to_json(value: Any) -> str:
    """For a script element: NaN and Infinity are words there, and no tag can end the element."""
    return json.dumps(value).replace("<", "\\u003c")
