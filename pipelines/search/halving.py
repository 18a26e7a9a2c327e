"""Synchronous successive halving (Jamieson and Talwalkar, arXiv 1502.07943), and the rule that picks the winner.

A rung promotes trials only after it has judged all of them, and generations of proposals follow each other in a fixed
order. So the trials, the promotions and the winner do not depend on when a result arrives or how many trials run at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from pipelines.measurement.measure import jackknife_error
from pipelines.search.records import Choice, Trial, TrialResult

GENERATION = 10
"""Trials proposed before any of their results is reported; equals TPE's number of random startup trials."""


class Proposer(Protocol):
    """Proposes choices, and learns from their quick FIDs at the first rung."""

    def ask(self, count: int) -> list[Choice]: ...

    def tell(self, fids: Sequence[float]) -> None: ...


def rungs(steps: int, grace_steps: int, reduction_factor: int) -> tuple[int, ...]:
    """Return the steps at which trials are judged: grace_steps times powers of the factor, and the last step."""
    marks = []
    mark = grace_steps
    while mark < steps:
        marks.append(mark)
        mark *= reduction_factor
    return (*marks, steps)


def search(
    proposer: Proposer,
    judge: Callable[[Sequence[Choice], int], Sequence[TrialResult]],
    *,
    num_trials: int,
    rungs: Sequence[int],
    reduction_factor: int,
) -> list[Trial]:
    """Judge up to ``num_trials`` proposals at the first rung and the promoted ones at the next rungs; return all trials.

    A space with fewer choices ends the proposals.
    ``judge(choices, step)`` returns the results of these choices at a rung, in their order.
    """
    choices: list[Choice] = []
    results: list[TrialResult] = []
    while len(choices) < num_trials:
        wanted = min(GENERATION, num_trials - len(choices))
        generation = proposer.ask(wanted)
        if not generation:
            break
        judged = judge(generation, rungs[0])
        proposer.tell([result.fid for result in judged])
        choices += generation
        results += judged
        if len(generation) < wanted:  # the space has no more
            break
    running = list(range(len(choices)))
    for rung in rungs[1:]:
        running = promoted({number: results[number] for number in running}, reduction_factor)
        if not running:
            break
        judged = judge([choices[number] for number in running], rung)
        for number, result in zip(running, judged, strict=True):
            results[number] = result
    return [Trial(number, *pair) for number, pair in enumerate(zip(choices, results, strict=True))]


def promoted(results: Mapping[int, TrialResult], reduction_factor: int) -> list[int]:
    """Return the trial numbers that continue after a rung: the best ceil(n / reduction_factor) of its n trials, ascending.

    Equal FIDs are ordered by trial number. Diverged trials never continue.
    """
    usable = sorted((result.fid, number) for number, result in results.items() if not result.diverged)
    return sorted(number for _, number in usable[: math.ceil(len(results) / reduction_factor)])


@dataclass(frozen=True)
class Verdict:
    """The winner and how sure its lead is.

    ``difference``: the runner-up's quick FID minus the winner's, with its standard ``error``; all three are None if one trial
    was judged at the last rung. ``tied``: the best trial and those tied with it, by number.
    """

    winner: Trial
    runner_up: Trial | None
    difference: float | None
    error: float | None
    tied: tuple[Trial, ...]

    @property
    def tie(self) -> bool:
        return len(self.tied) > 1


def winner(trials: Sequence[Trial]) -> Verdict:
    """Pick the winner among the trials judged at the furthest step.

    Two trials are tied if their quick FIDs differ by at most two standard errors of the difference. The lowest number
    among the tied trials wins: train's own settings are number 0, so a tie changes as little as possible.
    The runner-up is the best of the others. At least one trial must not have diverged.
    """
    usable = [trial for trial in trials if not trial.result.diverged]
    assert usable, "all trials diverged"
    furthest = max(trial.result.step for trial in usable)
    ranked = sorted(
        (trial for trial in usable if trial.result.step == furthest), key=lambda trial: (trial.result.fid, trial.number)
    )
    best = ranked[0]
    tied = sorted(
        (
            trial
            for trial in ranked
            if trial.result.fid - best.result.fid <= 2.0 * difference_error(trial.result, best.result)
        ),
        key=lambda trial: trial.number,
    )
    chosen = tied[0]
    others = [trial for trial in ranked if trial is not chosen]
    if not others:
        return Verdict(chosen, None, None, None, tuple(tied))
    difference = others[0].result.fid - chosen.result.fid
    return Verdict(chosen, others[0], difference, difference_error(others[0].result, chosen.result), tuple(tied))


def difference_error(one: TrialResult, other: TrialResult) -> float:
    """Return the standard error of the difference of two quick FIDs: the paired jackknife over the groups that both leave out.

    Both trials use the same noise and labels, so most of their sampling error cancels. The error covers the choice of
    samples, not that of the training seed.
    """
    return jackknife_error([a - b for a, b in zip(one.leave_one_out, other.leave_one_out, strict=True)])
