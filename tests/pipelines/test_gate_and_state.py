from __future__ import annotations

import fcntl
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.cluster import prepare_worker
from pipelines.params import load_params
from pipelines.registry.gate import COMPARED, judge
from pipelines.search.driver import best_row
from pipelines.search.trial import FAILED_FID, rungs
from pipelines.stage import describe_error, stage_lock
from pipelines.state import fingerprint, stage_params, workspace_id
from pipelines.training.driver import set_aside_torn_state
from pipelines.training.settings import train_settings
from tests.conftest import Project

MEASURED: dict[str, Any] = dict.fromkeys(COMPARED, "same") | {"num_samples": 100, "eta": 0.0, "steps": 50, "fid": 2.0}


def test_first_model_becomes_champion() -> None:
    assert judge(MEASURED, None).promoted


@pytest.mark.parametrize(("fid", "promoted"), [(1.9, True), (2.0, False), (2.1, False)])
def test_only_a_lower_fid_moves_the_alias(fid: float, promoted: bool) -> None:
    champion = {key: str(value) for key, value in MEASURED.items()}  # as tags hold it
    verdict = judge({**MEASURED, "fid": fid}, champion)
    assert verdict.promoted is promoted
    assert f"{fid:.6g} against 2" in verdict.reason


@pytest.mark.parametrize("key", COMPARED)
def test_figures_of_another_kind_are_not_compared(key: str) -> None:
    verdict = judge({**MEASURED, "fid": 0.1}, {**MEASURED, key: "other"})
    assert not verdict.promoted
    assert f"differ in {key}" in verdict.reason


def test_rungs_are_powers_of_the_factor_and_the_end() -> None:
    assert rungs(160, 40, 2) == (40, 80, 160)
    assert rungs(100, 40, 2) == (40, 80, 100)
    assert rungs(10, 10, 3) == (10,)


def test_best_trial_is_the_best_of_those_that_went_furthest() -> None:
    rows = [
        {"step": 40, "fid": 0.5},
        {"step": 160, "fid": 2.0},
        {"step": 160, "fid": 1.0},
        {"step": 160, "fid": FAILED_FID},
    ]
    assert best_row(rows) == {"step": 160, "fid": 1.0}


def test_fingerprint_follows_params_inputs_and_code_and_nothing_else(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project.folder)
    before = fingerprint("train", load_params(), {"data": "a"})
    assert fingerprint("train", load_params(), {"data": "a"}) == before
    assert fingerprint("train", load_params(), {"data": "b"}) != before
    project.change(evaluate__num_samples=999, ray__num_cpus=7)
    assert fingerprint("train", load_params(), {"data": "a"}) == before
    project.change(train__learning_rate=0.123)
    assert fingerprint("train", load_params(), {"data": "a"}) != before
    project.run("git", "checkout", "params.yaml")
    with open("diffusion_core/ema.py", "a") as file:
        file.write("\n# changed\n")
    assert fingerprint("train", load_params(), {"data": "a"}) != before


def test_stage_params_are_those_that_dvc_yaml_lists(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project.folder)
    values = stage_params("tune", load_params())
    assert values["train.network.channels"] == load_params().train.network.channels
    assert "train.steps" not in values
    assert "train.num_workers" not in values


def test_workspace_keeps_its_name(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project.folder)
    assert workspace_id() == workspace_id() != ""


def test_second_process_waits_for_the_lock(tmp_path: Path) -> None:
    held = open(tmp_path / "train.lock", "a+")  # noqa: SIM115
    fcntl.flock(held, fcntl.LOCK_EX)
    entered = threading.Event()

    def enter() -> None:
        with stage_lock("train", tmp_path):
            entered.set()

    thread = threading.Thread(target=enter, daemon=True)
    thread.start()
    time.sleep(0.5)
    assert not entered.is_set()
    held.close()
    assert entered.wait(5)


def test_only_torn_snapshots_are_set_aside(tmp_path: Path) -> None:
    (tmp_path / "checkpoint_manager_snapshot.json").write_text('{"a": 1}')
    set_aside_torn_state(tmp_path)
    assert (tmp_path / "checkpoint_manager_snapshot.json").exists()
    (tmp_path / "checkpoint_manager_snapshot.json").write_text('{"a": ')
    set_aside_torn_state(tmp_path)
    assert not (tmp_path / "checkpoint_manager_snapshot.json").exists()


def test_errors_are_described_in_one_line() -> None:
    assert describe_error(ValueError("two\n  lines")) == "two lines"
    assert describe_error(PermissionError(13, "Permission denied", "x/y")) == "x/y: Permission denied"


def test_search_settings_reach_the_training_loop(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.data.shards import Manifest

    monkeypatch.chdir(project.folder)
    manifest = Manifest({}, {}, (8, 8, 1), ("a", "b"), {}, [], {}, "hash")
    plain = train_settings(load_params(), manifest)
    tuned = train_settings(load_params(), manifest, {"schedule": "linear", "objective": "eps", "learning_rate": 0.5})
    assert (plain.schedule["name"], plain.objective) == ("cosine", "v")
    assert (tuned.schedule["name"], tuned.objective, tuned.learning_rate) == ("linear", "eps", 0.5)
    assert tuned.network["condition"] == {"kind": "class", "size": 2}


def test_worker_takes_its_share_of_the_cores() -> None:
    former = torch.get_num_threads()
    try:
        prepare_worker(1)
        assert torch.get_num_threads() == 1 or torch.cuda.is_available()
    finally:
        torch.set_num_threads(former)
