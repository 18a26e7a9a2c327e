"""The training loop in one process with torch alone, without Ray, MLflow and DVC. For benchmarks and bare machines.

python -m pipelines.training.bare artifacts/data --steps 200 --output model
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from diffusion_core.networks.memory import keep_freed_memory
from pipelines.data.shards import open_split, read_manifest
from pipelines.devices import best_precision
from pipelines.training.loop import Hooks, TrainSettings, new_state, train
from pipelines.training.model import ema_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder that the prepare stage wrote")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--channels", type=int, default=24)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="write the EMA model here")
    arguments = parser.parse_args()
    keep_freed_memory()
    device = torch.device(arguments.device)
    manifest = read_manifest(arguments.data)
    settings = TrainSettings(
        seed=0,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        warmup_steps=min(50, arguments.steps),
        decay="cosine",
        weight_decay=0.0,
        grad_clip=1.0,
        ema_decay=0.999,
        condition_dropout=0.1,
        horizontal_flip=False,
        precision=best_precision(device) if arguments.precision == "auto" else arguments.precision,
        network={
            "name": "unet",
            "image_size": manifest.shape[0],
            "image_channels": manifest.shape[2],
            "channels": arguments.channels,
            "multipliers": [1, 2],
            "num_res_blocks": 1,
            "attention_sizes": [],
            "condition": {"kind": "class", "size": len(manifest.class_names)},
        },
        schedule={"name": "cosine", "num_steps": 1000},
        objective="v",
        weighting="snr_plus_one",
        class_names=manifest.class_names,
    )
    hooks = Hooks(
        log_every=max(arguments.steps // 20, 1),
        on_log=lambda p: print(
            f"step {p.row['step']:.0f}/{arguments.steps}  loss {p.row['loss']:.4f}  {p.images_per_s:.0f} images/s  ETA {p.seconds_left:.0f} s"
        ),
    )
    state = train(settings, open_split(arguments.data, "train"), new_state(settings, device), hooks)
    if arguments.output:
        ema_model(settings, state, {"data_hash": manifest.content_hash, "step": state.step}).save(arguments.output)


if __name__ == "__main__":
    main()
