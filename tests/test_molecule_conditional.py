"""The conditional baseline: what its property is known of, where that is kept, and what is said when it is not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_molecules import PUBLISHED, WATER

from benchmarks.molecules import drawn
from envs.molecules import cache, conditional, files
from envs.molecules.conditional import ConditionalMolecules
from envs.molecules.decode import heavy
from envs.molecules.domain import trained_on
from envs.molecules.metrics import summarise


@pytest.fixture
def qm9(tmp_path, monkeypatch):
    """A data folder, and five molecules for QM9."""
    monkeypatch.setenv("RAYFT_DATA", str(tmp_path / "data"))
    monkeypatch.setattr("envs.molecules.qm9.qm9", lambda split: files.read(PUBLISHED))
    return tmp_path / "data"


def test_properties_are_scored_once_for_each_size_of_the_model(qm9, monkeypatch):
    for max_atoms in (9, 8):
        domain = ConditionalMolecules(max_atoms=max_atoms)
        assert len(domain._values) == len(trained_on("qm9", max_atoms))
    monkeypatch.setattr(conditional, "build", None)  # nothing is scored again
    again = ConditionalMolecules(max_atoms=8)
    assert torch.equal(again._values, domain._values)
    assert sorted(path.name for path in qm9.glob("*.npy")) == ["qm9_heavy8_qed.npy", "qm9_heavy9_qed.npy"]
    assert not list(qm9.glob(".*.tmp"))


def test_a_process_killed_while_it_writes_leaves_no_file(qm9, monkeypatch):
    def killed(file, values):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        ConditionalMolecules()._values  # noqa: B018
    assert not list(qm9.glob("*.npy"))


def test_a_file_of_other_molecules_is_refused(qm9):
    qm9.mkdir()
    for content in (np.zeros(3), None):
        path = qm9 / "qm9_heavy9_qed.npy"
        path.write_bytes(b"no array") if content is None else np.save(path, content)
        with pytest.raises(ValueError, match=r"qm9_heavy9_qed\.npy does not hold a number for each of 5 .* delete it"):
            ConditionalMolecules()._values  # noqa: B018


def test_whoever_comes_second_waits(tmp_path):
    made = []
    cache.once(tmp_path / "new" / "x", lambda: made.append((tmp_path / "new" / "x").write_text("x")))
    cache.once(tmp_path / "new" / "x", lambda: made.append(2))
    assert made == [1]


def test_unknown_properties_are_counted(tmp_path, caplog):
    own = tmp_path / "own"
    own.mkdir()
    for file in PUBLISHED.iterdir():
        (own / file.name).write_text(file.read_text())
    (own / "water.xyz").write_text(WATER)
    domain = ConditionalMolecules(data=str(own))
    others = domain._values.flatten()[:-1]
    assert float(domain._values[-1]) == pytest.approx(float(others.mean()))
    (record,) = caplog.records
    assert record.message.startswith(f"qed is unknown of 1 of 6 molecules in {own}; in training they are told the mean")
    with pytest.raises(ValueError, match=r"is known of no molecule in .*water\.xyz; .* give an \.sdf"):
        ConditionalMolecules(data=str(own / "water.xyz"))._values  # noqa: B018


@pytest.mark.parametrize("at", ["high", True, float("nan"), float("inf")])
def test_what_is_asked_for_is_a_number(at):
    with pytest.raises(ValueError, match=rf"at is {at!r}; give a number, the qed asked for, or null"):
        ConditionalMolecules(at=at)


def test_missing_weights_are_made_and_then_given():
    with pytest.raises(ValueError, match=r"then give domain\.weights=runs/molecules_conditional_pretrain/weights"):
        ConditionalMolecules(weights="nowhere").denoiser()


@pytest.mark.parametrize(("key", "value"), [("condition", "synth"), ("data", "mine.sdf")])
def test_the_shipped_weights_are_not_taken_for_what_they_were_never_told(key, value):
    with pytest.raises(ValueError, match=rf"know the QED of QM9, not .*_pretrain .*domain\.{key}={value}") as told:
        ConditionalMolecules(**{key: value}).denoiser()
    assert "`, then give domain.weights=runs/molecules_conditional_pretrain" in str(told.value)


def test_the_shipped_model_draws_more_qed_where_more_is_asked_for():
    mean = {}
    for at in (0.35, 0.6):
        x_0, mask, _ = drawn(ConditionalMolecules(at=at, num_steps=25), 100, "beta")
        mean[at] = summarise(heavy(x_0, {"mask": mask})).qed
    assert mean[0.35] + 0.05 < mean[0.6]
