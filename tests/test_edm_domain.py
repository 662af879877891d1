"""Molecules of an EDM checkpoint: its events, its sizes, what it is told, and chains of its network."""

from __future__ import annotations

import argparse
import pickle
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from rdkit import Chem
from safetensors.torch import save_file
from small_molecules import PUBLISHED

from envs.molecules import decode, edm, files, metrics
from envs.molecules.edm_domain import NUM_OF_FULL_SIZE, EDMMolecules
from rayft import imports
from rayft.chain import Policy, reverse_process, sample
from rayft.cli import main
from rayft.denoise import denoising_loss
from rayft.domain import build, decoded, try_out
from rayft.verdict import Samples, measured

GOLDEN = Path(__file__).parent / "golden" / "edm"
CONDITIONAL = GOLDEN / "conditional"
AT = {"alpha": 0.5, "gap": -1.0}
OWN = {"data": str(PUBLISHED)}
WORLDS = {"full": {"model": str(GOLDEN)}, "heavy": {"model": str(CONDITIONAL), "at": AT}}


def world(name="full", **told) -> EDMMolecules:
    domain = build("molecules_edm", {"num_steps": 10, **WORLDS[name], **told})
    assert isinstance(domain, EDMMolecules)
    return domain


@cache
def drawn(name):
    """(domain, x_0, context) of short chains, of the sizes in the published data."""
    domain, generator = world(name, **OWN), torch.Generator().manual_seed(1)
    net, process = domain.denoiser(), reverse_process(domain.schedule())
    policy = Policy(net, process, domain.space, net.prediction)
    context = domain.context(6, generator)
    x = policy.noise(torch.empty(6, *domain.event_shape), context, generator)
    with torch.no_grad():
        return domain, sample(policy, x, context, generator).x_0, context


def renormalised(folder: Path, *norms: float) -> str:
    """The golden model under other norms."""
    shutil.copy(GOLDEN / "generative_model_ema.npy", folder)
    arguments = vars(pickle.loads((GOLDEN / edm.ARGUMENTS).read_bytes())) | {"normalize_factors": list(norms)}
    (folder / edm.ARGUMENTS).write_bytes(pickle.dumps(argparse.Namespace(**arguments)))
    return str(folder)


def distances(x: np.ndarray) -> np.ndarray:
    return np.linalg.norm(x[:, None] - x[None], axis=-1)


# what it is


def test_an_event_has_the_columns_of_the_network():
    full, heavy = world("full"), world("heavy")
    assert (full.event_shape, full.decoder) == ((29, 3 + 5 + 1), "envs.molecules.decode:full")
    assert (heavy.event_shape, heavy.decoder) == ((9, 3 + 4), "envs.molecules.decode:heavy")


@pytest.mark.parametrize("name", WORLDS)
def test_the_network_is_that_of_the_checkpoint(name):
    domain, model = world(name), edm.read(WORLDS[name]["model"])
    found = domain.denoiser().state_dict()
    assert all(torch.equal(found[key], value) for key, value in model.denoiser.state_dict().items())
    try_out(domain)


def test_its_chain_has_levels_of_the_checkpoint_s_own_schedule():
    trained = edm.read(GOLDEN).schedule
    respaced, whole = world(num_steps=100).schedule(), world(num_steps=None).schedule()
    assert respaced.num_steps == 100 and torch.equal(respaced.alpha_bar, trained.alpha_bar[respaced.timestep])
    assert torch.equal(whole.alpha_bar, trained.alpha_bar) and torch.equal(whole.timestep, trained.timestep)
    assert float(whole.alpha_bar[0]) == pytest.approx(1 - 1e-5, abs=1e-9)


def test_more_steps_than_the_checkpoint_has_are_refused():
    with pytest.raises(ValueError, match="num_steps is 101; this model's schedule allows 1 to 100"):
        world("heavy", num_steps=101)


def test_weights_take_the_place_of_its_own(tmp_path):
    state = {key: value + 0.01 for key, value in edm.read(GOLDEN).denoiser.state_dict().items()}
    save_file(state, tmp_path / "tuned.safetensors")
    found = world(weights=str(tmp_path / "tuned.safetensors")).denoiser().state_dict()
    assert all(torch.equal(found[key], value) for key, value in state.items())
    with pytest.raises(ValueError, match=r"tuned\.safetensors does not fit EGNN"):
        world("heavy", weights=str(tmp_path / "tuned.safetensors")).denoiser()


def test_reading_a_checkpoint_leaves_torch_s_random_numbers_alone():
    before = torch.get_rng_state()
    world().denoiser()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", WORLDS)
def test_it_goes_to_another_process_as_it_is(name):
    domain = world(name)
    again = pickle.loads(pickle.dumps(domain))
    first, second = (one.context(50, torch.Generator().manual_seed(1)) for one in (domain, again))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert torch.equal(domain.schedule().alpha_bar, again.schedule().alpha_bar)


# sizes


def test_sizes_are_drawn_as_qm9_has_them_with_hydrogens():
    assert sum(NUM_OF_FULL_SIZE) == 130_831 and len(NUM_OF_FULL_SIZE) == 30
    domain = world()
    sizes = domain.groups(domain.context(20_000, torch.Generator().manual_seed(0)))
    expected = np.array(NUM_OF_FULL_SIZE) / sum(NUM_OF_FULL_SIZE)
    assert np.abs(np.bincount(sizes, minlength=30) / 20_000 - expected).max() < 0.01


def test_or_as_they_are_in_data_of_one_s_own():
    domain = world(**OWN)
    sizes = domain.groups(domain.context(500, torch.Generator().manual_seed(0)))
    assert set(sizes.tolist()) == set(files.read(PUBLISHED).num_atoms.tolist())
    assert world("heavy", **OWN).context(9, torch.Generator())["mask"].shape == (9, 9)


def test_data_that_the_model_does_not_take_is_refused():
    domain = world(**OWN, max_atoms=2)
    with pytest.raises(
        ValueError, match=r"no molecule of 1 to 2 atoms of H, C, N, O, F: 5 with more than 2 atoms .*; raise max_atoms"
    ):
        domain.context(5, torch.Generator())


# events


@pytest.mark.parametrize("norms", [(1, 4, 10), (1.7, 2, 5)])
def test_events_of_data_decode_to_the_molecules_they_were_made_of(tmp_path, norms):
    domain = world(model=renormalised(tmp_path, *norms), **OWN)
    events, context = domain.data(64, torch.Generator().manual_seed(0))
    torch.testing.assert_close(domain.space.project(events, context), events, atol=1e-5, rtol=0)
    found = decoded(domain, events.numpy(), {key: value.numpy() for key, value in context.items()})
    known = {Chem.CanonSmiles(smiles) for smiles in files.read(PUBLISHED).smiles}
    made = {Chem.MolToSmiles(Chem.RemoveHs(mol)) for mol in found if mol is not None}
    assert len(known & made) >= 4, "an aromatic ring's bonds are too alike to have an order"
    methane = next(mol for mol in found if mol is not None and mol.GetNumAtoms() == 5)
    published = files.read(PUBLISHED).positions[:5]  # methane's
    np.testing.assert_allclose(distances(methane.GetConformer().GetPositions()), distances(published), atol=1e-4)


def test_columns_are_divided_by_the_norms(tmp_path):
    domain = world(model=renormalised(tmp_path, 1.0, 2.0, 5.0), **OWN)
    events, context = domain.data(200, torch.Generator().manual_seed(0))
    row = int(torch.nonzero(context["mask"].sum(1) == 5)[0])
    assert events[row, :5, 3:8].sum(0).tolist() == [2.0, 0.5, 0, 0, 0]  # CH4: four H and a C, each 1 / 2
    np.testing.assert_allclose(sorted(events[row, :5, 8].tolist()), [0.2] * 4 + [1.2], rtol=1e-6)
    assert float(events[row, 5:].abs().max()) == 0


@pytest.mark.parametrize("name", WORLDS)
def test_a_chain_ends_in_events_that_decode_or_do_not_and_never_fail(name):
    domain, x_0, context = drawn(name)
    arrays = {key: value.numpy() for key, value in context.items()}
    assert bool(torch.isfinite(x_0).all())
    torch.testing.assert_close(domain.space.project(x_0, context), x_0, atol=1e-4, rtol=1e-5)
    found = decoded(domain, x_0.numpy(), arrays)
    assert len(found) == 6 and all(one is None or isinstance(one, Chem.Mol) for one in found)
    alone = context["mask"].sum(1) == 1
    assert all(found[row] is not None for row in torch.nonzero(alone).flatten()), "a heavy atom by itself is a molecule"
    assert bool(alone.any()) == (name == "heavy")
    assert len(decoded(domain, np.full_like(x_0.numpy(), 1e30), arrays)) == 6
    for bad in (np.nan, np.inf):
        assert decoded(domain, np.full_like(x_0.numpy(), bad), arrays) == [None] * 6
    assert imports.load(domain.metrics)(found).keys()
    again = drawn.__wrapped__(name)[1]
    assert torch.equal(again, x_0), "the same seed"


@pytest.mark.parametrize("name", WORLDS)
def test_stability_is_told_of_all_samples_where_there_are_hydrogens(name):
    domain = world(name, **OWN)
    events, context = domain.data(40, torch.Generator().manual_seed(0))
    x_0, told = events.numpy().copy(), {key: value.numpy() for key, value in context.items()}
    x_0[:10, 0, 0] += 50  # an atom far away: what was stable is two fragments, and not decoded
    samples = decoded(domain, x_0, told)
    assert all(one is None for one, size in zip(samples[:10], told["mask"][:10].sum(1), strict=True) if size > 1)
    found = domain.measure(samples, x_0, told)
    if name == "heavy":
        assert not any("stability" in key for key in found)
        return
    whole = metrics.summarise(samples, decode.atoms(x_0, told))
    assert found["atom_stability"] == pytest.approx(whole.atom_stability)
    assert found["molecule_stability"] == pytest.approx(whole.molecule_stability)
    assert 0 < found["molecule_stability"] < found["atom_stability"] < 1
    assert measured(domain, Samples(*[np.zeros(40)] * 2, None, np.zeros(40), x_0, told)).metrics == found


@pytest.mark.parametrize("name", WORLDS)
def test_padding_changes_nothing_and_a_permutation_of_atoms_permutes_the_answer(name):
    domain, _, context = drawn(name)
    net, n = domain.denoiser(), domain.event_shape[0]
    generator = torch.Generator().manual_seed(3)
    x = domain.space.project(torch.randn(6, *domain.event_shape, generator=generator), context)
    t = torch.full((6,), 40)
    with torch.no_grad():
        out = net(x, t, context)
        assert float((out * (1 - context["mask"]).unsqueeze(-1)).abs().max()) == 0
        wide = {**context, "mask": torch.cat([context["mask"], torch.zeros(6, 4)], 1)}
        padded = net(torch.cat([x, torch.zeros(6, 4, x.shape[2])], 1), t, wide)
        torch.testing.assert_close(padded[:, :n], out, atol=1e-5, rtol=1e-4)
        order = torch.randperm(n, generator=generator)
        permuted = net(x[:, order], t, {**context, "mask": context["mask"][:, order]})
        torch.testing.assert_close(permuted, out[:, order], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", WORLDS)
def test_it_can_be_trained_on_its_data(name):
    domain = world(name, **OWN)
    net = domain.denoiser()
    denoising_loss(domain, domain.schedule(), net, 8, torch.Generator().manual_seed(0)).backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in net.parameters())
    assert any(p.grad is not None and bool((p.grad != 0).any()) for p in net.parameters())


# a fresh network


def test_a_fresh_network_is_edm_s_published_one_if_nothing_else_is_told():
    before = torch.get_rng_state()
    whole, heavy = (build("molecules_edm", {"model": None, "hydrogens": told}) for told in (None, False))
    assert torch.equal(before, torch.get_rng_state())
    assert isinstance(whole, EDMMolecules) and whole.schedule().num_steps == 100
    assert whole.event_shape == (29, 9) and whole.decoder.endswith(":full") and heavy.event_shape == (9, 8)
    assert torch.equal(whole.trained.alpha_bar, world().trained.alpha_bar)
    net = edm.claimed(whole.arguments)
    assert sum(p.numel() for p in net.parameters()) == 5_339_920 and len(net.layers) == 9
    edm.check(whole.arguments, "the published settings")


@pytest.mark.parametrize("hydrogens", [True, False])
def test_and_can_be_pretrained_sampled_and_exported(tmp_path, hydrogens, capsys):
    small = {"width": 8, "num_layers": 1, "hydrogens": hydrogens, **OWN}
    told = [f"domain.{name}={str(value).lower() if name == 'hydrogens' else value}" for name, value in small.items()]
    short = ["pretrain.steps=2", "pretrain.batch_size=4", f"output={tmp_path}", "--quiet"]
    assert main(["pretrain", "molecules_full_pretrain", *told, *short]) == 0
    weights = tmp_path / "molecules_full_pretrain" / "weights.safetensors"
    domain = build("molecules_edm", {"model": None, "weights": str(weights), **small})
    edm.write(tmp_path / "edm", domain.model_of(domain.denoiser()))
    again = world(model=str(tmp_path / "edm")).denoiser().state_dict()
    assert all(torch.equal(again[name], value) for name, value in domain.denoiser().state_dict().items())
    out = ["--num", "3", "--num-steps", "5", "--out", str(tmp_path / "found.npz")]
    assert main(["sample", "molecules_edm", "domain.model=null", f"domain.weights={weights}", *told, *out]) == 0
    with np.load(tmp_path / "found.npz") as found:
        assert found["x_0"].shape == (3, *domain.event_shape)


# what a conditional model is told


def test_a_conditional_model_is_told_what_is_asked_for_in_its_own_order():
    told = world("heavy", at={"gap": 2, "alpha": 0.25}).context(3, torch.Generator())
    assert told["property"].tolist() == [[0.25, 2.0]] * 3
    assert "property" not in world().context(3, torch.Generator())


def test_and_with_data_what_its_molecules_have():
    domain, table = world("heavy", **OWN), files.read(PUBLISHED)
    events, context = domain.data(300, torch.Generator().manual_seed(0))
    sizes = context["mask"].sum(1)
    row = int(torch.nonzero(sizes == 1)[0])
    for column, name in enumerate(("alpha", "gap")):
        values = table.properties[name] - table.properties[name].mean()
        standard = values / np.abs(values).mean()
        alone = standard[np.flatnonzero(table.heavy().num_atoms == 1)]
        assert np.abs(alone - float(context["property"][row, column])).min() < 1e-5
    assert len(events) == 300


def test_data_without_the_property_is_refused(tmp_path):
    (tmp_path / "water.xyz").write_text("3\nwater\nO 0 0 0\nH 0.96 0 0\nH -0.24 0.93 0\n")
    domain = world("heavy", data=str(tmp_path / "water.xyz"))
    with pytest.raises(ValueError, match=r"water\.xyz does not say alpha, which the model is told"):
        domain.data(2, torch.Generator())


@pytest.mark.parametrize(
    ("name", "at", "sentence"),
    [
        ("heavy", None, r"at lacks alpha; this model is told alpha, gap: give .* domain\.at\.alpha=0"),
        ("heavy", {"alpha": 1}, "at lacks gap; this model is told alpha, gap"),
        ("heavy", {**AT, "mu": 1}, "at has 'mu'; this model is told alpha, gap: leave it out"),
        ("heavy", {**AT, "gap": "low"}, r"at\.gap is 'low'; give a number"),
        ("heavy", {**AT, "gap": float("nan")}, r"at\.gap is nan; give a number"),
        ("heavy", {**AT, "gap": True}, r"at\.gap is True; give a number"),
        ("heavy", 0.5, r"at is 0\.5; this model is told alpha, gap"),
        ("full", AT, "at has 'alpha'; this model is told no property: leave it out"),
    ],
)
def test_what_it_is_told_is_checked_by_name(name, at, sentence):
    with pytest.raises(ValueError, match=sentence):
        world(name, at=at)


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        ({}, "needs model"),
        ({"model": "nowhere"}, r"no nowhere/args\.pickle; an EDM checkpoint is a folder"),
        ({"model": str(GOLDEN / "forward.npz")}, r"forward\.npz is damaged or no \.safetensors"),
        ({"model": str(GOLDEN), "max_atoms": 0}, "max_atoms is 0"),
        (
            {"model": str(GOLDEN), "hydrogens": True},
            r"hydrogens is True, and .* has its own; leave it out",
        ),
        ({"model": None, "num_layers": 0}, "num_layers is 0; give 1 to 10000"),
        ({"model": None, "width": "wide"}, "width is 'wide'; it should be a whole number or null"),
    ],
)
def test_what_is_no_model_is_refused_in_a_sentence(told, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        build("molecules_edm", told)
    assert "\n" not in str(caught.value)
