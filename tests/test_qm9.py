"""QM9: its ids, its split, the wheel it comes in, and a cache that survives two builders and a kill."""

from __future__ import annotations

import bz2
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from small_molecules import GOLDEN, IDS, PUBLISHED, archive, same, texts

from envs.molecules import data, files, qm9, qm9pack


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> Path:
    """All 133,885 ids as EDM's three files, each molecule a single carbon atom whose x is its id."""
    folder = tmp_path_factory.mktemp("edm")
    ids = np.random.default_rng(0).permutation(np.arange(1, qm9.NUM_PUBLISHED + 1))
    for name, index in zip(("train", "valid", "test"), np.array_split(ids, 3), strict=True):
        ones = np.ones(len(index), int)
        x = np.stack([index, 0 * index, 0 * index], -1)[:, None].astype(np.float32)
        columns = {"num_atoms": ones, "charges": 6 * ones[:, None], "positions": x, "index": index, "mu": index / 7}
        np.savez(folder / f"{name}.npz", **columns)
    return folder


def test_the_ids_are_those_of_the_publication_and_the_test_split_is_cormorants():
    told = json.loads((GOLDEN / "official_test_ids.json").read_text())
    left_out, ids = qm9.uncharacterized_ids(), qm9.split_ids("test")
    assert len(left_out) == 3054 and left_out[:4].tolist() == [58, 61, 80, 185] and (np.diff(left_out) > 0).all()
    assert ids[:5].tolist() == told["first"] and ids[-3:].tolist() == told["last"] and len(ids) == told["num"]
    assert hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest() == told["sha256"]
    parts = [qm9.split_ids(split) for split in ("train", "valid", "test")]
    assert [len(part) for part in parts] == [100_000, 17_748, 13_083]
    assert np.array_equal(np.sort(np.concatenate(parts)), qm9.split_ids("all"))
    assert np.array_equal(np.union1d(qm9.split_ids("all"), left_out), np.arange(1, 133_886))


def test_qm9_is_built_once_and_then_read_from_its_cache(everything, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("RAYFT_DATA", str(tmp_path / "data"))
    train = qm9.qm9(source=everything)
    assert capfd.readouterr().err == ""  # no progress bar where there is no terminal
    begin = time.perf_counter()
    again = qm9.qm9("train")
    assert time.perf_counter() - begin < 1
    assert same(train, again) and len(train) == 100_000
    test = qm9.qm9("test")
    assert np.array_equal(test.index, qm9.split_ids("test")) and np.array_equal(test.positions[:, 0], test.index)
    assert np.array_equal(test.properties["mu"], test.index / 7)
    assert len(qm9.qm9("all")) == 130_831
    with pytest.raises(ValueError, match="split is 'val'; give train, valid, test or all"):
        qm9.qm9("val")
    files.read(PUBLISHED).save(tmp_path / "data" / qm9.FILE)
    with pytest.raises(ValueError, match="does not hold the 130,831 molecules of QM9; delete it"):
        qm9.qm9()


def test_without_a_source_it_is_found_in_the_environment_or_beside_its_cache(everything, tmp_path, monkeypatch):
    monkeypatch.setenv("RAYFT_QM9", str(tmp_path / "nowhere.sdf"))
    with pytest.raises(ValueError, match=r"there is no .*nowhere\.sdf; give"):
        qm9.qm9(folder=tmp_path)
    for source in (PUBLISHED, tmp_path / "mine.tar.bz2"):
        monkeypatch.setenv("RAYFT_QM9", str(source))
        archive(tmp_path / "mine.tar.bz2", texts(), bz2.open)
        with pytest.raises(ValueError, match=rf"{source} has 5 of the 130,831"):
            qm9.qm9(folder=tmp_path)
    monkeypatch.delenv("RAYFT_QM9")
    for name in ("qm9", "dsgdb9nsd", "dsgdb9nsd.xyz"):
        shutil.copytree(PUBLISHED, tmp_path / name)
        with pytest.raises(ValueError, match=rf"/{name} has 5 of the 130,831"):
            qm9.qm9(folder=tmp_path)
    archive(tmp_path / "dsgdb9nsd.xyz.tar.bz2", texts(), bz2.open)
    with pytest.raises(ValueError, match=r"/dsgdb9nsd\.xyz\.tar\.bz2 has 5 of the 130,831"):
        qm9.qm9(folder=tmp_path)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "qm9").symlink_to(everything)
    assert len(qm9.qm9("test", folder=tmp_path / "new")) == 13_083


def test_a_part_of_qm9_is_not_taken_for_qm9(tmp_path):
    with pytest.raises(ValueError, match=r"has 5 of the 130,831 molecules of QM9 by their ids; give all of it"):
        qm9.qm9(folder=tmp_path, source=PUBLISHED)
    shutil.copytree(PUBLISHED, tmp_path / "xyz")
    (tmp_path / "xyz" / "dsgdb9nsd_000001.xyz").write_text("5\n")
    with pytest.raises(ValueError, match=r"has 4 of the .* 1 unusable ones, 1 with fewer lines"):
        qm9.qm9(folder=tmp_path, source=tmp_path / "xyz")
    assert not (tmp_path / qm9.FILE).exists()


def test_a_wheel_is_read_without_importing_it_and_a_broken_one_refused(tmp_path, monkeypatch):
    installed, wheel = tmp_path / "site" / "qm9pack", tmp_path / "qm9pack-1.0.3-py3-none-any.whl"
    shutil.copytree(GOLDEN / "qm9pack", installed / "data")
    (installed / "__init__.py").write_text("import pkg_resources_is_missing")
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for part in qm9pack.PARTS:
            archive.write(installed / "data" / part, f"qm9pack/data/{part}")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    folder = qm9pack.installed()
    assert folder == installed / "data" and "qm9pack" not in sys.modules
    assert same(data.concatenate(list(qm9pack.chunks(folder))), data.concatenate(list(qm9pack.chunks(wheel))))
    with pytest.raises(ValueError, match=r"qm9pack-1\.0\.3.* has 5 of the 130,831"):
        qm9.qm9(folder=tmp_path)  # the wheel that lies in the folder
    whole, table = wheel.read_bytes(), (folder / "qm9_part2.csv").read_text()
    for content in (whole[:4000], whole[:300] + b"x" + whole[301:], b""):
        wheel.write_bytes(content)
        with pytest.raises(ValueError, match=r"qm9pack-1\.0\.3.* is cut off, damaged or not qm9pack==1.0.3"):
            qm9.qm9(folder=tmp_path)
    for wrong in (
        table.replace("'N'", "'Xx'"),
        table.replace("[[", "[[1.,"),
        table.replace("SMILES", "SMILE"),
        table[:900],
    ):
        (folder / "qm9_part2.csv").write_text(wrong)
        with pytest.raises(ValueError, match=r"data is cut off, damaged or not qm9pack==1.0.3"):
            qm9.complete(folder)


def child(folder: Path, source: Path | None = None, **environment: str) -> subprocess.Popen[str]:
    code = "import sys; from envs.molecules import qm9; m = qm9.qm9('all', *sys.argv[1:]); print(len(m), m.index.sum())"
    command = [sys.executable, "-c", code, str(folder), *([] if source is None else [str(source)])]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment
    )


@pytest.mark.skipif(qm9pack.installed() is not None, reason="qm9pack is installed")
def test_without_network_one_sentence_says_what_to_do(tmp_path):
    error = child(tmp_path / "new", PIP_NO_INDEX="1").communicate()[1]
    assert "fetching qm9pack==1.0.3, 104 MB, once, from PyPI" in error
    assert "ValueError: QM9 is not in" in error and "pip install 'rayft[qm9]'" in error
    assert "without one, set RAYFT_QM9 to the path of qm9pack" in error
    assert {file.name for file in (tmp_path / "new").iterdir()} == {f".{qm9.FILE}.lock"}


def test_a_folder_that_cannot_be_written_is_named(everything, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot keep data in .*file/data .*; set RAYFT_DATA to a folder"):
        qm9.qm9(folder=tmp_path / "file" / "data", source=everything)


def test_two_processes_at_once_build_one_file(everything, tmp_path):
    both = [child(tmp_path, everything), child(tmp_path, everything)]
    told = [process.communicate() for process in both]
    assert {out for out, _ in told} == {f"130831 {qm9.characterized_ids().sum()}\n"}, told
    assert sum("another process is making" in error for _, error in told) <= 1
    assert {file.name for file in tmp_path.iterdir()} == {qm9.FILE, f".{qm9.FILE}.lock"}


def test_whoever_waits_takes_over_from_a_process_that_was_killed(everything, tmp_path):
    os.mkfifo(fifo := tmp_path / "endless.tar")
    folder = tmp_path / "data"
    killed = child(folder, fifo)
    with fifo.open("wb", buffering=0) as stream:  # opens when the other end does
        stream.write(b"a" * 100)
        (folder / f".{qm9.FILE}.1-dead.tmp").write_bytes(b"half of it")
        (folder / ".qm9pack-dead").mkdir()
        waiting = child(folder, everything)
        assert "another process is making" in waiting.stderr.readline()
        assert not (folder / qm9.FILE).exists()
        killed.kill()
        out, _ = waiting.communicate()
    killed.communicate()
    assert out.startswith("130831 ")
    assert {file.name for file in folder.iterdir()} == {qm9.FILE, f".{qm9.FILE}.lock", ".qm9pack-dead"}


@pytest.mark.slow
def test_the_real_wheel_is_fetched_and_has_the_published_histogram(tmp_path):
    train = qm9.qm9("train", folder=tmp_path)
    assert np.bincount(train.num_atoms)[3:].tolist() == [
        *(1, 4, 5, 9, 16, 49, 124, 362, 807, 1689, 3060, 5136, 7796, 10644, 13025, 13364, 13832, 9482, 9970, 3393),
        *(4848, 539, 1506, 48, 266, 0, 25),
    ]  # EDM's n_nodes
    some = np.isin(train.index, IDS)
    published = files.read(PUBLISHED)
    assert same(train[some], published[np.isin(published.index, train.index)])
