"""A cloud as a picture: a PNG by the format's own rules, from where it says, with what is near before what is far."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest

from envs.shapes import splat


def plane(num=400, seed=0):
    """A body along x, wings along y, a fin in z at its end."""
    rng = np.random.default_rng(seed)
    parts = [rng.uniform(low, high, (num, 3)) for low, high in (
        ([-1, -0.1, -0.1], [1, 0.1, 0.1]), ([-0.2, -0.9, 0], [0.2, 0.9, 0.05]), ([0.8, 0, 0], [1, 0.03, 0.5])
    )]  # fmt: skip
    return np.concatenate(parts)[rng.permutation(3 * num)[:num]].astype(np.float32)


def pixels(data):
    """Red, green, blue, cover [height, width, 4] of a PNG with a palette, by the format's own rules."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size]) == (zlib.crc32(kind + body),)
        chunks[kind], at = body, at + 12 + size
    assert list(chunks) == [b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"]
    w, h, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert rest == [8, 3, 0, 0, 0]
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(h, w + 1)
    assert not lines[:, 0].any()
    inks = np.frombuffer(chunks[b"PLTE"], np.uint8).reshape(-1, 3)
    return np.concatenate([inks, np.frombuffer(chunks[b"tRNS"], np.uint8)[:, None]], 1)[lines[:, 1:]]


def test_a_picture_is_a_png_that_shows_something_on_nothing():
    found = pixels(splat.png(splat.draw(plane(), width=120, height=90), "run"))
    assert found.shape == (90, 120, 4)
    cover = found[..., 3]
    assert 0.05 < (cover > 128).mean() < 0.8
    assert not cover[[0, -1]].any() and not cover[:, [0, -1]].any()  # nothing is cut off
    assert len(np.unique(found[cover > 128][:, :3], axis=0)) > 15


def test_the_same_cloud_gives_the_same_bytes_in_any_order_of_its_points():
    x = plane()
    first = splat.png(splat.draw(x), "run")
    assert splat.png(splat.draw(x), "run") == first
    again = splat.draw(x[::-1])
    np.testing.assert_allclose(again.cover, splat.draw(x).cover)
    assert splat.png(splat.draw(plane(seed=1)), "run") != first


@pytest.mark.parametrize("background", [(255, 255, 255), (20, 24, 29)])
@pytest.mark.parametrize("ramp", splat.RAMPS)
def test_a_shape_stands_out_on_white_and_on_black(background, ramp):
    found = pixels(splat.png(splat.draw(plane(), width=100, height=80), ramp)).astype(float)
    shape = found[found[..., 3] == 255][:, :3]
    assert np.median(np.abs(shape - background).max(1)) > 60


def test_views_are_from_where_they_say():
    x = plane(2000)
    sizes = {}
    for view in splat.VIEWS:
        cover = splat.draw(x, view, 200, 200).cover > 0.5
        rows, columns = np.flatnonzero(cover.any(1)), np.flatnonzero(cover.any(0))
        sizes[view] = np.ptp(columns) / np.ptp(rows)
    assert sizes["top"] == pytest.approx(2 / 1.8, rel=0.1)  # x across, y up
    assert sizes["side"] > 2.5  # x across, z up
    assert sizes["front"] > 2.5  # y across, z up
    side = splat.draw(x, "side", 200, 200).cover
    assert side[:100, 100:].sum() > 2 * side[:100, :100].sum()  # the fin: high, and at the end of x


def test_with_y_up_a_shape_that_lies_so_looks_as_it_does_with_z_up():
    x = plane()
    lying = x[:, [1, 2, 0]]  # its z is now y, and no mirror was used
    assert splat.png(splat.draw(lying, up="y"), "run") == splat.png(splat.draw(x), "run")


def test_what_is_near_hides_what_is_far():
    ground = np.random.default_rng(0).uniform(-1, 1, (3000, 3)) * [1, 1, 0]
    lid = ground[:1500] * 0.5 + [0, 0, 0.8]
    open_, covered = (splat.draw(np.concatenate(parts), "top", 80, 80) for parts in ([ground], [ground, lid]))
    centre, edge = np.s_[30:50, 30:50], np.s_[30:50, 16:22]
    assert covered.light[centre].mean() > covered.light[edge].mean() + 0.05  # far is darker
    assert abs(open_.light[centre].mean() - open_.light[edge].mean()) < 0.05


@pytest.mark.parametrize(
    "cloud", [np.zeros((1, 3)), np.ones((9, 3)), np.eye(3), np.linspace([0, 0, 0], [1e6, 0, 0], 50), plane() * 1e-6]
)
def test_clouds_without_a_surface_are_drawn_too(cloud):
    with np.errstate(all="raise", under="ignore"):
        shot = splat.draw(cloud, width=60, height=40)
    assert shot.cover.max() == 1
    assert np.isfinite(shot.light).all()


def test_a_view_or_an_axis_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="view is 'below' and up 'z'; choose of corner, side"):
        splat.draw(plane(), "below")
    with pytest.raises(ValueError, match="up 'w'"):
        splat.draw(plane(), up="w")
