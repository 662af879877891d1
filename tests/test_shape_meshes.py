"""Folders of meshes as point clouds: every layout, any number of processes, and a loss of one file at most."""

from __future__ import annotations

import os
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from scipy.spatial import KDTree
from small_meshes import BAD, TETRAHEDRON, put

from envs.shapes.data import normalised
from envs.shapes.meshes import Mesh, listed, sampled

pytest.importorskip("libusb_package", reason="needs Open3D: pip install 'rayft[shapes]'")

SHARED = Path(os.environ.get("RAYFT_SHARED") or Path(__file__).parents[2] / "shared")
OBJ_SAMPLE = SHARED / "data" / "shapes_psb_shrec" / "obj_sample.tar.xz"


@pytest.mark.parametrize(
    ("files", "kinds"),
    [
        (["car/a.off", "bus/b.off"], [("", "bus"), ("", "car")]),
        (["aircraft/jet/a.obj", "aircraft/biplane/b.ply"], [("aircraft", "biplane"), ("aircraft", "jet")]),
        (["chair/train/a.off", "chair/test/b.off", "bed/train/c.off"], [("", "bed"), ("", "chair"), ("", "chair")]),
        (["Airplane/train/jet/a.off", "Airplane/test/jet/b.off"], [("Airplane", "jet")] * 2),
        (["Airplane/jet/train/a.off", "Airplane/jet/test/b.off"], [("Airplane", "jet")] * 2),
        (["train/car/a.off", "test/car/b.off"], [("", "car")] * 2),
        (["vehicle/train/a.off", "vehicle/bus/b.off"], [("vehicle", "bus"), ("vehicle", "train")]),
        (["train/a.off", "bus/b.off"], [("", "bus"), ("", "train")]),
        (["02691156/1a04/models/model_normalized.obj", "02691156/1a32/model.obj"], [("", "02691156")] * 2),
        (["jet/1a/b.off", "jet/.hidden.off", "__MACOSX/jet/._b.off", "readme.txt"], [("jet", "1a")]),
        (["a.STL"], [("", "cups")]),
    ],
)
def test_folders_say_group_and_class(files, kinds, tmp_path):
    for name in files:
        put(tmp_path / "cups" / name, TETRAHEDRON)
    found = listed(tmp_path / "cups")
    assert [file.kind for file in found] == kinds
    assert all((tmp_path / "cups" / file.name).samefile(file.path) for file in found)


def test_a_folder_without_meshes_says_what_is_expected(tmp_path):
    put(tmp_path / "a.txt", "")
    with pytest.raises(ValueError, match=r"holds no file of \.off, .*give a folder ROOT/class/ or ROOT/group/class/"):
        listed(tmp_path)


def test_bad_files_are_left_out_and_counted_and_the_points_do_not_depend_on_the_workers(tmp_path):
    for name, (content, _) in BAD.items():
        put(tmp_path / "a" / "bad" / name, content)
    for number in range(6):
        put(tmp_path / "a" / "good" / f"{number}.off", TETRAHEDRON.replace("0 0 1", f"0 0 {number + 1}"))
    files = listed(tmp_path / "a")
    clouds, kept, skipped = sampled(files, 64, num_workers=1, max_megabytes=1)
    assert clouds.shape == (6, 64, 3) and [file.name for file in kept] == [f"good/{n}.off" for n in range(6)]
    assert skipped.total == len(BAD)
    for name, (_, reason) in BAD.items():
        assert f"bad/{name}" in skipped.left_out[reason]
    assert len(np.unique(clouds[:, 0], axis=0)) == 6  # every file has a seed of its own
    sentence = skipped.sentence(len(files))
    assert sentence.startswith(
        f"{len(BAD)} of {len(files)} meshes skipped: 5 with a line that is no vertex or face (bad/"
    )
    assert "3 with NaN vertices (bad/nan.obj, bad/nan.off, bad/nan.xyz), " in sentence

    (tmp_path / "a").rename(tmp_path / "b")
    again, _, _ = sampled(listed(tmp_path / "b" / "good"), 64, num_workers=1)
    assert not np.array_equal(again, clouds)  # the same meshes by other names
    again, _, others = sampled(listed(tmp_path / "b"), 64, num_workers=3, max_megabytes=1)
    assert np.array_equal(again, clouds) and others == skipped


def test_a_process_killed_at_one_mesh_loses_that_mesh_and_no_other(tmp_path):
    files = _with_a_pipe(tmp_path)
    pids: list[int] = []
    killer = threading.Thread(target=_kill_reader, args=(tmp_path / "a" / "1.off", pids))
    killer.start()
    clouds, kept, skipped = sampled(files, 32, num_workers=1, time_limit=30)
    killer.join()
    assert len(pids) == 1 and len(clouds) == 3 and [file.path.name for file in kept] == ["0.off", "2.off", "3.off"]
    assert skipped.sentence(4) == "1 of 4 meshes skipped: 1 that ended the process which read it (code -9) (a/1.off)"
    assert np.isfinite(clouds).all() and (np.ptp(clouds, axis=1) > 0.5).all()


def test_a_mesh_that_takes_for_ever_loses_itself_and_no_other(tmp_path):
    files = _with_a_pipe(tmp_path)
    start = time.monotonic()
    clouds, _, skipped = sampled(files, 32, num_workers=2, time_limit=1)
    assert len(clouds) == 3 and time.monotonic() - start < 30
    assert skipped.left_out == {"that took more than 1 seconds": ["a/1.off"]}


def _with_a_pipe(folder: Path) -> list[Mesh]:
    """Four files, of which the second is a named pipe by now: to read it takes for ever."""
    for number in range(4):
        put(folder / "a" / f"{number}.off", TETRAHEDRON)
    files = listed(folder)
    (folder / "a" / "1.off").unlink()
    os.mkfifo(folder / "a" / "1.off")
    return files


def _kill_reader(pipe: Path, pids: list[int]) -> None:
    """Kills the child of this process that has the pipe open."""
    for _ in range(400):
        try:
            writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # nobody reads yet
            time.sleep(0.05)
            continue
        readers = [child for child in psutil.Process().children() if "envs.shapes.meshes" in child.cmdline()]
        pids += [child.pid for child in readers]
        for child in readers:
            child.kill()
        os.close(writer)
        return


def test_without_open3d_it_says_how_to_get_it(tmp_path, monkeypatch):
    put(tmp_path / "broken" / "open3d.py", "raise ImportError('libX11 is missing')")
    monkeypatch.syspath_prepend(tmp_path / "broken")
    put(tmp_path / "a" / "a.off", TETRAHEDRON)
    with pytest.raises(ValueError, match=r"needs Open3D, and libX11 is missing; pip install 'rayft\[shapes\]'"):
        sampled(listed(tmp_path / "a"), 32)


@pytest.mark.parametrize("wrong", [{"num_points": 0}, {"num_points": 2.5}, {"num_workers": -1}])
def test_wrong_numbers_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is {next(iter(wrong.values()))}; give a whole number"):
        sampled([], **{"num_points": 8, **wrong})


@pytest.mark.skipif(not OBJ_SAMPLE.is_file(), reason=f"there is no {OBJ_SAMPLE}; set RAYFT_SHARED")
def test_published_obj_files_are_sampled(tmp_path):
    with tarfile.open(OBJ_SAMPLE) as archive:
        archive.extractall(tmp_path, filter="data")
    files = listed(tmp_path / "obj_sample")
    clouds, kept, skipped = sampled(files, 2048)
    assert len(files) == len(kept) == 32 and len({file.kind for file in kept}) == 8 and not skipped.total
    assert clouds.shape == (32, 2048, 3) and np.isfinite(clouds).all()
    assert 5 <= len(skipped.kept["not manifold"]) <= 20
    with np.load(OBJ_SAMPLE.with_name("shapes2048.npz")) as published:
        rows = {name: row for row, name in enumerate(published["name"])}
        expected = normalised(published["points"][[rows[file.path.stem] for file in kept]].astype(np.float32))
    apart = [KDTree(a).query(b)[0].mean() for a, b in zip(normalised(clouds), expected, strict=True)]
    assert max(apart) < 0.1  # two samples of one surface, in deviations
