"""A unit of evaluation: one shard of samples at one sampler setting, made, measured and thrown away on one worker."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from diffusion_core.artifact import DiffusionModel
from diffusion_core.generation import SamplerSettings, generate
from diffusion_core.metrics.statistics import GaussianStatistics
from diffusion_core.storage import atomic_path
from pipelines.cluster import prepare_worker
from pipelines.evaluation.reference import Reference, load_reference


@dataclass(frozen=True)
class Unit:
    """Samples ``first`` to ``first + count - 1`` at setting number ``setting``; a ``grid`` unit keeps its images instead."""

    setting: int
    shard: int
    first: int
    count: int
    grid: bool = False

    @property
    def name(self) -> str:
        return f"{self.setting:03d}-grid" if self.grid else f"{self.setting:03d}-{self.shard:05d}"


@dataclass(frozen=True)
class UnitResult:
    """Statistics of the features, how many samples show their label, and the seconds that sampling took; or the grid's images."""

    statistics: GaussianStatistics | None
    agreeing: int
    seconds: float
    images: np.ndarray | None = None


@dataclass(frozen=True)
class Work:
    """What all units of a sweep share. Paths are absolute: workers run elsewhere."""

    model_dir: str
    model_digest: str
    reference_dir: str
    data_hash: str
    seed: int
    batch_size: int
    threads: int


def evaluate_unit(work: Work, unit: Unit, settings: SamplerSettings, labels: np.ndarray) -> UnitResult:
    """Make the unit's samples and measure them where they are made. ``labels``: (count,) int64.

    Sample k depends on (seed, k, its label) alone, so the result is the same on any worker.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prepare_worker(work.threads)
    model, reference = _load(work.model_dir, work.model_digest, work.reference_dir, work.data_hash, str(device))
    condition = torch.from_numpy(labels)
    indices = torch.arange(unit.first, unit.first + unit.count, dtype=torch.int64)
    if unit.grid:
        images = np.empty((unit.count, *model.image_shape), dtype=np.uint8)
        for positions, block in generate(model, condition, indices, settings, seed=work.seed):
            images[positions.numpy()] = block.numpy()
        return UnitResult(None, 0, 0.0, images)
    parts, agreeing, seconds = [], 0, 0.0
    batches = generate(model, condition, indices, settings, seed=work.seed, block_size=work.batch_size)
    while True:
        started = time.perf_counter()
        item = next(batches, None)
        seconds += time.perf_counter() - started
        if item is None:
            break
        positions, block = item
        images_on_device = block.to(device)
        parts.append(reference.extractor(images_on_device).double().cpu().numpy())
        named = reference.classifier(images_on_device)[1].argmax(dim=1).cpu()
        agreeing += int((named == condition[positions]).sum())
    return UnitResult(GaussianStatistics.from_features(np.concatenate(parts)), agreeing, seconds)


def save_result(result: UnitResult, path: Path) -> None:
    """Write a finished unit, whole or not at all."""
    tensors: dict[str, np.ndarray] = {
        "agreeing": np.asarray([result.agreeing]),
        "seconds": np.asarray([result.seconds]),
    }
    if result.statistics is not None:
        tensors |= {
            "n": np.asarray([result.statistics.n]),
            "mean": np.ascontiguousarray(result.statistics.mean),
            "scatter": np.ascontiguousarray(result.statistics.scatter),
        }
    if result.images is not None:
        tensors["images"] = np.ascontiguousarray(result.images)
    with atomic_path(path) as temporary:
        save_file(tensors, temporary)


def load_result(path: Path) -> UnitResult | None:
    """A finished unit; None where it is absent or torn."""
    try:
        tensors = load_file(path)
        statistics = None
        if "n" in tensors:
            statistics = GaussianStatistics(int(tensors["n"][0]), tensors["mean"], tensors["scatter"])
        return UnitResult(statistics, int(tensors["agreeing"][0]), float(tensors["seconds"][0]), tensors.get("images"))
    except (OSError, SafetensorError, KeyError, IndexError):
        return None


@lru_cache(maxsize=1)
def _load(
    model_dir: str, digest: str, reference_dir: str, data_hash: str, device: str
) -> tuple[DiffusionModel, Reference]:
    model = DiffusionModel.load(Path(model_dir), device)
    reference = load_reference(Path(reference_dir), data_hash)
    reference.extractor.to(torch.device(device))
    reference.classifier.to(device)
    return model, reference
