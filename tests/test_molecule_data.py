"""Molecules as flat arrays: taken, stripped, padded, saved and loaded without changing an atom."""

from __future__ import annotations

import numpy as np
import pytest
from small_molecules import PUBLISHED, WATER, one_by_one, same

from envs.molecules import data, files
from envs.molecules.data import Molecules


@pytest.fixture
def published() -> Molecules:
    return files.read(PUBLISHED)


def test_a_molecule_keeps_its_atoms_wherever_it_is_taken(published):
    order = [3, 0, 0, -1]
    taken, atoms = published[order], one_by_one(published)
    assert taken.index.tolist() == published.index[order].tolist()
    assert taken.smiles.tolist() == published.smiles[order].tolist()
    assert taken.properties["mu"].tolist() == published.properties["mu"][order].tolist()
    for (numbers, positions), (wanted, there) in zip(one_by_one(taken), [atoms[i] for i in order], strict=True):
        assert numbers == wanted and np.array_equal(positions, there)
    assert same(published.take(np.array(order)), taken)
    assert same(published[1:3], published[np.array([False, True, True, False, False])])
    assert len(published[2]) == 1 and len(published[:0]) == 0 and len(published[[]]) == 0
    with pytest.raises(IndexError):
        published[5]


def test_without_hydrogens_the_others_stay_where_they_are(published):
    heavy = published.heavy()
    for (numbers, positions), (before, there) in zip(one_by_one(heavy), one_by_one(published), strict=True):
        kept = np.array(before) != 1
        assert numbers == np.array(before)[kept].tolist() and np.array_equal(positions, there[kept])
    assert heavy.index.tolist() == published.index.tolist()
    assert np.bincount(heavy.num_atoms).tolist() == [0, 2, 0, 0, 1, 0, 0, 0, 0, 2]


def test_hydrogen_alone_leaves_an_empty_place(tmp_path):
    (tmp_path / "h2.xyz").write_text("2\n\nH 0 0 0\nH 0 0 0.74\n" + WATER)
    heavy = files.read(tmp_path).heavy()
    assert heavy.num_atoms.tolist() == [0, 1]
    positions, numbers, mask = heavy.padded(1)
    assert numbers.tolist() == [[0], [8]] and mask.tolist() == [[False], [True]] and not positions.any()


def test_padded_molecules_have_their_mean_at_zero_and_keep_their_distances(published):
    positions, numbers, mask = published.padded(30)
    sizes = [5, 3, 12, 19, 17]
    assert positions.dtype == np.float32 and positions.shape == (5, 30, 3) and mask.sum(1).tolist() == sizes
    assert np.abs(positions.sum(1) / mask.sum(1)[:, None]).max() < 1e-6
    assert not positions[~mask].any() and not numbers[~mask].any()
    for row, its, (wanted, there) in zip(positions, numbers, one_by_one(published), strict=True):
        assert its[: len(wanted)].tolist() == wanted
        np.testing.assert_allclose(np.diff(row[: len(there)], axis=0), np.diff(there, axis=0), atol=1e-6)


def test_too_small_a_padding_says_what_fits(published):
    with pytest.raises(ValueError, match="max_atoms is 18, and there is a molecule of 19 atoms; give at least 19"):
        published.padded(18)
    assert published[published.num_atoms <= 18].padded(18)[0].shape == (4, 18, 3)


def test_an_arrow_file_gives_back_every_column(published, tmp_path):
    named = Molecules(*(getattr(published, name) for name in data.COLUMNS), {"index": published.properties["mu"]})
    for number, molecules in enumerate((published, named, published[:0], published[[4, 4, 1]])):
        molecules.save(path := tmp_path / f"{number}.arrow")
        found = data.load(path)
        path.unlink()  # what is mapped stays
        assert same(molecules, found) and found.positions.dtype == np.float32 and found.smiles.dtype == object
        assert same(found.take(np.arange(len(found))), found)
    assert not list(tmp_path.iterdir())


def test_a_damaged_arrow_file_is_refused_in_one_sentence(published, tmp_path):
    published.save(path := tmp_path / "a.arrow")
    for content in (path.read_bytes()[:-200], path.read_bytes()[:3000], b"", b"no arrow"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.arrow is damaged or no file of molecules"):
            data.load(path)
    with pytest.raises(ValueError, match="there is no file"):
        data.load(tmp_path / "b.arrow")
    with pytest.raises(ValueError, match="could not be written"):
        published.save(tmp_path / "nowhere" / "a.arrow")


def test_columns_that_do_not_fit_are_refused(published):
    columns = {name: getattr(published, name) for name in data.COLUMNS}
    with pytest.raises(ValueError, match="one number and three coordinates per atom"):
        Molecules(**columns | {"positions": published.positions[1:]})
    with pytest.raises(ValueError, match="num_atoms has 5 molecules, and there are 4 in smiles"):
        Molecules(**columns | {"smiles": published.smiles[1:]})
