"""Grids: the steps that a sampler visits, as an explicit list of (t, t_prev) pairs, highest noise first.

``t_prev`` is -1 in the last pair, where alpha_bar is exactly 1. No sampler computes a previous step by itself.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable, Sequence

import torch

from diffusion_core.checks import is_whole
from diffusion_core.schedules import NoiseSchedule

Grid = list[tuple[int, int]]
SPACINGS = ("uniform", "leading", "trailing", "linspace", "quadratic")


def make_grid(spacing: str, schedule_steps: int, num_steps: int) -> Grid:
    """Return a grid of exactly ``num_steps`` (S) distinct steps out of ``schedule_steps`` (T), for any 1 <= S <= T.

    ``uniform``    floor(i T / S): the DDIM paper's linear sub-sequence (arXiv 2010.02502, appendix D.2)
    ``leading``    i (T // S): the same if S divides T; otherwise it does not reach the top of the schedule
    ``trailing``   round(T - i T / S) - 1: starts at the last step (arXiv 2305.08891, table 2)
    ``linspace``   round(i (T - 1) / (S - 1)): both ends of the schedule
    ``quadratic``  floor((c i)^2) up to 0.8 T: the DDIM paper's choice for CIFAR-10; duplicate steps move up

    `karras_grid` spaces by noise level and `section_grid` by sections. Raises ValueError if the spacing is unknown or S lies
    outside 1 to T.
    """
    _check_count(num_steps, schedule_steps)
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
        steps = _distinct(steps, total)
    else:
        raise ValueError(f"unknown grid spacing {spacing!r}: choose one of {', '.join(SPACINGS)}")
    return grid_from_steps(steps, schedule_steps)


def karras_grid(
    schedule: NoiseSchedule,
    num_steps: int,
    *,
    rho: float = 7.0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> Grid:
    """Return a grid of exactly ``num_steps`` (S) steps, evenly spaced in sigma^(1 / rho), sigma = sqrt((1 - a) / a).

    sigma_i = (max^(1 / rho) + i / (S - 1) (min^(1 / rho) - max^(1 / rho)))^rho (arXiv 2206.00364, eq. 5), each at the step that is
    nearest in log sigma; duplicate steps move up. ``sigma_min`` and ``sigma_max``: the schedule's own ends by default. If the
    schedule ends in pure noise, where sigma is infinite, and sigma_max is not given, that step comes first and the others
    start below it.

    Raises ValueError if S lies outside 1 to T, rho is not above 0, the sigmas are not in order within the schedule's, or
    fewer than S steps lie between them.
    """
    _check_count(num_steps, schedule.num_steps)
    sigmas = schedule.sigma(torch.arange(schedule.num_steps))
    finite = sigmas[torch.isfinite(sigmas)]
    lowest, highest = float(sigmas[0]), float(finite[-1]) if len(finite) else math.inf
    low, high = (lowest if sigma_min is None else sigma_min), (highest if sigma_max is None else sigma_max)
    if not (rho > 0.0 and math.isfinite(rho)) or not lowest <= low <= high <= highest:
        raise ValueError(
            f"a Karras grid needs rho above 0 and {lowest:g} <= sigma_min <= sigma_max <= {highest:g}, the schedule's noise "
            f"levels, got rho {rho}, sigma_min {low} and sigma_max {high}"
        )
    pure_noise = [schedule.num_steps - 1] if sigma_max is None and len(finite) < len(sigmas) else []
    count = num_steps - len(pure_noise)
    ramp = torch.linspace(0.0, 1.0, count, dtype=torch.float64) if count > 1 else torch.ones(count, dtype=torch.float64)
    wanted = (low ** (1.0 / rho) + ramp * (high ** (1.0 / rho) - low ** (1.0 / rho))).pow(rho)
    nearest = (wanted.log()[:, None] - finite.log()).abs().argmin(dim=1).tolist() if count else []
    if nearest and nearest[-1] - nearest[0] + 1 < count:
        raise ValueError(
            f"a Karras grid of {num_steps} steps does not fit between sigma {low:g} and {high:g}, where the schedule has "
            f"{nearest[-1] - nearest[0] + 1}: give fewer steps or a wider range"
        )
    last = nearest[-1] + 1 if nearest else 0
    return grid_from_steps(_distinct(nearest, last) + pure_noise, schedule.num_steps)


def section_grid(schedule_steps: int, sections: int | Sequence[int] | str) -> Grid:
    """Return Improved DDPM's grid (arXiv 2102.09672, section 4, as in its authors' code).

    ``sections``: numbers of steps, one per equal part of the schedule from the clean end, evenly spaced within their part with
    both of its ends; one number, a list, or a string such as "10,15,20". Or "ddim25": 25 steps with one whole stride from step 0.

    Raises ValueError if a part has fewer steps than its number, no whole stride gives that many steps, or ``sections`` has
    another form.
    """
    if not is_whole(schedule_steps) or schedule_steps < 1:
        raise ValueError(f"a schedule has a whole number of steps, at least 1, got {schedule_steps!r}")
    if isinstance(sections, str) and (one := re.fullmatch(r"ddim([0-9]+)", sections)):
        count = int(one[1])
        for stride in range(1, schedule_steps + 1):
            if len(range(0, schedule_steps, stride)) == count:
                return grid_from_steps(range(0, schedule_steps, stride), schedule_steps)
        raise ValueError(f"no whole stride gives {count} of {schedule_steps} steps: use make_grid('uniform', ...)")
    counts = _counts(sections)
    steps: list[int] = []
    start = 0
    for i, count in enumerate(counts):
        size = schedule_steps // len(counts) + (1 if i < schedule_steps % len(counts) else 0)
        if count > size:
            raise ValueError(f"section {i + 1} of {len(counts)} has {size} steps, but {count} are asked of it")
        stride_of_section = 1.0 if count <= 1 else (size - 1) / (count - 1)
        position = 0.0  # the authors add up the stride, which rounds differently from a product
        for _ in range(count):
            steps.append(start + round(position))
            position += stride_of_section
        start += size
    return grid_from_steps(steps, schedule_steps)


def _counts(sections: int | Sequence[int] | str) -> list[int]:
    """Return the numbers of steps of a number, a list, or a string with commas."""
    if isinstance(sections, str):
        counts = [int(part) if re.fullmatch(r"\s*[0-9]+\s*", part) else -1 for part in sections.split(",")]
    else:
        counts = list(sections) if isinstance(sections, Iterable) else [sections]
    if not counts or not all(is_whole(count) and not isinstance(count, bool) and count >= 0 for count in counts):
        raise ValueError(
            f"sections are numbers of steps, such as [10, 15, 20], '10,15,20' or 'ddim25', got {sections!r}"
        )
    return [int(count) for count in counts]


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


def _check_count(num_steps: int, schedule_steps: int) -> None:
    if not is_whole(num_steps) or not 1 <= num_steps <= schedule_steps:
        raise ValueError(
            f"a grid of {num_steps} steps does not fit a schedule of {schedule_steps}: choose 1 to {schedule_steps}"
        )


def _distinct(steps: list[int], total: int) -> list[int]:
    """Return ascending steps below ``total`` without duplicates: move each up to just above the one before, but not over the end."""
    steps = list(steps)
    for i in range(1, len(steps)):
        steps[i] = max(steps[i], steps[i - 1] + 1)
    return [min(step, total - len(steps) + i) for i, step in enumerate(steps)]


def _round_half_even(numerator: int, denominator: int) -> int:
    """Return round(numerator / denominator) in exact arithmetic; halves round to even, as in NumPy."""
    quotient, remainder = divmod(numerator, denominator)
    if 2 * remainder > denominator or (2 * remainder == denominator and quotient % 2):
        quotient += 1
    return quotient
