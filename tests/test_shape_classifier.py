"""Classifiers of shapes and their rewards: what must not matter, what they learn, what they say of themselves."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from envs.shapes import recognise
from envs.shapes.classifier import GRID, NETWORKS, Classifier, load, occupancy, standard
from envs.shapes.data import normalised, split
from envs.shapes.generated import generated
from envs.shapes.latent import ROWS
from envs.shapes.recognise import TEMPERATURES, Recipe, best_temperature, folds, measured, tensors, train
from envs.shapes.reward import FOLDER, SHIPPED, WORST, LogProbability, Margin

QUICK = Recipe(epochs=6, batch_size=16, points=128, lr=3e-3)


@pytest.fixture(scope="module")
def shapes():
    return generated("aircraft", {"jet": 40, "helicopter": 40}, num_points=256)


@pytest.fixture(scope="module", params=list(NETWORKS))
def trained(request, shapes):
    torch.set_num_threads(1)
    part = split(shapes)["train"]
    return train(*tensors(part), request.param, part.classes, QUICK, 0)


@pytest.fixture(scope="module")
def saved(trained, tmp_path_factory):
    file = tmp_path_factory.mktemp("classifier") / "net.safetensors"
    trained.save(file)
    return str(file)


def test_it_learns_to_tell_jets_from_helicopters(trained, shapes):
    clouds, label = tensors(split(shapes)["test"])
    with torch.no_grad():
        right = (trained(clouds).argmax(1) == label).float().mean()
    assert float(right) >= 0.8


def test_neither_order_nor_place_nor_size_counts(trained, shapes):
    clouds = tensors(shapes)[0][:4]
    with torch.no_grad():
        here = trained(clouds)
        there = trained(7 * clouds[:, torch.randperm(clouds.shape[1])] + torch.tensor([3.0, -2.0, 1.0]))
    torch.testing.assert_close(here, there, atol=1e-3, rtol=1e-3)
    assert torch.allclose(here.exp().sum(1), torch.ones(4), atol=1e-5)


def test_a_grid_holds_every_point_once():
    clouds = torch.randn(3, 500, 3, dtype=torch.float64)
    grid = occupancy(clouds)
    assert grid.shape == (3, GRID, GRID, GRID)
    mass = grid.flatten(1).sum(1) * 500 * 64 / GRID**3
    torch.testing.assert_close(mass, torch.full((3,), 500.0, dtype=torch.float64))


def test_a_grid_moves_with_its_points_by_whole_cells():
    clouds = torch.rand(1, 50, 3) - 0.5
    step = torch.tensor([2 * 3.0 / (GRID - 1), 0.0, 0.0])
    torch.testing.assert_close(occupancy(clouds + step)[:, 1:], occupancy(clouds)[:, :-1], atol=1e-3, rtol=1e-3)


def test_a_cloud_in_one_place_gives_a_number_all_the_same(trained):
    with torch.no_grad():
        assert bool(torch.isfinite(trained(torch.ones(1, 64, 3))).all())
    assert float(standard(torch.ones(1, 8, 3)).abs().max()) == 0


def test_what_is_saved_is_what_is_loaded(trained, saved, shapes):
    trained.temperature.fill_(1.7)
    trained.save(saved)
    again, clouds = load(saved), tensors(shapes)[0][:3]
    assert again.classes == ("jet", "helicopter")
    with torch.no_grad():
        torch.testing.assert_close(again(clouds), trained(clouds))


def test_the_reward_is_log_p_of_the_label_and_has_its_gradient(saved, shapes):
    clouds = normalised(shapes.points)
    reward, net = LogProbability("helicopter", saved), load(saved)
    found = reward(list(clouds[:6]))
    with torch.no_grad():
        expected = net(torch.from_numpy(clouds[:6]))[:, 1]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found[:6].max() < 0
    events = torch.cat([torch.randn(6, ROWS, 3), torch.from_numpy(clouds[:6])], 1).requires_grad_(True)
    value = reward.value(events, {})
    np.testing.assert_allclose(value.detach(), found, atol=1e-5)
    (slope,) = torch.autograd.grad(value.sum(), events)
    assert float(slope[:, :ROWS].abs().max()) == 0  # the latent is not looked at
    assert float(slope[:, ROWS:].abs().max()) > 0


def test_clouds_of_different_sizes_are_scored_in_their_order(saved, shapes):
    clouds = list(normalised(shapes.points)[[0, 50, 1, 60]])
    clouds[1], clouds[2] = clouds[1][:100], clouds[2][:100]
    reward = LogProbability("helicopter", saved)
    np.testing.assert_allclose(reward(clouds), [reward([cloud])[0] for cloud in clouds], atol=1e-5)


def test_the_margin_is_the_odds_of_the_label(saved, shapes):
    clouds = list(normalised(shapes.points)[::9])
    log_p = LogProbability("helicopter", saved)(clouds)
    np.testing.assert_allclose(Margin("helicopter", saved)(clouds), log_p - np.log1p(-np.exp(log_p)), atol=1e-3)
    assert Margin.undecodable == WORST


def test_an_unknown_label_a_missing_file_and_a_damaged_one_are_named(saved, tmp_path):
    with pytest.raises(ValueError, match="label is 'teapot'; this classifier tells jet, helicopter apart"):
        LogProbability("teapot", saved)
    with pytest.raises(ValueError, match="no classifier at"):
        LogProbability("jet", str(tmp_path / "none.safetensors"))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\0" * 100)
    with pytest.raises(ValueError, match="is no classifier of shapes, or is damaged"):
        load(broken)
    with pytest.raises(ValueError, match="there is no network 'resnet'"):
        Classifier("resnet", ["a"])


# -- the card


def test_every_shape_is_in_one_fold_and_every_class_in_each():
    label = np.repeat([0, 1, 2], [50, 20, 7])
    found = folds(label, 0)
    assert np.bincount(found).sum() == 77
    for k in range(3):
        counts = np.bincount(found[label == k], minlength=5)
        assert counts.max() - counts.min() <= 1


def test_a_measured_set_of_answers_has_the_numbers_of_one_worked_by_hand():
    log_odds = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
    told = measured(log_odds, torch.tensor([0, 0, 1, 1]), 2)
    sure = float(torch.sigmoid(torch.tensor(2.0)))
    assert told["accuracy"] == 0.75
    assert told["confusion"] == [[2, 0], [1, 1]]
    assert told["calibration_error"] == pytest.approx(abs(0.75 - sure), abs=1e-6)
    assert told["standard_error"] == pytest.approx((0.75 * 0.25 / 4) ** 0.5)


def test_the_temperature_makes_overconfident_answers_honest():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 3, generator=generator)
    label = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    assert best_temperature(4 * logits, label) == pytest.approx(4, rel=0.1)
    assert best_temperature(4 * logits, logits.argmax(1)) == TEMPERATURES[0]  # no error, no best one


def test_a_card_says_when_its_temperature_is_a_bound(monkeypatch, shapes):
    monkeypatch.setattr(recognise, "train", lambda *told: Classifier("pointnet", shapes.classes).eval())
    for temperature, bounded in ((TEMPERATURES[0], True), (TEMPERATURES[1], False), (TEMPERATURES[-1], True)):
        monkeypatch.setattr(recognise, "best_temperature", lambda *told, found=temperature: found)
        assert recognise.card(shapes, "pointnet", QUICK, 64, 0)[1]["temperature_bounded"] is bounded
    for card in (json.loads((FOLDER / file).with_suffix(".json").read_text()) for file in SHIPPED.values()):
        assert card["temperature_bounded"] is (card["temperature"] in (TEMPERATURES[0], TEMPERATURES[-1]))


def test_the_command_writes_a_classifier_and_its_card(tmp_path, monkeypatch, shapes):
    monkeypatch.setattr(recognise, "read", lambda *told: shapes)
    file = tmp_path / "deep" / "net.safetensors"
    recognise.main([str(file), "--network", "voxnet", "--epochs", "1", "--points", "64"])
    card = json.loads(file.with_suffix(".json").read_text())
    assert card["classes"] == ["jet", "helicopter"]
    assert card["folds"]["num"] == 80
    assert np.sum(card["test"]["confusion"]) == card["test"]["num"] == 6
    assert load(file).kind == "voxnet"


def test_data_that_are_not_there_are_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match="recognise: "):
        recognise.main([str(tmp_path / "x.safetensors"), "--data", str(tmp_path / "no.npz")])


@pytest.mark.parametrize(
    ("told", "why"),
    [
        (["x.safetensors", "--epochs", "0"], "epochs is 0; give at least 1"),
        (["x.safetensors", "--points", "0"], "points is 0; give 1 to 256"),
        (["x.safetensors", "--points", "99999"], "points is 99999; give 1 to 256"),
        (["x.json"], r"OUT is .*x\.json; give FILE\.safetensors, beside which its card is written as FILE\.json"),
        (["file/x.safetensors"], r"cannot write .*file/x\.safetensors: .*; give another OUT"),
        (["folder.safetensors"], r"cannot write .*folder\.safetensors: Is a directory"),
        (["card.safetensors"], r"cannot write .*card\.safetensors: Is a directory"),
    ],
)
def test_what_cannot_be_done_is_said_before_training_and_leaves_nothing(told, why, tmp_path, monkeypatch, shapes):
    monkeypatch.setattr(recognise, "read", lambda *told: shapes)
    monkeypatch.setattr(recognise, "train", None)  # not called
    (tmp_path / "file").touch()
    for folder in ("folder.safetensors", "card.json"):
        (tmp_path / folder).mkdir()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit, match=f"recognise: {why}"):
        recognise.main([str(tmp_path / told[0]), *told[1:]])
    assert sorted(tmp_path.iterdir()) == before


def test_too_few_shapes_are_refused_and_one_alone_in_its_class_is_named(tmp_path, caplog, shapes):
    def command(*rows: int) -> list[str]:
        kinds = np.array(shapes.classes)[shapes.label[list(rows)]]
        np.savez(tmp_path / "few.npz", points=shapes.points[list(rows)], category=kinds)
        return [str(tmp_path / "x.safetensors"), "--data", str(tmp_path / "few.npz"), "--epochs", "1"]

    for rows, said in (((0,), "1 shape"), ((0, 1, 2), "3 shapes"), ((0, 40), "2 shapes")):
        with pytest.raises(SystemExit, match=rf"recognise: there is nothing to tell apart in {said} of "):
            recognise.main(command(*rows))
    caplog.clear()
    recognise.main(command(0, 1, 40))
    assert "1 alone in a class, of which nothing is held out (helicopter)" in caplog.text
    assert json.loads((tmp_path / "x.json").read_text())["folds"]["num"] == 3
