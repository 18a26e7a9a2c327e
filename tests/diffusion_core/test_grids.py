"""Grids: exactly S descending, connected steps for every S."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_core.grids import SPACINGS, check_grid, grid_from_steps, make_grid, restrict_grid


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("total", [1, 2, 7, 100, 1000])
def test_grid_has_exactly_the_requested_number_of_distinct_descending_steps(spacing, total):
    for count in range(1, total + 1):
        grid = make_grid(spacing, total, count)
        steps = [t for t, _ in grid]
        assert len(steps) == count == len(set(steps))
        assert steps == sorted(steps, reverse=True) and steps[-1] >= 0 and steps[0] < total
        assert [t_prev for _, t_prev in grid] == [*steps[1:], -1]
        check_grid(grid, total)


@given(spacing=st.sampled_from(SPACINGS), total=st.integers(1, 5000), data=st.data())
@settings(max_examples=200, deadline=None)
def test_grid_fits_a_schedule_of_any_length(spacing, total, data):
    count = data.draw(st.integers(1, total))
    grid = make_grid(spacing, total, count)
    assert len(grid) == count
    check_grid(grid, total)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_full_grid_is_every_step(spacing):
    assert make_grid(spacing, 50, 50) == [(t, t - 1) for t in range(49, -1, -1)]


def test_spacings_reach_the_documented_ends_of_the_schedule():
    for count in (2, 3, 7, 50, 333, 999):
        assert make_grid("trailing", 1000, count)[0][0] == 999
        linspace = make_grid("linspace", 1000, count)
        assert linspace[0][0] == 999 and linspace[-1][0] == 0
        assert make_grid("uniform", 1000, count)[-1][0] == 0
        assert make_grid("leading", 1000, count)[-1][0] == 0


def test_uniform_grid_covers_the_schedule_if_leading_does_not_reach_its_top():
    """With 600 of 1000 steps, the stride 1000 // 600 = 1 stays in the cleaner 600 levels."""
    assert make_grid("leading", 1000, 600)[0][0] == 599
    assert make_grid("uniform", 1000, 600)[0][0] == 998
    for count in range(1, 1001):
        gaps = {t - t_prev for t, t_prev in make_grid("uniform", 1000, count)[:-1]}
        assert gaps <= {1000 // count, math.ceil(1000 / count)}


def test_quadratic_grid_equals_that_of_the_papers_code():
    """Its NumPy formula is the reference; if it repeats a step, a grid of distinct steps must differ."""
    compared = 0
    for total in (100, 1000, 4000):
        for count in range(2, total // 4):
            expected = [int(s) for s in np.linspace(0, np.sqrt(total * 0.8), count) ** 2]
            if len(set(expected)) == count:
                assert sorted(t for t, _ in make_grid("quadratic", total, count)) == expected
                compared += 1
    assert compared > 40


def test_restricted_grid_starts_and_stops_at_the_given_levels():
    grid = make_grid("uniform", 100, 10)
    assert restrict_grid(grid, highest=50) == [(50, 40), (40, 30), (30, 20), (20, 10), (10, 0), (0, -1)]
    assert restrict_grid(grid, highest=30, lowest=10) == [(30, 20), (20, 10)]
    assert restrict_grid(grid) == grid
    for highest, lowest, message in (
        (55, -1, "not on the grid"),
        (50, 45, "not on the grid"),
        (30, 30, "no step lies"),
    ):
        with pytest.raises(ValueError, match=message):
            restrict_grid(grid, highest=highest, lowest=lowest)


def test_bad_grids_are_refused_with_the_remedy():
    for count in (0, 11):
        with pytest.raises(ValueError, match="choose 1 to 10"):
            make_grid("uniform", 10, count)
    with pytest.raises(ValueError, match="unknown grid spacing"):
        make_grid("cubic", 10, 5)
    with pytest.raises(ValueError, match="no step twice"):
        grid_from_steps([3, 3], 10)
    with pytest.raises(ValueError, match="at least one step"):
        grid_from_steps([], 10)
    with pytest.raises(ValueError, match="0 to 9"):
        grid_from_steps([10], 10)
    with pytest.raises(ValueError, match="whole numbers"):
        grid_from_steps([1.5, 3], 10)
    with pytest.raises(ValueError, match="choose 1 to 10"):
        make_grid("uniform", 10, 5.0)
    with pytest.raises(ValueError, match="must go down"):
        check_grid([(3, 3)], 10)
    with pytest.raises(ValueError, match="the next starts at 4"):
        check_grid([(9, 5), (4, -1)], 10)
    assert grid_from_steps([1, 8, 4], 10) == [(8, 4), (4, 1), (1, -1)]
