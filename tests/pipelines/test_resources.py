from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.measurement.distributed_reference import plan_reference
from pipelines.params import EvaluateRun, TrainRun, TuneRun
from pipelines.resources import Node, plan_training, plan_trials, plan_units

LAPTOP = [Node(2)]
EIGHT_GPUS = [Node(64, 8)]
CPU_CLUSTER = [Node(0), Node(8), Node(8), Node(4)]
GPU_CLUSTER = [Node(4), Node(16, 4), Node(16, 4)]


def training(nodes: list[Node], batch_size: int = 64, steps: int = 1200, **settings):
    return plan_training(TrainRun(**settings), batch_size=batch_size, steps=steps, nodes=nodes)


@pytest.mark.parametrize(
    ("nodes", "workers", "cpus", "gpus"),
    [
        ([Node(1)], 1, 1, 0),
        (LAPTOP, 2, 1, 0),
        ([Node(16)], 2, 8, 0),
        (CPU_CLUSTER, 3, 4, 0),
        ([Node(4, 1)], 1, 4, 1),
        (EIGHT_GPUS, 8, 8, 1),
        (GPU_CLUSTER, 8, 4, 1),
        ([Node(0), Node(1), Node(1)], 2, 1, 0),
    ],
)
def test_auto_takes_one_worker_per_gpu_or_per_node_or_two(
    nodes: list[Node], workers: int, cpus: float, gpus: float
) -> None:
    plan = training(nodes)
    assert (plan.num_workers, plan.cpus_per_worker, plan.gpus_per_worker) == (workers, cpus, gpus)
    assert plan.device_type == ("cuda" if gpus else "cpu")
    assert str(workers) in plan.reason
    assert plan.warning == ""


def test_explicit_values_are_obeyed_or_refused() -> None:
    plan = training(LAPTOP, num_workers=16, cpus_per_worker=0.5)
    assert (plan.num_workers, plan.cpus_per_worker) == (16, 0.5)
    plan = training(LAPTOP, num_workers=4)
    assert (plan.num_workers, plan.cpus_per_worker, plan.threads) == (4, 0.5, 1), "fractions of a CPU, so that it fits"
    plan = plan_trials(TuneRun(max_concurrent=8, cpus_per_trial=1), num_trials=6, nodes=LAPTOP)
    assert (plan.processes, plan.request) == (8, "tune.max_concurrent"), "all of them must fit"
    assert plan_trials(TuneRun(), num_trials=6, nodes=LAPTOP).processes == 1
    with pytest.raises(ValueError, match=r"train\.gpus_per_worker: given 2, allowed at most 1"):
        training(EIGHT_GPUS, gpus_per_worker=2)
    with pytest.raises(ValueError, match=r"evaluate\.gpus_per_task: given 2"):
        plan_units(EvaluateRun(gpus_per_task=2), num_units=4, nodes=EIGHT_GPUS)
    with pytest.raises(ValueError, match=r"train\.num_workers: given 16, allowed at most train\.batch_size \(8\)"):
        training(LAPTOP, batch_size=8, num_workers=16)


def test_auto_never_takes_more_workers_than_images_in_a_batch() -> None:
    plan = training(EIGHT_GPUS, batch_size=3)
    assert plan.num_workers == 3
    assert "at most one per image" in plan.reason


@pytest.mark.parametrize(
    ("settings", "idle"),
    [
        ({"num_workers": 2}, "6 of 8"),
        ({"gpus_per_worker": 0}, "8 of 8"),
        ({"gpus_per_worker": 0.5, "num_workers": 1}, "7 of 8"),
        ({}, ""),
    ],
)
def test_gpus_that_an_explicit_value_leaves_idle_are_named(settings: dict, idle: str) -> None:
    warning = training(EIGHT_GPUS, **settings).warning
    assert (idle in warning) if idle else warning == ""


@pytest.mark.parametrize(
    ("settings", "count", "idle"),
    [
        ({"max_concurrent": 1}, 6, "5 of 8"),
        ({"gpus_per_trial": 0}, 6, "6 of 8"),
        ({"gpus_per_trial": 0.5}, 40, ""),
        ({}, 6, ""),
        ({"max_concurrent": 8}, 40, ""),
    ],
)
def test_gpus_that_trials_could_use_and_do_not_are_named(settings: dict, count: int, idle: str) -> None:
    warning = plan_trials(TuneRun(**settings), num_trials=count, nodes=EIGHT_GPUS).warning
    assert (idle in warning) if idle else warning == ""


def test_cadence_follows_the_length_of_the_run_unless_given() -> None:
    plan = training(LAPTOP, steps=1200)
    assert (plan.log_every, plan.checkpoint_every, plan.sample_every) == (12, 150, 600)
    plan = training(LAPTOP, steps=3, log_every=7)
    assert (plan.log_every, plan.checkpoint_every, plan.sample_every) == (7, 1, 1)
    plan = training(LAPTOP, steps=10**6)
    assert (plan.log_every, plan.checkpoint_every, plan.sample_every) == (100, 2000, 10_000)


def test_tasks_fill_the_cluster() -> None:
    plan = plan_trials(TuneRun(), num_trials=6, nodes=LAPTOP)
    assert (plan.max_concurrent, plan.cpus, plan.gpus, plan.max_retries) == (2, 1, 0, 2)
    plan = plan_units(EvaluateRun(), num_units=48, nodes=GPU_CLUSTER)
    assert (plan.max_concurrent, plan.cpus, plan.gpus, plan.max_retries) == (8, 4, 1, 3)
    plan = plan_units(EvaluateRun(gpus_per_task=0.5), num_units=48, nodes=EIGHT_GPUS)
    assert (plan.max_concurrent, plan.cpus) == (16, 4)
    plan = plan_trials(TuneRun(max_concurrent=1, cpus_per_trial=2), num_trials=6, nodes=LAPTOP)
    assert (plan.max_concurrent, plan.cpus) == (1, 2)
    assert "set by tune.max_concurrent in run.yaml" in plan.reason


nodes_strategy = st.lists(
    st.builds(Node, st.integers(0, 128).map(float), st.integers(0, 8).map(float)), min_size=1, max_size=6
).filter(lambda nodes: any(node.cpus >= 1 for node in nodes) and all(node.cpus >= node.gpus for node in nodes))


@given(nodes=nodes_strategy, batch_size=st.integers(1, 512))
def test_what_auto_plans_fits_the_cluster(nodes: list[Node], batch_size: int) -> None:
    plans = [training(nodes, batch_size=batch_size)]
    tasks = [plan_trials(TuneRun(), num_trials=6, nodes=nodes), plan_units(EvaluateRun(), num_units=40, nodes=nodes)]
    wanted = [(plan.num_workers, plan.cpus_per_worker, plan.gpus_per_worker) for plan in plans]
    wanted += [(plan.max_concurrent, plan.cpus, plan.gpus) for plan in tasks]
    for count, cpus, gpus in wanted:
        fitting = sum(int(min(node.cpus / cpus, node.gpus / gpus if gpus else 1e9) + 1e-9) for node in nodes)
        assert 1 <= count <= fitting


@pytest.mark.parametrize(
    ("nodes", "device", "cpus", "gpus"),
    [
        (LAPTOP, "auto", 2, 0),
        (CPU_CLUSTER, "auto", 8, 0),
        (GPU_CLUSTER, "auto", 4, 1),
        (GPU_CLUSTER, "cuda", 4, 1),
        (GPU_CLUSTER, "cpu", 16, 0),
    ],
)
def test_reference_takes_a_gpu_of_the_cluster_or_the_cpus_of_one_node(
    nodes: list[Node], device: str, cpus: float, gpus: float
) -> None:
    plan = plan_reference(device, nodes)  # type: ignore[arg-type]
    assert (plan.cpus, plan.gpus) == (cpus, gpus)


def test_reference_on_a_gpu_is_refused_in_a_cluster_without_one() -> None:
    with pytest.raises(ValueError, match=r"reference\.device .* no node of the Ray cluster has a GPU: set auto or cpu"):
        plan_reference("cuda", CPU_CLUSTER)


def test_workers_that_share_a_gpu_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"train\.gpus_per_worker: given 0\.5 with 2 workers: .* or train\.num_workers to 1"
    ):
        training([Node(8, 1)], gpus_per_worker=0.5)
    assert training([Node(8, 1)], gpus_per_worker=0.5, num_workers=1).gpus_per_worker == 0.5
