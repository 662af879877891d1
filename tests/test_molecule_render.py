"""What the report shows of molecules: drawings, ranks, balls and sticks, and that nothing in them is taken for HTML."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from rdkit import Chem
from test_molecule_write import events
from test_report import ALPHA, HOSTILE, Page, make_run

from envs.molecules import render, solid
from envs.molecules.decode import heavy
from envs.molecules.domain import Molecules
from envs.molecules.reward import QED, embed
from rayft import report
from rayft.domain import Panel
from rayft.verdict import Samples, measured

BEFORE = ["CCO", "CC#N", "C=CC", "CC(=O)N", "CCCO", "CCCO"]
AFTER = ["CCCO", "OCC(C)(C)CN", "OCC(C)(C)CN", "C[C@H](O)CF"]


def panel(smiles, rewards, broken=()):
    x_0, context = events(smiles, broken)
    return Panel(x_0, context, np.array(rewards, dtype=float), heavy(x_0, context))


@pytest.fixture(scope="module")
def panels():
    before = panel(BEFORE, [0.1, 0.2, 0.0, np.nan, 0.4, 0.4], broken=[2])
    return {"pretrained": before, "fine-tuned": panel(AFTER, [0.5, 0.6, 0.7, -0.1])}


@pytest.fixture(scope="module")
def told(panels):
    return render.sections(panels)


class Tree(HTMLParser):
    """Open tags and text; fails on tags that do not close."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.words, self.figures = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.open.append(tag)
        self.figures += [json.loads(value) for name, value in attrs if name == "data-figures"]

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def test_every_section_is_well_formed_and_stands_alone(told):
    assert list(told) == ["Molecules", "The best molecules", "The best in three dimensions", "What else changed"]
    for body in told.values():
        tags = set(Tree(body).tags)
        assert not tags & {"script", "img", "link", "iframe", "style", "image", "use"}
        assert "http" not in body
        assert "url(" not in body


def test_the_grid_draws_every_decodable_molecule_with_its_score(told):
    tree = Tree(told["Molecules"])
    assert tree.tags.count("svg") == 5 + 4
    assert "5 molecules, 4 of them different, in 6 samples." in tree.text
    assert "4 molecules, 3 of them different, in 4 samples." in tree.text
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", told["Molecules"])
    assert sorted(captions[:5]) == ["<b>0.1</b>", "<b>0.2</b>", "<b>0.4</b>", "<b>0.4</b>", "no score"]


def test_of_many_molecules_a_few_are_drawn_and_always_the_same():
    many = panel(["CCO", "CCCO"] * 20, np.linspace(0, 1, 40))
    found = render.sections({"pretrained": many})
    assert Tree(found["Molecules"]).tags.count("svg") == render.NUM_DRAWN
    assert "20 at random of 40 molecules, 2 of them different" in found["Molecules"]
    assert render.sections({"pretrained": many}) == found


def test_the_best_are_ranked_and_a_molecule_is_there_once_with_its_highest_score(told):
    text = Tree(told["The best molecules"]).text
    assert re.findall(r"(\d)\. (-?[0-9.]+)", text) == [("1", "0.7"), ("2", "0.5"), ("3", "-0.1")]
    codes = re.findall(r"<code class=whole>(.*?)</code>", told["The best molecules"])
    assert codes == [Chem.CanonSmiles(AFTER[i]) for i in (1, 0, 3)]
    assert f"{codes[0]} 0.7\n{codes[1]} 0.5" in told["The best molecules"]


def test_a_drawing_has_the_ink_of_the_page_and_no_paper():
    drawn = render.draw("CC(=O)NCC#N")
    assert "currentColor" in drawn
    assert "#000000" not in drawn
    assert "#FFFFFF" not in drawn.upper()
    assert "<rect" not in drawn
    inks = {ink.lower() for ink in re.findall("#[0-9A-Fa-f]{6}", drawn)}
    assert inks == {render.INKS[7], render.INKS[8]}
    assert "nan" not in drawn
    assert drawn.count("<path") >= 8


@pytest.mark.parametrize("splits", [0, 1, 2])
def test_a_ball_is_closed_round_and_seen_from_outside(splits):
    points, faces = solid.sphere(splits)
    assert np.allclose(np.linalg.norm(points, axis=1), 1)
    edges = {frozenset(pair) for a, b, c in faces.tolist() for pair in ((a, b), (b, c), (c, a))}
    assert (len(points) - len(edges) + len(faces), len(faces)) == (2, 20 * 4**splits)  # Euler
    assert (np.linalg.det(points[faces]) > 0).all()


def test_balls_stand_where_the_atoms_are_and_are_named():
    mol = embed("NCC=O")
    meshes = {mesh.get("name"): mesh for mesh in solid.scene(mol, "x")["data"]}
    numbers = np.array([atom.GetAtomicNum() for atom in mol.GetAtoms()])
    xyz = mol.GetConformer().GetPositions()
    for name, number in {"hydrogen": 1, "carbon": 6, "nitrogen": 7, "oxygen": 8}.items():
        corners = np.array([meshes[name][axis] for axis in "xyz"]).T.reshape((numbers == number).sum(), -1, 3)
        np.testing.assert_allclose(corners.mean(1), (xyz - xyz.mean(0))[numbers == number], atol=0.01)
        radius, _ = solid.SMALL if number == 1 else solid.LARGE
        assert np.ptp(corners, axis=1) == pytest.approx(2 * radius, abs=0.05)
        assert max(max(meshes[name][corner]) for corner in "ijk") < corners.size // 3
        assert meshes[name]["hovertemplate"] == f"{name}<extra></extra>"
        assert meshes[name]["color"] == solid.COLOURS[number]
    assert meshes.keys() == {"hydrogen", "carbon", "nitrogen", "oxygen", None}


@pytest.mark.parametrize(
    ("smiles", "sticks"), [("CC", 7), ("C=C", 4 + 2), ("C#C", 2 + 3), ("c1ccccc1", 6 + 3 * 1 + 3 * 2)]
)
def test_a_bond_has_a_stick_for_each_electron_pair(smiles, sticks):
    mesh = solid.scene(embed(smiles), "x")["data"][-1]
    assert len(mesh["x"]) == sticks * 2 * solid.SIDES
    assert len(mesh["i"]) == sticks * 2 * solid.SIDES
    used = {corner for name in "ijk" for corner in mesh[name]}
    assert used == set(range(len(mesh["x"])))


def test_the_sticks_of_a_double_bond_lie_beside_each_other_along_it():
    mol = embed("C=C")
    mesh = solid.scene(mol, "x")["data"][-1]
    corners = np.array([mesh[axis] for axis in "xyz"]).T.reshape(-1, 2, solid.SIDES, 3).mean(2)
    first, second = corners[:2]  # the bond of the carbons comes first
    xyz = mol.GetConformer().GetPositions()
    along = xyz[1] - xyz[0]
    for stick in (first, second):
        np.testing.assert_allclose(stick[1] - stick[0], along, atol=0.02)
    gap = first[0] - second[0]
    assert np.linalg.norm(gap) == pytest.approx(0.22, abs=0.02)
    assert abs(gap @ along) < 0.02
    assert abs(np.linalg.det([gap, along, xyz[2] - xyz[0]])) < 0.02  # in the plane of the hydrogens


def test_hydrogens_that_the_model_leaves_out_are_placed(told):
    (scenes,) = Tree(told["The best in three dimensions"]).figures
    assert [scene["name"] for scene in scenes] == ["1: 0.7", "2: 0.5", "3: -0.1"]
    assert {mesh.get("name") for mesh in scenes[2]["data"]} == {"hydrogen", "carbon", "oxygen", "fluorine", None}


def test_histograms_are_shares_of_the_molecules(told):
    figures = [figure for (figure,) in Tree(told["What else changed"]).figures]
    assert [figure["name"] for figure in figures] == ["QED", "log P", "rings", "heavy atoms"]
    for figure in figures:
        for trace in figure["data"]:
            assert sum(trace["y"][:-1]) == pytest.approx(1, abs=1e-3)
    sizes = figures[-1]["data"][0]
    assert dict(zip(np.add(sizes["x"], 0.5), sizes["y"][:-1], strict=False)) == {3: 0.4, 4: 0.6, 5: 0, 6: 0, 7: 0}


def test_a_quantity_that_is_the_reward_is_not_shown_again():
    x_0, context = events(AFTER)
    samples = heavy(x_0, context)
    told = render.sections({"pretrained": Panel(x_0, context, np.array(QED()(samples)), samples)})
    assert [figure["name"] for (figure,) in Tree(told["What else changed"]).figures] == [
        "log P",
        "rings",
        "heavy atoms",
    ]


def test_where_nothing_can_be_decoded_or_scored_that_is_what_is_said():
    nothing = render.sections({"pretrained": panel(BEFORE, np.zeros(6), broken=range(6))})
    assert list(nothing) == ["Molecules"]
    assert "0 molecules, 0 of them different, in 6 samples." in nothing["Molecules"]
    unscored = render.sections({"pretrained": panel(BEFORE, np.full(6, np.nan))})
    assert list(unscored) == ["Molecules", "What else changed"]


def test_whatever_a_panel_is_called_it_is_text(panels):
    for body in render.sections({HOSTILE: panels["fine-tuned"]}).values():
        assert "script" not in Tree(body).tags
        assert "<script" not in body
        assert "onerror='alert" not in body


def test_a_few_numbers_tell_how_good_a_set_is(panels):
    found = render.numbers(panels["pretrained"].samples)
    assert found.keys() == {"validity", "uniqueness", "diversity", "qed", "synth", "sound_geometry"}
    assert found["validity"] == pytest.approx(5 / 6)
    assert found["uniqueness"] == pytest.approx(4 / 5)
    assert found["qed"] == pytest.approx(np.mean(QED()(["CCO", "CC#N", "CC(=O)N", "CCCO", "CCCO"])))
    assert found["sound_geometry"] == 1
    assert np.isnan(render.numbers([])["validity"]) and np.isnan(render.numbers([None])["sound_geometry"])
    bent = Chem.Mol(panels["pretrained"].samples[0])
    bent.GetConformer().SetPositions(bent.GetConformer().GetPositions() * 1.5)
    assert render.numbers([bent, panels["pretrained"].samples[0]])["sound_geometry"] == 0.5


def test_the_report_of_a_run_shows_its_molecules(panels, tmp_path):
    run, world = make_run(tmp_path / "run", size=20), Molecules()
    for name, one in zip(("pretrained", "iteration_000030"), panels.values(), strict=True):
        n, blank = 40, np.array([sample is None for sample in one.samples])
        rewards, undecodable = np.resize(one.rewards, n), np.resize(blank, n)
        x_0, mask = np.resize(one.x_0, (n, *one.x_0.shape[1:])), np.resize(one.context["mask"], (n, 9))
        kl = np.zeros(n) if name == "pretrained" else np.full(n, 2.0)
        samples = measured(world, Samples(rewards, kl, None, undecodable, x_0, {"mask": mask}))
        assert samples.unmeasured == ""
        samples.save(run / "evaluations" / f"{name}.npz")
    path = report.write(run, world, ALPHA)
    page = Page(path)
    assert "could not" not in page.text
    for title in ("Molecules", "The best molecules", "The best in three dimensions", "What else changed"):
        assert path.read_text("utf-8").count(f"<h2>{title}</h2>") == 1
    assert len(page.scripts) == 2
    share = np.resize([sample is None for sample in panels["pretrained"].samples], 40).mean()
    assert f"{share:.2%} of the pretrained ones and 0.00% of the fine-tuned ones." in page.text
    scored = np.isfinite(np.resize(panels["pretrained"].rewards, 40))
    valid = (scored.sum() - 40 * share) / scored.sum()
    assert f"metric: validity of the domain {valid:.4g} 1" in page.text
