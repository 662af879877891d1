"""Shapes from every source: npz, HDF5, folders kept as Arrow; chosen by group and class, with one number of points."""

from __future__ import annotations

import logging
import os
import re
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from envs.shapes import cache, formats
from envs.shapes.data import Shapes
from envs.shapes.generated import main as write_generated

SHARED = Path(os.environ.get("RAYFT_SHARED") or Path(__file__).parents[2] / "shared") / "data"
PSB, FURNITURE = SHARED / "shapes_psb_shrec" / "shapes2048.npz", SHARED / "furniture_cc" / "furniture2048.npz"
OBJ_SAMPLE = PSB.with_name("obj_sample.tar.xz")
absent = {
    path: pytest.mark.skipif(not path.is_file(), reason=f"there is no {path}; set RAYFT_SHARED")
    for path in (PSB, FURNITURE, OBJ_SAMPLE)
}

needs_open3d = pytest.mark.skipif(find_spec("open3d") is None, reason="needs Open3D: pip install 'rayft[shapes]'")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYFT_DATA", str(tmp_path / "cache"))


def clouds(count: int, num_points: int = 50) -> np.ndarray:
    return np.random.default_rng(count).normal(size=(count, num_points, 3)).astype(np.float32)


def labelled() -> dict[str, np.ndarray]:
    return {
        "points": clouds(5),
        "label": np.array([0, 1, 1, 2, 0]),
        "classes": np.array(["Jet", "Bus", "Cup"]),
        "class_group": np.array(["aircraft", "vehicle", "vessel"]),
        "name": np.array(["j0", "b0", "b1", "c0", "j1"]),
    }


def saved(path: Path, **arrays) -> Path:
    np.savez(path, **arrays)
    return path


# -- npz


def test_an_npz_gives_back_points_labels_classes_and_groups(tmp_path):
    arrays = labelled()
    found = formats.read(saved(tmp_path / "a.npz", **arrays), num_points=50)
    assert np.array_equal(found.points, arrays["points"]) and found.points.dtype == np.float32
    assert found.full_names == ("aircraft/Jet", "vehicle/Bus", "vessel/Cup")
    assert found.label.tolist() == [0, 1, 1, 2, 0] and found.name.tolist() == arrays["name"].tolist()


def test_rotations_bring_an_npz_into_one_pose(tmp_path):
    turn = np.array([[[1, 0, 0], [0, 1, 0], [0, 0, 1]], [[0, -1, 0], [1, 0, 0], [0, 0, 1]]], np.int8)
    arrays = labelled() | {"rot24": np.array([0, 1, 0, 1, 0], np.uint8), "rotations": turn}
    found = formats.read(saved(tmp_path / "a.npz", **arrays), num_points=50)
    assert np.array_equal(found.points[0], arrays["points"][0])
    x, y, z = arrays["points"][1].T  # p @ R.T: (x, y, z) -> (-y, x, z)
    np.testing.assert_allclose(found.points[1], np.stack([-y, x, z], 1), rtol=1e-6)
    arrays["rot24"][0] = 7
    with pytest.raises(ValueError, match="rot24 that do not fit rotations"):
        formats.read(saved(tmp_path / "a.npz", **arrays))


@pytest.mark.parametrize("name", ["category", "label"])
def test_classes_may_be_words(name, tmp_path):
    words = {"points": clouds(3), name: np.array(["Sofa", "Bed", "Sofa"]), "name": np.array(["a", "a", "a"])}
    found = formats.read(saved(tmp_path / "a.npz", **words), num_points=50)
    assert found.classes == ("Bed", "Sofa") and found.label.tolist() == [1, 0, 1]
    assert found.name.tolist() == ["a", "a", "a (2)"]
    grouped = formats.read(saved(tmp_path / "b.npz", **words, group=np.array(["home"] * 3)), 50, group="home")
    assert grouped.full_names == ("home/Bed", "home/Sofa")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": None}, "has no points; it needs points"),
        ({"points": np.zeros((5, 50, 2))}, r"has points \(5, 50, 2\) of float64; it needs"),
        ({"label": np.zeros(4, int)}, r"has 5 clouds and label has shape \(4,\); give one per cloud"),
        ({"label": np.full(5, 3)}, "has label or class_group that do not fit its 3 classes"),
        ({"classes": None}, "does not say of what class its clouds are"),
        ({"classes": np.array("Jet")}, r"has classes of shape \(\); give a name for each class"),
        ({"classes": np.array([["Jet", "Bus", "Cup"]])}, r"has classes of shape \(1, 3\); give a name for each class"),
        ({"class_group": np.array("air")}, "has label or class_group that do not fit its 3 classes"),
        ({"name": np.array([{}] * 5)}, "is no whole .npz of plain arrays"),
    ],
)
def test_an_npz_that_is_something_else_is_refused(change, message, tmp_path):
    arrays = {name: array for name, array in (labelled() | change).items() if array is not None}
    with pytest.raises(ValueError, match=message):
        formats.read(saved(tmp_path / "a.npz", **arrays))


def damaged(path: Path, how: str) -> None:
    """An .npz with points that numpy cannot read."""
    whole = saved(path, **labelled()).read_bytes()
    if how == "array":
        with path.open("wb") as file:
            np.save(file, clouds(2))
    elif how in ("method", "flag"):  # of each entry: an unknown compression, or encrypted
        entry, told = (
            (rb"(PK\x01\x02.{6})..", b"\x63\x00") if how == "method" else (rb"(PK\x01\x02.{4})..", b"\x01\x00")
        )
        path.write_bytes(re.sub(entry, lambda found: found[1] + told, whole, flags=re.DOTALL))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("points.npy", b"\x93NUMPY\x01\x00\x10\x00{'descr': '<f4', ")


@pytest.mark.parametrize("how", ["array", "method", "flag", "header"])
def test_an_npz_that_is_damaged_is_said_to_be(how, tmp_path):
    damaged(tmp_path / "a.npz", how)
    with pytest.raises(ValueError, match=r"a\.npz is no whole \.npz of plain arrays .*; get it or write it again"):
        formats.read(tmp_path / "a.npz")


def test_bad_clouds_are_left_out_and_counted_in_one_sentence(tmp_path, caplog):
    arrays = labelled()
    arrays["points"][1, 3] = np.nan
    arrays["points"][2] = 7
    path = saved(tmp_path / "a.npz", **arrays)
    found = formats.read(path, num_points=50)
    assert found.classes == ("Jet", "Cup") and found.name.tolist() == ["j0", "c0", "j1"]
    (record,) = caplog.records
    told = "2 of 5 shapes skipped: 1 with NaN or infinite points (b0), 1 with all points in one place (b1)"
    told += "; used all the same: 1 alone in a class, of which nothing is held out (vessel/Cup)"
    assert record.message == f"{path}: {told}"
    with pytest.raises(ValueError, match=r"no shape in .* can be used: 2 of 2 shapes skipped: 1 with NaN"):
        formats.read(path, classes=["Bus"])
    with pytest.raises(ValueError, match=r"no shape in .*: it holds none"):
        formats.read(saved(tmp_path / "b.npz", points=np.zeros((0, 9, 3)), category=np.zeros(0, str)))


# -- HDF5


@pytest.fixture
def shapenet(tmp_path) -> Path:
    """Two synsets in the layout of ShapeNet's point clouds, one of them with fewer points and no val."""
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "shapenet.hdf5"
    with h5py.File(path, "w") as file:
        for part, count in (("train", 4), ("val", 2), ("test", 1)):
            file[f"02691156/{part}"] = clouds(count, 80)
        file["03001627/train"] = clouds(3, 30)
        file["03001627/test"] = clouds(2, 30)
    return path


def test_shapenets_clouds_are_read_by_name_or_synset(shapenet):
    planes = formats.read(shapenet, num_points=80, classes=["airplane"])
    assert planes.classes == ("airplane",) and len(planes) == 7
    assert np.array_equal(planes.points[4:6], clouds(2, 80)) and planes.name[4] == "02691156/val/00000"
    assert np.array_equal(formats.read(shapenet, 80, classes=["02691156"]).points, planes.points)
    with pytest.raises(ValueError, match=r"no class 'char' \(did you mean 'chair'\?\); there are airplane, chair"):
        formats.read(shapenet, classes=["char"])
    assert formats.SYNSETS["02958343"] == "car" and len(formats.SYNSETS) == 56


def test_mixed_point_counts_are_thinned_or_repeated_and_told(shapenet, caplog):
    found = formats.read(shapenet, num_points=40)
    assert found.points.shape == (12, 40, 3) and found.classes == ("airplane", "chair")
    distinct = [len(np.unique(cloud, axis=0)) for cloud in found.points]
    assert distinct == [40] * 7 + [30] * 5
    (record,) = caplog.records
    assert "used all the same: 5 with fewer than 40 points, some of them taken twice (03001627/" in record.message
    assert np.array_equal(formats.read(shapenet, 40, classes=["chair"]).points, found.points[7:])


def test_an_hdf5_that_is_something_else_is_refused(shapenet, tmp_path):
    import h5py

    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["data"] = clouds(2)
    with pytest.raises(ValueError, match=r"a\.h5 holds data; it needs groups named by synset"):
        formats.read(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["02691156/train"] = clouds(2)[:, :, :2]
    with pytest.raises(ValueError, match=r"has \(2, 50, 2\) of float32 in 02691156/train; it needs groups"):
        formats.read(tmp_path / "a.h5")
    for kind, part in (("Group", "train/clouds"), ("Datatype", "train")):
        with h5py.File(tmp_path / "a.h5", "w") as file:
            file[f"02691156/{part}"] = clouds(2) if kind == "Group" else np.dtype("f4")
        with pytest.raises(ValueError, match=f"has a {kind} in 02691156/train; it needs groups"):
            formats.read(tmp_path / "a.h5")
    for content in (b"no hdf5", shapenet.read_bytes()[:3000]):
        (tmp_path / "b.hdf5").write_bytes(content)
        with pytest.raises(ValueError, match="is cut off, damaged or no HDF5 file"):
            formats.read(tmp_path / "b.hdf5")


# -- folders, and what is kept of them


def same(a: Shapes, b: Shapes) -> bool:
    arrays = all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("points", "label", "name"))
    return arrays and a.classes == b.classes and a.groups == b.groups


@needs_open3d
def test_a_folder_is_sampled_once_and_again_when_a_file_changes(tmp_path, caplog, monkeypatch):
    write_generated([str(tmp_path / "set"), "--num", "8"])
    bad = tmp_path / "set" / "aircraft" / "jet" / "bad.off"
    bad.touch()
    first = formats.read(tmp_path / "set", 64)
    assert first.points.shape == (8, 64, 3) and first.full_names[0] == "aircraft/biplane"
    kept = list((tmp_path / "cache" / "shapes").glob("*.arrow"))
    assert len(kept) == 1 and kept[0].name.startswith("set-")
    with monkeypatch.context() as patched:
        patched.setattr(formats, "sampled", None)  # not called
        assert same(formats.read(tmp_path / "set", 64), first)
    told = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == 2 and told[0] == told[1] and "1 of 9 shapes skipped: 1 empty (aircraft/jet/bad.off)" in told[0]

    bad.unlink()
    assert same(formats.read(tmp_path / "set", 64), first)
    assert len(list((tmp_path / "cache" / "shapes").glob("*.arrow"))) == 2
    jets = formats.read(tmp_path / "set", 64, classes=["jet"])
    assert same(jets, first.subset(["jet"]))


@needs_open3d
def test_a_damaged_cache_is_made_again_and_said_once(tmp_path, caplog):
    write_generated([str(tmp_path / "set"), "--num", "4"])
    first = formats.read(tmp_path / "set", 64)
    (path,) = (tmp_path / "cache" / "shapes").glob("*.arrow")
    whole = path.read_bytes()
    for content in (whole[:-100], b""):
        caplog.clear()
        path.write_bytes(content)
        assert same(formats.read(tmp_path / "set", 64), first)
        (told,) = [record.message for record in caplog.records if "is damaged" in record.message]
        assert told.endswith("it is made again")
        assert same(cache.load(path)[0], first)
    assert sorted(file.suffix for file in path.parent.iterdir()) == [".arrow", ".lock"]


@needs_open3d
def test_a_cache_that_cannot_be_written_says_what_to_set(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("RAYFT_DATA", str(tmp_path / "file"))
    write_generated([str(tmp_path / "set"), "--num", "2"])
    with pytest.raises(ValueError, match=r"cannot keep data in .*; set RAYFT_DATA to a folder that you can write"):
        formats.read(tmp_path / "set", 64)


# -- any source


def test_the_generated_set_is_chosen_by_group_and_class():
    assert len(formats.read("generated", 32)) == 1200
    assert formats.read("generated", 32, group="vehicle").classes == ("car", "truck", "bus", "tractor")
    few = formats.read("generated", 32, classes=["tractor", "aircraft/jet"])
    assert few.full_names == ("vehicle/tractor", "aircraft/jet") and len(few) == 60 + 270
    with pytest.raises(ValueError, match=r"no class 'hellicopter' in aircraft \(did you mean 'helicopter'\?\)"):
        formats.read("generated", group="aircraft", classes=["hellicopter"])


def test_what_is_no_source_says_what_is(tmp_path):
    (tmp_path / "a.csv").touch()
    for source, message in ((tmp_path / "a.csv", "a name that says no format"), ("generatd", "there is no generatd")):
        with pytest.raises(
            ValueError, match=rf"{message}; give 'generated', a folder of meshes, an .npz, or ShapeNet's"
        ):
            formats.read(source)
    with pytest.raises(ValueError, match="num_points is 0; give a whole number"):
        formats.read("generated", 0)


# -- published shapes


@absent[PSB]
def test_published_aircraft_are_one_group_in_one_pose():
    planes, skipped = formats.read_counted(PSB, group="aircraft")
    assert len(planes) == 323 and planes.points.shape[1:] == (2048, 3) and not skipped.left_out and not skipped.kept
    counts = dict(zip(planes.classes, np.bincount(planes.label).tolist(), strict=True))
    assert counts["Jet"] == 143 and counts["Helicopter"] == 50 and counts["Biplane"] == 44
    with np.load(PSB) as raw:
        row = raw["name"].tolist().index(planes.name[7])
        expected = raw["points"][row].astype(np.float32) @ raw["rotations"][raw["rot24"][row]].astype(np.float32).T
    np.testing.assert_allclose(planes.points[7], expected, atol=1e-6)
    extents = np.ptp(planes.subset(["Jet"]).points, axis=1)
    assert (extents.argmin(1) == np.bincount(extents.argmin(1)).argmax()).mean() > 0.9  # the same axis is the thinnest
    thin = formats.read(PSB, 512, classes=["Helicopter"])
    assert thin.points.shape == (50, 512, 3)


@absent[FURNITURE]
def test_published_furniture_is_named_by_category():
    found, skipped = formats.read_counted(FURNITURE)
    assert len(found) + skipped.total == 820 and len(found.classes) == 12 and skipped.total < 5
    assert len({*zip(found.label.tolist(), found.name, strict=True)}) == len(found)


@needs_open3d
@absent[OBJ_SAMPLE]
def test_published_obj_files_are_shapes_of_eight_classes(tmp_path):
    with tarfile.open(OBJ_SAMPLE) as archive:
        archive.extractall(tmp_path, filter="data")
    found = formats.read(tmp_path / "obj_sample")
    assert len(found) == 32 and np.bincount(found.label).tolist() == [4] * 8 and "Helicopter" in found.classes
