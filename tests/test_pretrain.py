"""Pretraining from YAML to a card: what is logged, kept, resumed, refused, and left behind by whatever ends it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from test_denoise import at_step, mean_loss

from envs.toy.domain import Toy
from rayft import resume
from rayft.cli import main
from rayft.denoise import PretrainSettings
from rayft.domain import Plain
from rayft.resume import load_state
from rayft.table import Table
from rayft.ticker import Ticker
from rayft.training import COLUMNS, Training, device_of

SHORT = PretrainSettings(steps=60, batch_size=64, checkpoint_every=20, log_every=25)
SMALL = ["pretrain.steps=20", "pretrain.batch_size=32", "pretrain.log_every=8"]


def training(folder, settings=SHORT, domain=None, **named):
    return Training(domain or Toy(weights=None), settings, 0, folder, named)


def trained(folder, settings=SHORT, domain=None):
    told = training(folder, settings, domain)
    assert told.run()
    return told


def interrupt():
    signal.raise_signal(signal.SIGINT)


def rows(folder):
    """metrics.csv without its clock."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "samples_per_s")} for row in table(folder).rows]


def table(folder):
    return Table(folder / "metrics.csv")


def command(folder, *more):
    return main(["pretrain", "toy_pretrain", *SMALL, f"output={folder}", *more])


# -- training


def test_training_lowers_the_loss(tmp_path):
    toy = Toy(weights=None)
    torch.manual_seed(0)
    before = mean_loss(toy, toy.denoiser())
    assert mean_loss(toy, trained(tmp_path).learner.average) < 0.8 * before


def test_a_domain_without_data_says_so(tmp_path):
    plain = Plain("torch.nn:Identity", [2], [0.1, 0.2])
    with pytest.raises(ValueError, match="has no data set to pretrain on"):
        training(tmp_path, domain=plain)


def test_a_network_without_parameters_says_so(tmp_path):
    class Fixed(Toy):
        def denoiser(self):
            return super().denoiser().requires_grad_(False)

    with pytest.raises(ValueError, match="ToyDenoiser has no parameters to train"):
        training(tmp_path, domain=Fixed(weights=None))


def test_a_device_that_is_not_there_is_refused_and_auto_takes_what_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of(SHORT).type == device_of(replace(SHORT, num_learners=4)).type == "cpu"
    with pytest.raises(ValueError, match=r"torch sees 0 GPUs and pretrain[.]num_learners is 1"):
        device_of(replace(SHORT, device="cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_of(replace(SHORT, num_learners=2)) == torch.device("cuda", 0)
    assert device_of(replace(SHORT, device="cpu")).type == "cpu"
    with pytest.raises(ValueError, match=r"torch sees 2 GPUs and pretrain.num_learners is 3.*set pretrain.device"):
        device_of(replace(SHORT, num_learners=3))


def test_more_learners_than_events_are_refused(tmp_path):
    with pytest.raises(ValueError, match="num_learners is 3 and a batch has 2 events"):
        training(tmp_path, PretrainSettings(batch_size=2, num_learners=3))


# -- the log


def test_every_row_is_the_mean_of_its_steps(tmp_path):
    whole = trained(tmp_path, replace(SHORT, log_every=1))
    single = table(tmp_path).rows
    every = trained(tmp_path / "every")
    assert list(table(tmp_path / "every").columns) == COLUMNS
    assert [row["step"] for row in table(tmp_path / "every").rows] == [25, 50, 60]
    for row, (first, last) in zip(table(tmp_path / "every").rows, ((0, 25), (25, 50), (50, 60)), strict=True):
        steps = single[first:last]
        assert row["loss"] == pytest.approx(sum(step["loss"] for step in steps) / len(steps))
        assert row["lr"] == steps[-1]["lr"]
        assert row["samples_per_s"] > 0
        assert row["loss_1"] > row["loss_5"] > 0, "little noise is harder to tell from the data"
    assert every.loss == whole.loss == pytest.approx(sum(step["loss"] for step in single) / 60)
    assert table(tmp_path).rows[-1]["seconds"] >= table(tmp_path).rows[0]["seconds"] > 0


def test_a_domain_with_held_out_data_gets_a_column_for_the_averaged_weights(tmp_path):
    class Split(Toy):
        def held_out(self, num_events, generator):
            return self.data(num_events, generator)

    told = trained(tmp_path, domain=Split(weights=None))
    held_out = [row for row in table(tmp_path).rows if "valid_loss" in row]
    assert [row["step"] for row in held_out] == [20, 40, 60], "at every state"
    assert held_out[-1]["valid_loss"] == pytest.approx(mean_loss(told.domain, told.learner.average), rel=0.05)


def test_a_terminal_has_a_bar_and_a_pipe_a_line_of_json(tmp_path, capsys, monkeypatch):
    row = {"step": 3, "loss": 0.25, "samples_per_s": 1e4}
    with Ticker("pretrain", 9, 0, quiet=False) as ticker:
        ticker.tick(1, {})
        ticker.tick(3, row)
        ticker.say("stopping")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [{**row, "steps": 9}, {"event": "stopping"}]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    with Ticker("pretrain", 9, 0, quiet=False) as ticker:
        ticker.tick(3, row)
        assert ticker.bar.tasks[0].completed == 3
        assert ticker.bar.tasks[0].fields["said"] == "loss 0.25  samples/s 10,000"
    assert capsys.readouterr().out == ""


# -- what ends a training


@pytest.mark.parametrize("muon_lr", [0.0, 0.02], ids=["adamw", "muon"])
def test_a_training_that_is_stopped_and_resumed_is_the_same_bits(muon_lr, tmp_path):
    settings = replace(SHORT, muon_lr=muon_lr, warmup=5, weight_decay=0.01)
    whole = trained(tmp_path / "whole", settings)
    for step in (0, 33, 52):  # before anything, between a state and a row, after both
        cut = training(tmp_path / "cut", settings)
        at_step(cut, step, interrupt)
        assert not cut.run(resume=step > 0) and cut.step == cut.saved == step + 1
    last = training(tmp_path / "cut", replace(settings, checkpoint_every=7))
    assert last.run(resume=True) and last.loss == whole.loss
    for name in ("net", "average"):
        for key, value in getattr(whole.learner, name).state_dict().items():
            assert torch.equal(getattr(last.learner, name).state_dict()[key], value), key
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_dropout_is_resumed_to_the_same_bits(tmp_path):
    class Dropping(Toy):
        def denoiser(self):
            net = super().denoiser()
            net.net.insert(2, torch.nn.Dropout(0.3))
            return net

    whole = trained(tmp_path / "whole", domain=Dropping(weights=None))
    cut = training(tmp_path / "cut", domain=Dropping(weights=None))
    at_step(cut, 30, interrupt)
    assert not cut.run()
    torch.rand(7)
    last = training(tmp_path / "cut", domain=Dropping(weights=None))
    assert last.run(resume=True) and last.loss == whole.loss


def test_a_second_ctrl_c_stops_at_once_and_leaves_the_last_state(tmp_path):
    told = training(tmp_path)
    at_step(told, 30, lambda: (interrupt(), interrupt()))
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        told.run()
    assert load_state(tmp_path / "state.pt")["step"] == 20
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_loss_that_is_no_number_ends_the_training_and_spares_the_state(tmp_path):
    told = training(tmp_path)

    def spoil():
        with torch.no_grad():
            next(told.learner.net.parameters()).mul_(float("nan"))

    at_step(told, 29, spoil)
    with pytest.raises(ValueError, match=r"the loss was nan at step 30 of 60; .*keeps step 20: .*pretrain.lr"):
        told.run()
    state = load_state(tmp_path / "state.pt")
    assert state["step"] == 20 and all(bool(v.isfinite().all()) for v in state["net"].values())
    assert [row["step"] for row in rows(tmp_path)] == [25]


def test_weights_that_are_no_numbers_are_not_saved(tmp_path):
    told = training(tmp_path)
    step = told.learner.step

    def spoiled(number):
        loss = step(number)
        if number == 39:
            with torch.no_grad():
                next(told.learner.net.parameters()).mul_(float("inf"))
        return loss

    told.learner.step = spoiled
    with pytest.raises(ValueError, match=r"a weight is not finite after step 40 of 60; .*keeps step 20"):
        told.run()
    assert load_state(tmp_path / "state.pt")["step"] == 20


def test_a_state_that_cannot_be_written_leaves_the_one_before_whole(tmp_path, monkeypatch):
    told, save = training(tmp_path), torch.save

    def full(state, file):
        save(state, file)
        if state["step"] == 40:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(resume.torch, "save", full)
    with pytest.raises(ValueError, match=r"could not be written \(No space left on device\); that of step 20 is whole"):
        told.run()
    assert load_state(tmp_path / "state.pt")["step"] == 20
    assert not (tmp_path / "state.tmp").exists()


# -- what may be resumed


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["pretrain.lr=1e-3"], "pretrain.lr is 0.001 and .*state.pt was made with 0.002"),
        (["pretrain.batch_size=33"], "pretrain.batch_size is 33"),
        (["pretrain.muon_lr=0.02"], "pretrain.muon_lr is 0.02"),
        (["seed=3"], "seed is 3 and .* with 0"),
        (["domain.num_steps=40"], "domain.num_steps is 40 and .* with None"),
        (["domain=toy_masked"], "domain.name is 'toy_masked' and .* with 'toy'"),
    ],
)
def test_another_training_is_not_resumed(change, words, tmp_path, capsys, half):
    assert command(half, "--quiet", "--resume", *change) == 2
    said = capsys.readouterr().err
    assert re.search(words, said) and "name=NAME" in said


def stopped(folder, *more):
    """The command's exit code; Ctrl-C comes in its twelfth step."""
    run = Training.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "run", lambda self, *told: (at_step(self, 11, interrupt), run(self, *told))[1])
        return command(folder, *more)


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """Where a training was stopped."""
    folder = tmp_path_factory.mktemp("half")
    assert stopped(folder, "--quiet") == 130
    return folder


def test_ctrl_c_is_exit_130_and_says_how_to_go_on_which_works(tmp_path, capsys):
    assert stopped(tmp_path) == 130
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["event"].startswith("stopping after this step")
    said, _, told = err.strip().partition("; continue with: ")
    assert said == "saved at step 12 of 20"
    assert command(tmp_path) == 2, "without --resume the hours that it took are not thrown away"
    assert "stopped at step 12: continue it with --resume" in capsys.readouterr().err
    assert main(told.split()[1:]) == 0
    assert [row["step"] for row in rows(tmp_path / "toy_pretrain")] == [8, 16, 20]
    assert command(tmp_path, "--quiet") == 0, "what is finished may be trained again"


def test_a_finished_training_can_be_given_more_steps_and_a_damaged_state_says_so(tmp_path, capsys):
    trained(tmp_path, replace(SHORT, steps=10))
    more = training(tmp_path, replace(SHORT, steps=15))
    assert more.run(resume=True) and more.step == 15
    path = tmp_path / "state.pt"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ValueError, match=r"state.pt is damaged or of another version"):
        training(tmp_path).run(resume=True)
    with pytest.raises(ValueError, match="nothing to resume"):
        training(tmp_path / "none").run(resume=True)


def test_another_network_under_the_same_name_is_refused_by_its_first_weight(tmp_path):
    class Wide(Toy):
        def denoiser(self):
            net = super().denoiser()
            net.net[0] = torch.nn.Linear(11, 65)
            return net

    trained(tmp_path)
    with pytest.raises(ValueError, match=r"state.pt does not fit ToyDenoiser: 'net.0.weight' is \(64, 11\)"):
        training(tmp_path, domain=Wide(weights=None)).run(resume=True)


# -- weights and card


def test_the_command_leaves_weights_that_the_domain_loads_and_a_card_that_says_what_made_them(tmp_path, capsys):
    assert command(tmp_path) == 0
    folder = tmp_path / "toy_pretrain"
    *lines, last = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["step"] for line in lines] == [8, 16, 20]
    path = folder / "weights.safetensors"
    assert last.startswith(f"weights in {path}, last mean loss ")
    net = Toy(weights=str(path)).denoiser()
    assert set(load_file(path)) == set(net.state_dict())
    card = json.loads((folder / "card.json").read_text())
    assert card["domain"] == {"name": "toy", "weights": None} and (card["seed"], card["steps"]) == (0, 20)
    assert card["pretrain"]["batch_size"] == 32 and card["pretrain"]["ema"] == 0.999
    assert card["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert card["parameters"] == sum(p.numel() for p in net.parameters())
    assert card["weights_loss"] == pytest.approx(mean_loss(Toy(), net), rel=0.1)
    assert card["seconds"] > 0 and card["device"] == "cpu" and "torch" in card["versions"]
    assert "metrics" not in card and "valid_loss" not in card
    assert {path.name for path in folder.iterdir()} == {"weights.safetensors", "card.json", "metrics.csv", "state.pt"}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_of_two_bytes_fill_a_float32_network(dtype, tmp_path):
    assert command(tmp_path, "--quiet", f"pretrain.weights_dtype={dtype}") == 0
    path = tmp_path / "toy_pretrain" / "weights.safetensors"
    stored, net = load_file(path), Toy(weights=str(path)).denoiser()
    assert path.stat().st_size < 2.2 * sum(p.numel() for p in net.parameters())
    average = load_state(tmp_path / "toy_pretrain" / "state.pt")["average"]
    for key, value in net.state_dict().items():
        assert value.dtype == torch.float32 and stored[key].dtype == getattr(torch, dtype)
        assert torch.equal(value, average[key].to(stored[key].dtype).float())


class Measured(Toy):
    """Toy events, measured."""

    metrics = "test_pretrain:spread"


def spread(samples):
    return {"num": len(samples), "far": sum(abs(x).max() > 3 for x in samples) / len(samples)}


def test_samples_of_the_weights_are_measured_on_the_card(tmp_path, capsys):
    told = ["domain={name: 'test_pretrain:Measured', weights: null}", "--quiet"]
    assert command(tmp_path, *told, "pretrain.evaluate={num: 300}") == 0
    card = json.loads((tmp_path / "toy_pretrain" / "card.json").read_text())
    assert card["metrics"]["num"] == 300 and 0 <= card["metrics"]["far"] <= 1
    assert card["pretrain"]["evaluate"] == {"num": 300}
    assert command(tmp_path, "--quiet", "pretrain.evaluate={num: 300}") == 2
    assert "pretrain.evaluate needs metrics and Toy has none" in capsys.readouterr().err
    assert command(tmp_path, *told, "pretrain.evaluate.nun=300") == 2
    assert "pretrain.evaluate has no key 'nun' (did you mean 'num'?)" in capsys.readouterr().err
