"""What a domain adds to a run's report: numbers of its samples, and sections of its own, whose faults cost little."""

from __future__ import annotations

import html
import json
import shutil
from io import StringIO

import numpy as np
import pytest
from rich.console import Console
from test_report import ALPHA, HOSTILE, Page, draw, make_run, samples

from envs.toy.domain import Toy
from rayft import display, report
from rayft.verdict import Samples, judge, measured


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "small")


@pytest.fixture
def run(small, tmp_path):
    return shutil.copytree(small, tmp_path / small.name)


def fine(samples):
    return {"mean": float(np.mean(samples)), "count": len(samples), "unknown": np.nan}


def broken(samples):
    raise RuntimeError("no ruler")


def no_mapping(samples):
    return 3.0


class Measured(Toy):
    metrics = "test_report_domain:fine"


def test_metrics_are_those_of_the_samples_whose_scoring_did_not_fail():
    told = samples(400, 0, 0)
    told.rewards[[0, 5, 300]] = np.nan  # the last is not kept
    found = measured(Measured(), told)
    kept = np.delete(told.x_0, [0, 5], axis=0)
    assert found.metrics == {
        "mean": pytest.approx(kept.mean()),
        "count": 198,
        "unknown": pytest.approx(np.nan, nan_ok=True),
    }
    assert found.unmeasured == ""
    assert measured(Toy(), told) is told


def test_metrics_survive_the_disk_and_become_scalars(tmp_path):
    before, after = (measured(Measured(), samples(200, sharpness, 0)) for sharpness in (0, 1))
    for name, one in (("before", before), ("after", after)):
        one.save(tmp_path / f"{name}.npz")
    again = [Samples.load(tmp_path / f"{name}.npz") for name in ("before", "after")]
    scalars = judge(*again, ALPHA).scalars()
    assert scalars["metric/mean"] == after.metrics["mean"] != before.metrics["mean"]
    assert scalars["metric/mean_pretrained"] == before.metrics["mean"]
    assert np.isnan(scalars["metric/unknown"])


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("test_report_domain:broken", "RuntimeError: no ruler"),
        ("test_report_domain:no_mapping", "AttributeError"),
        ("test_report_domain:absent", "test_report_domain has no 'absent'"),
        ("no_such_package:f", "no module 'no_such_package'"),
    ],
)
def test_metrics_that_fail_cost_a_sentence(path, why, run, tmp_path):
    class Failing(Toy):
        metrics = path

    found = measured(Failing(), samples(200, 0, 0))
    assert found.metrics == {}
    assert found.unmeasured.startswith(f"the domain's metrics are left out: {why}")
    verdict = judge(found, found, None)
    assert verdict.notes == [found.unmeasured]
    assert not any(name.startswith("metric/") for name in verdict.scalars())
    for file in (run / "evaluations").glob("*.npz"):
        measured(Failing(), Samples.load(file)).save(file)
    assert found.unmeasured in Page(report.write(run, Toy(), ALPHA)).text


def test_metrics_have_rows_in_the_table_before_and_after(run):
    for file in (run / "evaluations").glob("*.npz"):
        measured(Measured(), Samples.load(file)).save(file)
    before, after = (Samples.load(run / "evaluations" / f"{n}.npz") for n in ("pretrained", "iteration_000030"))
    text = Page(report.write(run, Toy(), ALPHA)).text
    assert f"metric: mean of the domain {before.metrics['mean']:.4g} {after.metrics['mean']:.4g}" in text
    assert "metric: count of the domain 200 200" in text
    assert "nan" not in text.partition("metric: unknown")[2][:40]


def test_metrics_are_told_in_a_terminal_too():
    before, after = (measured(Measured(), samples(200, sharpness, 0)) for sharpness in (0, 1))
    console = Console(file=StringIO(), width=120)
    console.print(display.before_after(judge(before, after, ALPHA).scalars()))
    row = next(line for line in console.file.getvalue().splitlines() if "metric: mean" in line)
    assert f"{before.metrics['mean']:.4f}" in row
    assert f"{after.metrics['mean']:.4f}" in row


class Exhibited(Toy):
    """Sections of its own; remembers what it was shown."""

    def page(self, panels):
        self.panels = panels
        figures = [{"name": n, "data": [{"x": [0], "fill": "var(--run)38"}], "layout": {}} for n in ("one", "two")]
        told = html.escape(json.dumps(figures))
        return {"Corners": f'<p>four of them</p><div data-figures="{told}"></div>', HOSTILE: "$data stays"}


def test_a_domains_own_sections_hold_its_figures_and_are_drawn(run, tmp_path):
    world = Exhibited()
    page = Page(report.write(run, world, ALPHA))
    assert "Corners four of them" in page.text
    assert f"{HOSTILE} $data stays" in page.text
    assert len(page.scripts) == 2
    figures = draw(page, tmp_path)
    (own,) = [figure for figure in figures if figure["data"][0].get("x") == [0]]
    assert own["data"][0]["fill"] == "#12345638", "colours are the page's"
    assert list(world.panels) == ["pretrained", "fine-tuned"]
    told = Samples.load(run / "evaluations" / "iteration_000030.npz")
    shown = world.panels["fine-tuned"]
    np.testing.assert_array_equal(shown.x_0, told.x_0)
    np.testing.assert_array_equal(shown.rewards, told.rewards[: len(told.x_0)])
    np.testing.assert_array_equal(np.stack(shown.samples), told.x_0)


def test_what_failed_to_be_scored_is_not_decoded_again(run):
    path = run / "evaluations" / "iteration_000030.npz"
    told = Samples.load(path)
    told.rewards[[3, 4]] = np.nan
    told.save(path)
    world = Exhibited()
    report.write(run, world, ALPHA)
    assert [i for i, one in enumerate(world.panels["fine-tuned"].samples) if one is None] == [3, 4]


@pytest.mark.parametrize("fault", ["raises", "no dict", "decoder", "short decoder"])
def test_sections_that_fail_cost_a_sentence(fault, run):
    class Broken(Toy):
        decoder = {"decoder": "test_report_domain:no_rdkit", "short decoder": "test_report_domain:short"}.get(
            fault, Toy.decoder
        )

        def page(self, panels):
            if fault == "raises":
                raise RuntimeError(f"the camera broke {HOSTILE}")
            return ["no dict"]

    path = report.write(run, Broken(), ALPHA)
    why = {
        "raises": "RuntimeError: the camera broke",
        "no dict": "ValueError: Broken.page gives list; return a dict of title to HTML",
        "decoder": "ValueError: needs rdkit.Chem; pip install",
        "short decoder": "ValueError: test_report_domain:short returned 1 samples for 200 events",
    }[fault]
    page = Page(path)
    assert f"The domain's own part of this page could not be used ({why}" in page.text
    assert len(page.scripts) == 2
    assert "Reached" in page.text
    assert page.data["histogram"]


def no_rdkit(x_0, context):
    raise ValueError("needs rdkit.Chem; pip install 'rayft[molecules]'")


def short(x_0, context):
    return [x_0[0]]


def test_a_domain_without_sections_is_not_decoded(run):
    class Plain(Toy):
        decoder = "test_report_domain:no_rdkit"

    assert "could not" not in Page(report.write(run, Plain(), ALPHA)).text


def test_undecodable_samples_are_in_no_bin_of_the_histogram_and_their_share_is_said(run):
    assert "In no bin" not in Page(report.write(run, Toy(), ALPHA)).text
    path = run / "evaluations" / "iteration_000030.npz"
    told = Samples.load(path)
    told.undecodable[:50], told.rewards[:50] = True, 5.0  # far above all others
    told.save(path)
    page = Page(report.write(run, Toy(), ALPHA))
    bars = page.data["histogram"]
    assert bars["edges"][-1] < 1
    assert sum(bars["before"]) == pytest.approx(1)
    assert sum(bars["run"]) == pytest.approx(0.75)
    assert "0.00% of the pretrained ones and 25.00% of the fine-tuned ones." in page.text
