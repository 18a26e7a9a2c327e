"""The search: proposals, successive halving, the winner, and trials on Ray Tune."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion_core.ema import warmup_decay
from diffusion_core.generation import NonFiniteOutputError
from pipelines.identity import identify
from pipelines.measurement.measure import measurement_rows
from pipelines.params import RayRun, load_params, load_run_settings
from pipelines.resources import TaskPlan
from pipelines.search import driver
from pipelines.search.driver import run_search
from pipelines.search.halving import difference_error, promoted, rungs, search, winner
from pipelines.search.proposals import Proposals, Space
from pipelines.search.records import FAILED_FID, Choice, Trial, TrialResult
from pipelines.search.summary import describe_verdict, search_metrics, trial_rows
from pipelines.search.trial import same_training, trial_settings
from pipelines.search.worker import TrialFolder, TrialWork, run_rung
from pipelines.training.loop import Hooks, TrainSettings, learning_rate_at, new_state, train
from pipelines.training.settings import shortened
from pipelines.tune import _best as best_of
from pipelines.tune import trial_identity_settings
from tests.conftest import ROOT, Project, kill_everything, make_project

SPACE = Space(("linear", "cosine", "sigmoid"), ("eps", "x0", "v"), ("snr", "min_snr"), (1e-3, 4e-3))
FIRST = Choice("cosine", "v", "min_snr", 3e-3)
SETTINGS = TrainSettings(
    seed=0,
    steps=40,
    batch_size=8,
    learning_rate=3e-3,
    network={"name": "unet"},
    schedule={"name": "cosine", "num_steps": 1000},
    objective="v",
    weighting="min_snr",
    precision="fp32",
    warmup_steps=0,
    decay="cosine",
    weight_decay=0.0,
    grad_clip=1.0,
    ema_decay=0.999,
    condition_dropout=0.1,
    horizontal_flip=False,
    class_names=(),
)


def result_of(fid: float, step: int = 10, offsets: Sequence[float] = (0.0,) * 8) -> TrialResult:
    """A result whose leave-one-out FIDs differ from ``fid`` by ``offsets``."""
    return TrialResult(step, fid, tuple(fid + offset for offset in offsets), loss=0.1)


def trial_of(number: int, result: TrialResult) -> Trial:
    return Trial(number, Choice("cosine", "v", "min_snr", 1e-3 + number * 1e-5), result)


def fake_result(choice: Choice, step: int) -> TrialResult:
    """A result that depends on the choice and the step only; one choice in five diverges."""
    rng = np.random.default_rng([int(choice.name[6:], 16), step])
    if int(choice.name[6:], 16) % 5 == 0:
        return TrialResult(step, FAILED_FID)
    return result_of(1.0 + 10.0 / step + rng.uniform(0, 1), step, rng.normal(0, 0.01, 8).tolist())


def test_rungs_are_powers_of_the_factor_and_the_last_step() -> None:
    assert rungs(160, 40, 2) == (40, 80, 160)
    assert rungs(100, 40, 2) == (40, 80, 100)
    assert rungs(10, 10, 3) == (10,)


@given(st.lists(st.sampled_from([1.0, 2.0, 3.0, FAILED_FID]), min_size=1, max_size=12), st.integers(2, 4), st.randoms())
def test_promotion_does_not_depend_on_the_order_of_arrival(fids: list[float], factor: int, random: Any) -> None:
    results = {number: TrialResult(10, fid) for number, fid in enumerate(fids)}
    shuffled = list(results.items())
    random.shuffle(shuffled)
    chosen = promoted(results, factor)
    assert promoted(dict(shuffled), factor) == chosen
    usable = [number for number, fid in enumerate(fids) if fid < FAILED_FID]
    assert len(chosen) == min(math.ceil(len(fids) / factor), len(usable)) and set(chosen) <= set(usable)
    for number in chosen:
        for left in set(usable) - set(chosen):
            assert (fids[number], number) < (fids[left], left)


@given(st.lists(st.floats(0.5, 2.0), min_size=1, max_size=8), st.floats(0.0, 0.3), st.randoms())
def test_winner_does_not_depend_on_the_order_of_arrival(fids: list[float], spread: float, random: Any) -> None:
    offsets = np.random.default_rng(len(fids)).normal(0, spread, (len(fids), 8))
    trials = [trial_of(number, result_of(fid, offsets=offsets[number].tolist())) for number, fid in enumerate(fids)]
    verdict = winner(trials)
    shuffled = list(trials)
    random.shuffle(shuffled)
    assert winner(shuffled) == verdict
    assert verdict.winner in verdict.tied and verdict.winner.number == min(trial.number for trial in verdict.tied)
    best = min(trials, key=lambda trial: (trial.result.fid, trial.number))
    for trial in trials:
        within = trial.result.fid - best.result.fid <= 2 * difference_error(trial.result, best.result)
        assert (trial in verdict.tied) == within


def test_tie_goes_to_the_trial_that_was_proposed_first() -> None:
    noise = [0.1, -0.1, 0.05, -0.05, 0.1, -0.1, 0.05, -0.05]
    first, second = result_of(1.872, offsets=noise), result_of(1.871)
    verdict = winner([trial_of(0, first), trial_of(1, second)])
    assert verdict.tie and verdict.winner.number == 0 and verdict.runner_up is not None
    assert verdict.runner_up.number == 1 and verdict.difference == pytest.approx(-0.001)
    assert "a tie of" in describe_verdict(verdict)
    assert search_metrics([trial_of(0, first), trial_of(1, second)], verdict)["tie"] is True


def test_clear_lead_beats_a_lower_number() -> None:
    common = [0.1, -0.1, 0.05, -0.05, 0.1, -0.1, 0.05, -0.05]  # the same samples move both FIDs alike
    verdict = winner([trial_of(0, result_of(1.9, offsets=common)), trial_of(1, result_of(1.8, offsets=common))])
    assert verdict.winner.number == 1 and not verdict.tie and verdict.difference == pytest.approx(0.1)
    assert verdict.error == pytest.approx(0.0, abs=1e-12)


def test_trials_that_stopped_early_or_diverged_cannot_win() -> None:
    trials = [
        trial_of(0, result_of(0.5, step=40)),
        trial_of(1, result_of(0.9, step=160)),
        trial_of(2, result_of(0.7, step=160)),
        trial_of(3, TrialResult(160, FAILED_FID)),
    ]
    assert winner(trials).winner.number == 2
    diverged_last = [trials[0], trial_of(1, TrialResult(160, FAILED_FID))]
    assert winner(diverged_last).winner.number == 0
    rows = trial_rows(trials)
    assert [row["step"] for row in rows] == [160, 160, 160, 40] and [row["fid"] for row in rows][:2] == ["0.7", "0.9"]


def test_error_of_a_difference_is_that_of_paired_groups() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.normal(0, 1, (2, 8, 50))
    other = 0.9 * one + 0.1 * other
    left_out = [tuple(float(np.delete(values, group, axis=0).mean()) for group in range(8)) for values in (one, other)]
    error = difference_error(TrialResult(1, 0.0, left_out[0]), TrialResult(1, 0.0, left_out[1]))
    means = (one - other).mean(axis=1)
    assert error == pytest.approx(means.std(ddof=1) / math.sqrt(8))


def test_first_proposal_is_trains_own_settings_and_none_comes_twice() -> None:
    first = Choice("cosine", "v", "min_snr", 0.00312345678)
    proposals = Proposals(SPACE, first, seed=1)
    chosen: list[Choice] = []
    for _ in range(3):
        generation = proposals.ask(10)
        proposals.tell([fake_result(choice, 10).fid for choice in generation])
        chosen += generation
    assert chosen[0] == first and len(set(chosen)) == 30
    for choice in chosen[1:]:
        assert 1e-3 <= choice.learning_rate <= 4e-3
        assert choice.learning_rate == float(f"{choice.learning_rate:.4g}")
        assert choice.schedule in SPACE.schedule and choice.objective in SPACE.objective


def test_longer_search_proposes_what_a_shorter_one_did() -> None:
    def judged(num_trials: int) -> list[Choice]:
        asked: list[Choice] = []

        def judge(choices: Sequence[Choice], step: int) -> list[TrialResult]:
            if step == 10:
                asked.extend(choices)
            return [fake_result(choice, step) for choice in choices]

        proposals = Proposals(SPACE, FIRST, seed=1)
        search(proposals, judge, num_trials=num_trials, rungs=(10, 20), reduction_factor=2)
        return asked

    assert judged(25)[:14] == judged(14)
    assert judged(14)[:6] == judged(6)


def test_later_proposals_learn_from_the_results() -> None:
    def proposed(fid: Callable[[Choice], float]) -> list[Choice]:
        proposals = Proposals(SPACE, FIRST, seed=1)
        for _ in range(4):
            generation = proposals.ask(10)
            proposals.tell([fid(choice) for choice in generation])
        return generation

    likes_linear = proposed(lambda choice: float(choice.schedule != "linear"))
    likes_sigmoid = proposed(lambda choice: float(choice.schedule != "sigmoid"))
    assert sum(choice.schedule == "linear" for choice in likes_linear) >= 6
    assert sum(choice.schedule == "sigmoid" for choice in likes_sigmoid) >= 6


def test_exhausted_space_ends_the_proposals(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="rediffuse")
    space = Space(("linear", "cosine"), ("eps", "v"), ("snr",), (1e-3, 1e-3))
    first = Choice("cosine", "v", "snr", 1e-3)
    judge: Callable[..., list[TrialResult]] = lambda choices, step: [fake_result(each, step) for each in choices]  # noqa: E731
    trials = search(Proposals(space, first, seed=1), judge, num_trials=30, rungs=(10,), reduction_factor=2)
    assert len({trial.choice for trial in trials}) == len(trials) == 4
    assert "only 4 different choices" in caplog.text


def all_of(proposals: Proposals, num_trials: int) -> list[Choice]:
    """Search without training, and return the choices of all trials."""
    judge: Callable[..., list[TrialResult]] = lambda choices, step: [fake_result(each, step) for each in choices]  # noqa: E731
    trials = search(proposals, judge, num_trials=num_trials, rungs=(10, 20), reduction_factor=2)
    return [trial.choice for trial in trials]


@pytest.mark.parametrize(
    ("rates", "first", "expected"),
    [
        ((0.003, 0.003), 0.003, {0.003}),
        ((0.003, 0.003002), 0.003, {0.003, 0.003001, 0.003002}),  # three rates of four digits
        ((0.0029999, 0.003001), 0.0029999, {0.0029999, 0.003001}),  # the first one is 0.003 to four digits
        ((0.00300012, 0.00300034), 0.00300023, {0.00300023}),
        ((9.998e-4, 1.001e-3), 1e-3, {9.998e-4, 9.999e-4, 1e-3, 1.001e-3}),  # the digits change their place
    ],
)
def test_every_rounded_learning_rate_of_a_small_space_is_tried_once(
    rates: tuple[float, float], first: float, expected: set[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="rediffuse")
    space = Space(("linear", "cosine", "linear"), ("v",), ("snr",), rates)
    tried = all_of(Proposals(space, Choice("cosine", "v", "snr", first), seed=1), 30)
    found = {name: [choice.learning_rate for choice in tried if choice.schedule == name] for name in space.schedule}
    assert {f"{rate:.4g}" for rate in found["linear"]} == {f"{rate:.4g}" for rate in expected}
    assert set(found["cosine"]) == expected
    assert len(tried) == 2 * len(expected), "no rate twice"
    assert all(rates[0] <= choice.learning_rate <= rates[1] for choice in tried)
    assert caplog.text.count("no more trials") == 1


def test_space_of_three_choices_ends_a_search_of_ten_trials_in_every_run(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="rediffuse")
    space = Space(("linear", "cosine", "sigmoid"), ("v",), ("snr",), (1e-3, 1e-3))
    runs = [all_of(Proposals(space, Choice("cosine", "v", "snr", 1e-3), seed=1), 10) for _ in range(2)]
    assert len(set(runs[0])) == len(runs[0]) == 3 and runs[0] == runs[1]
    assert caplog.text.count("only 3 different choices") == 2


def test_names_of_the_same_training_are_one_trial() -> None:
    """At an SNR above 1 in every step, truncated_snr is snr."""
    base = replace(SETTINGS, schedule={"name": "linear", "num_steps": 1})
    space = Space(("linear",), ("v",), ("snr", "truncated_snr", "snr_plus_one"), (1e-3, 1e-3))
    first = Choice("linear", "v", "truncated_snr", 1e-3)
    tried = all_of(Proposals(space, first, 1, partial(same_training, base)), 10)
    assert {choice.weighting for choice in tried} == {"truncated_snr", "snr_plus_one"}
    everything = [
        Choice(schedule, objective, weighting, 1e-3)
        for schedule in ("linear", "scaled_linear", "cosine", "sigmoid")
        for objective in ("eps", "x0", "v")
        for weighting in ("uniform", "snr", "truncated_snr", "snr_plus_one", "min_snr", "p2")
    ]
    assert len({same_training(SETTINGS, choice) for choice in everything}) == len(everything)
    near = replace(FIRST, learning_rate=FIRST.learning_rate * (1 + 1e-6))
    assert same_training(SETTINGS, near) == same_training(SETTINGS, FIRST)


# trials see the training they stand for


@pytest.mark.parametrize(
    ("steps", "warmup_steps", "trial_steps", "expected"),
    [(200_000, 5000, 4000, 100), (1200, 50, 160, 7), (20_000, 500, 800, 20), (1000, 1, 10, 1), (1000, 0, 10, 0),
     (1000, 1000, 10, 10), (100, 10, 200, 20)],
)  # fmt: skip
def test_warmup_takes_the_same_share_of_a_trial(steps: int, warmup_steps: int, trial_steps: int, expected: int) -> None:
    whole = load_params(ROOT / "params.yaml").train.model_copy(update={"steps": steps, "warmup_steps": warmup_steps})
    short = shortened(whole, trial_steps)
    assert (short.steps, short.warmup_steps) == (trial_steps, expected)
    kept = short.model_copy(update={"steps": steps, "warmup_steps": warmup_steps})
    assert kept == whole, "nothing else changes, the EMA's decay neither"


def test_rate_of_a_trial_peaks_and_falls_as_that_of_the_whole_run() -> None:
    """The defect: with the preset cifar10 the rate of a trial rose until its last step."""
    train_params = load_params(ROOT / "params.yaml").train.model_copy(update={"steps": 200_000, "warmup_steps": 5000})
    short = shortened(train_params, 4000)
    whole, trial = (
        replace(SETTINGS, steps=each.steps, warmup_steps=each.warmup_steps) for each in (train_params, short)
    )
    for share in (0.01, 0.025, 0.1, 0.5, 0.9, 0.999):
        rates = [learning_rate_at(each, int(share * each.steps)) for each in (whole, trial)]
        assert rates[1] == pytest.approx(rates[0], rel=0.03)
    assert learning_rate_at(trial, 3999) < 1e-4 * trial.learning_rate


def test_average_of_a_trial_forgets_the_initial_weights() -> None:
    """Why ``ema_decay`` is not scaled: 0.9999 would average 10,000 steps, but the decay has a warm-up."""
    initial, age = 1.0, 0.0
    for step in range(1, 4001):
        decay = warmup_decay(step, 0.9999)
        initial *= decay
        age = decay * (age + 1)
    assert initial < 1e-20
    assert 300 < age < 500, "mean age of the averaged weights, in steps: a tenth of the trial"


# a result that is not finite

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    "broken",
    [
        TrialResult(40, NAN),
        TrialResult(40, INF),
        TrialResult(40, -INF),
        TrialResult(40, 0.1, (NAN,) * 8, 0.1),
        TrialResult(40, 0.1, (0.1,) * 7 + (INF,), 0.1),
        TrialResult(40, 0.1, (0.1,) * 8, NAN),
    ],
)
@pytest.mark.parametrize("number", [0, 2])
def test_result_that_is_not_finite_neither_advances_nor_wins(broken: TrialResult, number: int, tmp_path: Path) -> None:
    assert broken.diverged and "not finite" in broken.reason
    results = [result_of(2.0, 40), result_of(1.0, 40)]
    results.insert(number, broken)
    assert promoted(dict(enumerate(results)), 2) == sorted({0, 1, 2} - {number})
    trials = [trial_of(each, result) for each, result in enumerate(results)]
    verdict = winner(trials)
    assert verdict.winner.result.fid == 1.0 and len(verdict.tied) == 1
    assert trial_rows(trials)[-1]["trial"] == trials[number].choice.name
    folder = TrialFolder(str(tmp_path), FIRST)
    folder.save_result(broken)
    assert folder.result(40) == broken, "JSON has no NaN, and the reason survives a restart"


def test_proposals_learn_from_a_result_that_is_not_finite() -> None:
    proposals = Proposals(SPACE, FIRST, seed=1)
    for _ in range(2):
        generation = proposals.ask(10)
        proposals.tell([TrialResult(10, NAN if number % 2 else 1.0).fid for number in range(len(generation))])
    assert len(proposals.proposed) == 20


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity"])
def test_stored_result_that_is_not_finite_is_judged_again(tmp_path: Path, text: str) -> None:
    folder = TrialFolder(str(tmp_path), FIRST)
    folder.save_result(result_of(1.25))
    path = tmp_path / "trials" / FIRST.name / "rung_00010.json"
    path.write_text(path.read_text().replace("1.25", text, 1))
    assert folder.result(10) is None


def test_network_that_returns_nan_ends_its_trial_and_not_the_search(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The defect: NaN became black images, whose FID is finite."""
    from pipelines.search import trial as module
    from pipelines.search import worker
    from tests.pipelines.test_training_loop import CPU, Noise
    from tests.pipelines.test_training_loop import SETTINGS as SMALL

    def refuse(*arguments: Any, **options: Any) -> None:
        raise NonFiniteOutputError("the network returned NaN or infinity at step t = 7")

    monkeypatch.setattr(module, "measure", refuse)
    monkeypatch.setattr(worker, "prepare_process", lambda threads: CPU)
    monkeypatch.setattr(worker, "open_split", lambda *arguments: Noise())
    monkeypatch.setattr(worker, "_load_reference", lambda *arguments: None)
    reported: list[Mapping[str, float]] = []
    monkeypatch.setattr("ray.tune.report", reported.append)
    work = replace(fake_work(tmp_path), settings=SMALL)
    caplog.set_level("INFO", logger="rediffuse")
    run_rung({"choice": asdict(FIRST), "rung": 2}, work)
    assert reported == [{"fid": FAILED_FID}]
    result = TrialFolder(str(tmp_path), FIRST).result(2)
    assert result is not None and result.diverged and "NaN or infinity at step t = 7" in result.reason
    assert f"{FIRST} diverged before step 2: the network returned NaN" in caplog.text
    assert not list(tmp_path.glob("trials/*/step_*")), "its state is not used again"


def test_search_whose_trials_all_fail_ends_with_one_error_that_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(
        globals(), "fake_result", lambda choice, step: TrialResult(step, FAILED_FID, reason="weights not finite")
    )
    caplog.set_level("INFO", logger="rediffuse")
    with pytest.raises(
        ValueError, match=r"every trial of the search diverged \(5 of 5; .*weights not finite\): narrow"
    ):
        answered(tmp_path / "state", monkeypatch, lambda choice: True)
    assert caplog.text.count("diverged before step 10 (weights not finite)") == 5


@pytest.mark.parametrize("num_trials", [1, 6, 23])
def test_rung_is_judged_whole_before_the_next_one_starts(num_trials: int) -> None:
    calls: list[tuple[int, int]] = []

    def judge(choices: Sequence[Choice], step: int) -> list[TrialResult]:
        calls.append((step, len(choices)))
        return [fake_result(choice, step) for choice in choices]

    trials = search(Proposals(SPACE, FIRST, 1), judge, num_trials=num_trials, rungs=(10, 20, 40), reduction_factor=2)
    assert [step for step, _ in calls] == sorted(step for step, _ in calls)
    assert sum(count for step, count in calls if step == 10) == len(trials) == num_trials
    for step, before in ((20, 10), (40, 20)):
        entered = sum(count for at, count in calls if at == before)
        usable = sum(trial.result.step >= before and not trial.result.diverged for trial in trials)
        assert sum(count for at, count in calls if at == step) <= min(math.ceil(entered / 2), usable)


def test_choice_reaches_the_training_loop() -> None:
    changed = trial_settings(SETTINGS, Choice("linear", "eps", "snr", 0.5))
    assert changed.schedule == {"name": "linear", "num_steps": 1000}
    assert (changed.objective, changed.weighting, changed.learning_rate) == ("eps", "snr", 0.5)
    assert trial_settings(SETTINGS, FIRST) == SETTINGS


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_damaged_result_is_judged_again(tmp_path: Path, scheme: str) -> None:
    folder = TrialFolder(f"{scheme}{tmp_path}", FIRST)
    assert folder.result(10) is None
    folder.save_result(result_of(1.25))
    assert TrialFolder(f"{scheme}{tmp_path}", FIRST).result(10) == result_of(1.25)
    path = tmp_path / "trials" / FIRST.name / "rung_00010.json"
    path.write_text(path.read_text()[:20])
    assert folder.result(10) is None


def fake_rung(config: Mapping[str, Any], work: TrialWork, slowest: int, refuse: str = "") -> None:
    """A trainable without training. Delays differ between trials, so that they end in another order than they start."""
    from ray import tune

    choice, step = Choice(**config["choice"]), int(config["rung"])
    if choice.name == refuse:
        raise ValueError("refused by the test")
    time.sleep(int(choice.name[6:], 16) % slowest / 10)
    with open(Path(work.storage) / "calls.txt", "a", encoding="utf-8") as file:
        file.write(f"{choice.name} {step}\n")
    TrialFolder(work.storage, choice).save_result(fake_result(choice, step))
    tune.report({"fid": 0.0})


def fake_work(storage: Path, earlier: tuple[str, ...] = ()) -> TrialWork:
    storage.mkdir(exist_ok=True)
    return TrialWork(
        SETTINGS, data_dir="", reference_dir="", data_hash="", storage=str(storage), earlier=earlier, key="key",
        num_samples=16, ddim_steps=2, threads=1,
    )  # fmt: skip


def plan_of(max_concurrent: int, max_retries: int = 0) -> TaskPlan:
    return TaskPlan(max_concurrent, cpus=1.0, gpus=0.0, max_retries=max_retries, reason="", request="", remedy="")


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    from pipelines.cluster import ray_session

    with ray_session(RayRun(num_cpus=2)):
        yield


FAKE_SEARCH: dict[str, Any] = {"num_trials": 5, "rungs": (10, 20), "reduction_factor": 2}


def fake_search(storage: Path, max_concurrent: int, **delays: Any) -> tuple[list[Trial], list[str]]:
    """Run a search without training. Return its trials, and the names in the order in which the results arrived."""
    arrived: list[str] = []
    trials = run_search(
        Proposals(SPACE, FIRST, 1),
        fake_work(storage),
        plan_of(max_concurrent),
        on_result=lambda choice, result: arrived.append(choice.name),
        trainable=partial(fake_rung, **delays),
        **FAKE_SEARCH,
    )
    return trials, arrived


def calls_of(storage: Path) -> list[str]:
    return (storage / "calls.txt").read_text().splitlines()


@pytest.fixture(scope="module")
def one_at_a_time(ray: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Trial]]:
    storage = tmp_path_factory.mktemp("one-at-a-time") / "state"
    return storage, fake_search(storage, 1, slowest=3)[0]


@pytest.mark.slow
def test_delays_and_concurrency_change_neither_trials_nor_winner(
    one_at_a_time: tuple[Path, list[Trial]], tmp_path: Path
) -> None:
    trials, arrived = fake_search(tmp_path / "state", 2, slowest=7)
    assert trials == one_at_a_time[1] and trials[0].choice == FIRST
    assert winner(trials) == winner(one_at_a_time[1])
    assert len(arrived) == len(calls_of(tmp_path / "state")) == 5 + 3


@pytest.mark.slow
def test_interrupted_search_does_not_run_finished_rungs_again(
    one_at_a_time: tuple[Path, list[Trial]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", logger="rediffuse")
    storage = tmp_path / "state"
    shutil.copytree(one_at_a_time[0], storage)
    unfinished = max(storage.glob("trials/*/rung_00020.json"))
    unfinished.unlink()
    trials, arrived = fake_search(storage, 2, slowest=2)
    assert trials == one_at_a_time[1] and len(arrived) == 5 + 3
    assert calls_of(storage)[8:] == [f"{unfinished.parent.name} 20"]
    assert "resuming the search: 2 of 3 trials already have a result at step 20" in caplog.text
    assert sorted(path.name for path in storage.iterdir()) == ["calls.txt", "trials"]
    monkeypatch.setattr(driver._Judge, "_run_tune", lambda *arguments: pytest.fail("Ray Tune was started"))
    again, arrived_again = fake_search(storage, 1, slowest=1)
    assert again == trials and sorted(arrived_again) == sorted(arrived)


def answered(storage: Path, monkeypatch: pytest.MonkeyPatch, answers: Callable[[Choice], bool], **options: Any) -> Any:
    """Run a search whose Ray Tune is replaced: it stores the results of some choices and returns an error."""

    def run_tune(judge: Any, choices: Sequence[Choice], step: int, on_complete: Callable[[Choice], None]) -> Exception:
        for choice in filter(answers, choices):
            TrialFolder(judge.work.storage, choice).save_result(fake_result(choice, step))
            on_complete(choice)
        return RuntimeError("the error of a trial")

    monkeypatch.setattr(driver._Judge, "_run_tune", run_tune)
    return run_search(
        Proposals(SPACE, FIRST, 1), fake_work(storage, **options), plan_of(1),
        on_result=lambda choice, result: None, **FAKE_SEARCH,
    )  # fmt: skip


def test_error_of_a_trial_that_left_its_result_does_not_end_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = answered(tmp_path, monkeypatch, lambda choice: True)
    assert len(trials) == 5 and {trial.result.step for trial in trials} == {10, 20}
    with pytest.raises(ValueError, match=rf"{FIRST.name}.* failed at step 10 .*the error of a trial"):
        answered(tmp_path / "other", monkeypatch, lambda choice: choice != FIRST)


def test_results_in_an_earlier_storage_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "new").mkdir()
    trials = answered(tmp_path / "old", monkeypatch, lambda choice: True)
    assert answered(tmp_path / "new", monkeypatch, lambda choice: False, earlier=(str(tmp_path / "old"),)) == trials


def test_trial_restores_the_newest_checkpoint_of_all_storages(tmp_path: Path) -> None:
    from tests.pipelines.test_training_loop import CPU, Noise
    from tests.pipelines.test_training_loop import SETTINGS as SMALL

    saved = new_state(SMALL, CPU)
    folders = [TrialFolder(f"{scheme}{tmp_path / name}", FIRST) for scheme, name in (("", "a"), ("file://", "b"))]
    for step, folder in zip((4, 8), folders, strict=True):
        folder.save_checkpoint(train(SMALL, Noise(), saved, until=step), "key")
    for order in (folders, folders[::-1]):
        for most, expected in ((10, 8), (8, 8), (7, 4), (3, 0)):
            state = new_state(SMALL, CPU)
            for folder in order:
                folder.restore(state, "key", most)
            assert state.step == expected


def test_key_of_trials_holds_rows_per_call_and_device_but_not_the_choice() -> None:
    tune_params = load_params(ROOT / "params.yaml").tune

    def key_of(base: TrainSettings, device_type: str = "cpu") -> str:
        return identify("tune", trial_identity_settings(base, tune_params, device_type), {}, []).key

    key = key_of(SETTINGS)
    assert key_of(trial_settings(SETTINGS, Choice("linear", "eps", "snr", 0.5))) == key
    assert key_of(replace(SETTINGS, steps=41)) != key and key_of(SETTINGS, "cuda") != key
    found = [trial_identity_settings(SETTINGS, tune_params, each) for each in ("cpu", "cuda")]
    assert [each["tune.rows_per_call"] for each in found] == [measurement_rows("cpu"), measurement_rows("cuda")]


def test_search_from_few_images_says_so_in_its_tables() -> None:
    trials = [trial_of(0, result_of(1.0))]
    assert [row["few_images"] for row in trial_rows(trials)] == ["false"]
    assert [row["few_images"] for row in trial_rows(trials, few_images=True)] == ["true"]
    assert "few_images" not in best_of(winner(trials), ())
    assert best_of(winner(trials), (), "a notice")["few_images"] == "a notice"


def test_best_yaml_names_the_modules_of_a_forced_search() -> None:
    verdict = winner([trial_of(0, result_of(1.0))])
    assert "resumed_across_changes" not in best_of(verdict, ())
    assert best_of(verdict, ("pipelines.search.trial",))["resumed_across_changes"] == ["pipelines.search.trial"]


@pytest.mark.slow
def test_failed_trial_ends_the_search_and_names_the_reason(ray: None, tmp_path: Path) -> None:
    fifth = Proposals(SPACE, FIRST, 1).ask(5)[4].name
    with pytest.raises(ValueError, match=f"{fifth}.*refused by the test"):
        fake_search(tmp_path / "state", 2, slowest=2, refuse=fifth)
    assert len(calls_of(tmp_path / "state")) == 4, "the other trials of the rung are finished and kept"


def delayed_rung(config: Mapping[str, Any], work: TrialWork, delays: Sequence[float]) -> None:
    time.sleep(delays[int(Choice(**config["choice"]).name[6:], 16) % len(delays)])
    run_rung(config, work)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    made = make_project(tmp_path_factory.mktemp("search") / "project", tune__num_trials=4)
    for stage in ("prepare", "reference"):
        made.stage(stage)
    yield made
    kill_everything(made)


@pytest.mark.slow
def test_real_searches_of_different_timing_write_the_same_bytes(
    ray: None, prepared: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines import tune as stage

    monkeypatch.chdir(prepared.folder)
    params, run = load_params(), load_run_settings()
    written = []
    for max_concurrent, delays in ((1, (0.0,)), (2, (2.0, 0.0, 1.0))):
        shutil.rmtree("runs/tune", ignore_errors=True)
        monkeypatch.setattr(stage, "run_search", partial(run_search, trainable=partial(delayed_rung, delays=delays)))
        counts = run.tune.model_copy(update={"max_concurrent": max_concurrent, "cpus_per_trial": 1.0})
        stage.tune(params, run.model_copy(update={"tune": counts}))
        files = (
            "artifacts/search/trials.csv",
            "artifacts/search/best.yaml",
            "metrics/tune.json",
            "plots/tune_trials.csv",
        )
        written.append([Path(name).read_bytes() for name in files])
    assert written[0] == written[1]
    monkeypatch.setattr(driver._Judge, "_run_tune", lambda *arguments: pytest.fail("Ray Tune was started"))
    longer = params.model_copy(update={"tune": params.tune.model_copy(update={"reduction_factor": 3})})
    stage.tune(longer, run)  # the first rung is the same, and the second one judges a subset
    started = time.monotonic()
    stage.tune(params, run)
    assert time.monotonic() - started < 10
    assert [Path(name).read_bytes() for name in files] == written[0]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_trial_resumed_at_a_rung_equals_an_uninterrupted_one(
    prepared: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    from pipelines.data.shards import open_split, read_manifest
    from pipelines.measurement.reference import load_reference
    from pipelines.search.trial import judge_rung
    from pipelines.training.settings import train_settings

    monkeypatch.chdir(prepared.folder)
    params = load_params()
    manifest = read_manifest(Path("artifacts/data"))
    settings = train_settings(params.train, 0, manifest, "fp32")
    images, reference = (
        open_split(Path("artifacts/data"), "train"),
        load_reference(Path("artifacts/reference"), manifest.content_hash),
    )
    judge = partial(judge_rung, settings, images=images, reference=reference, num_samples=32, ddim_steps=2)
    device = torch.device("cpu")
    whole = judge(new_state(settings, device), rung=8)
    folder = TrialFolder(f"{scheme}{tmp_path}", FIRST)
    halfway = new_state(settings, device)
    judge(halfway, rung=4)
    folder.save_checkpoint(halfway, "key")
    resumed = new_state(settings, device)
    folder.restore(resumed, "key", 8)
    assert resumed.step == 4
    assert judge(resumed, rung=8) == whole
    folder.save_checkpoint(resumed, "key")
    assert [path.name for path in Path(folder.path).iterdir()] == ["step_00000008"]
    early = new_state(settings, device)
    folder.restore(early, "key", 4)
    assert early.step == 0, "a checkpoint beyond the rung is of no use"
    saved: list[int] = []
    judge(
        new_state(settings, device),
        rung=8,
        hooks=Hooks(checkpoint_every=3, on_checkpoint=lambda s: saved.append(s.step)),
    )
    assert saved == [3, 6, 8], "a killed trial resumes within its rung"
    tensors = Path(folder.path) / "step_00000008/checkpoint.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    folder.restore(early, "key", 8)
    assert early.step == 0, "a damaged checkpoint is skipped"
