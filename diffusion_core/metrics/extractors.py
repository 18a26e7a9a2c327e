"""Feature extractors: uint8 images to feature vectors. The name of a metric includes the name of its extractor."""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffusion_core.networks.blocks import group_norm
from diffusion_core.storage import file_sha256, read_json, write_json

INCEPTION = "inception-v3-compat"
INCEPTION_SHA256_PREFIX = "6726825d"
"""torch-fidelity names its weights file by the first digits of the file's SHA-256."""


class ImageClassifier(nn.Module):
    """A small convolutional classifier of uint8 images; its last hidden layer gives the features.

    images: (B, C, H, W) uint8. `forward` returns (features (B, feature_dim), logits (B, num_classes)), float32.
    """

    def __init__(
        self, *, image_size: int, image_channels: int, num_classes: int, channels: int = 32, feature_dim: int = 64
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "image_size": image_size,
            "image_channels": image_channels,
            "num_classes": num_classes,
            "channels": channels,
            "feature_dim": feature_dim,
        }
        layers: list[nn.Module] = []
        width, size = image_channels, image_size
        for out in (channels, 2 * channels, 4 * channels):
            layers += [nn.Conv2d(width, out, 3, padding=1), group_norm(out, 8), nn.ReLU()]
            if size >= 4:
                layers.append(nn.MaxPool2d(2))
                size //= 2
            width = out
        self.body = nn.Sequential(*layers)
        self.hidden = nn.Linear(width * 4, feature_dim)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(feature_dim, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = images.to(torch.float32) / 127.5 - 1.0
        x = x.contiguous(memory_format=torch.channels_last)
        features = F.relu(self.hidden(_mean_of_quarters(self.body(x)).flatten(1)))
        return features, self.head(self.dropout(features))


def _mean_of_quarters(x: Tensor) -> Tensor:
    """Return adaptive_avg_pool2d(x, 2), (B, C, 2, 2). The gradient of PyTorch's own differs from run to run on a GPU."""
    height, width = x.shape[-2:]
    rows = (slice(0, -(-height // 2)), slice(height // 2, height))
    columns = (slice(0, -(-width // 2)), slice(width // 2, width))
    means = [x[..., row, column].mean(dim=(-2, -1)) for row in rows for column in columns]
    return torch.stack(means, dim=-1).unflatten(-1, (2, 2))


def save_classifier(classifier: ImageClassifier, path: Path) -> None:
    """Write the classifier's weights, with its configuration in the file's metadata."""
    weights = {name: value.contiguous() for name, value in classifier.state_dict().items()}
    save_file(weights, path, metadata={"classifier": json.dumps(classifier.config)})


def load_classifier(path: Path) -> ImageClassifier:
    """Read a classifier that `save_classifier` wrote, in evaluation mode. Raises ValueError if the file does not hold one."""
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            config = json.loads((file.metadata() or {})["classifier"])
        classifier = ImageClassifier(**config)
        classifier.load_state_dict(load_file(path))
    except (OSError, SafetensorError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} does not hold an image classifier: {error}") from None
    return classifier.eval().requires_grad_(False)


class FeatureExtractor:
    """Map images to features: ``extractor(images)`` takes (B, C, H, W) uint8 and returns (B, D) float32.

    ``name`` identifies the network and ``digest`` its weights; figures are comparable only if both are equal.
    """

    def __init__(self, name: str, digest: str, network: nn.Module) -> None:
        self.name = name
        self.digest = digest
        self.network = network.eval().requires_grad_(False)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        return self._outputs(images)[0].float()

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        """Return the (B, classes) float32 logits of the network, for the Inception score."""
        return self._outputs(images)[1].float()

    def _outputs(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return (features, logits). Raises ValueError unless ``images`` is (B, C, H, W) uint8."""
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(
                f"a feature extractor takes uint8 images (B, C, H, W), got {images.dtype} {tuple(images.shape)}"
            )
        if self.name == INCEPTION and images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        return self.network(images)

    def to(self, device: torch.device) -> FeatureExtractor:
        self.network.to(device)
        return self


def import_inception_weights(weights_path: Path | None, sha256: str | None) -> dict[str, Tensor]:
    """Return the weights of torch-fidelity's Inception: downloaded if ``weights_path`` is None, otherwise read from that file.

    The file's SHA-256 is checked before it is read. None stands for the hash of torch-fidelity's release.
    Raises ValueError if the file is missing, its hash differs, or the download fails.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    if weights_path is None:
        try:
            return torch.hub.load_state_dict_from_url(
                URL_INCEPTION_V3, progress=True, check_hash=True, weights_only=True
            )
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"the Inception weights could not be downloaded ({error}): download {URL_INCEPTION_V3} on another "
                "machine and give the path of the file and its SHA-256"
            ) from None
    try:
        content = weights_path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {weights_path}: {error.strerror}") from None
    digest = hashlib.sha256(content).hexdigest()
    if (sha256 is None and not digest.startswith(INCEPTION_SHA256_PREFIX)) or (
        sha256 is not None and digest != sha256.lower()
    ):
        expected = sha256 or f"{INCEPTION_SHA256_PREFIX}..."
        raise ValueError(
            f"{weights_path} has SHA-256 {digest}, expected {expected}: the file is damaged, or it is another file"
        )
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def build_inception(weights: Mapping[str, Tensor]) -> nn.Module:
    """Build torch-fidelity's Inception with these weights: it returns the 2048-dimensional pool features and the logits.

    Raises ValueError if the weights do not fit.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with tempfile.TemporaryDirectory() as folder:  # the constructor takes only a file of torch.save
        path = Path(folder) / "weights.pth"
        torch.save(dict(weights), path)
        try:
            return FeatureExtractorInceptionV3(
                INCEPTION, ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
            )
        except RuntimeError as error:
            raise ValueError(f"these are not the weights of {INCEPTION}: {str(error).splitlines()[0]}") from None


def save_extractor(folder: Path, name: str, weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> str:
    """Write extractor.safetensors and extractor.json into ``folder``. Returns the SHA-256 of the weights file."""
    path = folder / "extractor.safetensors"
    save_file({key: value.contiguous() for key, value in weights.items()}, path)
    digest = file_sha256(path)
    write_json(folder / "extractor.json", {"name": name, "digest": digest, "config": dict(config)})
    return digest


def load_extractor(folder: Path) -> FeatureExtractor:
    """Read the extractor that `save_extractor` wrote. Raises ValueError if a file is missing or the two do not match."""
    description = read_json(folder / "extractor.json")
    path = folder / "extractor.safetensors"
    try:
        digest = file_sha256(path)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    if digest != description.get("digest"):
        raise ValueError(
            f"{path} has SHA-256 {digest}, but extractor.json names {description.get('digest')}: one of the two was changed"
        )
    network: nn.Module
    try:
        weights = load_file(path)
        if description["name"] == INCEPTION:
            network = build_inception(weights)
        else:
            network = ImageClassifier(**description["config"])
            network.load_state_dict(weights)
    except (SafetensorError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{folder} does not hold a feature extractor: {error}") from None
    return FeatureExtractor(description["name"], digest, network)


def register_with_torch_fidelity(extractor: FeatureExtractor) -> str:
    """Register ``extractor`` with torch-fidelity. Returns the name to pass as ``feature_extractor=`` to its functions.

    It has the layers "features" (for FID, KID, precision and recall) and "logits" (for the Inception score). The name
    contains the digest of the weights, because torch-fidelity caches statistics by name: other weights under the same name
    would get stale statistics. An extractor that is already registered is kept.
    """
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

    name = f"{extractor.name}-{extractor.digest[:16]}"
    if name in FEATURE_EXTRACTORS_REGISTRY:
        return name
    layers = ("features", "logits")

    class Registered(FeatureExtractorBase):
        def __init__(self, name: str, features_list: list[str], **options: Any) -> None:
            super().__init__(name, features_list)
            self.network = extractor.network

        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            outputs = dict(zip(layers, extractor._outputs(images)))
            return tuple(outputs[layer].float() for layer in self.features_list)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return layers

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "logits" if metric == "isc" else "features"

        @staticmethod
        def can_be_compiled() -> bool:
            return True

        @staticmethod
        def get_dummy_input_for_compile() -> Tensor:
            config = getattr(extractor.network, "config", {"image_channels": 3, "image_size": 299})
            shape = (1, config["image_channels"], config["image_size"], config["image_size"])
            return torch.zeros(shape, dtype=torch.uint8)

    register_feature_extractor(name, Registered)
    return name
