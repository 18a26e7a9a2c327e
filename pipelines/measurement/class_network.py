"""The class network: its training, its accuracy, and the features of real images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_core.metrics.extractors import FeatureExtractor, ImageClassifier, save_classifier
from pipelines.data.shards import ImageSplit
from pipelines.measurement.reference import CLASSIFIER, num_agreeing

FEATURE_BATCH = 250


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
    """Train the class network on the train split: AdamW, a learning rate that falls to 0, shifts of up to a sixteenth.

    shape: (H, W, C) of an image. ``on_step(step, mean loss)`` is called every 20 steps and at the end. Returns the network in
    evaluation mode. Deterministic for a seed on a CPU. Raises ValueError if a loss or a weight is not finite.
    """
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
            mean = float(torch.stack(losses).mean())
            _check_finite(mean, "its loss", step)
            on_step(step, mean)
            losses.clear()
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            _check_finite(float(value.abs().max()), name, steps)
    return network.eval().requires_grad_(False)


@torch.inference_mode()
def accuracy(classifier: ImageClassifier, images: ImageSplit, device: torch.device) -> float:
    """Return the share of a split's images whose label the class network predicts. Raises ValueError if a logit is not finite."""
    right = sum(num_agreeing(classifier, pixels.to(device), labels) for pixels, labels in images.batches(FEATURE_BATCH))
    return right / len(images)


def save_class_network(classifier: ImageClassifier, folder: Path) -> None:
    """Write the class network into artifacts/reference."""
    save_classifier(classifier, folder / CLASSIFIER)


def split_features(extractor: FeatureExtractor, images: ImageSplit, device: torch.device) -> Iterator[np.ndarray]:
    """Yield the (B, D) float32 features of a split's images, in order, batch by batch."""
    for pixels, _ in images.batches(FEATURE_BATCH):
        yield extractor(pixels.to(device)).cpu().numpy()


def _check_finite(value: float, name: str, step: int) -> None:
    if not math.isfinite(value):
        raise ValueError(
            f"the class network diverged: {name} is not finite at step {step}; try another reference.classifier_batch_size, "
            "reference.classifier_steps or seed"
        )


def _shift(pixels: Tensor, down: int, right: int) -> Tensor:
    """Return the images moved by whole pixels, with the border repeated."""
    rows = (torch.arange(pixels.shape[2], device=pixels.device) - down).clamp(0, pixels.shape[2] - 1)
    columns = (torch.arange(pixels.shape[3], device=pixels.device) - right).clamp(0, pixels.shape[3] - 1)
    return pixels[:, :, rows][:, :, :, columns]
