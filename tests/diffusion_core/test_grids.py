"""Grids: exactly S descending, connected steps for every S."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_core.grids import (
    SPACINGS,
    check_grid,
    grid_from_steps,
    karras_grid,
    make_grid,
    restrict_grid,
    section_grid,
)
from diffusion_core.schedules import SCHEDULES, make_schedule


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


@given(
    name=st.sampled_from(SCHEDULES),
    total=st.integers(2, 400),
    zero=st.booleans(),
    rho=st.floats(0.5, 20),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_karras_grid_has_exactly_the_requested_number_of_steps_for_any_schedule(name, total, zero, rho, data):
    schedule = make_schedule(name, total, zero_terminal_snr=zero)
    count = data.draw(st.integers(1, total))
    grid = karras_grid(schedule, count, rho=rho)
    assert len(grid) == count and grid[0][0] == total - 1
    check_grid(grid, total)


def test_karras_grid_is_the_nearest_to_the_published_noise_levels():
    schedule = make_schedule("scaled_linear", 1000)
    sigma = schedule.sigma(torch.arange(1000))
    for count, rho in ((10, 7.0), (20, 3.0)):
        low, high = float(sigma[0]), float(sigma[-1])
        i = torch.arange(count, dtype=torch.float64)
        wanted = (high ** (1 / rho) + i / (count - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho  # EDM, eq. 5
        steps = [t for t, _ in karras_grid(schedule, count, rho=rho)]
        assert steps == [int((sigma.log() - level.log()).abs().argmin()) for level in wanted]
    inner = karras_grid(schedule, 8, sigma_min=0.1, sigma_max=5.0)
    assert float(sigma[inner[-1][0]]) == pytest.approx(0.1, rel=0.03)
    assert float(sigma[inner[0][0]]) == pytest.approx(5.0, rel=0.03)


def test_karras_grid_starts_at_pure_noise_unless_told_otherwise():
    schedule = make_schedule("linear", 1000, zero_terminal_snr=True)
    assert karras_grid(schedule, 1) == [(999, -1)]
    steps = [t for t, _ in karras_grid(schedule, 5)]
    assert steps[0] == 999 and steps[1] == 998 and steps[-1] == 0
    assert karras_grid(schedule, 5, sigma_max=10.0)[0][0] < 998
    with pytest.raises(ValueError, match="sigma_max"):
        karras_grid(schedule, 5, sigma_max=math.inf)


def space_timesteps(num_timesteps, section_counts):
    """Improved DDPM's function of this name, written out again: the set of steps."""
    if isinstance(section_counts, str):
        if section_counts.startswith("ddim"):
            desired = int(section_counts[4:])
            for i in range(1, num_timesteps):
                if len(range(0, num_timesteps, i)) == desired:
                    return set(range(0, num_timesteps, i))
            raise ValueError
        section_counts = [int(x) for x in section_counts.split(",")]
    size_per, extra = divmod(num_timesteps, len(section_counts))
    start, taken = 0, []
    for i, count in enumerate(section_counts):
        size = size_per + (1 if i < extra else 0)
        if size < count:
            raise ValueError
        stride, position = (1 if count <= 1 else (size - 1) / (count - 1)), 0.0
        for _ in range(count):
            taken.append(start + round(position))
            position += stride
        start += size
    return set(taken)


@given(total=st.integers(1, 1500), sections=st.lists(st.integers(0, 60), min_size=1, max_size=6), text=st.booleans())
@settings(max_examples=150, deadline=None)
def test_section_grid_is_that_of_the_published_code(total, sections, text):
    given_sections = ",".join(map(str, sections)) if text else sections
    try:
        expected = space_timesteps(total, given_sections)
    except ValueError:
        with pytest.raises(ValueError, match="are asked of it"):
            section_grid(total, given_sections)
        return
    if not expected:
        with pytest.raises(ValueError, match="at least one step"):
            section_grid(total, given_sections)
        return
    assert {t for t, _ in section_grid(total, given_sections)} == expected
    check_grid(section_grid(total, given_sections), total)


def test_ddim_sections_have_one_whole_stride():
    for count in (1, 2, 25, 50, 100, 250, 334, 500, 1000):
        assert {t for t, _ in section_grid(1000, f"ddim{count}")} == (
            space_timesteps(1000, f"ddim{count}") if count > 1 else {0}
        )
    assert section_grid(1000, "ddim25") == make_grid("uniform", 1000, 25)
    assert section_grid(1000, 250) == section_grid(1000, [250]) == section_grid(1000, "250")
    with pytest.raises(ValueError, match="no whole stride gives 300 of 1000"):
        section_grid(1000, "ddim300")


@pytest.mark.parametrize(
    "sections", ["", "ddim", "ddim10,20", "ddim-3", "10;20", "1.5", [], [1.5], [True], [-1, 5], None, "\u00b2"]
)
def test_sections_that_are_no_numbers_are_refused(sections):
    with pytest.raises(ValueError, match="sections are numbers of steps, such as"):
        section_grid(100, sections)


def test_impossible_karras_grids_are_refused_with_the_noise_levels_of_the_schedule():
    schedule = make_schedule("linear", 100)
    lowest, highest = (float(value) for value in schedule.sigma(torch.tensor([0, 99])))
    for options in (
        {"rho": 0.0},
        {"rho": math.nan},
        {"sigma_min": lowest / 2},
        {"sigma_max": 2 * highest},
        {"sigma_min": 5.0, "sigma_max": 1.0},
        {"sigma_max": math.nan},
    ):
        with pytest.raises(ValueError, match=f"{lowest:g} <= sigma_min <= sigma_max <= {highest:g}"):
            karras_grid(schedule, 5, **options)
    for count in (0, 101, 5.0):
        with pytest.raises(ValueError, match="choose 1 to 100"):
            karras_grid(schedule, count)


def test_karras_grid_stays_between_its_sigmas_or_is_refused():
    schedule = make_schedule("cosine", 1000)
    for steps, low, high in ((20, 0.1, 5.0), (500, 0.1, 5.0), (900, None, 10.0)):
        grid = karras_grid(schedule, steps, sigma_min=low, sigma_max=high)
        assert len(grid) == steps
        assert float(schedule.sigma(torch.tensor(grid[0][0]))) < 1.05 * high
    with pytest.raises(ValueError, match="does not fit between sigma"):
        karras_grid(schedule, 20, sigma_min=0.99, sigma_max=1.0)
