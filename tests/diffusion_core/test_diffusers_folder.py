"""Folders of whole diffusers pipelines: read without diffusers, and against diffusers' own pipelines."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffusion_core.artifact import DiffusionModel
from diffusion_core.diffusers_folder import read_diffusers_pipeline, scheduler_from_diffusers
from diffusion_core.networks.conditioning import ConditionSpec
from diffusion_core.networks.diffusers_weights import unet_to_diffusers
from diffusion_core.networks.unet import UNet
from diffusion_core.noise import NoiseSource
from diffusion_core.schedules import make_schedule

STEM = "diffusion_pytorch_model"
DDPM = {"_class_name": "DDPMScheduler", "num_train_timesteps": 100}
DDIM = {"_class_name": "DDIMScheduler", "num_train_timesteps": 100}


def peer():
    return pytest.importorskip("diffusers", reason="diffusers is in the bench group: uv sync --group bench")


def random_unet(**options):
    torch.manual_seed(0)
    network = UNet(
        **{
            "condition": ConditionSpec(),
            "image_size": 8,
            "image_channels": 1,
            "channels": 8,
            "multipliers": (1, 2),
            "num_res_blocks": 1,
            "attention_sizes": (),
            "groups": 4,
            **options,
        }
    ).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network


def write_pipeline(folder, scheduler, network=None, *, kind=None, flat=False, variant=None, index=None):
    """Write the folder that ``save_pretrained`` of a pipeline writes, or with ``flat`` that of the first releases."""
    config, weights = unet_to_diffusers(random_unet() if network is None else network)
    kind = kind or scheduler["_class_name"].replace("Scheduler", "Pipeline")
    parts = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", scheduler["_class_name"]]}
    content = {"_class_name": kind, "_diffusers_version": "0.42.1", **parts, **(index or {})}
    unet, settings = (folder, folder) if flat else (folder / "unet", folder / "scheduler")
    for path in (unet, settings):
        path.mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps(content))
    (settings / "scheduler_config.json").write_text(json.dumps(scheduler))
    (unet / "config.json").write_text(json.dumps(config))
    save_file(weights, unet / f"{STEM}{'' if variant is None else '.' + variant}.safetensors")
    return folder


def betas_of(schedule):
    return schedule.betas().numpy()


def cosine_betas(steps):
    curve = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - curve[1:] / curve[:-1], 0.999)


def test_betas_are_read_from_the_scheduler_and_not_scaled_to_its_length():
    def read(**change):
        return betas_of(scheduler_from_diffusers({**DDPM, **change}).schedule)

    roots = np.linspace(0.00085**0.5, 0.012**0.5, 100)
    sigmoid = 1 / (1 + np.exp(-np.linspace(-6, 6, 100)))
    for betas, expected in (
        (read(), np.linspace(1e-4, 0.02, 100)),
        (read(beta_start=0.01, beta_end=0.3), np.linspace(0.01, 0.3, 100)),
        (read(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012), roots**2),
        (read(beta_schedule="squaredcos_cap_v2"), cosine_betas(100)),
        (read(beta_schedule="sigmoid"), sigmoid * (0.02 - 1e-4) + 1e-4),
        (read(trained_betas=[0.1, 0.2, 0.4], num_train_timesteps=3), [0.1, 0.2, 0.4]),
    ):
        np.testing.assert_allclose(betas, expected, rtol=1e-6)
    rescaled = scheduler_from_diffusers({**DDPM, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"})
    assert rescaled.schedule.has_zero_terminal_snr
    assert rescaled.schedule.alpha_bar(0) == pytest.approx(1 - 1e-4, rel=1e-12)


def test_schedule_of_a_scheduler_is_built_again_from_its_config():
    for change in ({}, {"beta_schedule": "sigmoid"}, {"rescale_betas_zero_snr": True, "prediction_type": "sample"}):
        schedule = scheduler_from_diffusers({**DDIM, "beta_end": 0.1, **change}).schedule
        again = make_schedule(**json.loads(json.dumps(dict(schedule.config))))
        assert torch.equal(again.alphas_cumprod, schedule.alphas_cumprod)


def test_prediction_type_clipping_and_variance_are_read_from_the_scheduler():
    def read(base=DDPM, **change):
        return scheduler_from_diffusers({**base, **change})

    for theirs, ours in (("epsilon", "eps"), ("sample", "x0"), ("v_prediction", "v")):
        assert read(prediction_type=theirs).objective == ours
    assert read().objective == "eps" and read().clip == 1.0
    assert read(clip_sample=False).clip is None and read(clip_sample_range=2.5).clip == 2.5
    assert read(clip_sample=False, thresholding=True).clip == 1.0  # its threshold lies between 1 and 1
    assert read(clip_sample_range=2.5, thresholding=True).clip == 1.0
    assert read().rederive_eps and not read(DDIM).rederive_eps
    assert read().variance == "fixed_small" and read(DDIM).variance is None
    for theirs, ours in (
        ("fixed_small_log", "fixed_small"),
        ("fixed_large", "fixed_large"),
        ("learned_range", "learned"),
    ):
        assert read(variance_type=theirs).variance == ours
    assert read(DDIM, variance_type="learned").variance is None  # a setting that a DDIMScheduler does not have


def test_prediction_type_under_its_first_name_is_read():
    assert scheduler_from_diffusers({**DDPM, "predict_epsilon": False}).objective == "x0"
    assert scheduler_from_diffusers({**DDPM, "predict_epsilon": True}).objective == "eps"
    with pytest.raises(ValueError, match="trained_betas='abc' is not supported"):
        scheduler_from_diffusers({**DDPM, "trained_betas": "abc"})


def test_grid_has_the_spacing_and_the_offset_of_the_scheduler():
    def steps(num_steps, base=DDPM, **change):
        return [t for t, _ in scheduler_from_diffusers({**base, **change}).grid(num_steps)]

    assert steps(5) == [80, 60, 40, 20, 0]
    assert steps(5, steps_offset=1) == [81, 61, 41, 21, 1]
    assert steps(3) == [66, 33, 0]
    assert steps(5, timestep_spacing="trailing", steps_offset=1) == [99, 79, 59, 39, 19]
    assert steps(5, timestep_spacing="linspace") == [99, 74, 50, 25, 0]
    assert steps(1, timestep_spacing="linspace") == [0]
    assert scheduler_from_diffusers(DDIM).grid(4)[-1] == (0, -1)
    ends_at_first = {"set_alpha_to_one": False, "steps_offset": 1}
    assert scheduler_from_diffusers({**DDIM, **ends_at_first}).grid(4) == [(76, 51), (51, 26), (26, 1), (1, 0)]
    assert scheduler_from_diffusers({**DDPM, **ends_at_first}).grid(4)[-1] == (1, -1)  # DDPM has no set_alpha_to_one
    for num_steps in (0, 101, 5.0):
        with pytest.raises(ValueError, match="a whole number from 1 to 100"):
            steps(num_steps)
    with pytest.raises(ValueError, match="steps_offset=1 moves a step of a grid of 100 to 100"):
        steps(100, steps_offset=1)
    with pytest.raises(ValueError, match="set_alpha_to_one=False ends at level 0"):
        steps(5, DDIM, set_alpha_to_one=False)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"_class_name": "PNDMScheduler"}, "scheduler PNDMScheduler is not supported: allowed are DDPMScheduler, DDIM"),
        ({"_class_name": None}, "scheduler None is not supported"),
        ({"prediction_type": "flow_prediction"}, "prediction_type='flow_prediction'"),
        ({"beta_schedule": "laplace"}, "beta_schedule='laplace'"),
        ({"variance_type": "learned"}, "variance_type='learned'"),
        ({"variance_type": "fixed_large_log"}, "variance_type='fixed_large_log'"),
        ({"timestep_spacing": "karras"}, "timestep_spacing='karras'"),
        ({"thresholding": True, "sample_max_value": 1.5}, "sample_max_value=1.5"),
        ({"clip_sample_range": None}, "clip_sample_range=None"),
        ({"clip_sample_range": 0.0}, "clip_sample_range=0.0"),
        (
            {"rescale_betas_zero_snr": True},
            "rescale_betas_zero_snr=True is not supported with prediction_type='epsilon'",
        ),
        ({"num_train_timesteps": 0}, "num_train_timesteps=0"),
        ({"num_train_timesteps": 100.0}, r"num_train_timesteps=100\.0"),
        ({"beta_start": 0.0}, r"beta_start=0\.0"),
        ({"beta_end": "0.02"}, "beta_end='0.02'"),
        ({"beta_end": 1.0}, r"beta_end=1\.0"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas has shape"),
        ({"steps_offset": -1}, "steps_offset=-1"),
        ({"steps_offset": 0.5}, r"steps_offset=0\.5"),
    ],
)
def test_setting_that_cannot_be_expressed_is_refused_by_name(change, named):
    with pytest.raises(ValueError, match=named):
        scheduler_from_diffusers({**DDPM, **change})


def sampled_by_hand(network, scheduler, x, steps, noise, *, ddim):
    """Return the samples of diffusers' step functions, written out again: DDPM fixed_small or DDIM eta 0, prediction eps."""
    betas = torch.linspace(scheduler["beta_start"], scheduler["beta_end"], scheduler["num_train_timesteps"]).double()
    products = torch.cumprod(1 - betas, 0)
    for t, t_prev in zip(steps, [*steps[1:], -1], strict=True):
        a, a_prev = products[t], products[t_prev] if t_prev >= 0 else torch.tensor(1.0).double()
        eps = network(x, torch.full((len(x),), t)).detach()
        x0 = ((x - (1 - a) ** 0.5 * eps) / a**0.5).clamp(
            -scheduler["clip_sample_range"], scheduler["clip_sample_range"]
        )
        if ddim:  # the network's own eps beside the clipped image
            x = a_prev**0.5 * x0 + (1 - a_prev) ** 0.5 * eps
        else:
            beta = 1 - a / a_prev
            x = (a_prev**0.5 * beta * x0 + (a / a_prev) ** 0.5 * (1 - a_prev) * x) / (1 - a)
            x = x + ((1 - a_prev) / (1 - a) * beta) ** 0.5 * noise(t) if t > 0 else x
        x = x.float()
    return x


@pytest.mark.parametrize("flat", [False, True], ids=["subfolders", "first releases"])
@pytest.mark.parametrize("ddim", [False, True], ids=["DDPM", "DDIM"])
def test_pipeline_read_from_a_folder_samples_with_its_scheduler(tmp_path, flat, ddim):
    settings = {**(DDIM if ddim else DDPM), "beta_start": 0.001, "beta_end": 0.2, "clip_sample_range": 0.8}
    network = random_unet()
    pipeline = read_diffusers_pipeline(write_pipeline(tmp_path, settings, network, flat=flat))
    noise = NoiseSource(0).for_samples((1, 8, 8), torch.arange(3))
    expected = sampled_by_hand(network, settings, noise(100), [75, 50, 25, 0], noise, ddim=ddim)
    got = pipeline.sample(noise(100), 4, noise)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)
    assert not pipeline.network.training and pipeline.denoiser().clip == 0.8


def test_ddim_pipeline_samples_with_ddim_whatever_scheduler_its_folder_has(tmp_path):
    settings = {**DDPM, "beta_start": 0.001, "beta_end": 0.2, "clip_sample_range": 0.8, "variance_type": "fixed_large"}
    network = random_unet()
    pipeline = read_diffusers_pipeline(write_pipeline(tmp_path, settings, network, kind="DDIMPipeline"))
    noise = NoiseSource(0).for_samples((1, 8, 8), torch.arange(3))
    expected = sampled_by_hand(network, settings, noise(100), [75, 50, 25, 0], noise, ddim=True)
    torch.testing.assert_close(pipeline.sample(noise(100), 4), expected, atol=2e-5, rtol=0)
    pipeline.sample(noise(100), 4, noise, eta=0.5)


def test_learned_variance_and_classes_of_a_folder_are_used(tmp_path):
    network = random_unet(learned_variance=True, condition=ConditionSpec("class", 3))
    folder = write_pipeline(tmp_path, {**DDPM, "variance_type": "learned_range"}, network)
    pipeline = read_diffusers_pipeline(folder, last_class_is_null=True)
    assert pipeline.network.condition == ConditionSpec("class", 3) and pipeline.denoiser().learned_variance
    noise = NoiseSource(0).for_samples((1, 8, 8), torch.arange(3))
    samples = [
        pipeline.sample(noise(100), 5, noise, condition=torch.tensor(labels)) for labels in ([0, 1, 2], [0, 2, 2])
    ]
    assert samples[0].shape == (3, 1, 8, 8) and not torch.equal(samples[0][1], samples[1][1])
    with pytest.raises(ValueError, match="1 conditions were given for 3 images"):
        pipeline.sample(noise(100), 5, noise, condition=torch.tensor([1]))
    for learned, variance in ((True, "fixed_small"), (False, "learned_range")):
        other = tmp_path / f"{learned}"
        write_pipeline(other, {**DDPM, "variance_type": variance}, network if learned else None)
        with pytest.raises(ValueError, match=f"{variance}.*the two do not belong together"):
            read_diffusers_pipeline(other)
    write_pipeline(tmp_path / "ddim", DDIM, network)
    with pytest.raises(ValueError, match="the two do not belong together"):
        read_diffusers_pipeline(tmp_path / "ddim")


def test_variant_of_a_pipeline_is_read(tmp_path):
    folder = write_pipeline(tmp_path, DDPM, variant="fp16")
    assert read_diffusers_pipeline(folder, variant="fp16").network.config["channels"] == 8
    with pytest.raises(ValueError, match="it has weights for variant='fp16'"):
        read_diffusers_pipeline(folder)


def test_network_and_schedule_of_a_folder_are_saved_as_a_model(tmp_path):
    pipeline = read_diffusers_pipeline(write_pipeline(tmp_path / "theirs", {**DDPM, "beta_end": 0.1}))
    network, scheduler = pipeline.network, pipeline.scheduler
    model = DiffusionModel(
        network,
        {"name": "unet", "condition": network.condition.as_dict(), **network.config},
        scheduler.schedule,
        scheduler.objective,
        network.config["image_size"],
        network.config["image_channels"],
    )
    model.save(tmp_path / "ours")
    again = DiffusionModel.load(tmp_path / "ours")
    assert torch.equal(again.schedule.alphas_cumprod, scheduler.schedule.alphas_cumprod)
    x, t = torch.ones(2, 1, 8, 8), torch.tensor([3, 60])
    torch.testing.assert_close(again.network(x, t, None), network(x, t, None), atol=1e-6, rtol=0)


def test_folder_of_another_pipeline_or_without_a_part_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="holds a StableDiffusionPipeline: allowed are DDPMPipeline and DDIMPipeline"):
        read_diffusers_pipeline(write_pipeline(tmp_path / "kind", DDPM, kind="StableDiffusionPipeline"))
    more = {"vqvae": ["diffusers", "VQModel"]}
    with pytest.raises(ValueError, match="vqvae besides unet and scheduler"):
        read_diffusers_pipeline(write_pipeline(tmp_path / "more", DDPM, index=more))
    absent = {"image_encoder": [None, None]}
    assert read_diffusers_pipeline(write_pipeline(tmp_path / "absent", DDPM, index=absent)).scheduler.clip == 1.0
    with pytest.raises(ValueError, match=r"model_index\.json: No such file"):
        read_diffusers_pipeline(tmp_path / "nothing")
    for part, missing in (("scheduler", "scheduler_config.json"), ("unet", "config.json")):
        folder = write_pipeline(tmp_path / part, DDPM)
        (folder / part / missing).unlink()
        with pytest.raises(ValueError, match=f"cannot read .*{missing}"):
            read_diffusers_pipeline(folder)
        (folder / part / missing).write_text("[]")
        with pytest.raises(ValueError, match=f"{missing} does not hold"):
            read_diffusers_pipeline(folder)


def test_class_of_the_scheduler_is_taken_from_the_index_if_its_settings_lack_it(tmp_path):
    folder = write_pipeline(tmp_path, DDIM)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"num_train_timesteps": 100}))
    assert read_diffusers_pipeline(folder).scheduler.variance is None


def test_sampling_options_that_do_not_belong_to_the_scheduler_are_refused(tmp_path):
    pipeline = read_diffusers_pipeline(write_pipeline(tmp_path, DDPM))
    with pytest.raises(ValueError, match="eta belongs to a DDIMScheduler"):
        pipeline.sample(torch.zeros(1, 1, 8, 8), 4, lambda t: torch.zeros(1, 1, 8, 8), eta=0.5)
    with pytest.raises(ValueError, match="pass noise="):
        pipeline.sample(torch.zeros(1, 1, 8, 8), 4)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
def test_grid_is_that_of_set_timesteps_for_every_number_of_steps(name, spacing):
    for total in (1, 7, 100, 250):
        theirs = getattr(peer(), name)(num_train_timesteps=total, timestep_spacing=spacing)
        ours = scheduler_from_diffusers({**theirs.config, "_class_name": name})
        for num_steps in range(1, total + 1):
            theirs.set_timesteps(num_steps)
            steps = theirs.timesteps.tolist()
            assert [t for t, _ in ours.grid(num_steps)] == steps[:num_steps]
            assert steps[num_steps:] in ([], [-1])  # rounding error of theirs, see `DiffusersScheduler.grid`


PIPELINES = {
    "ddpm": ("DDPM", {}, 100),
    "ddpm fixed_large": ("DDPM", {"variance_type": "fixed_large"}, 20),
    "ddpm v": ("DDPM", {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"}, 20),
    "ddpm x0": ("DDPM", {"prediction_type": "sample", "clip_sample": False, "beta_schedule": "sigmoid"}, 20),
    "ddpm linspace": ("DDPM", {"timestep_spacing": "linspace", "variance_type": "fixed_small_log"}, 17),
    "ddpm learned": ("DDPM", {"variance_type": "learned_range", "trained_betas": [0.01] * 50 + [0.1] * 50}, 20),
    "ddim": ("DDIM", {"clip_sample_range": 0.7}, 20),
    "ddim 30": ("DDIM", {}, 30),
    "ddim thresholding": ("DDIM", {"thresholding": True, "clip_sample": False}, 10),
    "ddim trailing": ("DDIM", {"timestep_spacing": "trailing"}, 20),
    "ddim to the first alpha": ("DDIM", {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False}, 20),
    "ddim zero snr": (
        "DDIM",
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
        10,
    ),
}


@pytest.mark.parametrize("case", PIPELINES)
def test_folder_written_by_diffusers_gives_the_images_of_its_pipeline(case, tmp_path):
    diffusers = peer()
    kind, settings, num_steps = PIPELINES[case]
    learned = settings.get("variance_type") == "learned_range"
    config, weights = unet_to_diffusers(random_unet(learned_variance=learned))
    unet = diffusers.UNet2DModel(**{name: value for name, value in config.items() if name != "_class_name"}).eval()
    unet.load_state_dict(weights)
    options = {"num_train_timesteps": 100, "beta_start": 0.001, "beta_end": 0.15, **settings}
    scheduler = getattr(diffusers, f"{kind}Scheduler")(**options)
    getattr(diffusers, f"{kind}Pipeline")(unet, scheduler).save_pretrained(tmp_path, variant="fp16")
    theirs = getattr(diffusers, f"{kind}Pipeline").from_pretrained(tmp_path, variant="fp16")
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(2, torch.Generator().manual_seed(0), num_inference_steps=num_steps, output_type="np").images
    generator = torch.Generator().manual_seed(0)
    shape = (2, 1, 8, 8)
    x_T = torch.randn(shape, generator=generator)
    ours = read_diffusers_pipeline(tmp_path, variant="fp16")
    images = ours.sample(x_T, num_steps, lambda _: torch.randn(shape, generator=generator))
    shown = (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(shown, expected, atol=3e-4, rtol=0)
    assert float(np.abs(expected - 0.5).max()) > 0.05
