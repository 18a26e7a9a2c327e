"""An autoscaling cluster without worker nodes: a real autoscaler adds raylets on this machine."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from pipelines.autoscaling import NodeType, future_nodes, types_of_launcher
from pipelines.resources import Node
from tests.infra.raylets import clean_environment, ray_head

HEAD_ID = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"
PORT = 6379
"""The raylets of Ray's fake provider join this port."""
LISTS = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands", "rsync_filter")
MORE_LISTS = ("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude")
CONFIGURATION = {
    "cluster_name": "fake",
    "max_workers": 8,
    "provider": {"type": "fake_multinode", "head_node_id": HEAD_ID, "launch_multiple": True},
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "worker": {"resources": {"CPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": 3},
    },
    "head_node_type": "ray.head.default",
    "upscaling_speed": 1.0,
    "idle_timeout_minutes": 5,
    "file_mounts_sync_continuously": False,
    "auth": {"ssh_user": "nobody"},
    **{name: {} for name in ("docker", "file_mounts")},
    **{name: [] for name in (*LISTS, *MORE_LISTS)},
}
SCRIPT = """
import logging
logging.basicConfig(level=20, format="%(message)s")
from pipelines import autoscaling
from pipelines.cluster import cluster_nodes, place, ray_session
from pipelines.params import EvaluateRun, RayRun, TrainRun
from pipelines.resources import plan_training, plan_units
from pipelines.stage import one_line_errors
autoscaling.REPORT_SECONDS = 1.0
with one_line_errors("train"), ray_session(RayRun(), compare=False):
    nodes = cluster_nodes()
    print("NODES", sorted(node.cpus for node in nodes))
    place(plan_training(TrainRun(num_workers=3, cpus_per_worker=1), batch_size=64, steps=10, nodes=nodes))
    import ray
    print("UP", sum(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]))
    print("AUTO", plan_training(TrainRun(), batch_size=64, steps=10, nodes=cluster_nodes()).reason)
    place(plan_training(TrainRun(num_workers=7, cpus_per_worker=1), batch_size=64, steps=10, nodes=nodes))
"""


@pytest.mark.infra
def test_cluster_without_nodes_grows_and_refuses_only_what_no_type_can_hold(tmp_path: Path) -> None:
    with closing(socket.socket()) as probe:
        if probe.connect_ex(("127.0.0.1", PORT)) == 0:
            pytest.skip(f"port {PORT}, which Ray's fake provider needs, is taken")
    (tmp_path / "config.json").write_text(json.dumps(CONFIGURATION))
    options = ("--include-dashboard=false", f"--autoscaling-config={tmp_path / 'config.json'}")
    fake = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    with ray_head(*options, port=PORT, num_cpus=0, **fake) as head:
        (head.home / "ray_bootstrap_config.yaml").write_text(json.dumps(CONFIGURATION))
        result = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env=clean_environment(head.home, RAY_ADDRESS=head.address, RAY_SCHEDULER_EVENTS="0"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=90,
            check=False,
        )
    text = result.stdout
    assert "NODES [0.0, 2.0, 2.0, 2.0]" in text, text
    assert "train.num_workers: asked the autoscaler for 3 x (1 CPUs); waiting for its nodes" in text, text
    assert "train.num_workers: still waiting for 3 x (1 CPUs) after" in text, text
    assert "UP 4.0" in text, text
    assert "AUTO 3 workers with 2 CPUs each: one per node, no GPUs" in text, "the same count as before the nodes came"
    assert (
        "train: error: train.num_workers: 7 x (1 CPUs) can never run on this Ray cluster of 4 node(s) with 6 CPUs"
        in text
    )
    assert result.returncode == 1


def test_types_of_a_launcher_file_are_its_workers_within_the_total() -> None:
    assert types_of_launcher(CONFIGURATION) == [NodeType("worker", Node(2.0), 3)]
    assert types_of_launcher({**CONFIGURATION, "max_workers": 1}) == [NodeType("worker", Node(2.0), 1)]


def test_future_nodes_count_present_ones_once() -> None:
    small, large = Node(2.0), Node(8.0, 1.0)
    types = [NodeType("small", small, 3), NodeType("large", large, 2)]
    assert sorted(future_nodes([Node(0.0), small], types), key=str) == sorted(
        [Node(0.0), small, small, small, large, large], key=str
    )
    endless = [NodeType("endless", large, 2**31 - 1)]
    assert future_nodes([], endless) == [large], "one node of a type without a limit"
    assert future_nodes([large, large], endless) == [large, large]
    assert future_nodes([small], []) == [small], "unknown types add nothing"
