"""The model of many nodes, against cases that can be worked by hand."""

from __future__ import annotations

import pytest

from benchmarks._scale import Parts, Price, cost, efficiency, seconds

PARTS = Parts(chain=0.1, sample=0.3, rest=2.0, chains=100)


def test_what_is_drawn_and_scored_shrinks_with_the_nodes_and_the_rest_does_not():
    assert seconds(PARTS, 1) == pytest.approx(100 * 0.4 + 2)
    assert seconds(PARTS, 10) == pytest.approx(10 * 0.4 + 2)
    assert seconds(PARTS, 1000) == pytest.approx(0.4 + 2)  # a chain is not divided


def test_chains_that_do_not_divide_evenly_wait_for_the_node_with_one_more():
    assert seconds(PARTS, 99) == pytest.approx(2 * 0.4 + 2)


def test_pieces_hide_the_shorter_of_drawing_and_scoring_but_for_the_first_piece():
    assert seconds(PARTS, 1, pieces=10) == pytest.approx(1 + 9 * 3 + 3 + 2)


def test_perfect_is_1_where_nothing_rests():
    assert efficiency(Parts(0.1, 0.3, 0.0, 64), 64) == pytest.approx(1)
    assert efficiency(PARTS, 10) == pytest.approx(4 / 6)


def test_more_nodes_cost_more_for_an_hour_and_fewer_hours():
    price = Price(head=1.0, node=0.5)
    assert cost(PARTS, 10, 600, price) == pytest.approx(600 * 6 / 3600 * 6)
