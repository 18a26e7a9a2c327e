"""The Stable Diffusion adapter on a tiny pipeline with random weights, saved and loaded by diffusers."""

from __future__ import annotations

import json

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="needs the extra stable-diffusion: uv sync --group bench")
transformers = pytest.importorskip("transformers", reason="needs the extra stable-diffusion: uv sync --group bench")

from diffusion_core.editing import edit, image_to_image  # noqa: E402
from diffusion_core.grids import grid_from_steps, make_grid  # noqa: E402
from diffusion_core.inversion import (  # noqa: E402
    invert_ddim,
    invert_trajectory,
    optimise_null_condition,
    sample_with_denoisers,
)
from diffusion_core.noise import NoiseSource  # noqa: E402
from diffusion_core.samplers import sample_ddim, sample_dpmpp_2m  # noqa: E402
from diffusion_core.stable_diffusion import StableDiffusion, load_stable_diffusion  # noqa: E402

WORDS = ["a", "cat", "dog", "photo", "of"]


def tiny_tokenizer(folder):
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = [*letters, *(letter + "</w>" for letter in letters)]
    merges = []
    for word in WORDS:
        built = ""
        for i, letter in enumerate(word):
            part = letter + ("</w>" if i == len(word) - 1 else "")
            if built:
                merges.append(f"{built} {part}")
            built += part
            vocabulary.append(built)
    tokens = list(dict.fromkeys([*vocabulary, "<|startoftext|>", "<|endoftext|>"]))
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *dict.fromkeys(merges)]))
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=16)
    assert tokenizer("a photo of a cat").input_ids != tokenizer("a photo of a dog").input_ids
    return tokenizer, len(tokens)


@pytest.fixture(scope="module")
def saved_pipeline(tmp_path_factory):
    """A Stable Diffusion pipeline with random weights, written by `save_pretrained`."""
    torch.manual_seed(0)
    tokenizer_folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer, size = tiny_tokenizer(tokenizer_folder)
    text_encoder = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=size,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=size - 2,
            eos_token_id=size - 1,
            pad_token_id=size - 1,
        )
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
    )
    unet.conv_out.weight.data *= 0.3  # a trained eps changes less from step to step than random weights do
    vae = diffusers.AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=8,
        scaling_factor=0.31,
    )
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )
    pipeline = diffusers.StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    folder = tmp_path_factory.mktemp("stable_diffusion")
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(saved_pipeline) -> StableDiffusion:
    loaded = load_stable_diffusion(saved_pipeline)
    loaded.pipeline.set_progress_bar_config(disable=True)
    return loaded


def latents(seed=0, count=1):
    return NoiseSource(seed).normal((4, 4, 4), torch.arange(count), 1000)


def picture():
    return torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_ddim_gives_the_latents_and_the_image_of_the_pipeline(model, guidance_scale):
    prompt = "a photo of a cat"
    options = {"num_inference_steps": 10, "guidance_scale": guidance_scale, "latents": latents()}
    theirs = model.pipeline(prompt, output_type="latent", **options).images
    grid = grid_from_steps([int(t) for t in model.pipeline.scheduler.timesteps], 1000)
    ours = sample_ddim(model.denoiser(guidance_scale), latents(), grid, condition=model.encode_prompts([prompt]))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    image = model.pipeline(prompt, output_type="pt", **options).images
    torch.testing.assert_close((model.decode_latents(ours) / 2 + 0.5).clamp(0, 1), image, atol=1e-4, rtol=1e-4)


def test_dpm_solver_gives_the_latents_of_the_pipeline(model):
    solver = diffusers.DPMSolverMultistepScheduler.from_config(model.pipeline.scheduler.config)
    pipeline = diffusers.StableDiffusionPipeline(
        **{**model.pipeline.components, "scheduler": solver}, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        "a dog", num_inference_steps=8, guidance_scale=4.0, latents=latents(), output_type="latent"
    ).images
    grid = grid_from_steps([int(t) for t in pipeline.scheduler.timesteps], 1000)
    ours = sample_dpmpp_2m(model.denoiser(4.0), latents(), grid, condition=model.encode_prompts(["a dog"]))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_negative_prompt_gives_the_latents_of_the_pipeline(model):
    options = {"num_inference_steps": 5, "guidance_scale": 5.0, "latents": latents(), "output_type": "latent"}
    theirs = model.pipeline("a cat", negative_prompt="a dog", **options).images
    grid = grid_from_steps([int(t) for t in model.pipeline.scheduler.timesteps], 1000)
    denoiser = model.denoiser(5.0, negative_prompt="a dog")
    ours = sample_ddim(denoiser, latents(), grid, condition=model.encode_prompts(["a cat"]))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_latents_are_scaled_by_the_autoencoders_factor(model):
    vae = model.pipeline.vae
    with torch.no_grad():
        posterior = vae.encode(picture()).latent_dist
        torch.testing.assert_close(model.encode_images(picture()), 0.31 * posterior.mean)
        drawn = model.encode_images(picture(), latents())
        torch.testing.assert_close(drawn, 0.31 * (posterior.mean + posterior.std * latents()))
        torch.testing.assert_close(
            model.decode_latents(model.encode_images(picture())), vae.decode(posterior.mean).sample
        )


def test_inversion_reconstructs_the_image_and_null_text_optimisation_does_so_under_guidance(model):
    grid = make_grid("trailing", 1000, 6)
    condition = model.encode_prompts(["a photo of a cat"])
    x0 = model.encode_images(picture())
    bare, guided = model.denoiser(1.0), model.denoiser(7.5)
    exact = invert_ddim(bare, x0, grid, condition=condition, fixed_point_steps=12)
    torch.testing.assert_close(sample_ddim(bare, exact, grid, condition=condition), x0, atol=1e-3, rtol=1e-3)
    pivot = invert_trajectory(bare, x0, grid, condition=condition)
    top = pivot[grid[0][0]]
    untuned = float((sample_ddim(guided, top, grid, condition=condition) - x0).square().mean())
    tuned = optimise_null_condition(guided, pivot, grid, condition, inner_steps=10, learning_rate=0.1)
    followed = float((sample_with_denoisers(tuned, top, grid, condition=condition) - x0).square().mean())
    assert followed < 0.5 * untuned, (followed, untuned)
    assert all(parameter.grad is None for parameter in model.pipeline.unet.parameters())


def test_edit_changes_the_image_with_the_prompt_and_strength_controls_image_to_image(model):
    grid = make_grid("trailing", 1000, 6)
    cat, dog = model.encode_prompts(["a cat"]), model.encode_prompts(["a dog"])
    x0 = model.encode_images(picture())
    same = edit(model.denoiser(1.0), x0, grid, cat, cat, fixed_point_steps=12)
    changed = edit(model.denoiser(1.0), x0, grid, cat, dog, fixed_point_steps=12)
    torch.testing.assert_close(same, x0, atol=1e-3, rtol=1e-3)
    assert float((changed - x0).abs().max()) > 3 * float((same - x0).abs().max())
    noise = NoiseSource(0).for_samples((4, 4, 4), torch.arange(1))
    weak, strong = (
        image_to_image(model.denoiser(3.0), x0, grid, noise, strength=strength, condition=cat)
        for strength in (0.1, 0.9)
    )
    assert float((weak - x0).abs().mean()) < float((strong - x0).abs().mean())


def test_schedule_and_objective_are_those_of_the_pipeline(model):
    assert torch.equal(model.schedule.alphas_cumprod, model.pipeline.scheduler.alphas_cumprod.double())
    assert model.objective == "eps"


def test_other_pipelines_are_refused_with_the_remedy(tmp_path, model):
    with pytest.raises(ValueError, match="holds no Stable Diffusion pipeline"):
        load_stable_diffusion(tmp_path / "nothing", local_files_only=True)
    with pytest.raises(ValueError, match="flow-matching"):
        flow = diffusers.FlowMatchEulerDiscreteScheduler()
        StableDiffusion(
            diffusers.StableDiffusionPipeline(
                **{**model.pipeline.components, "scheduler": flow}, requires_safety_checker=False
            )
        )


def test_pipeline_in_bfloat16_takes_float32_latents(saved_pipeline):
    half = load_stable_diffusion(saved_pipeline, dtype=torch.bfloat16)
    condition = half.encode_prompts("a cat")
    assert condition.shape[0] == 1 and condition.dtype == torch.bfloat16
    sample = sample_ddim(half.denoiser(3.0), latents(), make_grid("trailing", 1000, 3), condition=condition)
    assert sample.dtype == torch.float32 and torch.isfinite(sample).all()
    assert half.decode_latents(half.encode_images(picture())).shape == (1, 3, 8, 8)


def test_noise_of_another_shape_than_the_latents_is_refused(model):
    with pytest.raises(ValueError, match="noise has shape"):
        model.encode_images(picture().expand(3, -1, -1, -1), noise=latents())


def test_bad_input_is_refused_with_the_remedy(model):
    grid = make_grid("trailing", 1000, 2)
    with pytest.raises(ValueError, match="one prompt embedding per image"):
        sample_ddim(model.denoiser(1.0), latents(), grid)
    with pytest.raises(ValueError, match="1 conditions were given for 2 images"):
        sample_ddim(model.denoiser(1.0), latents(count=2), grid, condition=model.encode_prompts(["a cat"]))
    with pytest.raises(ValueError, match="batch of floats"):
        model.encode_images(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        model.encode_images(torch.zeros(1, 1, 8, 8))
