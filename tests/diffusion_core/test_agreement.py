"""Agreement with independent implementations, diffusers' schedulers and denoising-diffusion-pytorch, to 1e-5.

Every case returns (ours, theirs) on the same inputs; samplers return the image after every step. To print the table:
``.uv/bin/uv run --group bench python -m tests.diffusion_core.test_agreement``
"""

from __future__ import annotations

import contextlib
import functools
import io
import math

import pytest
import torch

from diffusion_core.bound_terms import discretised_log_likelihood
from diffusion_core.denoiser import Denoiser, threshold_dynamically
from diffusion_core.grids import grid_from_steps, make_grid
from diffusion_core.inversion import invert_ddim
from diffusion_core.losses import training_loss
from diffusion_core.objectives import OBJECTIVES
from diffusion_core.posterior import posterior
from diffusion_core.samplers import sample_ddim, sample_ddpm, sample_dpmpp_2m, sample_dpmpp_2m_sde
from diffusion_core.schedules import given_schedule, make_schedule
from tests.diffusion_core.oracle import tilted_gaussian

NEEDED = "the bench dependency group is not installed: uv sync --group bench"
TOLERANCE = 1e-5
SHAPE = (3, 2, 4, 4)
PREDICTION_TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
BETAS = {
    "linear": ("linear", 1e-4, 0.02),
    "scaled_linear": ("scaled_linear", 0.00085, 0.012),
    "cosine": ("squaredcos_cap_v2", 1e-4, 0.02),
}


def peer(module: str, name: str):
    return getattr(pytest.importorskip(module, reason=NEEDED), name)


def network(x_t, t, *_, **__):
    """Return a nonlinear output that differs at each step and is large enough to be clipped."""
    phase = t.view(-1, 1, 1, 1).to(x_t.dtype) / 300.0
    return 0.8 * torch.sin(2.0 * x_t + phase) + 0.3 * x_t


def start(seed=0):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def noise_in_order(seed=1):
    """Return a noise function that gives both sides the same numbers in the order of the calls."""
    generator = torch.Generator().manual_seed(seed)
    return lambda _step: torch.randn(SHAPE, generator=generator)


def in_float64(case):
    """Run both sides in float64, so that rounding does not add up over many steps; the peers' tables stay float32."""

    @functools.wraps(case)
    def run(*arguments, **options):
        former = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            return case(*arguments, **options)
        finally:
            torch.set_default_dtype(former)

    return run


def scheduler_of(name, schedule="linear", objective="eps", **options):
    beta_schedule, beta_start, beta_end = BETAS[schedule]
    scheduler = peer("diffusers", name)(
        num_train_timesteps=1000,
        beta_schedule=beta_schedule,
        beta_start=beta_start,
        beta_end=beta_end,
        prediction_type=PREDICTION_TYPES[objective],
        **options,
    )
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(torch.get_default_dtype())
    return scheduler


def run_scheduler(scheduler, num_steps, x, network=network, **options):
    """Run diffusers' loop, set_timesteps and then step, and return the image after each step. Call options that are functions."""
    scheduler.set_timesteps(num_steps)
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    images = []
    for t in scheduler.timesteps:
        output = network(x, torch.full((x.shape[0],), int(t)))
        x = scheduler.step(output, t, x, **{k: v() if callable(v) else v for k, v in options.items()}).prev_sample
        images.append(x)
    return torch.stack(images)


def trajectory(sampler, *arguments, **options):
    """Return the image after each step of one of our samplers."""
    images = []
    sampler(*arguments, callback=lambda step: images.append(step.x), **options)
    return torch.stack(images)


@in_float64
def ddim(spacing, clip, rederive, eta, objective, schedule, num_steps=50, percentile=None):
    scheduler = scheduler_of(
        "DDIMScheduler",
        schedule,
        objective,
        timestep_spacing=spacing,
        clip_sample=clip and percentile is None,
        thresholding=percentile is not None,
        dynamic_thresholding_ratio=percentile or 0.995,
        sample_max_value=1e6 if percentile else 1.0,
    )
    noise = noise_in_order()
    theirs = run_scheduler(
        scheduler,
        num_steps,
        start(),
        eta=eta,
        use_clipped_model_output=rederive,
        variance_noise=(lambda: noise(0)) if eta else None,
    )
    denoiser = Denoiser(
        network,
        given_schedule(scheduler.alphas_cumprod),
        objective,
        clip=1.0 if clip else None,
        rederive_eps=rederive,
        dynamic_percentile=percentile,
    )
    grid = make_grid(spacing, 1000, num_steps)
    return trajectory(sample_ddim, denoiser, start(), grid, noise_in_order(), eta=eta), theirs


@in_float64
def ddpm(spacing, variance, clip, objective, schedule, num_steps=50):
    kind = "learned_range" if variance == "learned" else variance
    scheduler = scheduler_of(
        "DDPMScheduler", schedule, objective, timestep_spacing=spacing, variance_type=kind, clip_sample=clip
    )

    def maybe_learned(x, t, *_, **__):
        output = network(x, t)
        return torch.cat([output, torch.tanh(3 * x)], dim=1) if variance == "learned" else output

    theirs = run_scheduler(scheduler, num_steps, start(), maybe_learned, generator=torch.Generator().manual_seed(1))
    denoiser = Denoiser(
        maybe_learned,
        given_schedule(scheduler.alphas_cumprod),
        objective,
        clip=1.0 if clip else None,
        learned_variance=variance == "learned",
    )
    grid = make_grid(spacing, 1000, num_steps)
    return trajectory(sample_ddpm, denoiser, start(), grid, noise_in_order(), variance=variance), theirs


def dpmpp(spacing, kind, objective, schedule, num_steps=20, percentile=None):
    scheduler = scheduler_of(
        "DPMSolverMultistepScheduler",
        schedule,
        objective,
        timestep_spacing=spacing,
        algorithm_type=kind,
        solver_order=2,
        thresholding=percentile is not None,
        dynamic_thresholding_ratio=percentile or 0.995,
        sample_max_value=1e6 if percentile else 1.0,
    )
    noise = noise_in_order()
    options = {"variance_noise": lambda: noise(0)} if "sde" in kind else {}
    theirs = run_scheduler(scheduler, num_steps, start(), **options)
    grid = grid_from_steps([int(t) for t in scheduler.timesteps], 1000)
    denoiser = Denoiser(
        network,
        given_schedule(scheduler.alphas_cumprod),
        objective,
        clip=1.0 if percentile else None,
        rederive_eps=False,
        dynamic_percentile=percentile,
    )
    sampler = sample_dpmpp_2m_sde if "sde" in kind else sample_dpmpp_2m
    return trajectory(sampler, denoiser, start(), grid, noise_in_order()), theirs


@in_float64
def ddim_inverse(spacing, clip, objective, schedule, num_steps=50):
    scheduler = scheduler_of("DDIMInverseScheduler", schedule, objective, timestep_spacing=spacing, clip_sample=clip)
    x0 = start().clamp(-1, 1)
    theirs = run_scheduler(scheduler, num_steps, x0)
    denoiser = Denoiser(
        network, given_schedule(scheduler.alphas_cumprod), objective, clip=1.0 if clip else None, rederive_eps=False
    )
    return trajectory(invert_ddim, denoiser, x0, make_grid(spacing, 1000, num_steps)), theirs


class PeerNetwork(torch.nn.Module):
    """The network with the interface of denoising-diffusion-pytorch."""

    def __init__(self, learned=False, self_condition=False):
        super().__init__()
        self.channels, self.out_dim, self.self_condition = 2, 4 if learned else 2, self_condition
        self.random_or_learned_sinusoidal_cond = False

    def forward(self, x, t, x_self_cond=None, *_):
        output = network(x, t)
        if x_self_cond is not None:
            output = output + 0.2 * x_self_cond
        return torch.cat([output, torch.tanh(3 * x)], dim=1) if self.out_dim == 4 else output


def ddp_model(objective="eps", schedule="linear", **options):
    model = PeerNetwork(self_condition=options.pop("self_condition", False))
    name = {"eps": "pred_noise", "x0": "pred_x0", "v": "pred_v"}[objective]
    gaussian = peer("denoising_diffusion_pytorch", "GaussianDiffusion")
    return gaussian(
        model, image_size=4, timesteps=1000, objective=name, beta_schedule=schedule, auto_normalize=False, **options
    )


def largest_difference(ours, theirs):
    """Return the largest |ours - theirs| / (1 + largest |theirs| of the same step)."""
    assert ours.shape == theirs.shape
    apart, size = ((x.abs().reshape(len(x), -1).amax(dim=1)) for x in (ours - theirs, theirs))
    return float((apart / (1 + size)).max())


def loss_inputs():
    t = torch.tensor([3, 480, 990])
    return start(3).clamp(-1, 1), t, start(4)


def ddp_loss(objective, schedule, min_snr, self_condition=False):
    model = ddp_model(objective, schedule, min_snr_loss_weight=min_snr, self_condition=self_condition)
    x0, t, eps = loss_inputs()
    model.random = None
    with contextlib.ExitStack() as stack:
        if self_condition:
            module = pytest.importorskip("denoising_diffusion_pytorch.denoising_diffusion_pytorch", reason=NEEDED)
            coin, module.random = module.random, lambda: 0.0
            stack.callback(setattr, module, "random", coin)
        theirs = model.p_losses(x0, t, noise=eps.clone(), loss_reduction="none")

    def ours(x_t, t, condition, self_condition=None):
        return model.model(x_t, t, self_condition)

    loss = training_loss(
        ours,
        make_schedule(schedule),
        objective,
        "min_snr" if min_snr else "snr",
        x0,
        t,
        eps,
        self_condition=self_condition,
        self_condition_clip=None,
    )
    # an SNR of 1e3 or more multiplies the x0 loss: compare relative to the weight
    scale = model.loss_weight[t].clamp(min=1.0)
    return loss / scale, theirs / scale


def ddp_hybrid_loss():
    learned = peer("denoising_diffusion_pytorch.learned_gaussian_diffusion", "LearnedGaussianDiffusion")
    model = learned(
        PeerNetwork(learned=True),
        1e-3,
        image_size=4,
        timesteps=1000,
        objective="pred_noise",
        beta_schedule="linear",
        auto_normalize=False,
    )
    x0, t, eps = loss_inputs()
    theirs = model.p_losses(x0, t, noise=eps, loss_reduction="none")
    ours = training_loss(
        lambda x, t, *_: model.model(x, t),
        make_schedule("linear"),
        "eps",
        "snr",
        x0,
        t,
        eps,
        learned_variance=True,
        bound_weight=1e-3 / 1000,
    )
    return ours, theirs


def ddp_posterior(schedule):
    model = ddp_model(schedule=schedule)
    ours = make_schedule(schedule)
    t = torch.arange(1000)
    step = posterior(ours.gather(t), ours.gather(t - 1))
    theirs = torch.stack([model.posterior_mean_coef1, model.posterior_mean_coef2, model.posterior_variance])
    return torch.stack([step.x0, step.x_t, step.variance]), theirs.double()


@in_float64
def ddp_ddim(num_steps, eta, objective):
    model = ddp_model(objective, "cosine", sampling_timesteps=num_steps, ddim_sampling_eta=eta).double()
    torch.manual_seed(5)
    with contextlib.redirect_stderr(io.StringIO()):
        theirs = model.ddim_sample(SHAPE, return_all_timesteps=True)
    torch.manual_seed(5)
    levels = torch.linspace(-1, 999, steps=num_steps + 1).int().tolist()
    grid = grid_from_steps(levels[1:], 1000)
    denoiser = Denoiser(network, make_schedule("cosine"), objective)
    x_T = torch.randn(SHAPE)
    ours = trajectory(sample_ddim, denoiser, x_T, grid, lambda t: torch.randn(SHAPE), eta=eta if eta else 1e-30)
    return ours, theirs[:, 1:].transpose(0, 1)


@in_float64
def ddp_ddpm(objective, schedule):
    """Sample ancestrally over every step, clipped, as that library always does."""
    model = ddp_model(objective, schedule).double()
    torch.manual_seed(5)
    with contextlib.redirect_stderr(io.StringIO()):
        theirs = model.p_sample_loop(SHAPE, return_all_timesteps=True)
    torch.manual_seed(5)
    denoiser = Denoiser(network, make_schedule(schedule), objective)
    x_T = torch.randn(SHAPE)
    ours = trajectory(sample_ddpm, denoiser, x_T, make_grid("uniform", 1000, 1000), lambda t: torch.randn(SHAPE))
    return ours, theirs[:, 1:].transpose(0, 1)


CASES = {
    **{
        f"diffusers DDIM, {spacing}, eta {eta:g}, clip {'with eps again' if rederive else 'on' if clip else 'off'}, {objective}, {schedule}": functools.partial(
            ddim, spacing, clip, rederive, eta, objective, schedule
        )
        for spacing in ("leading", "trailing")
        for clip, rederive, eta, objective, schedule in (
            (False, False, 0.0, "eps", "linear"),
            (True, False, 0.0, "eps", "linear"),
            (True, True, 0.0, "v", "scaled_linear"),
            (True, True, 1.0, "x0", "cosine"),
            (True, False, 0.5, "v", "cosine"),
            (False, False, 1.0, "v", "scaled_linear"),
        )
    },
    **{
        f"diffusers DDIM, linspace, every step, clip {'on' if clip else 'off'}, {objective}, {schedule}": functools.partial(
            ddim, "linspace", clip, clip, 0.0, objective, schedule, num_steps=1000
        )
        for clip, objective, schedule in ((True, "v", "cosine"), (False, "v", "linear"))
    },
    "diffusers DDIM, dynamic thresholding 0.9": functools.partial(
        ddim, "trailing", True, True, 0.0, "v", "linear", percentile=0.9
    ),
    **{
        f"diffusers DDPM, {spacing}, {variance}, clip {'on' if clip else 'off'}, {objective}, {schedule}": functools.partial(
            ddpm, spacing, variance, clip, objective, schedule
        )
        for spacing, variance, clip, objective, schedule in (
            ("leading", "fixed_small", True, "eps", "linear"),
            ("leading", "fixed_large", True, "v", "linear"),
            ("leading", "fixed_large", False, "v", "scaled_linear"),
            ("leading", "learned", True, "eps", "cosine"),
            ("leading", "fixed_small", False, "eps", "scaled_linear"),
            ("leading", "learned", False, "v", "linear"),
            ("trailing", "fixed_small", True, "x0", "cosine"),
            ("trailing", "fixed_small", False, "v", "linear"),
            ("linspace", "fixed_small", False, "v", "linear"),
            ("linspace", "fixed_small", True, "eps", "linear"),
            ("linspace", "learned", True, "v", "cosine"),
        )
    },
    **{
        f"diffusers DPM-Solver++, {kind}, {spacing}, {objective}, {schedule}": functools.partial(
            dpmpp, spacing, kind, objective, schedule
        )
        for kind in ("dpmsolver++", "sde-dpmsolver++")
        for spacing, objective, schedule in (
            ("leading", "eps", "linear"),
            ("trailing", "v", "cosine"),
            ("linspace", "x0", "scaled_linear"),
        )
    },
    "diffusers DPM-Solver++, 7 steps": functools.partial(dpmpp, "linspace", "dpmsolver++", "v", "linear", num_steps=7),
    "diffusers DPM-Solver++, dynamic thresholding 0.9": functools.partial(
        dpmpp, "linspace", "dpmsolver++", "v", "linear", percentile=0.9
    ),
    **{
        f"diffusers DDIM inverse, {spacing}, clip {'on' if clip else 'off'}, {objective}": functools.partial(
            ddim_inverse, spacing, clip, objective, schedule
        )
        for spacing, clip, objective, schedule in (
            ("leading", False, "eps", "linear"),
            ("leading", True, "eps", "linear"),
            ("leading", False, "v", "scaled_linear"),
            ("leading", True, "v", "cosine"),
            ("trailing", False, "v", "linear"),
            ("trailing", True, "eps", "scaled_linear"),
        )
    },
    **{
        f"denoising-diffusion-pytorch loss, {objective}, {schedule}{', min-SNR' if min_snr else ''}{', self-conditioned' if own else ''}": functools.partial(
            ddp_loss, objective, schedule, min_snr, own
        )
        for objective in OBJECTIVES
        for schedule, min_snr, own in (("linear", False, False), ("cosine", True, False), ("sigmoid", True, True))
    },
    "denoising-diffusion-pytorch hybrid loss": ddp_hybrid_loss,
    **{
        f"denoising-diffusion-pytorch posterior coefficients, {schedule}": functools.partial(ddp_posterior, schedule)
        for schedule in ("linear", "cosine", "sigmoid")
    },
    **{
        f"denoising-diffusion-pytorch DDIM, {num_steps} steps, eta {eta:g}, {objective}": functools.partial(
            ddp_ddim, num_steps, eta, objective
        )
        for num_steps, eta, objective in ((50, 0.0, "v"), (37, 1.0, "v"), (333, 0.5, "x0"))
    },
    **{
        f"denoising-diffusion-pytorch DDPM, every step, {objective}, {schedule}": functools.partial(
            ddp_ddpm, objective, schedule
        )
        for objective, schedule in (("v", "cosine"), ("x0", "sigmoid"), ("v", "linear"))
    },
}


@pytest.mark.parametrize("case", CASES)
def test_ours_agrees_with_the_peer(case):
    ours, theirs = CASES[case]()
    assert bool(torch.isfinite(theirs).all())
    assert largest_difference(ours, theirs) < TOLERANCE


@pytest.mark.parametrize("schedule", BETAS)
def test_schedules_agree_with_diffusers(schedule):
    theirs = scheduler_of("DDIMScheduler", schedule).alphas_cumprod.double()
    torch.testing.assert_close(make_schedule(schedule).alphas_cumprod, theirs, atol=2e-6, rtol=0)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_zero_terminal_snr_agrees_with_diffusers(schedule):
    theirs = scheduler_of("DDIMScheduler", schedule, rescale_betas_zero_snr=True).alphas_cumprod.double()
    ours = make_schedule(schedule, zero_terminal_snr=True).alphas_cumprod
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)
    assert float(ours[-1]) == 0.0


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("num_steps", [1, 7, 50, 333, 999, 1000])
def test_grids_visit_the_steps_that_diffusers_visits(spacing, num_steps):
    scheduler = scheduler_of("DDIMScheduler", timestep_spacing=spacing)
    scheduler.set_timesteps(num_steps)
    theirs = [int(t) for t in scheduler.timesteps]
    ours = [t for t, _ in make_grid(spacing, 1000, num_steps)]
    if spacing == "linspace" and num_steps == 1:
        assert theirs == [0] and ours == [999], "diffusers would start its only step at the clean end"
    else:
        assert ours == theirs


@pytest.mark.parametrize(
    ("spacing", "num_steps"), [("linspace", 600), ("trailing", 350), ("trailing", 600), ("leading", 333)]
)
def test_diffusers_leaves_the_exact_flow_if_the_stride_does_not_fit_and_ours_does_not(spacing, num_steps):
    """diffusers steps to t - T // S, whatever the next timestep is, so the image and its noise level disagree."""
    target, schedule = tilted_gaussian(), make_schedule("linear")
    denoiser = target.denoiser(schedule)
    grid = make_grid(spacing, 1000, num_steps)
    x_T = start().double().flatten(1)[:, :2]
    exact = target.flow(x_T, schedule.alpha_bar(grid[0][0]), 1.0)
    ours = sample_ddim(denoiser, x_T, grid)
    theirs = run_scheduler(
        scheduler_of("DDIMScheduler", timestep_spacing=spacing, clip_sample=False), num_steps, x_T, denoiser.network
    )[-1]
    our_error, their_error = float((ours - exact).abs().max()), float((theirs - exact).abs().max())
    if spacing == "leading":  # every stride fits, so both are right
        assert their_error == pytest.approx(our_error, rel=1e-3)
    else:
        assert their_error > 1.5 * our_error, (our_error, their_error)


@pytest.mark.parametrize("variance", ["fixed_large", "learned"])
def test_diffusers_larger_variances_leave_noise_in_the_last_image_of_a_trailing_grid_and_ours_do_not(variance):
    """diffusers adds noise in every step from t > 0, also in the step to the clean image."""
    target, schedule = tilted_gaussian(), make_schedule("linear")
    plain = target.denoiser(schedule)
    learned = variance == "learned"

    def network(x, t, *_, **__):
        output = plain.network(x, t)
        return torch.cat([output, torch.ones_like(x)], dim=1) if learned else output

    denoiser = Denoiser(network, schedule, "eps", clip=None, learned_variance=learned)
    x = start().double().flatten(1)[:, :2]
    kind = "learned_range" if learned else variance
    scheduler = scheduler_of("DDPMScheduler", timestep_spacing="trailing", variance_type=kind, clip_sample=False)
    scheduler.set_timesteps(50)
    last = int(scheduler.timesteps[-1])
    x0, eps = denoiser(x, last)
    output = torch.cat([eps, torch.ones_like(x)], dim=1) if learned else eps
    theirs = scheduler.step(output, last, x, generator=torch.Generator().manual_seed(0)).prev_sample
    assert float((theirs - x0).abs().max()) > 1e-2
    ours = sample_ddpm(denoiser, x, [(last, -1)], lambda t: torch.ones_like(x), variance=variance)
    torch.testing.assert_close(ours, x0)


def test_dynamic_thresholding_agrees_with_diffusers():
    scheduler = scheduler_of("DDIMScheduler", thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=1e6)
    x0 = 2 * start()
    torch.testing.assert_close(threshold_dynamically(x0, 0.9), scheduler._threshold_sample(x0))


def test_decoder_is_exact_and_that_of_the_peer_an_approximation():
    """denoising-diffusion-pytorch, like Improved DDPM, uses a tanh formula for the normal distribution function."""
    module = pytest.importorskip("denoising_diffusion_pytorch.learned_gaussian_diffusion", reason=NEEDED)
    levels = torch.linspace(-1, 1, 256, dtype=torch.float64)[:, None]
    mean, log_scale = torch.full_like(levels, 0.1), torch.full_like(levels, math.log(0.02))
    theirs = module.discretized_gaussian_log_likelihood(levels, means=mean, log_scales=log_scale)
    ours = discretised_log_likelihood(levels, mean, 2 * math.log(0.02))
    near = ours > -6
    assert 1e-5 < float((ours - theirs)[near].abs().max()) < 0.05
    assert float(ours.exp().sum()) == pytest.approx(1.0, abs=1e-12)


def table() -> str:
    """Return a Markdown page with the `largest_difference` of each case."""
    from importlib.metadata import version

    rows = []
    for name, case in CASES.items():
        ours, theirs = case()
        rows.append(f"| {name} | {largest_difference(ours, theirs):.1e} |")
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "denoising-diffusion-pytorch"))
    return "\n".join(
        [
            "# Agreement with independent implementations",
            "",
            f"With {versions}. Made by `.uv/bin/uv run --group bench python -m tests.diffusion_core.test_agreement`; the same cases are",
            "tests, with a bound of 1e-5.",
            "",
            "The difference is the largest |ours - theirs| / (1 + the largest |theirs| of the same step) over all steps, with the same",
            "noise and a nonlinear network. DDIM and DDPM are compared in float64 (the peers' tables stay in float32). DPM-Solver++, which",
            "always computes in float32, and losses are compared in float32. diffusers has no DDIM inverse over `linspace`. The peers have",
            "the weightings SNR and min-SNR; the others are tested against their formulas.",
            "",
            "| case | largest difference |",
            "|---|---|",
            *rows,
            "",
            "Known differences, each with its own test:",
            "",
            "- diffusers' DDIM steps to t - T // S, whatever its next timestep is. If S does not divide T (`trailing`, 350 or 600",
            "  of 1000), and on `linspace` grids, the image's noise level and the network's timestep drift apart, and the result is",
            "  further from the exact probability flow of a Gaussian than ours.",
            "- diffusers' DDPM with `fixed_large` or a learned variance adds noise in the step to the clean image if that step",
            "  starts above t = 0 (`trailing`). Ours never does.",
            "- diffusers' `linspace` with one step starts at t = 0, the clean end; ours starts at T - 1.",
            "- The discretised decoder of denoising-diffusion-pytorch (and of Improved DDPM) uses a tanh formula for the normal",
            "  distribution function; ours is exact, so the probabilities of the 256 levels sum to 1.",
        ]
    )


if __name__ == "__main__":
    print(table())
