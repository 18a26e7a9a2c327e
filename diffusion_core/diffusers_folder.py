"""The folder of a diffusers ``DDPMPipeline`` or ``DDIMPipeline``, read as a network, a schedule and a sampler: diffusers is not needed.

Everything that decides the samples comes from the folder: the network from unet/, and the betas, the prediction type, the
clipping, the variance and the spacing of steps from scheduler/. Folders of the first releases, without subfolders, work too.
What this package cannot express is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from diffusion_core.checks import is_whole
from diffusion_core.denoiser import Denoiser
from diffusion_core.grids import Grid, grid_from_steps
from diffusion_core.networks.diffusers_weights import read_diffusers_folder
from diffusion_core.networks.unet import UNet
from diffusion_core.samplers import Callback, StepNoise, sample_ddim, sample_ddpm
from diffusion_core.schedules import NoiseSchedule, given_schedule, make_schedule, rescale_to_zero_terminal_snr
from diffusion_core.storage import read_json

_DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "prediction_type": "epsilon",
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "rescale_betas_zero_snr": False,
}
"""Values of the settings that scheduler_config.json omits."""

_OWN_DEFAULTS: dict[str, dict[str, Any]] = {
    "DDPMScheduler": {"variance_type": "fixed_small"},
    "DDIMScheduler": {"set_alpha_to_one": True},
}
"""The settings that only one class of scheduler has."""

_OBJECTIVES = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
_VARIANCES = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "learned_range": "learned",
}
_SPACINGS = ("leading", "trailing", "linspace")


@dataclass(frozen=True)
class DiffusersScheduler:
    """The settings of a diffusers scheduler in the terms of this package.

    ``clip`` and ``rederive_eps`` as in `Denoiser`. ``variance``: as in `sample_ddpm`, or None for a DDIM scheduler.
    ``spacing``: leading, trailing or linspace; ``steps_offset`` is added to the steps of leading. ``last_level``: the level at
    which grids end: -1, the clean image, or 0 if the scheduler ends at its first alpha-bar (``set_alpha_to_one`` off).
    """

    schedule: NoiseSchedule
    objective: str
    clip: float | None
    rederive_eps: bool
    variance: str | None
    spacing: str
    steps_offset: int
    last_level: int

    def grid(self, num_steps: int) -> Grid:
        """Return the grid of the scheduler's ``set_timesteps(num_steps)``, rounded in the same way, each step connected to the next.

        Two differences from diffusers, whose images are then not quite ours: its DDIMScheduler steps from t to t - T // S, which
        is not the next step for linspace, nor for trailing unless S divides T; and for some S it rounds its way to a step -1
        after the last of trailing. Raises ValueError if S lies outside 1 to T, or the grid does not fit the schedule.
        """
        total = self.schedule.num_steps
        if not is_whole(num_steps) or not 1 <= num_steps <= total:
            raise ValueError(
                f"a grid of {num_steps} steps does not fit a schedule of {total}: choose a whole number from 1 to {total}"
            )
        if self.spacing == "leading":
            steps = np.arange(num_steps) * (total // num_steps) + self.steps_offset
        elif self.spacing == "trailing":
            steps = np.round(np.arange(total, 0, -total / num_steps)[:num_steps]).astype(np.int64) - 1
        else:
            steps = np.linspace(0, total - 1, num_steps).round().astype(np.int64)
        if steps.max() >= total:
            raise ValueError(
                f"steps_offset={self.steps_offset} moves a step of a grid of {num_steps} to {steps.max()}, above the last step "
                f"{total - 1}: use fewer steps"
            )
        grid = grid_from_steps(steps.tolist(), total)
        if self.last_level < 0:
            return grid
        if grid[-1][0] <= self.last_level:
            raise ValueError(
                "set_alpha_to_one=False ends at level 0, but the last of these steps starts there: "
                "only a scheduler with steps_offset of at least 1, or another spacing, is supported"
            )
        return [*grid[:-1], (grid[-1][0], self.last_level)]


@dataclass(frozen=True)
class DiffusersPipeline:
    """A network and its scheduler. `DiffusionModel` can save them, except for the scheduler's clipping, variance and spacing."""

    network: UNet
    scheduler: DiffusersScheduler

    def denoiser(self) -> Denoiser:
        """Return the network's denoiser, clipped as the scheduler clips."""
        return Denoiser(
            self.network,
            self.scheduler.schedule,
            self.scheduler.objective,
            self.scheduler.clip,
            rederive_eps=self.scheduler.rederive_eps,
            learned_variance=self.scheduler.variance == "learned",
        )

    def sample(
        self,
        x_T: Tensor,
        num_steps: int,
        noise: StepNoise | None = None,
        *,
        eta: float = 0.0,
        condition: Any = None,
        callback: Callback | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Sample as the pipeline does: ancestrally with a DDPMScheduler, else with DDIM and ``eta``.

        x_T: (B, C, H, W) float32 standard normal; ``noise`` as in `sample_ddpm`; ``condition``: (B,) class indices, if the
        network has classes. The step to the clean image adds no noise; diffusers' DDPMScheduler adds some at a last step above 0
        with ``fixed_large`` or ``learned_range``. Returns (B, C, H, W), roughly in [-1, 1]. Raises ValueError as the samplers
        do, and if a DDPMScheduler is given an eta.
        """
        grid = self.scheduler.grid(num_steps)
        options: dict[str, Any] = {"condition": condition, "callback": callback, "progress": progress}
        if self.scheduler.variance is None:
            return sample_ddim(self.denoiser(), x_T, grid, noise, eta=eta, **options)
        if eta != 0.0:
            raise ValueError("eta belongs to a DDIMScheduler, and this folder has a DDPMScheduler: omit it")
        return sample_ddpm(self.denoiser(), x_T, grid, noise, variance=self.scheduler.variance, **options)  # type: ignore[arg-type]


def read_diffusers_pipeline(folder: Path, *, variant: str | None = None, **options: Any) -> DiffusersPipeline:
    """Read the folder of a ``DDPMPipeline`` or ``DDIMPipeline``, in evaluation mode.

    As in diffusers, the scheduler's class is the one that model_index.json names, and a DDIMPipeline samples with a DDIMScheduler,
    also if its folder has the settings of a DDPMScheduler.
    ``variant`` as in `read_diffusers_folder`, ``options`` as in `unet_from_diffusers`. Raises ValueError if a file is missing or
    damaged, the folder holds another pipeline, or a setting is not supported; the error names it.
    """
    folder = Path(folder)
    index = _mapping(folder / "model_index.json")
    kind = index.get("_class_name")
    if kind not in ("DDPMPipeline", "DDIMPipeline"):
        raise ValueError(
            f"{folder} holds a {kind}: allowed are DDPMPipeline and DDIMPipeline; stable_diffusion loads Stable Diffusion"
        )
    parts = {name: value for name, value in index.items() if not name.startswith("_") and value != [None, None]}
    others = sorted(parts.keys() - {"unet", "scheduler"})
    if others:
        raise ValueError(
            f"{folder} has {', '.join(others)} besides unet and scheduler: such a pipeline is not supported"
        )
    config = _mapping(_part(folder, "scheduler") / "scheduler_config.json")
    config["_class_name"] = _class_in(index, "scheduler") or config.get("_class_name")
    if kind == "DDIMPipeline" and config["_class_name"] in _OWN_DEFAULTS:
        config["_class_name"] = "DDIMScheduler"
    scheduler = scheduler_from_diffusers(config)
    network = read_diffusers_folder(_part(folder, "unet"), variant=variant, **options).eval()
    learned = bool(network.config["learned_variance"])
    if learned != (scheduler.variance == "learned"):
        raise ValueError(
            f"the network {'learned' if learned else 'did not learn'} its variance, but the scheduler "
            f"{config['_class_name']} has variance_type={config.get('variance_type')!r}: the two do not belong together"
        )
    return DiffusersPipeline(network, scheduler)


def scheduler_from_diffusers(config: Mapping[str, Any]) -> DiffusersScheduler:
    """Return the settings of a ``DDPMScheduler`` or ``DDIMScheduler``, given the content of its scheduler_config.json.

    Settings that the class does not have are ignored, as diffusers ignores them. The alpha-bars are computed in float64;
    diffusers computes them in float32. Raises ValueError, naming the setting, if it is not supported or out of range.
    """
    kind = config.get("_class_name")
    if kind not in _OWN_DEFAULTS:
        raise ValueError(f"scheduler {kind} is not supported: allowed are {', '.join(_OWN_DEFAULTS)}")
    known = {**_DEFAULTS, **_OWN_DEFAULTS[kind]}
    given = {name: config.get(name, default) for name, default in known.items()}
    if "prediction_type" not in config and "predict_epsilon" in config:  # the name of the first releases
        given["prediction_type"] = "epsilon" if config["predict_epsilon"] else "sample"
    objective = _choice(given, "prediction_type", _OBJECTIVES)
    variance = _choice(given, "variance_type", _VARIANCES) if "variance_type" in given else None
    if given["timestep_spacing"] not in _SPACINGS:
        _refuse(given, "timestep_spacing", _SPACINGS)
    if given["rescale_betas_zero_snr"] and objective == "eps":
        raise ValueError(
            "diffusers' rescale_betas_zero_snr=True is not supported with prediction_type='epsilon': from pure noise, eps gives "
            "no estimate of the image"
        )
    if not is_whole(given["steps_offset"]) or given["steps_offset"] < 0:
        _refuse(given, "steps_offset", ("a whole number of at least 0",))
    schedule = _schedule(given)
    return DiffusersScheduler(
        schedule,
        objective,
        clip=_clip(given),
        rederive_eps=kind == "DDPMScheduler",  # DDIMScheduler keeps the network's noise beside the clipped image
        variance=variance,
        spacing=given["timestep_spacing"],
        steps_offset=given["steps_offset"],
        last_level=-1 if given.get("set_alpha_to_one", True) else 0,
    )


def _schedule(given: Mapping[str, Any]) -> NoiseSchedule:
    steps, start, end = given["num_train_timesteps"], given["beta_start"], given["beta_end"]
    name = given["beta_schedule"]
    if not is_whole(steps) or steps < 1:
        _refuse(given, "num_train_timesteps", ("a whole number of at least 1",))
    for setting, value in (("beta_start", start), ("beta_end", end)):
        if not isinstance(value, int | float) or not 0.0 < value < 1.0:
            _refuse(given, setting, ("a number between 0 and 1",))
    if given["trained_betas"] is not None:
        try:
            betas = torch.as_tensor(given["trained_betas"], dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            _refuse(given, "trained_betas", ("a list of numbers",))
        if betas.shape != (steps,):
            raise ValueError(
                f"diffusers' trained_betas has shape {tuple(betas.shape)}, but num_train_timesteps is {steps}: they must agree"
            )
        schedule = _from_betas(betas)
    elif name in ("linear", "scaled_linear"):
        schedule = make_schedule(name, steps, start=start, end=end)
    elif name == "squaredcos_cap_v2":
        schedule = make_schedule("cosine", steps)
    elif name == "sigmoid":
        schedule = _from_betas(torch.sigmoid(torch.linspace(-6, 6, steps, dtype=torch.float64)) * (end - start) + start)
    else:
        _refuse(given, "beta_schedule", ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"))
    return rescale_to_zero_terminal_snr(schedule) if given["rescale_betas_zero_snr"] else schedule


def _from_betas(betas: Tensor) -> NoiseSchedule:
    return given_schedule(torch.cumprod(1.0 - betas, dim=0))


def _clip(given: Mapping[str, Any]) -> float | None:
    if not given["thresholding"]:
        if not given["clip_sample"]:
            return None
        if not isinstance(given["clip_sample_range"], int | float) or not given["clip_sample_range"] > 0.0:
            _refuse(given, "clip_sample_range", ("a number above 0",))
        return float(given["clip_sample_range"])
    # the threshold lies between 1 and sample_max_value: with 1 it is a clamp to [-1, 1]
    if given["sample_max_value"] != 1.0:
        raise ValueError(
            f"diffusers' thresholding with sample_max_value={given['sample_max_value']!r} is not supported: allowed is 1.0"
        )
    return 1.0


def _choice(given: Mapping[str, Any], name: str, choices: Mapping[str, str]) -> str:
    if not isinstance(given[name], str) or given[name] not in choices:
        _refuse(given, name, tuple(choices))
    return choices[given[name]]


def _refuse(given: Mapping[str, Any], name: str, allowed: tuple[str, ...]) -> NoReturn:
    listed = allowed[0] if len(allowed) == 1 else " or ".join(map(repr, allowed))
    raise ValueError(f"diffusers' {name}={given[name]!r} is not supported: allowed is {listed}")


def _part(folder: Path, name: str) -> Path:
    """Return the subfolder of a component; the first releases kept all components in the pipeline's folder."""
    return folder / name if (folder / name).is_dir() else folder


def _class_in(index: Mapping[str, Any], name: str) -> Any:
    entry = index.get(name)
    return entry[1] if isinstance(entry, list) and len(entry) == 2 else None


def _mapping(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold settings by name")
    return content
