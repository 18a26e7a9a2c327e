"""Compare the speed of the UNet with diffusers and denoising-diffusion-pytorch, on one machine, with the same weights.

    .uv/bin/uv run --group bench python benchmarks/core.py [--cases small cifar10] [--device cuda] [--compile] [--help]

A training step is forward, backward, AdamW and EMA; a sample is a whole DDIM run. Our network and diffusers' have the same
weights, and their outputs are compared before they are timed. denoising-diffusion-pytorch runs its own nearest network (the table
shows its parameters). The rounds of all contestants are interleaved, so that other load slows all alike, and the fastest round
counts. Peers that are not installed are skipped. Prints Markdown; ``--profile`` adds the time per operator of our network.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_core.denoiser import Denoiser
from diffusion_core.ema import EMA
from diffusion_core.grids import make_grid
from diffusion_core.losses import training_loss
from diffusion_core.networks.conditioning import ConditionSpec
from diffusion_core.networks.diffusers_weights import config_from_diffusers, unet_from_diffusers
from diffusion_core.networks.memory import best_memory_format, keep_freed_memory
from diffusion_core.networks.unet import UNet
from diffusion_core.samplers import sample_ddim
from diffusion_core.schedules import make_schedule

try:
    import diffusers
    from diffusers.training_utils import EMAModel
except ImportError:
    diffusers = None
try:
    import denoising_diffusion_pytorch as ddpm_pytorch
except ImportError:
    ddpm_pytorch = None

SHARED = {"sample_size": 32, "layers_per_block": 2, "attention_head_dim": None, "norm_eps": 1e-6, "freq_shift": 1, "flip_sin_to_cos": False, "downsample_padding": 0}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "small": {  # 32x32, channels 32, multipliers 1, 2, 2, attention at 16
        **SHARED,
        "block_out_channels": [32, 64, 64],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    },
    "cifar10": {  # google/ddpm-cifar10-32
        **SHARED,
        "block_out_channels": [128, 256, 256, 256],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    },
}
GOALS = {"eager": 1.5, "compiled": 1.0}


@dataclass
class Contestant:
    """A library to time: its training step, and its sampling run of a given number of DDIM steps."""

    library: str
    mode: str
    layout: str
    parameters: int
    train: Callable[[], Any]
    sample: Callable[[int], Tensor]
    train_seconds: float = float("inf")
    sample_seconds: float = float("inf")
    failure: str = ""


def optimizer_of(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True)


def ours(case: str, weights: Any, data: dict[str, Tensor], settings: argparse.Namespace, precision: str, layout: str, mode: str) -> Contestant:  # fmt: skip
    network = build(case, weights).to(settings.device, memory_format=memory_format(layout))
    call = torch.compile(network) if mode == "compiled" else network
    schedule = make_schedule("linear")
    denoiser = Denoiser(call, schedule, "eps", clip=1.0)
    ema, optimizer, step = EMA(network, 0.9999), optimizer_of(network), 0
    data = {name: laid_out(value, layout) for name, value in data.items()}

    def train() -> None:
        nonlocal step
        step += 1
        network.train()
        with autocast(settings.device, precision):
            loss = training_loss(call, schedule, "eps", "uniform", data["x0"], data["t"], data["eps"]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(network, step)

    def sample(steps: int) -> Tensor:
        network.eval()
        with autocast(settings.device, precision):
            return sample_ddim(denoiser, data["eps"], make_grid("trailing", 1000, steps))

    return Contestant("rediffuse", mode, layout, count(network), train, sample)


def theirs(case: str, weights: Any, data: dict[str, Tensor], settings: argparse.Namespace, precision: str, layout: str, mode: str) -> Contestant:  # fmt: skip
    """diffusers' UNet2DModel with its own schedulers and EMA, as in its examples."""
    network = diffusers.UNet2DModel(**CASES[case])
    network.load_state_dict(weights)
    network = network.to(settings.device, memory_format=memory_format(layout))
    call = torch.compile(network) if mode == "compiled" else network
    training = diffusers.DDPMScheduler(beta_schedule="linear")
    sampling = diffusers.DDIMScheduler(beta_schedule="linear", timestep_spacing="trailing", clip_sample=True)
    ema, optimizer = EMAModel(network.parameters(), decay=0.9999, foreach=True), optimizer_of(network)
    ema.to(settings.device)
    data = {name: laid_out(value, layout) for name, value in data.items()}

    def train() -> None:
        network.train()
        x_t = training.add_noise(data["x0"], data["eps"], data["t"])
        with autocast(settings.device, precision):
            output = call(x_t, data["t"]).sample
        F.mse_loss(output.float(), data["eps"]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.step(network.parameters())

    @torch.no_grad()
    def sample(steps: int) -> Tensor:
        network.eval()
        sampling.set_timesteps(steps)
        x = data["eps"]
        with autocast(settings.device, precision):
            for t in sampling.timesteps:
                x = sampling.step(call(x, t).sample.float(), t, x, eta=0.0, use_clipped_model_output=True).prev_sample
        return x

    return Contestant("diffusers", mode, layout, count(network), train, sample)


def lucidrains(case: str, data: dict[str, Tensor], settings: argparse.Namespace, precision: str, layout: str) -> Contestant:  # fmt: skip
    """denoising-diffusion-pytorch with full attention at 16x16 and its linear attention elsewhere."""
    widths = CASES[case]["block_out_channels"]
    multipliers = tuple(width // widths[0] for width in widths)
    network = ddpm_pytorch.Unet(
        widths[0], dim_mults=multipliers, full_attn=tuple(level == 1 for level in range(len(widths))), flash_attn=True
    ).to(settings.device, memory_format=memory_format(layout))
    diffusion = ddpm_pytorch.GaussianDiffusion(
        network, image_size=32, sampling_timesteps=settings.ddim_steps, objective="pred_noise", beta_schedule="linear"
    ).to(settings.device)
    from ema_pytorch import EMA as TheirEMA

    ema, optimizer = TheirEMA(diffusion, beta=0.9999, update_every=1), optimizer_of(diffusion)
    images = laid_out(data["x0"] / 2 + 0.5, layout)

    def train() -> None:
        diffusion.train()
        with autocast(settings.device, precision):
            loss = diffusion(images)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update()

    def sample(steps: int) -> Tensor:
        diffusion.eval()
        diffusion.sampling_timesteps = steps
        with contextlib.redirect_stderr(io.StringIO()), autocast(settings.device, precision):
            return diffusion.sample(batch_size=len(images))

    return Contestant("denoising-diffusion-pytorch", "eager", layout, count(network), train, sample)


def build(case: str, weights: Any) -> UNet:
    """Build our network, with diffusers' weights unless they are None."""
    if weights is not None:
        return unet_from_diffusers(CASES[case], weights)
    options = config_from_diffusers(CASES[case])
    return UNet(condition=ConditionSpec(), **{k: v for k, v in options.items() if k not in ("name", "condition")})


def measure(contestants: list[Contestant], settings: argparse.Namespace) -> None:
    """Time one call of each contestant per round and keep the fastest."""
    clock = time.process_time if settings.clock == "cpu" else time.perf_counter
    for task in ("train", "sample"):
        for round_number in range(settings.rounds + 1):  # the first round warms up and compiles
            for contestant in contestants:
                if contestant.failure:
                    continue
                steps = settings.ddim_steps if round_number > 0 else 2
                work = contestant.train if task == "train" else partial(contestant.sample, steps)
                try:
                    seconds = timed(work, settings.device, clock)
                except Exception as error:  # a peer that fails becomes a row of the table
                    contestant.failure = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
                    continue
                if round_number > 0:
                    name = f"{task}_seconds"
                    setattr(contestant, name, min(getattr(contestant, name), seconds))


def timed(work: Callable[[], Any], device: str, clock: Callable[[], float] = time.perf_counter) -> float:
    synchronize(device)
    start = clock()
    work()
    synchronize(device)
    return clock() - start


def share_outside_network(case: str, weights: Any, data: dict[str, Tensor], settings: argparse.Namespace) -> float:
    """Return the share of a DDIM run that is spent outside the network, the smallest of the rounds."""
    network = build(case, weights).to(settings.device).eval()
    inside = 0.0

    def watched(x_t: Tensor, t: Tensor, condition: Any = None, self_condition: Tensor | None = None) -> Tensor:
        nonlocal inside
        synchronize(settings.device)
        start = time.perf_counter()
        output = network(x_t, t, condition, self_condition=self_condition)
        synchronize(settings.device)
        inside += time.perf_counter() - start
        return output

    denoiser = Denoiser(watched, make_schedule("linear"), "eps", clip=1.0)
    grid = make_grid("trailing", 1000, min(settings.ddim_steps, 10))
    shares = []
    for _ in range(settings.rounds + 1):
        inside = 0.0
        whole = timed(lambda: sample_ddim(denoiser, data["eps"], grid), settings.device)
        shares.append(1.0 - inside / whole)
    return min(shares[1:])


def profile(case: str, weights: Any, data: dict[str, Tensor], settings: argparse.Namespace, precision: str) -> str:
    """Return the self time per operator of one eager training step and one call of our network, as Markdown."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    layout = best_layout(settings.device, precision)
    contestant = ours(case, weights, data, settings, precision, layout, "eager")
    network = build(case, weights).to(settings.device, memory_format=memory_format(layout)).eval()
    x, t = laid_out(data["eps"], layout), data["t"]

    @torch.no_grad()
    def forward() -> None:
        with autocast(settings.device, precision):
            network(x, t)

    sections = []
    for title, work in (("training step", contestant.train), ("call of the network", forward)):
        work()
        with profiler(activities=[ProfilerActivity.CPU]) as record:
            work()
        events = sorted(record.key_averages(), key=lambda event: -event.self_cpu_time_total)
        total = sum(event.self_cpu_time_total for event in events)
        lines = [f"One {title}, case {case}, {precision}, {layout}, {total / 1e3:.0f} ms under the profiler:", "", "| operator | share | ms | calls |", "|---|---|---|---|"]  # fmt: skip
        lines += [
            f"| {event.key} | {event.self_cpu_time_total / total:.1%} | {event.self_cpu_time_total / 1e3:.1f} | {event.count} |"
            for event in events[:8]
        ]
        sections.append("\n".join(lines))
    return "\n\n".join(sections)


def table(case: str, precision: str, batch: int, contestants: list[Contestant], ddim_steps: int) -> str:
    """Return the times, and their ratios to our best time of the same mode, as Markdown."""
    best = {
        (mode, task): min((getattr(c, task) for c in contestants if c.library == "rediffuse" and c.mode == mode), default=float("nan"))
        for mode in GOALS
        for task in ("train_seconds", "sample_seconds")
    }  # fmt: skip
    lines = [
        f"### {case}, {precision}, batch {batch}",
        "",
        f"| library | mode | memory | parameters | training step | ours is | DDIM-{ddim_steps} | ours is |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for c in contestants:
        row = f"| {c.library} | {c.mode} | {c.layout} | {c.parameters / 1e6:.1f} M | "
        if c.failure:
            lines.append(f"{row}{c.failure} | | | |")
            continue
        ratios = [
            f"{getattr(c, task) / best[c.mode, task]:.2f}x" if c.library != "rediffuse" else ""
            for task in ("train_seconds", "sample_seconds")
        ]
        lines.append(
            f"{row}{c.train_seconds * 1e3:.1f} ms | {ratios[0]} | {c.sample_seconds * 1e3:.0f} ms | {ratios[1]} |"
        )
    for mode, goal in GOALS.items():
        rivals = [c for c in contestants if c.library == "diffusers" and c.mode == mode and not c.failure]
        if rivals:
            for task in ("train_seconds", "sample_seconds"):
                ratio = min(getattr(c, task) for c in rivals) / best[mode, task]
                verdict = "met" if ratio >= goal else "missed"
                what = "training" if task == "train_seconds" else "sampling"
                lines += [
                    "",
                    f"Against diffusers' best {mode} figure, {what}: {ratio:.2f}x (goal {goal:.1f}x: {verdict}).",
                ]
    return "\n".join(lines)


def compare_outputs(case: str, weights: Any, data: dict[str, Tensor], settings: argparse.Namespace) -> str:
    """Compare one float32 call of our network and diffusers'. Exits if they differ."""
    mine = build(case, weights).to(settings.device).eval()
    other = diffusers.UNet2DModel(**CASES[case]).to(settings.device).eval()
    other.load_state_dict(weights)
    with torch.no_grad():
        difference = float((mine(data["eps"], data["t"]) - other(data["eps"], data["t"]).sample).abs().max())
    if difference > (1e-5 if settings.device == "cpu" else 1e-3):
        raise SystemExit(f"the networks of case {case} differ by {difference:.1e}, so their times cannot be compared")
    return f"Case {case}: same weights, largest difference of the outputs {difference:.1e}."


def precisions(device: str) -> list[str]:
    """Return float32, and bfloat16 if the hardware supports it (emulated, it is slower than float32)."""
    if device == "cuda":
        return ["float32", "bfloat16"] if torch.cuda.is_bf16_supported() else ["float32"]
    return ["float32", "bfloat16"] if torch.cpu._is_avx512_bf16_supported() else ["float32"]


def autocast(device: str, precision: str) -> Any:
    return torch.autocast(device, dtype=torch.bfloat16) if precision == "bfloat16" else contextlib.nullcontext()


def laid_out(value: Tensor, layout: str) -> Tensor:
    return value.contiguous(memory_format=memory_format(layout)) if value.ndim == 4 else value


def best_layout(device: str, precision: str) -> str:
    """Return the layout of our training, which is also the initial layout of compiled networks."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    return "channels_last" if best_memory_format(device, dtype) == torch.channels_last else "contiguous"


def memory_format(layout: str) -> torch.memory_format:
    return torch.channels_last if layout == "channels_last" else torch.contiguous_format


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def machine(settings: argparse.Namespace) -> str:
    names = ["torch", "diffusers", "denoising-diffusion-pytorch"]
    versions = []
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    device = (
        torch.cuda.get_device_name() if settings.device == "cuda" else f"CPU {torch.backends.cpu.get_cpu_capability()}"
    )
    load = f", load average at the start {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    clock = "processor time" if settings.clock == "cpu" else "wall-clock time"
    return f"{clock}; {device}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, Python {platform.python_version()}, {', '.join(versions)}{load}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--precisions", nargs="+", choices=("float32", "bfloat16"), help="default: those of the hardware"
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--ddim-steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: processor time, for a shared machine (with --threads 1)",
    )
    parser.add_argument("--compile", action="store_true", help="also time compiled networks (minutes each on a CPU)")
    parser.add_argument(
        "--layouts", nargs="+", choices=("contiguous", "channels_last"), default=["contiguous", "channels_last"]
    )
    parser.add_argument(
        "--default-allocator",
        action="store_true",
        help="use glibc's default settings instead of keeping freed memory",
    )
    parser.add_argument("--profile", action="store_true", help="show the time per operator of our network")
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    if not settings.default_allocator:
        keep_freed_memory()
    if settings.device == "cuda":
        torch.backends.cudnn.benchmark = True
    if diffusers is not None:
        diffusers.utils.logging.set_verbosity_error()
    print(machine(settings), end="\n\n", flush=True)
    modes = ("eager", "compiled") if settings.compile else ("eager",)
    for case in settings.cases:
        generator = torch.Generator().manual_seed(0)
        data = {
            "x0": torch.rand(settings.batch, 3, 32, 32, generator=generator) * 2 - 1,
            "eps": torch.randn(settings.batch, 3, 32, 32, generator=generator),
            "t": torch.randint(0, 1000, (settings.batch,), generator=generator),
        }
        data = {name: value.to(settings.device) for name, value in data.items()}
        torch.manual_seed(0)
        weights = None
        if diffusers is not None:
            weights = diffusers.UNet2DModel(**CASES[case]).state_dict()
            print(compare_outputs(case, weights, data, settings), end="\n\n", flush=True)
        for precision in settings.precisions or precisions(settings.device):
            contestants = []
            for mode in modes:
                for layout in settings.layouts if mode == "eager" else [best_layout(settings.device, precision)]:
                    contestants.append(ours(case, weights, data, settings, precision, layout, mode))
                    if diffusers is not None:
                        contestants.append(theirs(case, weights, data, settings, precision, layout, mode))
            if ddpm_pytorch is not None:
                contestants += [lucidrains(case, data, settings, precision, layout) for layout in settings.layouts]
            measure(contestants, settings)
            print(table(case, precision, settings.batch, contestants, settings.ddim_steps), end="\n\n", flush=True)
            if settings.profile:
                print(profile(case, weights, data, settings, precision), end="\n\n", flush=True)
        share = share_outside_network(case, weights, data, settings)
        print(f"{share:.1%} of the DDIM run is spent outside the network (goal: under 5%).", end="\n\n", flush=True)


if __name__ == "__main__":
    main()
