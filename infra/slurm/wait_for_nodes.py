"""Wait until every node of a Slurm job has joined its Ray: ``wait_for_nodes.py ADDRESS COUNT SECONDS LOGS``."""

from __future__ import annotations

import logging
import socket
import sys
import time

import ray


def listens(address: str) -> bool:
    """Return True if something accepts connections at host:port."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError:
        return False
    return True


def main(address: str, count: int, seconds: float, logs: str) -> None:
    """Return when ``count`` nodes have joined. Exits with one line if they have not within the time."""
    deadline = time.monotonic() + seconds
    joined: dict[str, dict[str, float]] = {}
    connected = False
    while time.monotonic() < deadline:
        if not connected and listens(address):
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
            connected = True
        if connected:
            alive = [node for node in ray.nodes() if node["Alive"]]
            joined = {node["Labels"].get("slurm-node", node["NodeID"]): node["Resources"] for node in alive}
            if len(joined) >= count:
                shares = (
                    f"{name} ({each.get('CPU', 0):g} CPUs, {each.get('GPU', 0):g} GPUs)"
                    for name, each in sorted(joined.items())
                )
                print(f"rediffuse: all {count} node(s) have joined Ray: {', '.join(shares)}", flush=True)
                return
        time.sleep(0.5)
    there = f"only {', '.join(sorted(joined))}" if joined else "none"
    sys.exit(
        f"error: {len(joined)} of {count} nodes joined Ray at {address} within {seconds:g} s ({there}): read {logs}/ray-*.log, check that the "
        "nodes reach that address (REDIFFUSE_HEAD_IP names another), or set REDIFFUSE_JOIN_SECONDS higher"
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4])
