"""What the report shows of shapes: pictures, clouds to turn, and that nothing in them is taken for HTML."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from test_report import ALPHA, HOSTILE, Page, make_run
from test_shape_splat import pixels, plane

from envs.shapes import render
from envs.shapes.domain import Shapes
from envs.toy.domain import Toy
from rayft import report
from rayft.domain import Panel
from rayft.verdict import Samples, measured


def panel(num, lacking=(), unscored=(), points=200):
    samples = [None if i in lacking else plane(points, i) for i in range(num)]
    rewards = np.where(np.isin(np.arange(num), unscored), np.nan, np.arange(num) / 10)
    return Panel(np.zeros((num, 1)), {}, rewards, samples)


@pytest.fixture(scope="module")
def panels():
    return {"pretrained": panel(12, [3], [5]), "fine-tuned": panel(9)}


@pytest.fixture(scope="module")
def told(panels):
    return render.sections(panels)


class Tree(HTMLParser):
    """Tags, text, figures and pictures; fails on tags that do not close."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.words, self.figures, self.pictures, self.captions = [], [], [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag != "img":
            self.open.append(tag)
        told = dict(attrs)
        self.figures += json.loads(told.get("data-figures", "[]"))
        if tag == "img":
            kind, _, text = told["src"].partition(",")
            assert kind == "data:image/png;base64"
            self.pictures.append(base64.b64decode(text, validate=True))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if "figcaption" in self.open:
            self.captions.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


# -- the page


def test_every_section_is_well_formed_and_stands_alone(told):
    assert list(told) == ["Shapes", "Shapes in three dimensions"]
    for body in told.values():
        tags = set(Tree(body).tags)
        assert not tags & {"script", "link", "iframe", "style", "image", "use"}
        assert "http" not in body
        assert "url(" not in body


def test_the_best_typical_and_random_shapes_of_each_model_are_shown_with_their_scores(told):
    tree = Tree(told["Shapes"])
    assert "11 shapes in 12 samples" in tree.text
    assert "9 shapes in 9 samples" in tree.text
    assert len(tree.pictures) == len(tree.captions) == 2 * 3 * render.NUM_DRAWN
    assert tree.captions[:10] == ["1.1", "1", "0.9", "0.8", "0.7", "0.9", "0.8", "0.7", "0.6", "0.4"]
    assert tree.captions[15:25] == ["0.8", "0.7", "0.6", "0.5", "0.4", "0.6", "0.5", "0.4", "0.3", "0.2"]
    width, height = (sum(sizes) if i else sizes[0] for i, sizes in enumerate(zip(*render.SIZES.values(), strict=True)))
    for data in tree.pictures[::7]:
        assert pixels(data).shape == (height, width, 4)
        assert pixels(data)[..., 3].any()


def test_the_clouds_to_turn_are_the_best_of_each_model_in_its_colour(told):
    scenes = Tree(told["Shapes in three dimensions"]).figures
    assert [scene["name"] for scene in scenes][:2] == ["fine-tuned, 1: 0.8", "fine-tuned, 2: 0.7"]
    assert [scene["name"] for scene in scenes][4:6] == ["pretrained, 1: 1.1", "pretrained, 2: 1"]
    assert [scene["data"][0]["marker"]["color"] for scene in scenes] == ["var(--run)"] * 4 + ["var(--before)"] * 4
    x = plane(200, 8)
    found = np.array([scenes[0]["data"][0][axis] for axis in "xyz"]).T
    middle = (x.min(0) + x.max(0)) / 2
    np.testing.assert_allclose(found, (x - middle) / np.abs(x - middle).max(), atol=6e-4)
    assert scenes[0]["layout"]["scene"]["camera"]["up"] == {"x": 0, "y": 0, "z": 1}


def test_the_upright_axis_is_y_in_shapenets_files(panels):
    some = {"pretrained": panel(1)}
    found = render.sections(some, up="y")
    assert found["Shapes"] != render.sections(some)["Shapes"]
    (scene,) = Tree(found["Shapes in three dimensions"]).figures
    assert scene["layout"]["scene"]["camera"]["up"] == {"x": 0, "y": 1, "z": 0}
    assert Shapes(data="shapenet.HDF5").page(some) == found
    assert Shapes(data="shapenet.npz").page(some) == Shapes().page(some) == render.sections(some)


def test_two_models_of_noisy_clouds_stay_within_the_bound_of_a_page():
    rng = np.random.default_rng(0)
    noise = Panel(np.zeros((5, 1)), {}, np.arange(5.0), list(rng.uniform(-1, 1, (5, 2048, 3))))
    body = render.sections({"fine-tuned": noise})
    pictures = len(Tree(body["Shapes"]).pictures)
    assert 2 * (3 * render.NUM_DRAWN / pictures * len(body["Shapes"]) + len(body["Shapes in three dimensions"])) < 1.5e6


def test_where_nothing_can_be_decoded_or_scored_that_is_what_is_said():
    nothing = render.sections({"pretrained": panel(3, lacking=range(3))})
    assert list(nothing) == ["Shapes"]
    assert "0 shapes in 3 samples" in nothing["Shapes"]
    unscored = render.sections({"pretrained": panel(3, unscored=range(3))})
    assert Tree(unscored["Shapes"]).captions == ["no score"] * 3
    scene, *_ = Tree(unscored["Shapes in three dimensions"]).figures
    assert scene["name"] == "pretrained, 1: no score"


def test_whatever_a_panel_is_called_it_is_text():
    for body in render.sections({HOSTILE: panel(2)}).values():
        tree = Tree(body)
        assert "script" not in tree.tags
        assert "<script" not in body
        assert "onerror='alert" not in body
        assert re.findall(r"<img (?!src=\"data:)", body) == []


class Clouds(Toy):
    """Events that are clouds."""

    metrics = "envs.shapes.metrics:numbers"

    def page(self, panels):
        return render.sections(panels)


def test_the_report_of_a_run_shows_its_shapes_and_tells_their_numbers(tmp_path):
    run, world = make_run(tmp_path / "run", size=20), Clouds()
    for name, num in (("pretrained", 30), ("iteration_000030", 20)):
        x_0 = np.stack([plane(150, i) for i in range(num)])
        kl = np.zeros(num) if name == "pretrained" else np.full(num, 2.0)
        rewards, undecodable = np.arange(num) / num, np.zeros(num, bool)
        samples = measured(world, Samples(rewards, kl, None, undecodable, x_0, {}))
        assert samples.unmeasured == ""
        samples.save(run / "evaluations" / f"{name}.npz")
    path = report.write(run, world, ALPHA)
    page = Page(path)
    assert "could not" not in page.text
    for title in ("Shapes", "Shapes in three dimensions"):
        assert path.read_text("utf-8").count(f"<h2>{title}</h2>") == 1
    assert "metric: diversity of the domain" in page.text
    assert sum(tag == "img" for tag, _ in page.tags) == 30
