"""Units of work: a run of consecutive samples at one sampler setting, computed on one worker and kept in one file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from diffusion_core.artifact import DiffusionModel
from diffusion_core.generation import SamplerSettings
from diffusion_core.metrics.statistics import GaussianStatistics
from diffusion_core.storage import atomic_path
from pipelines.measurement.measure import Measurement, measure, num_groups
from pipelines.measurement.reference import load_reference_on

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Work:
    """Settings that all units share. The folders are absolute, because workers run in other folders.

    It decides the result together with the unit and the device type, so all of it belongs to the key of the folder of results.
    """

    model_dir: str
    model_digest: str
    reference_dir: str
    data_hash: str
    seed: int
    rows_per_call: int


@dataclass(frozen=True)
class Unit:
    """Samples ``first`` to ``first + count - 1`` at one sampler setting, and the function that computes with them.

    ``compute(work, unit, device)`` returns arrays. It is a function of a module, so that workers can import it.
    """

    compute: Callable[[Work, Unit, torch.device], Arrays]
    settings: SamplerSettings
    first: int
    count: int

    @property
    def name(self) -> str:
        """File name, unique among the units of one work."""
        s = self.settings
        eta = s.eta if isinstance(s.eta, str) else float(s.eta)
        sampler = f"steps-{s.steps}_eta-{eta}_guidance-{float(s.guidance_scale)}_{s.spacing}"
        return f"{self.compute.__name__}_{sampler}_{self.first}+{self.count}"

    @property
    def cost(self) -> int:
        """Cost estimate: steps times samples."""
        return self.settings.steps * self.count


def sample_units(settings: SamplerSettings, num_samples: int, shard_size: int, rows_per_call: int) -> list[Unit]:
    """Return the units that measure samples 0 to ``num_samples - 1``, ``shard_size`` samples per unit.

    The size is rounded up to a multiple of ``rows_per_call``, because two units that share a block would both compute it.
    """
    size = -(-shard_size // rows_per_call) * rows_per_call
    return [
        Unit(measure_unit, settings, first, min(size, num_samples - first)) for first in range(0, num_samples, size)
    ]


def measure_unit(work: Work, unit: Unit, device: torch.device) -> Arrays:
    """Sample the unit's images and measure them on the same worker."""
    model = load_model(work, device)
    reference = load_reference_on(work.reference_dir, work.data_hash, device)
    indices = torch.arange(unit.first, unit.first + unit.count)
    measurement = measure(
        model,
        reference,
        indices,
        unit.settings,
        seed=work.seed,
        rows_per_call=work.rows_per_call,
        num_groups=num_groups(reference.num_features),
    )
    return {
        "n": np.asarray([group.n for group in measurement.groups]),
        "mean": np.stack([group.mean for group in measurement.groups]),
        "scatter": np.stack([group.scatter for group in measurement.groups]),
        "agreeing": np.asarray([measurement.agreeing]),
        "seconds": np.asarray([measurement.seconds]),
        "network_calls": np.asarray([measurement.network_calls]),
    }


def merge_units(units: Sequence[Unit], folder: Path) -> Measurement:
    """Merge the measurements of finished units, one file at a time, in order."""
    return reduce(Measurement.merge, (_measurement(folder, unit) for unit in units))


def save_result(arrays: Arrays, folder: Path, unit: Unit) -> None:
    """Write the result of a unit; the file is complete or absent. Raises ValueError that names an array with NaN or infinity."""
    if broken := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
        raise ValueError(f"{unit.name}: {', '.join(broken)} hold NaN or infinity")
    with atomic_path(_path(folder, unit)) as temporary:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, temporary)


def load_result(folder: Path, unit: Unit) -> Arrays | None:
    """Return the result of a finished unit, or None if its file is absent, damaged or holds NaN or infinity."""
    try:
        arrays = load_file(_path(folder, unit))
    except (OSError, SafetensorError):
        return None
    return arrays if all(np.isfinite(array).all() for array in arrays.values()) else None


@lru_cache(maxsize=1)
def load_model(work: Work, device: torch.device) -> DiffusionModel:
    """Load the model of the work. The last one stays loaded in this process."""
    return DiffusionModel.load(Path(work.model_dir), device)


def _measurement(folder: Path, unit: Unit) -> Measurement:
    arrays = load_result(folder, unit)
    assert arrays is not None, f"{unit.name} is not finished"
    groups = zip(arrays["n"], arrays["mean"], arrays["scatter"], strict=True)
    return Measurement(
        groups=tuple(GaussianStatistics(int(n), mean, scatter) for n, mean, scatter in groups),
        agreeing=int(arrays["agreeing"].item()),
        seconds=float(arrays["seconds"].item()),
        network_calls=int(arrays["network_calls"].item()),
    )


def _path(folder: Path, unit: Unit) -> Path:
    return folder / f"{unit.name}.safetensors"
