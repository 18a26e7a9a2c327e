"""Samplers: one plain function each, over (denoiser, x_T, grid, noise), without hidden state.

``grid`` is a grid from `grids.make_grid`, or any list of steps. To start in the middle or stop early, pass part of a grid
(`grids.restrict_grid`). ``callback`` sees every step: ``steps = []; sample_ddim(..., callback=steps.append)`` keeps the
trajectory of x_t and x0. ``progress=True`` shows a bar. A `Denoiser` clips its estimate of x0 to [-1, 1] by default; data of
another range needs ``clip=None``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from diffusion_core.checks import check_images
from diffusion_core.denoiser import Denoiser, Prediction
from diffusion_core.grids import Grid, check_grid
from diffusion_core.posterior import VARIANCES, learned_log_variance, log_variance_range, posterior

StepNoise = Callable[[int], Tensor]
"""``noise(t)``: (B, ...) standard normal for the step that starts at t."""


class Step(NamedTuple):
    """One sampling step as the callback sees it: from t to t_prev, the new image x, and the estimate x0 at t."""

    t: int
    t_prev: int
    x: Tensor
    x0: Tensor


Callback = Callable[[Step], None]
Item = TypeVar("Item")


def ddim_sigmas(alpha_bar: float, alpha_bar_prev: float, eta: float | Literal["sigma_hat"]) -> tuple[float, float]:
    """Return (sigma of the direction term, sigma of the added noise) of one DDIM step; both are 0 if alpha_bar_prev is 1.

    sigma = eta sqrt((1 - a_prev) / (1 - a_t)) sqrt(1 - a_t / a_prev) (arXiv 2010.02502, eq. 16). ``"sigma_hat"`` is
    the larger DDPM variance: noise sqrt(1 - a_t / a_prev), direction as for eta 1 (same paper, section 5).
    """
    if alpha_bar_prev >= 1.0:
        return 0.0, 0.0
    larger = (1.0 - alpha_bar / alpha_bar_prev) ** 0.5
    smaller = ((1.0 - alpha_bar_prev) / (1.0 - alpha_bar)) ** 0.5 * larger
    if eta == "sigma_hat":
        return smaller, larger
    return float(eta) * smaller, float(eta) * smaller


def check_eta(eta: float | Literal["sigma_hat"]) -> None:
    """Raise ValueError unless eta is in [0, 1] or "sigma_hat"."""
    if eta != "sigma_hat" and not (isinstance(eta, Real) and 0.0 <= eta <= 1.0):
        raise ValueError(f"eta must lie in 0 to 1 or be 'sigma_hat', the larger DDPM variance, got {eta!r}")


@torch.no_grad()
def sample_ddim(
    denoiser: Denoiser,
    x_T: Tensor,
    grid: Grid,
    noise: StepNoise | None = None,
    *,
    eta: float | Literal["sigma_hat"] = 0.0,
    condition: Any = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """Sample with DDIM (arXiv 2010.02502, eq. 12): x_prev = sqrt(a_prev) x0 + sqrt(1 - a_prev - sigma^2) eps + sigma z.

    x_T: (B, ...) float32 at the noise level of the grid's first step. eta 0 is deterministic, 1 is DDPM's posterior
    over the grid. ``noise(t)`` gives z; it is not called if sigma is 0. Returns the image at the grid's end.

    Raises ValueError if eta is not in [0, 1] or "sigma_hat", the grid does not fit the schedule, or noise is missing.
    """
    check_eta(eta)
    grid = check_inputs(denoiser, x_T, grid)
    if eta != 0.0 and noise is None:
        raise ValueError("sampling with eta above 0 needs a source of noise: pass noise=")
    x, x0 = x_T, None
    for t, t_prev in steps_of(grid, progress, "DDIM"):
        prediction = denoiser(x, t, condition, x0)
        x = ddim_step(denoiser, prediction, t, t_prev, noise, eta)
        x0 = prediction.x0 if denoiser.self_conditioning else None
        if callback is not None:
            callback(Step(t, t_prev, x, prediction.x0))
    return x


def ddim_step(
    denoiser: Denoiser,
    prediction: Prediction,
    t: int,
    t_prev: int,
    noise: StepNoise | None = None,
    eta: float | Literal["sigma_hat"] = 0.0,
) -> Tensor:
    """Take one DDIM step from t to t_prev, given the prediction at t. Gradients flow, unlike in `sample_ddim`.

    ``noise`` and ``eta`` as in `sample_ddim`. Returns (B, ...). Raises ValueError if eta or a level is out of range, or noise is
    missing.
    """
    check_eta(eta)
    alpha_bar, alpha_bar_prev = denoiser.schedule.alpha_bar(t), denoiser.schedule.alpha_bar(t_prev)
    direction_sigma, noise_sigma = ddim_sigmas(alpha_bar, alpha_bar_prev, eta)
    direction = max(1.0 - alpha_bar_prev - direction_sigma**2, 0.0) ** 0.5
    x = alpha_bar_prev**0.5 * prediction.x0 + direction * prediction.eps
    return x + noise_sigma * draw(noise, t, x) if noise_sigma > 0.0 else x


@torch.no_grad()
def sample_ddpm(
    denoiser: Denoiser,
    x_T: Tensor,
    grid: Grid,
    noise: StepNoise | None = None,
    *,
    variance: Literal["fixed_small", "fixed_large", "learned"] = "fixed_small",
    condition: Any = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """Sample ancestrally (arXiv 2006.11239, algorithm 2): x_prev = mean of q(x_prev | x_t, x0) + sigma z.

    sigma^2 is the posterior variance (``fixed_small``), beta between the two levels (``fixed_large``), or ``learned``
    (arXiv 2102.09672, eq. 15), which needs a denoiser with ``learned_variance``. The step to the clean image adds no noise.
    x_T: (B, ...) float32 at the noise level of the grid's first step. Returns the image at the grid's end.

    Raises ValueError if the variance is unknown or unavailable, the grid does not fit the schedule, or noise is missing.
    """
    _check_variance(denoiser, variance)
    grid = check_inputs(denoiser, x_T, grid)
    if noise is None:
        raise ValueError("ancestral sampling adds noise at every step: pass noise=")
    x, x0 = x_T, None
    for t, t_prev in steps_of(grid, progress, "DDPM"):
        prediction = denoiser(x, t, condition, x0)
        x = ddpm_step(denoiser, prediction, x, t, t_prev, noise, variance)
        x0 = prediction.x0 if denoiser.self_conditioning else None
        if callback is not None:
            callback(Step(t, t_prev, x, prediction.x0))
    return x


def ddpm_step(
    denoiser: Denoiser,
    prediction: Prediction,
    x_t: Tensor,
    t: int,
    t_prev: int,
    noise: StepNoise | None = None,
    variance: Literal["fixed_small", "fixed_large", "learned"] = "fixed_small",
) -> Tensor:
    """Take one ancestral step from x_t at t to t_prev, given the prediction at t. Gradients flow, unlike in `sample_ddpm`.

    x_t: (B, ...) as the denoiser took it. ``noise`` and ``variance`` as in `sample_ddpm`; the step to the clean image, t_prev -1,
    adds no noise. Returns (B, ...). Raises ValueError if the variance is unknown or unavailable, the step does not go down, the
    prediction is of another shape, or noise is missing.
    """
    _check_step(denoiser, prediction, x_t, t, t_prev, variance)
    alpha_bar, alpha_bar_prev = denoiser.schedule.alpha_bar(t), denoiser.schedule.alpha_bar(t_prev)
    step = posterior(alpha_bar, alpha_bar_prev)
    x = step.x0 * prediction.x0 + step.x_t * x_t
    if t_prev < 0:
        return x
    small, large = float(step.variance), 1.0 - alpha_bar / alpha_bar_prev
    sigma: Tensor | float = math.sqrt(large if variance == "fixed_large" else small)
    if variance == "learned":
        assert prediction.variance_fraction is not None
        log_variance = learned_log_variance(prediction.variance_fraction, math.log(small), math.log(large))
        sigma = torch.exp(0.5 * log_variance)
    return x + sigma * draw(noise, t, x)


class ReverseStep(NamedTuple):
    """p(x_prev | x_t) = N(mean, exp(log_variance)): (B, ...) each. A fixed log-variance has one value for all elements."""

    mean: Tensor
    log_variance: Tensor


def reverse_step(
    denoiser: Denoiser,
    prediction: Prediction,
    x_t: Tensor,
    t: int,
    t_prev: int,
    variance: Literal["fixed_small", "fixed_large", "learned"] = "fixed_small",
    *,
    floor: float | None = None,
) -> ReverseStep:
    """Return mean and log-variance of the model's step from x_t at t to t_prev, given the prediction at t. Gradients flow.

    The mean is that of q(x_prev | x_t, x0) with the estimate of x0 (arXiv 2006.11239, eq. 7), and `ddpm_step` draws from this
    Gaussian. At t_prev -1 that posterior's variance is 0: ``floor`` replaces it and both fixed variances, as in the decoder of
    `likelihood.variational_bound`. By default it is the posterior variance of step 1 (arXiv 2102.09672, as in its authors'
    code); on a sub-grid pass that of the pair before. Raises ValueError as `ddpm_step` does, and if floor is not above 0.
    """
    _check_step(denoiser, prediction, x_t, t, t_prev, variance)
    schedule = denoiser.schedule
    alpha_bar, alpha_bar_prev = schedule.alpha_bar(t), schedule.alpha_bar(t_prev)
    step = posterior(alpha_bar, alpha_bar_prev)
    mean = step.x0 * prediction.x0 + step.x_t * x_t
    if floor is None:
        one_step = schedule.num_steps == 1
        floor = 1.0 - alpha_bar if one_step else float(posterior(schedule.alpha_bar(1), schedule.alpha_bar(0)).variance)
    if not floor > 0.0:
        raise ValueError(f"floor is a variance above 0, got {floor}")
    log_small, log_large = log_variance_range(
        *(torch.tensor(value, dtype=torch.float64) for value in (alpha_bar, alpha_bar_prev, floor))
    )
    if variance == "learned":
        assert prediction.variance_fraction is not None
        return ReverseStep(mean, learned_log_variance(prediction.variance_fraction, float(log_small), float(log_large)))
    log_variance = float(log_large if variance == "fixed_large" and t_prev >= 0 else log_small)
    return ReverseStep(mean, torch.full_like(mean, log_variance))


def _check_step(denoiser: Denoiser, prediction: Prediction, x_t: Tensor, t: int, t_prev: int, variance: str) -> None:
    """Raise ValueError unless the step goes down and the prediction belongs to x_t and has what the variance needs."""
    _check_variance(denoiser, variance)
    if not t_prev < t:
        raise ValueError(f"a reverse step goes down, got t {t} and t_prev {t_prev}")
    if prediction.x0.shape != x_t.shape:
        raise ValueError(
            f"the prediction is for images of {tuple(prediction.x0.shape)}, but x_t has {tuple(x_t.shape)}"
        )
    if variance == "learned" and prediction.variance_fraction is None:
        raise ValueError("variance 'learned' needs a prediction with a variance_fraction, as the denoiser returns it")


def _check_variance(denoiser: Denoiser, variance: str) -> None:
    if variance not in VARIANCES:
        raise ValueError(f"unknown variance {variance!r}: choose one of {', '.join(VARIANCES)}")
    if variance == "learned" and not denoiser.learned_variance:
        raise ValueError(
            "variance 'learned' needs a network that learned it: build the denoiser with learned_variance=True"
        )


def sample_dpmpp_2m(
    denoiser: Denoiser,
    x_T: Tensor,
    grid: Grid,
    noise: StepNoise | None = None,
    *,
    condition: Any = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """Sample with DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2), a second-order multistep solver of the probability-flow ODE.

    Deterministic: ``noise`` exists only so that all samplers have one signature, and is never called. The first step of the
    grid and the step to the clean image are of first order. x_T: (B, ...) float32 at the noise level of the grid's first
    step. Returns the image at the grid's end. Raises ValueError if the grid does not fit the schedule.
    """
    return _sample_dpmpp_2m(denoiser, x_T, grid, None, condition, callback, progress)


def sample_dpmpp_2m_sde(
    denoiser: Denoiser,
    x_T: Tensor,
    grid: Grid,
    noise: StepNoise | None = None,
    *,
    condition: Any = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """Sample with SDE-DPM-Solver++(2M) (arXiv 2211.01095, section 6): the reverse diffusion SDE, with noise at each step.

    Otherwise as `sample_dpmpp_2m`. Raises ValueError also if noise is missing.
    """
    if noise is None:
        raise ValueError("the SDE solver adds noise at every step: pass noise=, or use sample_dpmpp_2m")
    return _sample_dpmpp_2m(denoiser, x_T, grid, noise, condition, callback, progress)


@torch.no_grad()
def _sample_dpmpp_2m(
    denoiser: Denoiser,
    x_T: Tensor,
    grid: Grid,
    noise: StepNoise | None,
    condition: Any,
    callback: Callback | None,
    progress: bool,
) -> Tensor:
    """Run the solver. lambda is the half log-SNR, h = lambda_s - lambda_t, and D = x0 + h / (2 h_last) (x0 - x0_last):

    ODE: x_s = sigma_s / sigma_t x_t + alpha_s (1 - e^-h) D
    SDE: x_s = sigma_s / sigma_t e^-h x_t + alpha_s (1 - e^-2h) D + sigma_s sqrt(1 - e^-2h) z
    """
    grid = check_inputs(denoiser, x_T, grid)
    x, last_x0, last_h = x_T, None, math.inf
    for t, t_prev in steps_of(grid, progress, "DPM-Solver++"):
        alpha_bar, alpha_bar_prev = denoiser.schedule.alpha_bar(t), denoiser.schedule.alpha_bar(t_prev)
        prediction = denoiser(x, t, condition, last_x0 if denoiser.self_conditioning else None)
        h = _half_log_snr(alpha_bar_prev) - _half_log_snr(alpha_bar)
        aim = prediction.x0
        if last_x0 is not None and t_prev >= 0 and math.isfinite(last_h):
            aim = torch.lerp(aim, last_x0, -h / (2.0 * last_h))
        sigma_ratio = ((1.0 - alpha_bar_prev) / (1.0 - alpha_bar)) ** 0.5
        decay = math.exp(-h)
        if noise is None:
            x = sigma_ratio * x + alpha_bar_prev**0.5 * (1.0 - decay) * aim
        else:
            x = sigma_ratio * decay * x + alpha_bar_prev**0.5 * (1.0 - decay**2) * aim
            noise_sigma = ((1.0 - alpha_bar_prev) * (1.0 - decay**2)) ** 0.5
            x = x + noise_sigma * draw(noise, t, x) if noise_sigma > 0.0 else x
        last_x0, last_h = prediction.x0, h
        if callback is not None:
            callback(Step(t, t_prev, x, prediction.x0))
    return x


@torch.no_grad()
def sample_heun(
    denoiser: Denoiser,
    x_T: Tensor,
    grid: Grid,
    noise: StepNoise | None = None,
    *,
    condition: Any = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """Sample with Heun's method (arXiv 2206.00364, algorithm 1) for d(x / (alpha + sigma)) / dr = eps - x0, r = sigma / (alpha + sigma).

    alpha = sqrt(a), sigma = sqrt(1 - a). Both sides are finite from pure noise (r = 1) to the clean image (r = 0). The paper's
    variables, x / alpha over sigma / alpha, describe the same flow but are infinite at pure noise, and a long step from near
    it then errs more than DDIM's. A step is DDIM's plus (alpha_s + sigma_s) (r_s - r_t) / 2 (u(x_s, s) - u(x_t, t)), u = eps - x0.

    Second order, with two network calls per step. The step to the clean image is an Euler step, which equals DDIM's, with one
    call. Deterministic: ``noise`` is never called. x_T: (B, ...) float32 at the noise level of the grid's first step. Returns
    the image at the grid's end. Raises ValueError if the grid does not fit the schedule.
    """
    grid = check_inputs(denoiser, x_T, grid)
    x, x0 = x_T, None
    for t, t_prev in steps_of(grid, progress, "Heun"):
        alpha_bar, alpha_bar_prev = denoiser.schedule.alpha_bar(t), denoiser.schedule.alpha_bar(t_prev)
        prediction = denoiser(x, t, condition, x0)
        x0 = prediction.x0 if denoiser.self_conditioning else None
        x = ddim_step(denoiser, prediction, t, t_prev)
        if t_prev >= 0:
            corrected = denoiser(x, t_prev, condition, x0)
            alpha, sigma = alpha_bar**0.5, (1.0 - alpha_bar) ** 0.5
            alpha_prev, sigma_prev = alpha_bar_prev**0.5, (1.0 - alpha_bar_prev) ** 0.5
            half = (alpha_prev + sigma_prev) * (sigma_prev / (alpha_prev + sigma_prev) - sigma / (alpha + sigma)) / 2.0
            x = x + half * ((corrected.eps - corrected.x0) - (prediction.eps - prediction.x0))
        if callback is not None:
            callback(Step(t, t_prev, x, prediction.x0))
    return x


def steps_of(steps: Iterable[Item], progress: bool, name: str) -> Iterable[Item]:
    """Return the steps, wrapped in a progress bar if ``progress``."""
    if not progress:
        return steps
    from tqdm.auto import tqdm

    return tqdm(steps, desc=name, unit="step")


def draw(noise: StepNoise | None, step: int, like: Tensor) -> Tensor:
    """Return ``noise(step)`` with the dtype and device of ``like``.

    Raises ValueError if ``noise`` is None, is not callable, or returns another shape.
    """
    if noise is None:
        raise ValueError("this step adds noise: pass noise=")
    if not callable(noise):
        raise ValueError(
            f"noise must be a function of the step, got {type(noise).__name__}: from a NoiseSource, pass "
            "source.for_samples(shape, indices)"
        )
    z = noise(step)
    if z.shape != like.shape:
        raise ValueError(f"noise({step}) has shape {tuple(z.shape)}, but the images have {tuple(like.shape)}")
    return z.to(like.device, like.dtype)


def _half_log_snr(alpha_bar: float) -> float:
    if alpha_bar <= 0.0:
        return -math.inf
    return math.inf if alpha_bar >= 1.0 else 0.5 * (math.log(alpha_bar) - math.log1p(-alpha_bar))


def check_inputs(denoiser: Denoiser, images: Tensor, grid: Grid, name: str = "x_T") -> Grid:
    """Return the grid as pairs.

    Raises ValueError if ``denoiser`` is not a Denoiser, ``images`` is not a float batch, or the grid does not fit the schedule.
    """
    if not hasattr(denoiser, "schedule"):
        raise ValueError(
            f"a sampler needs a Denoiser, which holds the noise schedule, got {type(denoiser).__name__}: "
            "wrap a function (x_t, t) -> eps as Denoiser.from_eps(function, schedule)"
        )
    check_images(images, name)
    return check_grid(grid, denoiser.schedule.num_steps)
