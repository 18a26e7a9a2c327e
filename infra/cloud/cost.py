"""Print the table of expected cost: `python infra/cloud/cost.py`. Standard library and PyYAML only.

cost = hours * (head + workers * worker * (1 + lost)), in USD. `head` is the on-demand price per hour and `worker` the spot price. `lost`
is the share of work that interruptions repeat: interruptions per hour and worker * (half of the time between two checkpoints + the time
until a new worker works), in hours.
"""

from __future__ import annotations

from pathlib import Path

import yaml

INTERRUPTIONS_PER_HOUR = 0.05  # an assumption: one per worker in 20 hours
CHECKPOINT_MINUTES = 10.0  # an assumption: train.checkpoint_every times the time of a step
REPLACEMENT_MINUTES = 6.0  # an assumption: a machine starts and installs the project


def cost(hours: float, head: float, workers: int, worker: float) -> float:
    """Return the expected cost of a run in USD. Prices in USD per hour."""
    lost = INTERRUPTIONS_PER_HOUR * (CHECKPOINT_MINUTES / 2 + REPLACEMENT_MINUTES) / 60
    return hours * (head + workers * worker * (1 + lost))


def table() -> str:
    """Return the table as Markdown: each provider's head with 1 and 4 workers, for one hour and for ten."""
    folder = Path(__file__).parent
    prices = yaml.safe_load((folder / "prices.yaml").read_text(encoding="utf-8"))
    lines = ["| cluster | workers | 1 hour, USD | 10 hours, USD | 10 hours on demand, USD |", "|---|---|---|---|---|"]
    for provider in ("aws", "gcp"):
        types = yaml.safe_load((folder / f"{provider}.yaml").read_text(encoding="utf-8"))["available_node_types"]
        machines = prices[provider]["machines"]

        def machine(kind: str, types: dict = types) -> str:
            config = types[kind]["node_config"]
            return str(config.get("InstanceType") or config.get("machineType"))

        head = machines[machine("head")]["on_demand"]
        for kind in ("cpu", "gpu"):
            price = machines[machine(kind)]
            for workers in (1, 4):
                row = f"| {provider}, {machine('head')} + spot {machine(kind)} | {workers} |"
                if price["spot"] is None:
                    lines.append(f"{row} enter the price | in prices.yaml | |")
                    continue
                low, high = price["spot"]
                for hours in (1, 10):
                    least, most = cost(hours, head, workers, low), cost(hours, head, workers, high)
                    row += f" {least:.2f} |" if low == high else f" {least:.2f} to {most:.2f} |"
                lines.append(f"{row} {10 * (head + workers * price['on_demand']):.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
