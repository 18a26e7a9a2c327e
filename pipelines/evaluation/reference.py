"""What samples are compared with: the class network, the feature extractor, and the statistics of the real images."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from diffusion_core.metrics.extractors import (
    FeatureExtractor,
    ImageClassifier,
    load_classifier,
    load_extractor,
    save_classifier,
)
from diffusion_core.metrics.statistics import GaussianStatistics, merge_statistics
from diffusion_core.storage import read_json
from pipelines.data.shards import ImageSplit

FEATURE_BATCH = 250


@dataclass(frozen=True)
class Reference:
    """What the reference stage wrote, loaded. ``description`` is reference.json."""

    extractor: FeatureExtractor
    classifier: ImageClassifier
    statistics: Mapping[str, GaussianStatistics]
    description: Mapping[str, Any]

    @property
    def metric(self) -> str:
        """The metric's name, with the extractor's in it."""
        return f"fid_{self.extractor.name}"


def load_reference(folder: Path, data_hash: str) -> Reference:
    """Read artifacts/reference. Raises ValueError where it is damaged, or was made of other data."""
    description = read_json(folder / "reference.json")
    remedy = "run the reference stage again (dvc repro -f reference)"
    for key in ("data_hash", "extractor", "extractor_digest", "floor", "class_counts"):
        if key not in description:
            raise ValueError(f"{folder / 'reference.json'} lacks {key}: {remedy}")
    if description["data_hash"] != data_hash:
        raise ValueError(
            f"{folder} was made of data {description['data_hash'][:12]}, not of {data_hash[:12]}: {remedy}"
        )
    extractor = load_extractor(folder)
    if extractor.digest != description["extractor_digest"]:
        raise ValueError(f"{folder} holds the statistics of another extractor: {remedy}")
    return Reference(
        extractor,
        load_classifier(folder / "classifier.safetensors"),
        load_statistics(folder / "statistics.safetensors"),
        description,
    )


def train_classifier(
    images: ImageSplit,
    shape: tuple[int, int, int],
    num_classes: int,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    device: torch.device,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> ImageClassifier:
    """Train the class network on the train split: AdamW, a learning rate that falls to 0, shifts of up to a sixteenth."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ImageClassifier(image_size=shape[0], image_channels=shape[2], num_classes=num_classes)
    network = network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2, fused=True)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    reach = max(shape[0] // 16, 1)
    losses: list[Tensor] = []
    for step in range(1, steps + 1):
        pixels, labels = images.gather(rng.integers(0, len(images), size=batch_size))
        shifts = rng.integers(-reach, reach + 1, size=2)
        pixels = _shift(pixels.to(device), int(shifts[0]), int(shifts[1]))
        loss = F.cross_entropy(network(pixels)[1], labels.to(device), label_smoothing=0.05)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay.step()
        losses.append(loss.detach())
        if step % 20 == 0 or step == steps:
            on_step(step, float(torch.stack(losses).mean()))
            losses.clear()
    return network.eval().requires_grad_(False)


@torch.inference_mode()
def accuracy(classifier: ImageClassifier, images: ImageSplit, device: torch.device) -> float:
    """Share of a split's images that the class network names rightly."""
    right = sum(
        int((classifier(pixels.to(device))[1].argmax(dim=1).cpu() == labels).sum())
        for pixels, labels in images.batches(FEATURE_BATCH)
    )
    return right / len(images)


def split_statistics(
    extractor: FeatureExtractor,
    images: ImageSplit,
    device: torch.device,
    on_batch: Callable[[int], None] = lambda n: None,
) -> GaussianStatistics:
    """Statistics of a whole split's features, merged batch by batch."""

    def parts() -> Iterator[GaussianStatistics]:
        for pixels, _ in images.batches(FEATURE_BATCH):
            yield GaussianStatistics.from_features(extractor(pixels.to(device)).double().cpu().numpy())
            on_batch(len(pixels))

    return merge_statistics(parts())


def save_statistics(statistics: Mapping[str, GaussianStatistics], path: Path) -> None:
    """Write named statistics as float64 tensors."""
    tensors: dict[str, np.ndarray] = {}
    for name, part in statistics.items():
        tensors[f"{name}.n"] = np.asarray([part.n], dtype=np.int64)
        tensors[f"{name}.mean"] = np.ascontiguousarray(part.mean)
        tensors[f"{name}.scatter"] = np.ascontiguousarray(part.scatter)
    save_file(tensors, path)


def load_statistics(path: Path) -> dict[str, GaussianStatistics]:
    """What `save_statistics` wrote. Raises ValueError where the file is missing or damaged."""
    try:
        tensors = load_file(path)
        names = [key.removesuffix(".n") for key in tensors if key.endswith(".n")]
        return {
            n: GaussianStatistics(int(tensors[f"{n}.n"][0]), tensors[f"{n}.mean"], tensors[f"{n}.scatter"])
            for n in names
        }
    except (OSError, SafetensorError, KeyError, IndexError) as error:
        raise ValueError(f"cannot read {path} ({error}): run the stage that writes it again") from None


def save_class_network(classifier: ImageClassifier, folder: Path) -> str:
    """Write the class network; returns its digest."""
    path = folder / "classifier.safetensors"
    save_classifier(classifier, path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _shift(pixels: Tensor, down: int, right: int) -> Tensor:
    """Images moved by whole pixels, the border repeated."""
    rows = (torch.arange(pixels.shape[2], device=pixels.device) - down).clamp(0, pixels.shape[2] - 1)
    columns = (torch.arange(pixels.shape[3], device=pixels.device) - right).clamp(0, pixels.shape[3] - 1)
    return pixels[:, :, rows][:, :, :, columns]
