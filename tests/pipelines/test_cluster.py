"""Nodes, places and precision, without a cluster. tests/end_to_end/test_cluster.py has real ones."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from pipelines import cluster
from pipelines.cluster import cluster_nodes, place, resolve_precision, state_storage
from pipelines.devices import best_precision
from pipelines.identity import State
from pipelines.params import EvaluateRun, TrainRun
from pipelines.resources import Node, plan_training, plan_units


def alive(*resources: dict[str, float]) -> Any:
    return lambda: [{"Alive": True, "NodeID": str(i), "Resources": each} for i, each in enumerate(resources)]


def test_gpus_of_this_machine_that_torch_cannot_use_do_not_count(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setattr(cluster, "_alive_nodes", alive({"CPU": 16.0, "GPU": 2.0}))
    monkeypatch.setattr(cluster, "_started_here", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.WARNING):
        assert cluster_nodes() == [Node(16.0)]
    assert "cannot use the GPUs of this machine" in caplog.text
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cluster_nodes() == [Node(16.0, 2.0)]
    monkeypatch.setattr(cluster, "_started_here", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cluster_nodes() == [Node(16.0, 2.0)], "a head without a GPU says nothing about the other nodes"


def test_plan_that_can_never_be_placed_is_refused_with_the_setting(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setattr(cluster, "_alive_nodes", alive({"CPU": 2.0}, {"CPU": 2.0}))
    nodes = cluster_nodes()
    with caplog.at_level(logging.INFO):
        place(plan_training(TrainRun(), batch_size=64, steps=10, nodes=nodes))
    assert "2 workers with 2 CPUs each: one per node, no GPUs" in caplog.text
    large = plan_training(TrainRun(num_workers=5, cpus_per_worker=1), batch_size=64, steps=10, nodes=nodes)
    with pytest.raises(
        ValueError, match=r"train\.num_workers: 5 x \(1 CPUs\) can never run .* lower train\.num_workers"
    ):
        place(large)
    with pytest.raises(ValueError, match=r"evaluate\.max_concurrent: 9 x \(1 CPUs\) can never run"):
        place(plan_units(EvaluateRun(max_concurrent=9, cpus_per_task=1), num_units=40, nodes=nodes))
    with pytest.raises(ValueError, match=r"evaluate\.cpus_per_task: 1 x \(3 CPUs\) can never run"):
        place(plan_units(EvaluateRun(cpus_per_task=3), num_units=40, nodes=nodes))


def test_explicit_precision_is_kept_and_auto_is_what_this_machine_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_started_here", True)
    assert resolve_precision("bf16", "cpu") == "bf16"
    assert resolve_precision("fp32", "cuda") == "fp32"
    assert resolve_precision("auto", "cpu") == best_precision(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"torch .* cannot use them"):
        resolve_precision("auto", "cuda")


def test_storage_of_a_state_is_named_by_stage_and_key(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    state = State(tmp_path / "runs/train/abc", "abc")
    assert state_storage("runs", "train", state) == str(state.folder)
    assert state_storage("s3://bucket/x/", "train", state) == "s3://bucket/x/train/abc"
    assert state_storage(str(tmp_path / "other"), "tune", state) == str(tmp_path / "other/tune/abc")
