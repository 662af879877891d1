"""``rayft import edm`` and ``rayft export edm``: there and back, and what is refused with one sentence and exit 2."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_molecules import PUBLISHED
from test_edm import CONDITIONAL, GOLDEN, WEIGHTS, Runs

from envs.molecules import edm, edm_files
from rayft import store
from rayft.cli import main
from rayft.domain import build


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def folder(here):
    """A copy of the checkpoint to spoil."""
    (here / "theirs").mkdir()
    for name in (edm.ARGUMENTS, WEIGHTS):
        shutil.copy(GOLDEN / name, here / "theirs")
    return here / "theirs"


def refused(capfd, command, *words):
    """The one sentence a command ends with."""
    assert main(command) == 2
    out, said = capfd.readouterr()
    assert out == "" and said.count("\n") == 1 and said.startswith("rayft: ")
    for word in words:
        assert word in said, said


def tensors(folder):
    (path,) = folder.glob("*.npy")
    return path.name, torch.load(path, weights_only=True)


# there and back


def test_an_imported_checkpoint_is_exported_as_it_was(here, capfd):
    assert main(["import", "edm", str(GOLDEN), "--out", "model.safetensors"]) == 0
    assert main(["export", "edm", "model.safetensors", "back/again"]) == 0
    assert (here / "back/again" / edm.ARGUMENTS).read_bytes() == (GOLDEN / edm.ARGUMENTS).read_bytes()
    (name, before), (again, after) = tensors(GOLDEN), tensors(here / "back/again")
    assert name == again and list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    out, err = capfd.readouterr()
    assert err == "" and "in model.safetensors" in out and "in back/again" in out
    assert {path.name for path in here.iterdir()} == {"model.safetensors", "back"}, "nothing half-written is left"


def test_so_is_a_conditional_one_of_heavy_atoms(here):
    assert main(["import", "edm", str(CONDITIONAL)]) == 0
    assert main(["export", "edm", "conditional.safetensors", "back"]) == 0
    (name, before), (again, after) = tensors(CONDITIONAL), tensors(here / "back")
    assert name == again == "generative_model.npy" and all(torch.equal(before[key], after[key]) for key in before)
    assert edm.read(here / "back").arguments == edm.read(CONDITIONAL).arguments


def test_settings_of_any_plain_kind_come_back_as_they_were(here):
    odd = {
        "pair": (1, 2.0, None),
        "nested": [(), {"a": {(1, "b"): [True, b"\x00\xff"]}}, {"tuple": [1]}],
        "sets": [{1, 2}, frozenset({"x"})],
        "number": 1e-300,
        "endless": [float("inf"), -0.0],
        "complex": 1 - 2j,
        "text": "ä\n\0",
    }
    model = edm.read(GOLDEN)
    model = edm.EDMModel(model.denoiser, model.schedule, {**model.arguments, **odd})
    edm_files.keep(model, here / "odd.safetensors")
    found = edm_files.read(here / "odd.safetensors").arguments
    assert found == model.arguments and list(found) == list(model.arguments)
    assert repr({name: found[name] for name in odd if name != "sets"}) == repr(
        {name: value for name, value in odd.items() if name != "sets"}
    )


def test_what_is_imported_is_told_in_three_lines_and_the_last_names_a_command_that_runs(here, capfd):
    assert main(["import", "edm", str(CONDITIONAL), "--out", "."]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "EDM of 2 layers of width 8, 3,375 weights; heavy atoms, 4 features each"
    assert lines[1] == "T = 100, polynomial_2 with precision 1e-05; told alpha, gap"
    said, _, command = lines[2].partition("; next: rayft ")
    assert said == "in conditional.safetensors"
    assert main([*command.split(), "--num", "3", "--num-steps", "5"]) == 0
    assert capfd.readouterr().out.startswith("0 of 3 samples in molecules.sdf: index; 3 decode to nothing")
    assert main([*command.split()[:3], "domain.at.alpha=0"]) == 2
    assert "at lacks gap" in capfd.readouterr().err


def test_an_imported_file_gives_the_domain_the_network_of_the_folder(here):
    assert main(["import", "edm", str(GOLDEN)]) == 0
    worlds = [build("molecules_edm", {"model": str(path)}) for path in (GOLDEN, here / "edm.safetensors")]
    first, second = (world.denoiser().state_dict() for world in worlds)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert first.keys() == load_file(here / "edm.safetensors").keys(), "a domain's weights= takes the file too"
    assert torch.equal(worlds[0].schedule().alpha_bar, worlds[1].schedule().alpha_bar)


# a run's


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint as a run on this domain leaves it."""
    told = {"model": str(GOLDEN), "num_steps": 5, "data": str(PUBLISHED)}
    state = build("molecules_edm", told).denoiser().state_dict()
    tuned = {key: value.numpy() + np.float32(0.01) for key, value in state.items()}
    return saved(tmp_path_factory.mktemp("run"), {"name": "molecules_edm", **told}, tuned)


def saved(folder, domain, weights):
    card = {"iteration": 1, "domain": domain, "chain": {}, "alpha_bar": [], "config": {}}
    path = folder / "checkpoints" / "iteration_000001"
    return store.save(path, {"weights": weights}, card, lambda rllib: None).path


@pytest.mark.parametrize("given", ["run", "checkpoint"])
def test_a_fine_tuned_network_goes_back_into_edm_s_files(checkpoint, here, given, capfd):
    path = checkpoint if given == "checkpoint" else checkpoint.parents[1]
    assert main(["export", "edm", str(path), "tuned"]) == 0
    assert (here / "tuned" / edm.ARGUMENTS).read_bytes() == (GOLDEN / edm.ARGUMENTS).read_bytes()
    (name, before), (again, after) = tensors(GOLDEN), tensors(here / "tuned")
    assert name == again and list(before) == list(after)
    for key, value in before.items():
        moved = value + 0.01 if key.startswith("dynamics.") else value
        torch.testing.assert_close(after[key], moved, atol=1e-6, rtol=0)
    assert "29,290 weights" in capfd.readouterr().out


def test_a_run_on_another_domain_is_refused(here, capfd):
    weights = {key: value.numpy() for key, value in build("toy", {}).denoiser().state_dict().items()}
    path = saved(here, {"name": "toy"}, weights)
    refused(capfd, ["export", "edm", str(path), "out"], "is of Toy; EDM's format takes runs on molecules_edm")
    assert not (here / "out").exists()


def test_without_a_format_export_writes_the_state_dict(checkpoint, here):
    assert main(["export", str(checkpoint), "net.safetensors"]) == 0
    found, state = load_file(here / "net.safetensors"), edm.read(GOLDEN).denoiser.state_dict()
    assert found.keys() == state.keys()
    assert main(["sample", "molecules_edm", f"domain.model={GOLDEN}", "domain.weights=./net.safetensors", "--num", "2",
                 "--num-steps", "2"]) == 0  # fmt: skip


# refused


def test_a_pickle_that_runs_code_is_refused_unrun(folder, here, capfd):
    (folder / edm.ARGUMENTS).write_bytes(pickle.dumps(argparse.Namespace(nf=Runs(os.system, "touch ran"))))
    refused(capfd, ["import", "edm", "theirs"], "asks for 'posix.system', which could run code")
    torch.save(Runs(os.system, "touch ran"), folder / WEIGHTS)
    shutil.copy(GOLDEN / edm.ARGUMENTS, folder)
    refused(capfd, ["import", "edm", "theirs"], "damaged or holds more than tensors")
    assert {path.name for path in here.iterdir()} == {"theirs"}
    os.system("touch ran")
    assert (here / "ran").is_file(), "the bomb is deaf"


@pytest.mark.parametrize("share", [0, 0.5, 0.9])
@pytest.mark.parametrize("name", [edm.ARGUMENTS, WEIGHTS])
def test_a_truncated_file_is_refused(folder, here, name, share, capfd):
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: int(share * len(whole))])
    refused(capfd, ["import", "edm", "theirs"], f"theirs/{name} is damaged")
    assert {path.name for path in here.iterdir()} == {"theirs"}


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["import", "edm", "nowhere"], ["no nowhere/args.pickle; an EDM checkpoint is a folder"]),
        (["import", "edm"], ["required: DIR", "rayft import --help"]),
        (["import", "edn", "theirs"], ["no format 'edn' (did you mean 'edm'?); there are edm"]),
        (["import", "edm", "theirs", "--out", "theirs.pt"], ["--out is theirs.pt; give a .safetensors file"]),
        (["import", "edm", "theirs", "--out", "no/x.safetensors"], ["cannot write no/x.safetensors", "missing"]),
        (["export", "edm", "nowhere", "out"], ["no nowhere/args.pickle"]),
        (["export", "edm", "theirs/args.pickle", "out"], ["args.pickle is damaged or no .safetensors"]),
        (["export", "pt", "theirs", "out"], ["no format 'pt'; there are edm"]),
        (["export", "edm", "theirs", "theirs"], ["theirs is there already; give another, or --force"]),
        (["export", "edm", "theirs", "theirs/args.pickle"], ["args.pickle is there already"]),
        (["export", "edm", "theirs", "theirs/args.pickle/x"], ["theirs/args.pickle"]),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(folder, here, command, words, capfd):
    refused(capfd, command, *words)
    assert {path.name for path in here.iterdir()} == {"theirs"}


@pytest.mark.parametrize("name", [edm.ARGUMENTS, WEIGHTS])
def test_a_missing_file_is_named(folder, name, capfd):
    (folder / name).unlink()
    refused(capfd, ["import", "edm", "theirs"], f"no theirs/{name}; an EDM checkpoint is a folder with")


def test_what_is_no_edm_is_refused(folder, capfd):
    (folder / edm.ARGUMENTS).write_bytes(pickle.dumps(argparse.Namespace(lr=1e-4)))
    refused(capfd, ["import", "edm", "theirs"], "theirs/args.pickle has no 'model'; an EDM checkpoint that can be read")


def test_nothing_is_replaced_unless_it_is_asked_for(folder, here, capfd):
    (here / "theirs.safetensors").write_bytes(b"mine")
    refused(capfd, ["import", "edm", "theirs"], "theirs.safetensors is there already; give another, or --force")
    assert (here / "theirs.safetensors").read_bytes() == b"mine"
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["import", "edm", "theirs", "--force"]) == 0
    (folder / edm.ARGUMENTS).write_bytes(b"old")
    refused(capfd, ["export", "edm", "theirs.safetensors", "theirs"], "theirs is there already")
    assert (folder / edm.ARGUMENTS).read_bytes() == b"old"
    assert main(["export", "--force", "edm", "theirs.safetensors", "theirs"]) == 0
    assert (folder / edm.ARGUMENTS).read_bytes() == (GOLDEN / edm.ARGUMENTS).read_bytes()


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        (None, "holds no settings of EDM"),
        ({"edm": "[1]"}, "are damaged"),
        ({"edm": "{"}, "are damaged"),
        ({"edm": "[" * 100_000}, "are damaged"),
        ({"edm": '{"nf": {"system": "touch ran"}}'}, "are damaged"),
        ({"edm": '{"nf": {"dict": [[{"dict": []}, 1]]}}'}, "are damaged"),
        ({"edm": "{}"}, "has no 'model'"),
    ],
)
def test_a_file_that_import_did_not_write_is_refused(here, metadata, words, capfd):
    save_file(edm.read(GOLDEN).denoiser.state_dict(), here / "x.safetensors", metadata)
    refused(capfd, ["export", "edm", "x.safetensors", "out"], "x.safetensors", words)
    assert {path.name for path in here.iterdir()} == {"x.safetensors"}


def test_a_file_whose_weights_are_not_those_of_its_settings_is_refused(here, capfd):
    model = edm.read(GOLDEN)
    other = edm.EDMModel(model.denoiser, model.schedule, {**model.arguments, "nf": 10_000})
    edm_files.keep(other, here / "x.safetensors")
    refused(capfd, ["export", "edm", "x.safetensors", "out"], "x.safetensors does not fit the settings: 'embed.weight'")
    whole = (here / "x.safetensors").read_bytes()
    (here / "x.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(capfd, ["export", "edm", "x.safetensors", "out"], "x.safetensors is damaged")


@pytest.mark.parametrize("command", ["import", "export"])
def test_the_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: rayft {command}") and "FORMAT" in out
