"""Proposals of Optuna's TPE sampler (Bergstra et al., 2011), in an order that results cannot change."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from decimal import Decimal
from typing import Any

import optuna

from pipelines.search.records import Choice

log = logging.getLogger("rediffuse")

TRIES = 20
"""Maximum number of draws until a choice is new."""
DIGITS = 4
"""Significant digits of a learning rate."""
CATEGORIES = ("schedule", "objective", "weighting")


@dataclass(frozen=True)
class Space:
    """The values to choose from; the learning rate is drawn log-uniformly between its two bounds."""

    schedule: tuple[str, ...]
    objective: tuple[str, ...]
    weighting: tuple[str, ...]
    learning_rate: tuple[float, float]


def same_values(choice: Choice) -> Hashable:
    """Return the values of a choice, the learning rate to `DIGITS` digits."""
    return choice.schedule, choice.objective, choice.weighting, f"{choice.learning_rate:.{DIGITS}g}"


class Proposals:
    """Choices by ask and tell. The same space, first choice, seed and told FIDs give the same choices.

    ``first`` is proposed first, as it is; it must lie in the space. Other learning rates are rounded to four digits, so that
    the value tried is the value written. No training is proposed twice: two choices are the same training if ``same_training``
    returns the same for both.
    """

    def __init__(
        self, space: Space, first: Choice, seed: int, same_training: Callable[[Choice], Hashable] = same_values
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.space = replace(space, **{name: tuple(dict.fromkeys(getattr(space, name))) for name in CATEGORIES})
        self.first = first
        self.same_training = same_training
        self.proposed: dict[Hashable, Choice] = {}
        self.untold: list[optuna.Trial] = []
        self.study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
        self.study.enqueue_trial(asdict(first))

    def ask(self, count: int) -> list[Choice]:
        """Return ``count`` new choices, or fewer if the space has no more. Call `tell` before the next ask."""
        assert not self.untold, "the choices of the last ask have no FIDs yet"
        generation: list[Choice] = []
        while len(generation) < count:
            choice = self._next()
            if choice is None:
                log.info("the search space has only %d different choices: no more trials", len(self.proposed))
                break
            self.proposed[self.same_training(choice)] = choice
            generation.append(choice)
        return generation

    def tell(self, fids: Sequence[float]) -> None:
        """Tell the quick FIDs of the last ask, in the order of its choices."""
        for trial, fid in zip(self.untold, fids, strict=True):
            self.study.tell(trial, fid)
        self.untold.clear()

    def _next(self) -> Choice | None:
        for _ in range(TRIES):
            trial = self.study.ask()
            choice = self._suggest(trial)
            if self.same_training(choice) not in self.proposed:
                self.untold.append(trial)
                return choice
            self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
        left = self._first_left()
        if left is None:
            return None
        self.study.enqueue_trial(asdict(left))
        trial = self.study.ask()
        self._suggest(trial)
        self.untold.append(trial)
        return left

    def _suggest(self, trial: optuna.Trial) -> Choice:
        low, high = self.space.learning_rate
        values: dict[str, Any] = {
            name: trial.suggest_categorical(name, getattr(self.space, name)) for name in CATEGORIES
        }
        learning_rate = trial.suggest_float("learning_rate", low, high, log=True)
        if trial.number > 0:
            learning_rate = min(max(float(f"{learning_rate:.{DIGITS}g}"), low), high)
        return Choice(**values, learning_rate=learning_rate)

    def _first_left(self) -> Choice | None:
        """Return the first choice that was not proposed, with the lowest learning rate that is left; None if there is none."""
        every = list(itertools.product(self.space.schedule, self.space.objective, self.space.weighting))
        choices = (Choice(*values, learning_rate=rate) for rate in self._learning_rates() for values in every)
        return next((choice for choice in choices if self.same_training(choice) not in self.proposed), None)

    def _learning_rates(self) -> Iterator[float]:
        """Yield every rounded learning rate of the space, ascending."""
        low, high = self.space.learning_rate
        rate, last = (Decimal(f"{bound:.{DIGITS - 1}e}") for bound in (low, high))
        while rate <= last:
            yield min(max(float(rate), low), high)
            rate += Decimal(1).scaleb(rate.adjusted() - DIGITS + 1)
