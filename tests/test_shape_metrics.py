"""What is made of distances between sets: public code's numbers, sums by hand, and sets that cannot be compared."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from pathlib import Path
from time import perf_counter

import numpy as np
import pytest

from envs.shapes import metrics
from envs.shapes.distances import pairwise_chamfer, pairwise_emd
from envs.shapes.metrics import boxed, compare, jsd, mmd_cov, numbers, one_nn_accuracy

GOLDEN = Path(__file__).parent / "golden" / "point_clouds_metrics.npz"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as found:
        return dict(found)


def drawn(num, size=64, seed=0, at=0.0):
    return np.random.default_rng(seed).normal(at, 0.3, (num, size, 3)).astype(np.float32)


# -- public code's numbers


@pytest.mark.parametrize(("distance", "short"), [("chamfer", "cd"), ("emd", "emd")])
def test_mmd_and_cov_are_those_of_public_code(golden, distance, short):
    expected = golden[f"mmd_{short}"].item(), golden[f"cov_{short}"].item()
    assert mmd_cov(golden[distance]) == pytest.approx(expected, rel=1e-5)


def test_jsd_is_that_of_public_code_on_its_own_grid(golden):
    found = jsd(golden["sample_clouds"], golden["reference_clouds"], half=0.5)
    assert found == pytest.approx(float(golden["jsd"]), rel=1e-9)


# -- sets


def test_a_boxed_cloud_touches_the_box_with_its_longest_side():
    found = boxed(drawn(5) * [1, 3, 2] + 7)
    low, high = found.min(1), found.max(1)
    np.testing.assert_allclose(low, -high, atol=1e-12)
    assert high.max(1) == pytest.approx(1)
    assert (high.argmax(1) == 1).sum() >= 3
    assert (boxed(np.ones((1, 4, 3))) == 0).all()


def test_boxing_knows_neither_place_nor_scale():
    x = drawn(3)
    np.testing.assert_allclose(boxed(x), boxed(5 * x - 2), atol=1e-6)


def test_mmd_and_cov_by_hand():
    assert mmd_cov(np.array([[1.0, 4, 9], [2, 3, 8]])) == (pytest.approx((1 + 3 + 8) / 3), pytest.approx(1 / 3))


def test_jsd_is_0_of_a_set_and_itself_and_1_of_sets_that_share_no_place():
    x = drawn(4) / 3
    assert jsd(x, x) == 0
    assert jsd(x, x[::-1]) == 0
    assert jsd(x / 4 - 0.4, x / 4 + 0.4) == 1
    assert jsd(x, drawn(4, seed=1) / 3) == jsd(drawn(4, seed=1) / 3, x)


def test_jsd_by_hand_on_a_grid_of_27_nodes_of_which_7_lie_in_the_ball():
    at = np.array([[0.0, 0, 0], [1, 0, 0], [0, 0.9, 0], [1, 0.2, 0.2]])  # the last two: the nodes of y, and of x
    found = jsd(at[[0, 1]][None], at[[2, 3]][None], resolution=3)
    assert found == pytest.approx((0.25 * 2 + 0.25 * 2 + 0.5 * 1) - 1)
    assert jsd(at[[1]][None] * 9, at[[3]][None], resolution=3) == 0  # from anywhere outside to the nearest node


def test_one_nn_tells_a_half_of_two_draws_alike_and_all_of_sets_apart():
    scale = np.random.default_rng(0).uniform(0.2, 2, (120, 1, 3))
    made, real = drawn(120, seed=3)[:60] * scale[:60], drawn(60, seed=4) * scale[60:]
    cross = pairwise_chamfer(made, real), pairwise_chamfer(made, real + 9)
    ss, rr = pairwise_chamfer(made, made), pairwise_chamfer(real, real)
    assert one_nn_accuracy(ss, cross[0], rr) == pytest.approx(0.5, abs=0.15)
    assert one_nn_accuracy(ss, cross[1], rr) == 1.0
    assert one_nn_accuracy(ss, ss, ss) == 0.0  # copies


# -- all of it


def test_a_comparison_has_every_number_of_its_subsets():
    made, real = drawn(9, 40, 1), drawn(6, 40, 2)
    found = compare(made, real, one_nn=("chamfer", "emd"), num_draws=8, seed=5)
    assert [entry.name for entry in found.entries] == [
        "MMD, CD", "COV, CD", "1-NN, CD", "MMD, EMD", "COV, EMD", "1-NN, EMD", "JSD", "JSD, inner grid"
    ]  # fmt: skip
    rng = np.random.default_rng(5)
    draws = [np.sort(rng.permutation(9)[:6]) for _ in range(8)]
    a, b = boxed(made), boxed(real)
    mmds = [mmd_cov(pairwise_emd(a[draw], b))[0] for draw in draws]
    entry = found["MMD, EMD"]
    assert entry.value == pytest.approx(np.mean(mmds), rel=1e-12)
    assert (entry.low, entry.high) == pytest.approx(tuple(np.percentile(mmds, [2.5, 97.5])), rel=1e-12)
    assert found["JSD"].value == pytest.approx(np.mean([jsd(a[draw], b) for draw in draws]), rel=1e-12)
    assert found["JSD, inner grid"].value == pytest.approx(np.mean([jsd(a[draw], b, half=0.5) for draw in draws]))
    nn = [one_nn_accuracy(*(pairwise_chamfer(*pair) for pair in ((a[d], a[d]), (a[d], b), (b, b)))) for d in draws]
    assert found["1-NN, CD"].value == pytest.approx(np.mean(nn))
    assert (found.num_samples, found.num_references, found.num_draws) == (9, 6, 8)
    assert len(str(found).splitlines()) == 9


def test_a_comparison_does_not_depend_on_workers_and_depends_on_the_seed():
    made, real = drawn(9, 30, 1), drawn(4, 30, 2)
    first = compare(made, real, ("chamfer",), num_workers=1)
    assert compare(made, real, ("chamfer",), num_workers=3) == first
    assert compare(made, real, ("chamfer",), seed=1) != first


def test_as_many_samples_as_references_are_compared_once():
    found = compare(drawn(4, seed=1), drawn(4, seed=2), ("chamfer",))
    assert found.num_draws == 1
    assert all(entry.low == entry.value == entry.high for entry in found.entries)


def test_a_set_beside_itself_is_perfect():
    x = drawn(5)
    found = compare(x, x.copy(), one_nn=())
    assert {entry.name: entry.value for entry in found.entries} == pytest.approx(
        {"MMD, CD": 0, "COV, CD": 1, "MMD, EMD": 0, "COV, EMD": 1, "JSD": 0, "JSD, inner grid": 0}, abs=1e-9
    )


@pytest.mark.parametrize(
    ("samples", "sentence"),
    [
        (np.zeros((0, 9, 3)), "the sample set is empty"),
        ([], "the sample set is empty"),
        (np.full((6, 9, 3), np.nan), "cloud 0 of the sample set has, and 5 more have, NaN or infinite"),
        (drawn(3, 9), "3 samples and 4 references; draw at least as many samples"),
        ([*drawn(5, 9), drawn(1, 8)[0]], r"shapes \(8, 3\) and \(9, 3\); give as many points"),
        ([*drawn(5, 9), None], "cloud 5 of the sample set is None"),
        (drawn(5, 9)[..., :2], r"shape \(5, 9, 2\); give clouds"),
        (drawn(5, 8), "8 and 9 points; the earth mover's distance needs as many in both"),
        (np.array([["a"]]), "without numbers"),
    ],
)
def test_sets_that_cannot_be_compared_are_named_in_a_sentence(samples, sentence):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=sentence):
            compare(samples, drawn(4, 9))


def test_other_wrong_arguments_are_named_too():
    x = drawn(4, 9)
    for call, sentence in {
        lambda: compare(x, x, ("hausdorff",)): "choose chamfer and emd",
        lambda: compare(x, x, ("emd",), ("chamfer",)): "choose chamfer and emd",
        lambda: compare(drawn(5, 9), x, num_draws=0): "num_draws is 0",
        lambda: jsd(x, x, resolution=2): "resolution is 2",
        lambda: jsd(x, x, half=0): "half 0",
        lambda: mmd_cov(np.zeros((3, 0))): r"sr has shape \(3, 0\)",
        lambda: mmd_cov(np.array([[np.nan]])): "sr has distances that are NaN",
        lambda: one_nn_accuracy(np.zeros((2, 2)), np.zeros((3, 2)), np.zeros((2, 2))): r"give \[S, S\]",
        lambda: pairwise_emd(x, x, needed=np.ones((2, 2))): r"needed has shape \(2, 2\)",
        lambda: pairwise_emd(x, x, 0): "num_workers is 0",
    }.items():
        with pytest.raises(ValueError, match=sentence):
            call()


# -- beside every evaluation


def test_numbers_pass_over_what_is_no_shape_and_say_nothing_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for samples in ([], [None, None]):
            assert all(math.isnan(value) for value in numbers(samples).values())
        x = drawn(4, 200)
        assert numbers([x[0], None, *x[1:]]) == numbers(list(x))
        one = numbers([x[0]])
    assert math.isnan(one["diversity"]) and one["flatness"] > 0
    assert numbers([x[0]] * 3)["diversity"] == pytest.approx(0, abs=1e-9)


def test_diversity_is_chamfer_between_different_samples_in_the_box():
    x = drawn(6, 100)
    pairs = pairwise_chamfer(boxed(x), boxed(x))[np.triu_indices(6, 1)]
    assert numbers(list(3 * x + 1))["diversity"] == pytest.approx(pairs.mean(), rel=1e-5)


def test_flat_clouds_are_flat_and_points_that_lie_alone_are_stray():
    x = np.random.default_rng(0).uniform(-1, 1, (3, 400, 3)) * [1, 1, 0.01]
    clean = numbers(list(x))
    assert clean["flatness"] == pytest.approx(0.01, rel=0.1)
    x[:, :20] = np.random.default_rng(1).uniform(-1, 1, (3, 20, 3))
    noisy = numbers(list(x))
    assert clean["stray points"] < 0.005 < 0.03 < noisy["stray points"] < 0.06
    assert math.isnan(numbers(list(x[:, :4]))["stray points"])


def test_a_large_set_is_told_of_in_part_and_always_the_same():
    x = list(drawn(1000, 512))
    start = perf_counter()
    found = numbers(x)
    assert perf_counter() - start < 6  # half a second where nothing else runs
    assert found == numbers(x)
    assert metrics.NUM_COMPARED == 64


def test_measuring_loads_neither_torch_nor_ray():
    code = (
        "import os, sys, numpy as np; from envs.shapes.metrics import compare;"
        "x = np.random.default_rng(0).random((3, 9, 3)); compare(x, x + 1);"
        "print({'torch', 'ray', 'jax'} & set(sys.modules), [name for name in os.environ if name[:4] == 'POT_'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set() []\n"
