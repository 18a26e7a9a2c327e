"""The search's report: trials, metrics, and one line about the winner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from pipelines.measurement.measure import jackknife_error
from pipelines.search.halving import Verdict
from pipelines.search.records import Choice, Trial

COLUMNS = ("trial", *(field.name for field in fields(Choice)), "step", "fid", "fid_error", "few_images")
"""The columns of trials.csv."""


def trial_rows(trials: Sequence[Trial], few_images: bool = False) -> list[dict[str, Any]]:
    """Return the rows of trials.csv: the longest-trained trials first, then by FID, then by name.

    ``few_images``: whether the quick FIDs carry the notice of `pipelines.measurement.notice`.
    """
    ordered = sorted(trials, key=lambda trial: (-trial.result.step, trial.result.fid, trial.choice.name))
    return [
        {
            "trial": trial.choice.name,
            **asdict(trial.choice),
            "step": trial.result.step,
            "fid": f"{trial.result.fid:.6g}",
            "fid_error": None if trial.result.diverged else f"{jackknife_error(trial.result.leave_one_out):.3g}",
            "few_images": str(few_images).lower(),
        }
        for trial in ordered
    ]


def search_metrics(trials: Sequence[Trial], verdict: Verdict) -> dict[str, Any]:
    """Return metrics/tune.json: the winner's quick FID, its lead over the runner-up, both with standard errors, and its choice."""
    best = verdict.winner.result
    metrics: dict[str, Any] = {
        "enabled": True,
        "trials": len(trials),
        "best_quick_fid": round(best.fid, 6),
        "best_quick_fid_error": round(jackknife_error(best.leave_one_out), 6),
    }
    if verdict.difference is not None and verdict.error is not None:
        metrics |= {
            "runner_up_difference": round(verdict.difference, 6),
            "runner_up_difference_error": round(verdict.error, 6),
        }
    return {**metrics, "tie": verdict.tie, **asdict(verdict.winner.choice)}


def describe_verdict(verdict: Verdict) -> str:
    """Return one line with the winner, the runner-up, and the tie if there is one."""
    best = verdict.winner
    text = f"{best.choice}: quick FID {best.result.fid:.3f} +- {jackknife_error(best.result.leave_one_out):.3f}"
    if verdict.runner_up is None:
        return f"{text}; no other trial reached its last step"
    text += f"; runner-up {verdict.runner_up.choice.name} is {verdict.difference:+.3f} +- {verdict.error:.3f} away"
    if not verdict.tie:
        return text
    names = ", ".join(trial.choice.name for trial in verdict.tied)
    return f"{text}; a tie of {names}: the trial that was proposed first wins"
