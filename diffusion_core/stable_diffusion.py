"""A diffusers Stable Diffusion pipeline as a denoiser: every sampler, inversion and edit of this package runs on it.

Needs the optional extra ``stable-diffusion`` (diffusers and transformers), imported only when a pipeline is loaded.
Images are (B, 3, H, W) in [-1, 1]; samplers work on the autoencoder's latents; conditions are prompt embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_core.checks import check_images
from diffusion_core.denoiser import Denoiser
from diffusion_core.guidance import ClassifierFreeGuidance, Interval
from diffusion_core.schedules import NoiseSchedule, given_schedule

OBJECTIVES = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
"""diffusers' names of the objectives, mapped to ours."""


@dataclass(frozen=True)
class StableDiffusion:
    """A loaded ``StableDiffusionPipeline``, used through the interfaces of this package.

    Raises ValueError if the pipeline's scheduler has no discrete alpha-bar (flow matching) or an unknown prediction type.
    """

    pipeline: Any

    def __post_init__(self) -> None:
        if getattr(self.pipeline.scheduler, "alphas_cumprod", None) is None:
            raise ValueError(
                f"{type(self.pipeline.scheduler).__name__} has no alphas_cumprod: this adapter runs Stable Diffusion 1 and 2 "
                "pipelines, not flow-matching ones"
            )
        if self.pipeline.scheduler.config.prediction_type not in OBJECTIVES:
            raise ValueError(f"unknown prediction_type {self.pipeline.scheduler.config.prediction_type!r}")

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule of the pipeline's scheduler, with its float32 values.

        The step to the clean image has alpha-bar 1, as everywhere in this package; a diffusers scheduler with
        ``set_alpha_to_one`` off (that of Stable Diffusion 1) ends at the first step's alpha-bar instead.
        """
        return given_schedule(self.pipeline.scheduler.alphas_cumprod)

    @property
    def objective(self) -> str:
        """Objective of the UNet: eps, x0 or v."""
        return OBJECTIVES[self.pipeline.scheduler.config.prediction_type]

    def network(self, x_t: Tensor, t: Tensor, condition: Any, self_condition: Tensor | None = None) -> Tensor:
        """Call the UNet. x_t: (B, C, h, w) latents; condition: (B, tokens, dim) prompt embeddings. Returns (B, C, h, w).

        Both are cast to the UNet's dtype. Raises ValueError unless there is one embedding per image.
        """
        if not isinstance(condition, Tensor) or condition.ndim != 3 or len(condition) != len(x_t):
            got = tuple(condition.shape) if isinstance(condition, Tensor) else type(condition).__name__
            raise ValueError(
                f"Stable Diffusion needs one prompt embedding per image ({len(x_t)}), got {got}: see encode_prompts"
            )
        dtype = self.pipeline.unet.dtype
        return self.pipeline.unet(x_t.to(dtype), t, encoder_hidden_states=condition.to(dtype), return_dict=False)[0]

    def denoiser(
        self,
        guidance_scale: float = 7.5,
        *,
        negative_prompt: str = "",
        rescale: float = 0.0,
        interval: Interval | None = None,
    ) -> Denoiser:
        """Return a denoiser of latents, guided away from ``negative_prompt``; not clipped, because latents have no range.

        Only the alpha-bars and the prediction type of the pipeline's scheduler are used; its clipping, spacing and offset are not.
        """
        if guidance_scale == 1.0:
            return Denoiser(self.network, self.schedule, self.objective, clip=None)
        null = self.encode_prompts([negative_prompt])
        guided = ClassifierFreeGuidance(self.network, null, guidance_scale, rescale, interval)
        return Denoiser(guided, self.schedule, self.objective, clip=None)

    @torch.no_grad()
    def encode_prompts(self, prompts: str | Sequence[str]) -> Tensor:
        """Return (B, tokens, dim) embeddings from the pipeline's tokenizer and text encoder: the condition of `network`."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        return self.pipeline.encode_prompt(prompts, self.pipeline.unet.device, 1, False)[0]

    @torch.no_grad()
    def encode_images(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Encode (B, 3, H, W) images in [-1, 1] as (B, C, h, w) latents, scaled by the autoencoder's factor (0.18215 in SD 1).

        Returns the mean of the autoencoder's posterior, or with ``noise`` ((B, C, h, w) standard normal) a draw from it.
        Raises ValueError if the images are not floats or do not have 3 channels, or noise does not have the latents' shape.
        """
        check_images(images, "images")
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"the autoencoder takes images (B, 3, H, W), got {tuple(images.shape)}")
        posterior = self.pipeline.vae.encode(images.to(self.pipeline.vae.dtype), return_dict=False)[0]
        if noise is not None and noise.shape != posterior.mean.shape:
            raise ValueError(
                f"noise has shape {tuple(noise.shape)}, but the latents have {tuple(posterior.mean.shape)}"
            )
        latents = posterior.mean if noise is None else posterior.mean + posterior.std * noise
        return (latents - self._shift) * self.pipeline.vae.config.scaling_factor

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Decode (B, C, h, w) latents to (B, 3, H, W) images, roughly in [-1, 1]: the inverse of `encode_images`."""
        unscaled = latents / self.pipeline.vae.config.scaling_factor + self._shift
        return self.pipeline.vae.decode(unscaled.to(self.pipeline.vae.dtype), return_dict=False)[0]

    @property
    def _shift(self) -> float:
        return getattr(self.pipeline.vae.config, "shift_factor", None) or 0.0


def load_stable_diffusion(
    source: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, **options: Any
) -> StableDiffusion:
    """Load a pipeline from a local directory or the Hugging Face hub, in evaluation mode, on ``device``.

    ``options`` go to ``StableDiffusionPipeline.from_pretrained`` (revision, variant, local_files_only). Weights are read from
    safetensors only. Raises ImportError without the extra, ValueError if the source holds no such pipeline.
    """
    try:
        from diffusers import StableDiffusionPipeline
    except ImportError as error:
        raise ImportError(
            f"Stable Diffusion needs diffusers and transformers ({error}): install rediffuse[stable-diffusion]"
        ) from error
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            str(source), torch_dtype=dtype, use_safetensors=True, **options
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"{source} holds no Stable Diffusion pipeline: {str(error).splitlines()[0]}") from error
    pipeline.to(device)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.eval().requires_grad_(False)
    return StableDiffusion(pipeline)
