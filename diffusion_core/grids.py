"""Grids: the steps that a sampler visits, as an explicit list of (t, t_prev) pairs, highest noise first.

``t_prev`` is -1 in the last pair, where alpha_bar is exactly 1. No sampler computes a previous step by itself.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

from diffusion_core.checks import is_whole

Grid = list[tuple[int, int]]
SPACINGS = ("uniform", "leading", "trailing", "linspace", "quadratic")


def make_grid(spacing: str, schedule_steps: int, num_steps: int) -> Grid:
    """Return a grid of exactly ``num_steps`` (S) distinct steps out of ``schedule_steps`` (T), for any 1 <= S <= T.

    ``uniform``    floor(i T / S): the DDIM paper's linear sub-sequence (arXiv 2010.02502, appendix D.2)
    ``leading``    i (T // S): the same if S divides T; otherwise it does not reach the top of the schedule
    ``trailing``   round(T - i T / S) - 1: starts at the last step (arXiv 2305.08891, table 2)
    ``linspace``   round(i (T - 1) / (S - 1)): both ends of the schedule
    ``quadratic``  floor((c i)^2) up to 0.8 T: the DDIM paper's choice for CIFAR-10; duplicate steps move up

    Raises ValueError if the spacing is unknown or S lies outside 1 to T.
    """
    if not is_whole(num_steps) or not 1 <= num_steps <= schedule_steps:
        raise ValueError(
            f"a grid of {num_steps} steps does not fit a schedule of {schedule_steps}: choose 1 to {schedule_steps}"
        )
    total, count = schedule_steps, num_steps
    if spacing == "uniform":
        steps = [i * total // count for i in range(count)]
    elif spacing == "leading":
        steps = [i * (total // count) for i in range(count)]
    elif spacing == "trailing":
        steps = [_round_half_even(total * (i + 1), count) - 1 for i in range(count)]
    elif spacing == "linspace":
        steps = [_round_half_even(i * (total - 1), count - 1) for i in range(count)] if count > 1 else [total - 1]
    elif spacing == "quadratic":
        last = math.sqrt(total * 0.8)
        spacing_of_roots = last / max(count - 1, 1)  # rounds like NumPy's linspace, which the paper's code calls
        roots = [i * spacing_of_roots for i in range(count - 1)] + [last]
        steps = [int(root * root) for root in roots] if count > 1 else [total - 1]
        for i in range(1, count):
            steps[i] = max(steps[i], steps[i - 1] + 1)
        steps = [min(step, total - count + i) for i, step in enumerate(steps)]
    else:
        raise ValueError(f"unknown grid spacing {spacing!r}: choose one of {', '.join(SPACINGS)}")
    return grid_from_steps(steps, schedule_steps)


def grid_from_steps(steps: Sequence[int], schedule_steps: int) -> Grid:
    """Return the grid that visits the given steps (any order, distinct, in [0, T)) and ends at the clean image.

    Raises ValueError if there are no steps, a step repeats, is not an integer, or lies outside the schedule.
    """
    try:
        descending = sorted((operator.index(step) for step in steps), reverse=True)
    except TypeError:
        raise ValueError(f"the steps of a grid must be whole numbers, got {list(steps)}") from None
    if not descending or len(set(descending)) != len(descending):
        raise ValueError(f"a grid needs at least one step and no step twice, got {list(steps)}")
    if descending[-1] < 0 or descending[0] >= schedule_steps:
        raise ValueError(f"grid steps must lie in 0 to {schedule_steps - 1}, got {descending[-1]} to {descending[0]}")
    return list(zip(descending, [*descending[1:], -1], strict=True))


def restrict_grid(grid: Grid | Sequence[int], *, highest: int | None = None, lowest: int = -1) -> Grid:
    """Return the part of the grid from level ``highest`` down to level ``lowest``: to start in the middle, or to stop early.

    A level is a t or a t_prev. Raises ValueError unless both are levels of the grid and highest is above lowest.
    """
    grid = _pairs(grid)
    levels = [t for t, _ in grid] + ([grid[-1][1]] if grid else [])
    highest = levels[0] if highest is None and levels else highest
    for level in (highest, lowest):
        if level not in levels:
            raise ValueError(f"level {level} is not on the grid; its levels are {levels}")
    part = [(t, t_prev) for t, t_prev in grid if t <= highest and t_prev >= lowest]  # type: ignore[operator]
    if not part:
        raise ValueError(f"no step lies between level {highest} and level {lowest}: highest must be above lowest")
    return part


def check_grid(grid: Grid | Sequence[int], schedule_steps: int) -> Grid:
    """Return the grid as pairs; convert a plain list of steps.

    Raises ValueError unless every pair lies in the schedule, goes down, and ends where the next one starts.
    """
    grid = _pairs(grid)
    if not grid:
        raise ValueError("an empty grid samples nothing")
    for position, (t, t_prev) in enumerate(grid):
        if not -1 <= t_prev < t < schedule_steps:
            raise ValueError(
                f"grid pair {position} is ({t}, {t_prev}): it must go down within -1 to {schedule_steps - 1}"
            )
        if position + 1 < len(grid) and grid[position + 1][0] != t_prev:
            raise ValueError(f"grid pair {position} ends at {t_prev}, but the next starts at {grid[position + 1][0]}")
    return grid


def _pairs(grid: Grid | Sequence[int]) -> Grid:
    if all(is_whole(entry) for entry in grid):
        return grid_from_steps(grid, max(grid) + 1) if len(grid) else []  # type: ignore
    for entry in grid:
        if not isinstance(entry, Sequence) or len(entry) != 2 or not all(is_whole(step) for step in entry):
            raise ValueError(
                f"a grid must be a list of pairs (t, t_prev) of whole numbers, or of steps; it holds {entry!r}"
            )
    return list(grid)  # type: ignore[arg-type]


def _round_half_even(numerator: int, denominator: int) -> int:
    """Return round(numerator / denominator) in exact arithmetic; halves round to even, as in NumPy."""
    quotient, remainder = divmod(numerator, denominator)
    if 2 * remainder > denominator or (2 * remainder == denominator and quotient % 2):
        quotient += 1
    return quotient
