"""Autoscaling clusters: what their node types can hold, and the wait for nodes that are asked for.

Ray's autoscaler does not publish its node types. They are known from the cluster configuration in the GCS, if a platform puts
it there, or from ray_bootstrap_config.yaml in the home directory, which the cluster launcher writes on the head.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipelines.durations import minutes_and_seconds
from pipelines.resources import Node

REPORT_SECONDS = 30.0
BOOTSTRAP = "ray_bootstrap_config.yaml"
UNLIMITED = 10_000
"""A maximum from here on means that the owner set none."""

log = logging.getLogger("rediffuse")


@dataclass(frozen=True)
class NodeType:
    """A kind of node that the autoscaler can add, and the largest number of nodes of this kind."""

    name: str
    node: Node
    most: int


def is_autoscaling() -> bool:
    """Return True if the cluster that this process joined can add nodes."""
    import ray
    from ray._private import ray_constants
    from ray.experimental.internal_kv import _internal_kv_get

    if not ray.is_initialized():
        return False
    if _published() is not None:
        return True
    status = json.loads(_internal_kv_get(ray_constants.DEBUG_AUTOSCALING_STATUS) or b"{}")
    types = ((status.get("autoscaler_report") or {}).get("node_type_mapping") or {}).values()
    return any(not name.startswith("local_") for name in types) or _has_second_version()


def node_types() -> list[NodeType]:
    """Return the node types that can be added; an empty list if they are not known here."""
    published = _published()
    if published is not None:
        most = {each.name: each.max_count for each in published.node_group_configs}
        return [_type(each.name, dict(each.resources), most[each.name]) for each in published.node_group_configs]
    path = Path.home() / BOOTSTRAP
    try:
        tree = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except (OSError, YAMLError):
        return []
    return types_of_launcher(tree)


def types_of_launcher(tree: dict[str, Any]) -> list[NodeType]:
    """Return the worker types of a configuration of Ray's cluster launcher."""
    head, total = tree.get("head_node_type"), int(tree.get("max_workers", 2))
    return [
        _type(name, each.get("resources") or {}, min(int(each.get("max_workers", total)), total))
        for name, each in (tree.get("available_node_types") or {}).items()
        if name != head
    ]


def future_nodes(present: Sequence[Node], types: Sequence[NodeType]) -> list[Node]:
    """Return the present nodes and those that can be added. A type without a limit adds one node, if it has none yet."""
    left = Counter(present)
    added = []
    for each in types:
        there = left[each.node]
        most = max(there, 1) if each.most < 0 or each.most >= UNLIMITED else each.most
        taken = min(there, most)
        left[each.node] -= taken
        added += [each.node] * (most - taken)
    return [*present, *added]


def wait_for_nodes(count: int, cpus: float, gpus: float, what: str) -> None:
    """Ask the autoscaler for ``count`` bundles, and wait until it has added the nodes. Logs what is awaited, at once and every 30 s.

    The request is a placement group: unlike `request_resources`, it replaces no other user's request and ends with this process.
    """
    from ray.util.placement_group import placement_group, remove_placement_group

    bundle = {name: amount for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount}
    asked = f"{count} x ({cpus:g} CPUs{f' and {gpus:g} GPUs' if gpus else ''})"
    log.info("%s: asked the autoscaler for %s; waiting for its nodes", what, asked)
    group = placement_group([bundle] * count, strategy="PACK")
    began = time.monotonic()
    try:
        while not group.wait(REPORT_SECONDS):
            log.info("%s: still waiting for %s after %s", what, asked, minutes_and_seconds(time.monotonic() - began))
    finally:
        remove_placement_group(group)
    log.info("%s: the nodes are there after %s", what, minutes_and_seconds(time.monotonic() - began))


def _type(name: str, resources: dict[str, float], most: int) -> NodeType:
    return NodeType(name, Node(float(resources.get("CPU", 0)), float(resources.get("GPU", 0))), most)


def _published() -> Any:
    """Return the cluster configuration in the GCS, or None."""
    from ray._private.state import state

    try:
        found = state.get_cluster_config()
    except Exception:  # Ray Client has no such call
        return None
    return found if found is not None and found.node_group_configs else None


def _has_second_version() -> bool:
    """Return True if version 2 of the autoscaler manages nodes: they then have a node type."""
    import ray
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply  # type: ignore[attr-defined]

    try:
        reply = GetClusterStatusReply()
        reply.ParseFromString(GcsClient(address=ray.get_runtime_context().gcs_address).get_cluster_status(timeout_s=10))
    except Exception:
        return False
    names = [each.ray_node_type_name for each in reply.cluster_resource_state.node_states]
    return reply.autoscaling_state.autoscaler_state_version > 0 and any(
        name and not name.startswith("local_") for name in names
    )
