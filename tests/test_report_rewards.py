"""What the report says of rewards: what they cost, where they failed, and what happened to those nobody optimised."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from test_report import ALPHA, HOSTILE, Page, draw, make_run

from envs.toy.domain import Toy
from rayft import readout, report
from rayft.rewards.meter import Meter
from rayft.table import Table
from rayft.verdict import Samples, judge


def column(mean, spread, n, seed):
    """Exactly this mean and standard deviation, in an order of its own."""
    drawn = np.random.default_rng(seed).normal(size=n)
    return mean + spread * (drawn - drawn.mean()) / drawn.std()


def put(run, before, *after):
    """Gives the run's evaluations these columns: name -> (mean, spread), at the pretrained model and in turn after."""
    files = [run / "evaluations" / "pretrained.npz", *sorted((run / "evaluations").glob("iteration_*.npz"))]
    table = Table(run / "metrics.csv")
    for path, told in zip(files, [before, *after], strict=True):
        known = Samples.load(path)
        beside = {name: column(*numbers, len(known.rewards), i) for i, (name, numbers) in enumerate(told.items())}
        rewards = beside.pop("reward", known.rewards)
        replace(known, rewards=rewards, beside=beside).save(path)
        if path is not files[0]:
            scalars = judge(Samples.load(files[0]), Samples.load(path), ALPHA).scalars()
            table.rows[int(path.stem[-6:]) - 1] |= {f"evaluate/{name}": value for name, value in scalars.items()}
    (run / "metrics.csv").unlink()
    again = Table(run / "metrics.csv")
    for row in table.rows:
        again.add(row)
    return run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run")


def metered():
    """Two purposes, two rewards, failures of three kinds, and a user's text wherever one can be."""
    meter = Meter()
    labels = {0: "CCO", 1: HOSTILE, 2: "c1ccccc1", 3: "O"}
    seconds = np.array([0.1, 0.2, 0.4, np.nan])
    errors = {1: f"raised: {HOSTILE}", 2: "timed out: no answer for 60 s"}
    meter.add("train", "dock", calls=3, hits=5, duplicates=7, seconds=seconds, errors=errors, labels=labels)
    meter.add("train", "dock", calls=1200, seconds=np.full(1200, 0.01), errors={0: f"raised: {HOSTILE}"}, labels=labels)
    meter.add("train", "qed", calls=1300, seconds=np.full(1300, 1e-4))
    meter.add("watch", "sa", calls=40, seconds=np.full(40, 90.0), errors={3: "crashed: signal 11"}, labels=labels)
    meter.undecodable("train", 1234)
    return meter.summary()


def tables(path):
    """The cells of each table below "Rewards", row by row."""
    section = path.read_text("utf-8").split("<h2>Rewards</h2>")[1].split("</section>")[0]
    rows = [re.findall(r"<tr>(.*?)</tr>", table) for table in re.findall(r"<tbody>(.*?)</tbody>", section)]
    return [[[plain(cell) for cell in re.findall(r"<t[dh].*?>(.*?)</t[dh]>", row)] for row in table] for table in rows]


def plain(cell):
    return re.sub(r"<[^>]*>", " ", cell).split() if "<" in cell else cell


def test_the_table_of_costs_holds_the_numbers_of_the_meter(run):
    told = metered()
    (run / "rewards.json").write_text(json.dumps(told))
    path = report.write(run, Toy(), ALPHA)
    (train, qed, watch), reasons, failed, slowest = tables(path)
    dock = told["purposes"]["train"]["parts"]["dock"]
    times = [dock["seconds"][q] for q in ("p50", "p95", "p99")]
    assert train[0] == ["train", "training", "draws", "1,234", "undecodable"]
    assert train[1:5] == ["dock", "1,203", "5", "7"]
    assert train[5] == ["3", "2", "raised,", "1", "timed", "out"]
    assert train[6] == [word for number in times for word in (f"{1000 * number:.3g}", "ms")]
    assert times == pytest.approx([0.01, 0.01, 0.01], rel=0.025)
    assert train[7:] == ["12.7 s", f"{12.7 / 120:.1%}"]  # the run took the 120 s between started and finished
    assert qed[:3] == ["qed", "1,300", "0"]
    assert watch[1] == "sa"
    assert watch[-2:] == ["1 h", "3000.0%"]
    assert "2,543 calls were paid." in Page(path).text
    assert [row[:2] for row in reasons] == [["2", "dock"], ["1", "dock"], ["1", "sa"]]
    assert [row[3] for row in reasons][1:] == ["c1ccccc1", "O"]
    assert failed[-1] == ["O", "sa", "watch", "crashed: signal 11"]
    assert failed[0][0] == "CCO"  # the last of dock to fail
    assert [row[0] for row in slowest[:8]] == ["1.5 min"] * 8


def test_the_slowest_samples_come_first_whatever_reward_they_were_for(run):
    meter = Meter()
    for part, times in (("a", [0.5, 0.001]), ("b", [70.0, 0.2])):
        meter.add("train", part, calls=2, seconds=np.array(times), labels={0: f"{part} long", 1: f"{part} short"})
    (run / "rewards.json").write_text(json.dumps(meter.summary()))
    assert tables(report.write(run, Toy(), ALPHA))[1] == [
        ["1.17 min", "b", "train", "b long"],
        ["500 ms", "a", "train", "a long"],
        ["200 ms", "b", "train", "b short"],
        ["1 ms", "a", "train", "a short"],
    ]


def test_hostile_labels_reasons_and_names_are_text(run):
    told = metered()
    part = told["purposes"]["train"]["parts"].pop("dock")
    part["failures"][HOSTILE] = 4
    told["purposes"] |= {HOSTILE: {"undecodable": 0, "parts": {HOSTILE: part}}}
    (run / "rewards.json").write_text(json.dumps(told))
    name = f"watch/{HOSTILE.replace('/', '')}"
    put(run, *[{"reward": (i, 1.0), name: (-i, 1.0), "watch/even": (1.0, 0.0)} for i in range(4)])
    page = Page(report.write(run, Toy(), ALPHA))
    assert len(page.scripts) == [tag for tag, _ in page.tags].count("script") == 2
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert page.text.count(HOSTILE) >= 6
    assert f"{HOSTILE.replace('/', '')} fell while the reward rose" in page.text


def test_a_name_with_tags_is_plain_text_to_plotly(run, tmp_path):
    put(run, {"watch/<b>": (0.0, 1.0)}, *[{"watch/<b>": (i, 1.0)} for i in (1, 2, 3)])
    figures = draw(Page(report.write(run, Toy(), ALPHA)), tmp_path)
    names = [trace.get("name") for figure in figures for trace in figure["data"]]
    assert "&lt;b>" in names
    assert "<b>" not in names


def test_a_run_without_what_rewards_cost_has_no_section_for_it(run):
    for content in (None, "{}", json.dumps(Meter().summary())):
        if content is not None:
            (run / "rewards.json").write_text(content)
        path = report.write(run, Toy(), ALPHA)
        assert "<section hidden>\n<h2>Rewards</h2>" in path.read_text("utf-8")
        assert '<div class="missing" hidden>' in path.read_text("utf-8")


DAMAGED = {
    "half": json.dumps(metered())[:400],
    "a list": "[1, 2]",
    "no purposes": '{"purposes": 3}',
    "no parts": '{"purposes": {"train": {"undecodable": 0}}}',
    "no numbers": json.dumps(metered()).replace('"calls": ', '"calls": "<img src=x>", "were": '),
    "no samples": json.dumps(metered()).replace('"slowest": [', '"slowest": [3, '),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_costs_its_section_and_a_sentence(kind, run):
    (run / "rewards.json").write_text(DAMAGED[kind])
    path = report.write(run, Toy(), ALPHA)
    assert "<section hidden>\n<h2>Rewards</h2>" in path.read_text("utf-8")
    assert re.search(r"(rewards.json|The costs) could not be used \(", Page(path).text)
    assert "Reached" in Page(path).text


def test_watched_rewards_are_drawn_in_units_of_the_pretrained_spread(run, tmp_path):
    even = {"watch/even": (1.0, 0.0)}
    before = {"watch/up": (5.0, 2.0), "watch/down": (100.0, 10.0), **even}
    after = [{"watch/up": (5.0 + i, 1.0), "watch/down": (100.0 - 5 * i, 3.0), **even} for i in (1, 2, 3)]
    page = Page(report.write(put(run, before, *after), Toy(), ALPHA))
    lines = {line["name"]: line for line in page.data["watch"]["lines"]}
    # by hand: (6 - 5)/2, (7 - 5)/2, (8 - 5)/2 and (95 - 100)/10, (90 - 100)/10, (85 - 100)/10
    up, down = [[0, 0, 5], [10, 0.5, 6], [20, 1, 7], [30, 1.5, 8]], [[0, 0, 100], [10, -0.5, 95], [20, -1, 90]]
    assert np.allclose(lines["up"]["rows"], up)
    assert np.allclose(lines["down"]["rows"], [*down, [30, -1.5, 85]])
    rows = {row["iteration"]: row for row in Table(run / "metrics.csv").rows}
    for name, line in lines.items():
        key = "evaluate/reward" if name is None else f"evaluate/watch/{name}"
        assert [value for _, _, value in line["rows"][1:]] == pytest.approx([rows[i][key] for i in (10, 20, 30)])
        assert line["rows"][0][2] == pytest.approx(rows[30][f"{key}_pretrained"])
    n = len(Samples.load(run / "evaluations" / "pretrained.npz").rewards), 200
    error = np.sqrt(4.0 / (n[0] - 1) + 1.0 / (n[1] - 1))  # of variances with n - 1 below them
    assert lines["up"]["error"] == pytest.approx(1.96 * error / 2.0)
    assert page.data["watch"]["flat"] == ["even"]
    assert "even is not drawn: its scores do not differ" in page.text
    assert page.data["parts"] is None
    figures = draw(page, tmp_path)
    (figure,) = [figure for figure in figures if figure["layout"].get("showlegend")]
    assert [trace["name"] for trace in figure["data"]] == ["reward, optimised", "up", "down"]
    assert (
        figure["data"][2]["hovertext"][-1]
        == "down<br>iteration 30<br>85.00, pretrained 100.0<br>-1.50 standard deviations"
    )


def test_parts_have_a_figure_of_their_own_and_no_sentence(run, tmp_path):
    sa = {"watch/sa": (3.0, 1.0)}
    told = [{"reward": (i, 1.0), "part/qed": (0.5 - 0.1 * i, 0.1), "part/dock": (-7.0 - i, 1.0)} for i in range(4)]
    page = Page(report.write(put(run, *[one | sa for one in told]), Toy(), ALPHA))
    assert [line["name"] for line in page.data["parts"]["lines"]] == [None, "qed", "dock"]
    assert page.data["parts"]["lines"][1]["rows"][-1] == [30.0, pytest.approx(-3.0), pytest.approx(0.2)]
    assert [line["name"] for line in page.data["watch"]["lines"]] == [None, "sa"]
    assert "fell while the reward rose" not in page.text
    assert "No watched reward fell by more than 2 standard errors while the reward rose." in page.text
    assert len([figure for figure in draw(page, tmp_path) if figure["layout"].get("showlegend")]) == 2
    for words in ("part: qed its own scores", "part: dock its own scores", "watch: sa not optimised"):
        assert words in page.text


def test_the_table_before_and_after_tells_of_watched_rewards_with_their_intervals(run):
    put(run, {"watch/sa": (3.0, 1.0)}, *[{"watch/sa": (3.0 + i, 1.0)} for i in (1, 2, 3)])
    path = report.write(run, Toy(), ALPHA)
    sets = [Samples.load(run / "evaluations" / f"{name}.npz") for name in ("pretrained", "iteration_000030")]
    row = path.read_text("utf-8").split("watch: sa")[1].split("</tr>")[0]
    for one in sets:
        number, _, interval = str(readout.mean(one.beside["watch/sa"])).partition(" ")
        assert f"<b>{number}</b> <small>{interval}</small>" in row


@pytest.mark.parametrize(
    ("reward", "watched", "said"),
    [  # means before and after; 800 pretrained samples and 200 of the policy, spread 1: the standard error is 0.079
        ((0.0, 1.0), (0.0, -1.0), True),
        ((0.0, 1.0), (0.0, -0.2), True),
        ((0.0, 1.0), (0.0, -0.1), False),  # 1.3 standard errors
        ((0.0, 1.0), (0.0, 1.0), False),
        ((0.0, 0.1), (0.0, -1.0), False),  # the reward itself has hardly risen
        ((0.0, -1.0), (0.0, -1.0), False),
        ((0.0, 1.0), (np.nan, -1.0), False),
        ((0.0, 1.0), (0.0, np.nan), False),
    ],
)
def test_hacking_is_said_where_a_watched_reward_clearly_fell_and_the_reward_clearly_rose(reward, watched, said, run):
    before, last = ({"reward": (reward[i], 1.0), "watch/held": (watched[i], 1.0)} for i in (0, 1))
    between = {"reward": (9.0, 1.0), "watch/held": (-9.0, 1.0)}  # only the last evaluation counts
    page = Page(report.write(put(run, before, between, between, last), Toy(), ALPHA))
    words = "held fell while the reward rose : held by"
    assert (words in page.text) == said
    assert ("No watched reward fell" in page.text) != said
    if said:
        error = np.sqrt(1 / 799 + 1 / 199)
        fell = f"{-watched[1]:.3g} (from {0.0:.4g} to {watched[1]:.4g}, {-watched[1] / error:.3g} standard errors)"
        assert re.sub("-?[0-9.]+e-1[0-9]", "0", page.text).count(fell) == 1
        assert "If more of held is better, this is reward hacking." in page.text


def test_a_fall_that_rounding_explains_is_none():
    same = np.full(50, 0.1 + 0.2)
    assert readout.means(same, np.full(50, 0.3)).num_errors == 0
    assert readout.means(same, np.full(50, 0.2)).num_errors == -np.inf
    assert np.isnan(readout.means(same, np.array([])).after)


def test_a_stopped_run_shows_the_evaluation_that_is_in_no_row(run):
    put(run, {"watch/held": (0.0, 1.0)}, *[{"watch/held": (-i, 1.0)} for i in (1, 2, 3)])
    (run / "evaluations" / "iteration_000030.npz").rename(run / "evaluations" / "iteration_000031.npz")
    table = Table(run / "metrics.csv")
    table.truncate(20)
    rows = Page(report.write(run, Toy(), ALPHA)).data["watch"]["lines"][1]["rows"]
    assert [row[0] for row in rows] == [0, 10, 20, 31]
    assert rows[-1][2] == pytest.approx(-3.0)


@pytest.mark.parametrize("lost", ["pretrained", "iteration_*", "metrics"])
def test_held_out_rewards_need_no_file_in_particular(lost, run):
    put(run, {"watch/held": (0.0, 1.0)}, *[{"watch/held": (-i, 1.0)} for i in (1, 2, 3)])
    for path in [run / "metrics.csv"] if lost == "metrics" else (run / "evaluations").glob(f"{lost}.npz"):
        path.unlink()
    page = Page(report.write(run, Toy(), ALPHA))
    assert (page.data["watch"] is not None) == (lost == "metrics")
    assert "could not be used" not in page.text
