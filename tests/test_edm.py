"""EDM's checkpoints: read without running anything in them, written back as they were, refused in a sentence."""

import argparse
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from envs.molecules import edm

GOLDEN = Path(__file__).parent / "golden" / "edm"
CONDITIONAL = GOLDEN / "conditional"
ARGUMENTS, WEIGHTS = "args.pickle", "generative_model_ema.npy"
EDGE = "dynamics.egnn.e_block_1.gcl_0.edge_mlp.0.weight"


class Runs:
    """Pickled as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.fixture
def folder(tmp_path):
    """A copy to spoil."""
    for name in (ARGUMENTS, WEIGHTS):
        shutil.copy(GOLDEN / name, tmp_path / name)
    return tmp_path


def arguments(folder, **changed):
    """Its settings with some changed, or removed where ``None`` is given."""
    given = vars(pickle.loads((GOLDEN / ARGUMENTS).read_bytes())) | changed
    given = {name: value for name, value in given.items() if value is not None}
    (folder / ARGUMENTS).write_bytes(pickle.dumps(argparse.Namespace(**given)))


def weights(folder, **changed):
    """Its weights with some changed, or removed where ``None`` is given."""
    state = torch.load(GOLDEN / WEIGHTS, weights_only=True)
    state |= changed
    torch.save({key: value for key, value in state.items() if value is not None}, folder / WEIGHTS)


def refused(folder, *words):
    """The one sentence that reading ends with."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        edm.read(folder)
    said = str(caught.value)
    assert "\n" not in said and caught.value.__cause__ is None
    for word in words:
        assert word in said, said


# read


def test_a_checkpoint_says_what_its_events_are():
    model = edm.read(GOLDEN)
    assert (model.norm_values, model.elements) == ((1.0, 4.0, 10.0), (1, 6, 7, 8, 9))
    assert (model.include_charges, model.remove_h, model.conditioning) == (True, False, ())
    assert (model.denoiser.num_features, model.denoiser.num_steps) == (6, 1000)
    assert not model.denoiser.training


def test_one_of_heavy_atoms_told_properties_too():
    model = edm.read(CONDITIONAL)
    assert (model.norm_values, model.elements) == ((1.0, 8.0, 1.0), (6, 7, 8, 9))
    assert (model.include_charges, model.remove_h, model.conditioning) == (False, True, ("alpha", "gap"))
    assert (model.denoiser.num_features, model.denoiser.num_properties, model.denoiser.num_steps) == (4, 2, 100)


def test_a_cosine_schedule_is_edm_s_formula_and_goes_back_as_it_came(folder):
    num_steps = 1000
    u = (np.arange(num_steps + 2) / (num_steps + 1) + 0.008) / 1.008
    squared = np.cos(u * np.pi / 2) ** 2
    closed = squared[1:] / squared[0]  # alpha_bar_0 is below 1
    closed[-1] = 1e-3 * closed[-2]  # a beta of 1 is capped
    gamma = torch.from_numpy(np.log1p(-closed) - np.log(closed)).float()
    arguments(folder, diffusion_noise_schedule="cosine")
    refused(folder, "gamma.gamma", "is not that of cosine at T = 1000")
    weights(folder, **{"gamma.gamma": gamma})
    model = edm.read(folder)
    np.testing.assert_allclose(model.schedule.alpha_bar.numpy(), closed, rtol=1e-9)
    edm.write(folder / "back", model)
    again = torch.load(folder / "back" / WEIGHTS, weights_only=True)["gamma.gamma"]
    torch.testing.assert_close(again, gamma, rtol=1e-6, atol=1e-6)


def test_the_schedule_is_the_table_in_the_checkpoint():
    gamma = torch.from_numpy(np.load(GOLDEN / "forward.npz")["gamma"])
    model = edm.read(GOLDEN)
    torch.testing.assert_close(torch.sigmoid(-gamma.double()), model.schedule.alpha_bar, rtol=0, atol=2e-8)
    assert torch.equal(edm.expected(model.denoiser, model.schedule)["gamma.gamma"], gamma)


def test_settings_that_older_checkpoints_lack_are_what_they_were_then(folder):
    arguments(folder, normalization_factor=None, aggregation_method=None)
    state = edm.read(folder).denoiser.state_dict()
    assert all(torch.equal(state[key], value) for key, value in edm.read(GOLDEN).denoiser.state_dict().items())


def test_a_pickle_of_any_protocol_is_read(folder):
    given = pickle.loads((GOLDEN / ARGUMENTS).read_bytes())
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        (folder / ARGUMENTS).write_bytes(pickle.dumps(given, protocol=protocol))
        assert edm.read(folder).arguments == vars(given)


# written


@pytest.mark.parametrize("source", [GOLDEN, CONDITIONAL])
def test_a_checkpoint_is_written_as_it_was_read(source, tmp_path):
    model = edm.read(source)
    edm.write(tmp_path / "new" / "folder", model)
    names = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert names == [ARGUMENTS, "generative_model.npy" if source is CONDITIONAL else WEIGHTS]
    before = torch.load(source / names[1], weights_only=True)
    after = torch.load(tmp_path / "new" / "folder" / names[1], weights_only=True)
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    given = pickle.loads((tmp_path / "new" / "folder" / ARGUMENTS).read_bytes())
    assert type(given) is argparse.Namespace and given == pickle.loads((source / ARGUMENTS).read_bytes())
    again = edm.read(tmp_path / "new" / "folder")
    assert again.arguments == model.arguments and torch.equal(again.schedule.alpha_bar, model.schedule.alpha_bar)


def test_the_settings_file_is_the_same_to_the_byte(tmp_path):
    edm.write(tmp_path, edm.read(GOLDEN))
    assert (tmp_path / ARGUMENTS).read_bytes() == (GOLDEN / ARGUMENTS).read_bytes()


def test_a_fine_tuned_network_goes_into_the_same_settings(tmp_path):
    model = edm.read(GOLDEN)
    with torch.no_grad():
        for parameter in model.denoiser.parameters():
            parameter.add_(0.01)
    edm.write(tmp_path, model)
    state = torch.load(tmp_path / WEIGHTS, weights_only=True)
    before = torch.load(GOLDEN / WEIGHTS, weights_only=True)
    torch.testing.assert_close(state[EDGE], before[EDGE] + 0.01)


def test_a_network_of_other_settings_is_not_written(tmp_path):
    other = replace(edm.read(GOLDEN), denoiser=edm.read(CONDITIONAL).denoiser)
    with pytest.raises(ValueError, match=r"the model's network does not fit the settings: 'dynamics\.egnn\.embedding"):
        edm.write(tmp_path / "none", other)
    assert not (tmp_path / "none").exists()


# refused: files


def test_a_missing_file_is_named(folder):
    refused(folder / "elsewhere", ARGUMENTS, WEIGHTS)
    (folder / WEIGHTS).unlink()
    refused(folder, f"no {folder / WEIGHTS}")


@pytest.mark.parametrize("name", [ARGUMENTS, WEIGHTS])
@pytest.mark.parametrize("share", [0, 0.3, 0.9])
def test_a_truncated_file_is_damaged(folder, name, share):
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: int(share * len(whole))])
    refused(folder, str(folder / name), "damaged")


@pytest.mark.parametrize("name", [ARGUMENTS, WEIGHTS])
def test_another_file_under_its_name_is_damaged(folder, name):
    (folder / name).write_bytes(b"\x93NUMPY" + bytes(range(200)))
    refused(folder, str(folder / name), "damaged")


def test_a_large_pickle_is_not_opened(folder):
    (folder / ARGUMENTS).write_bytes(pickle.dumps(argparse.Namespace(a="x" * (1 << 20))))
    refused(folder, "bytes; EDM's settings take about 1,000")


# refused: code


def calls(folder):
    import os

    run = f"touch {folder / 'ran'}"
    return {
        "posix.system": Runs(os.system, run),
        "builtins.eval": Runs(eval, f"open({str(folder / 'ran')!r}, 'w')"),
        "builtins.exec": argparse.Namespace(nf=Runs(exec, f"open({str(folder / 'ran')!r}, 'w')")),
        "builtins.getattr": Runs(getattr, argparse.Namespace, "__init__"),
        "pathlib.": argparse.Namespace(datadir=Path("qm9")),
        "torch": argparse.Namespace(device=torch.device("cpu")),
        "argparse.ArgumentParser": Runs(argparse.ArgumentParser),
    }


@pytest.mark.parametrize("name", calls(Path()))
def test_a_pickle_that_names_anything_else_is_refused_unrun(folder, name):
    (folder / ARGUMENTS).write_bytes(pickle.dumps(calls(folder)[name]))
    refused(folder, f"asks for '{name}", "could run code")
    assert not (folder / "ran").exists()


def test_a_pickle_cannot_change_the_namespace_class(folder):
    spoil = b"\x80\x04cargparse\nNamespace\nN}X\x06\x00\x00\x00__eq__K\x07s\x86b."  # BUILD on the class itself
    (folder / ARGUMENTS).write_bytes(spoil)
    refused(folder, ARGUMENTS)
    assert argparse.Namespace.__eq__ != 7 and edm.read(GOLDEN).elements


def test_weights_that_hold_code_are_refused_unrun(folder):
    torch.save(calls(folder)["posix.system"], folder / WEIGHTS)
    refused(folder, str(folder / WEIGHTS), "damaged or holds more than tensors")
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("held", [{"nf": 32}, [1, 2], None, argparse.Namespace(inner=argparse.Namespace(a=1))])
def test_a_pickle_of_something_else_is_said_to_be_that(folder, held):
    (folder / ARGUMENTS).write_bytes(pickle.dumps(held))
    refused(folder, "should be an argparse.Namespace of plain values")


# refused: settings


@pytest.mark.parametrize(
    ("setting", "value", "allowed"),
    [
        ("diffusion_noise_schedule", "cosine_2", "or a polynomial schedule such as 'polynomial_2', no learned one"),
        ("diffusion_noise_schedule", "learned", "'cosine' or a polynomial schedule"),
        ("model", "gnn_dynamics", "'egnn_dynamics'"),
        ("probabilistic_model", "flow", "'diffusion'"),
        ("dataset", "geom", "'qm9' or 'qm9_second_half'"),
        ("aggregation_method", "mean", "'sum'"),
        ("condition_time", False, "True"),
        ("remove_h", 1, "True or False"),
        ("normalize_factors", [1, 4], "three positive numbers"),
        ("normalize_factors", [1, 0, 10], "three positive numbers"),
        ("normalize_factors", 3, "three positive numbers"),
        ("nf", "32", "a whole number from 1 to 10000"),
        ("n_layers", 10**12, "a whole number from 1 to 10000"),
        ("attention", "yes", "True or False"),
        ("norm_constant", float("nan"), "a number from 0"),
        ("diffusion_noise_precision", 0, "a number from 1e-09 to 0.1"),
        ("conditioning", "alpha", "a list of properties' names"),
    ],
)
def test_a_setting_that_cannot_be_reproduced_is_named(folder, setting, value, allowed):
    arguments(folder, **{setting: value})
    refused(folder, str(folder / ARGUMENTS), f"{setting} is ", allowed)


def test_a_setting_that_is_missing_is_named(folder):
    arguments(folder, nf=None)
    refused(folder, "has no 'nf'", "a whole number")


def test_a_property_of_more_than_one_number_is_refused(folder):
    arguments(folder, conditioning=["alpha"], context_node_nf=3)
    refused(folder, "context_node_nf 3 for conditioning ['alpha']", "one number for each property")


# refused: weights


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({EDGE: torch.zeros(32, 60)}, (EDGE, "float32 (32, 60)", "float32 (32, 66)")),
        ({EDGE: torch.zeros(32, 66).double()}, (EDGE, "float64 (32, 66)", "float32 (32, 66)")),
        ({EDGE: None}, (EDGE, "is absent, it should be float32 (32, 66)")),
        ({"extra": torch.zeros(2)}, ("'extra' is float32 (2,), it should be absent",)),
        ({EDGE: torch.full((32, 66), torch.nan)}, (EDGE, "not finite")),
        ({"gamma.gamma": torch.linspace(-11, 11, 1001)}, ("gamma.gamma", "polynomial_2 at T = 1000")),
        ({"gamma.gamma": torch.zeros(501)}, ("gamma.gamma", "float32 (501,)")),
        ({EDGE: 3}, ("should be EDM's state dict, names and tensors",)),
    ],
)
def test_weights_that_are_not_what_the_settings_say_are_named(folder, changed, words):
    weights(folder, **changed)
    refused(folder, str(folder / WEIGHTS), *words)


def test_settings_that_are_not_those_of_the_weights_are_named(folder):
    arguments(folder, n_layers=2)
    refused(folder, "'dynamics.egnn.e_block_2.gcl_0.edge_mlp.0.weight'", "should be absent")


def test_no_memory_is_taken_for_what_settings_only_claim(folder, monkeypatch):
    devices, network = [], edm.network
    monkeypatch.setattr(edm, "network", lambda given: devices.append(torch.get_default_device().type) or network(given))
    arguments(folder, nf=33)
    refused(folder, "does not fit the settings")
    assert devices == ["meta"]


def test_weights_that_are_a_list_are_said_to_be_that(folder):
    torch.save([torch.zeros(2)], folder / WEIGHTS)
    refused(folder, "holds a list")
