"""Console script ``rediffuse``: doctor, sample."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.stage import one_line_errors, quiet_environment

if TYPE_CHECKING:
    from diffusion_core.artifact import DiffusionModel
    from pipelines.params import RayRun

PACKAGES = (
    "rediffuse",
    "torch",
    "torchvision",
    "ray",
    "mlflow",
    "dvc",
    "torch-fidelity",
    "optuna",
    "pandas",
    "numpy",
)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script."""
    quiet_environment()
    parser = _parser()
    parsed = parser.parse_args(arguments)
    with one_line_errors(f"rediffuse {parsed.command}"):
        parsed.work(parsed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rediffuse", description="Reproducible training and evaluation of conditional image diffusion models."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    doctor_parser = commands.add_parser(
        "doctor",
        help="show versions, devices, settings, Ray, MLflow and storage: paste it into a bug report",
        description="Show versions, devices, settings, Ray, MLflow and storage, for bug reports. Changes nothing.",
    )
    doctor_parser.set_defaults(work=doctor)
    sample_parser = commands.add_parser(
        "sample",
        help="sample images from a trained model",
        description="Sample images from a trained model. The same seed and labels give the same images for any batch size.",
        epilog="example: rediffuse sample artifacts/model --labels 3,7 --num 64 --steps 50 --seed 0 --output picture.png",
    )
    sample_parser.add_argument(
        "model", help="a model directory, or models:/NAME@champion or models:/NAME/VERSION in MLflow's registry"
    )
    sample_parser.add_argument(
        "--labels", help="class indices or names, separated by commas, taken in turn (default: every class)"
    )
    sample_parser.add_argument("--num", type=int, default=64, help="number of images (default: %(default)s)")
    sample_parser.add_argument("--steps", type=int, default=50, help="sampling steps (default: %(default)s)")
    sample_parser.add_argument(
        "--eta", default="0", help="0 (deterministic) to 1 (DDPM), or sigma_hat (default: %(default)s)"
    )
    sample_parser.add_argument(
        "--guidance-scale",
        type=float,
        default=1.0,
        help="1: conditional, 0: unconditional, above 1: guided (default: %(default)s)",
    )
    sample_parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    sample_parser.add_argument(
        "--batch-size",
        type=int,
        default=64,
        help="images held at a time; changes memory, not the images, except for rounding on a GPU (default: %(default)s)",
    )
    sample_parser.add_argument("--device", help="cpu, cuda, ... (default: cuda if there is a GPU)")
    sample_parser.add_argument(
        "--output",
        type=Path,
        default=Path("samples.png"),
        help="a .png for one picture of all images, or a folder for single files (default: %(default)s)",
    )
    sample_parser.set_defaults(work=sample)
    return parser


def sample(arguments: argparse.Namespace) -> None:
    """Sample images, and write them as one picture or as single files."""
    import torch
    from tqdm import tqdm

    from diffusion_core.condition_encoding import encode_classes
    from diffusion_core.generation import SamplerSettings, generate, rows_per_call
    from diffusion_core.networks.memory import keep_freed_memory
    from diffusion_core.storage import atomic_path
    from pipelines.devices import driver_device
    from pipelines.pictures import picture_of, png

    for name in ("num", "batch_size"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: given {getattr(arguments, name)}, allowed at least 1")
    if arguments.output.suffix and arguments.output.suffix.lower() != ".png":
        raise ValueError(f"--output: given {arguments.output}, allowed a name that ends in .png, or a folder")
    keep_freed_memory()
    device = arguments.device or str(driver_device())
    model = _load_model(arguments.model, device)
    if model.condition.kind != "class":
        raise ValueError(
            f"{arguments.model} takes a condition of kind {model.condition.kind}, this command samples classes only: "
            "use diffusion_core.generation.generate_images"
        )
    class_names = model.class_names or [str(index) for index in range(model.condition.size)]
    try:
        eta = arguments.eta if arguments.eta == "sigma_hat" else float(arguments.eta)
    except ValueError:
        raise ValueError(f"--eta: given {arguments.eta!r}, allowed a number from 0 to 1, or sigma_hat") from None
    settings = SamplerSettings(steps=arguments.steps, eta=eta, guidance_scale=arguments.guidance_scale)
    if arguments.labels:
        chosen = encode_classes(arguments.labels.split(","), class_names)
    else:  # not encoded: a class may be named by a number
        chosen = torch.arange(len(class_names))
    labels = chosen[torch.arange(arguments.num) % len(chosen)]
    images = torch.empty((arguments.num, *model.image_shape), dtype=torch.uint8)
    block_size = rows_per_call(torch.device(device).type, min(arguments.num, arguments.batch_size))
    with tqdm(total=arguments.num, unit="image", desc=f"{settings.steps} steps, eta {arguments.eta}") as bar:
        for start in range(0, arguments.num, arguments.batch_size):
            indices = torch.arange(start, min(start + arguments.batch_size, arguments.num))
            blocks = generate(model, labels[indices], indices, settings, seed=arguments.seed, block_size=block_size)
            for positions, block in blocks:
                images[indices[positions]] = block
                bar.update(len(positions))
    if arguments.output.suffix:
        with atomic_path(arguments.output) as temporary:
            temporary.write_bytes(png(picture_of(images, columns=min(8, arguments.num))))
    else:
        arguments.output.mkdir(parents=True, exist_ok=True)
        digits = len(str(arguments.num - 1))
        for index, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            name = "".join(c if c.isalnum() or c in "-_" else "_" for c in class_names[label])
            picture = picture_of(image[None], columns=1, scale=1, gap=0)
            (arguments.output / f"{index:0{digits}d}-{name}.png").write_bytes(png(picture))
    print(f"{arguments.num} images of {model.image_size}x{model.image_size}: {arguments.output}")


def _load_model(source: str, device: str) -> DiffusionModel:
    """Load a DiffusionModel from a directory or from MLflow's registry."""
    from diffusion_core.artifact import DiffusionModel

    if not source.startswith("models:/"):
        return DiffusionModel.load(Path(source), device)
    import mlflow
    from mlflow.exceptions import MlflowException

    from pipelines.params import load_run_settings
    from pipelines.tracking import registry_uri, tracking_uri, without_credentials

    tracking = load_run_settings().tracking
    mlflow.set_tracking_uri(tracking_uri(tracking))
    mlflow.set_registry_uri(registry_uri(tracking))
    with tempfile.TemporaryDirectory() as folder:
        try:
            root = Path(mlflow.artifacts.download_artifacts(source, dst_path=folder))
        except MlflowException as error:
            raise ValueError(
                f"{source}: {' '.join(str(error).split())}; the registry is {without_credentials(registry_uri(tracking))}"
            ) from None
        found = sorted(root.rglob("model.json"))
        if not found:
            raise ValueError(f"{source} holds no diffusion model")
        return DiffusionModel.load(found[0].parent, device)


def doctor(arguments: argparse.Namespace) -> None:
    """Show versions, devices, settings, Ray, MLflow and storage."""
    from pipelines.params import PARAMS_PATH, RunSettings, load_params, load_run_settings, run_settings_path
    from pipelines.tracking import changed_store, registry_uri, tracking_uri, without_credentials

    _show("system", f"{platform.platform()}, Python {platform.python_version()}")
    _show("uv", _uv_version())
    for package in PACKAGES:
        try:
            _show(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            _show(package, "not installed")
    _show_devices()
    for name, path in (
        ("project disk", Path.cwd()),
        ("temporary disk", Path(tempfile.gettempdir())),
        ("shared memory", Path("/dev/shm")),
    ):
        if path.exists():
            _show(name, f"{shutil.disk_usage(path).free / 2**30:.0f} GiB free")
    _show("project", f"writable: {'yes' if os.access('.', os.W_OK) else 'no'}")
    if PARAMS_PATH.exists():
        _show("params.yaml", _validity(load_params))
    else:
        _show("params.yaml", "not found: run this in the project's folder")
    run, run_path = RunSettings(), run_settings_path()
    state = _validity(load_run_settings)
    if state == "valid":
        run = load_run_settings()
        state = "valid" if run_path.exists() else "not found: every count is auto"
    _show(str(run_path), state)
    uri, registry = tracking_uri(run.tracking), registry_uri(run.tracking)
    _show("MLflow", _mlflow_state(uri))
    if registry != uri:
        _show("MLflow registry", without_credentials(registry))
    changed = changed_store(run.tracking)
    if changed:
        _show("MLflow history", changed)
    _show("Ray", _ray_state(run.ray))


def _show(name: str, value: object) -> None:
    print(f"{name:<22}{value}")


def _show_devices() -> None:
    import torch

    from pipelines.devices import best_precision

    cpu = torch.device("cpu")
    cores = len(os.sched_getaffinity(0))
    _show("cpu", f"{cores} cores, {torch.backends.cpu.get_cpu_capability()}, precision auto: {best_precision(cpu)}")
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        _show(
            f"cuda:{index}",
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, capability {properties.major}.{properties.minor}, "
            f"precision auto: {best_precision(torch.device('cuda', index))}",
        )
    if not torch.cuda.is_available():
        _show("cuda", "none")


def _uv_version() -> str:
    found = shutil.which("uv")
    if found is None:
        return "not installed"
    result = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)
    return result.stdout.strip().removeprefix("uv ") or "does not run"


def _validity(load: Callable[[], object]) -> str:
    try:
        load()
    except ValueError as error:
        return f"invalid: {error}"
    return "valid"


def _mlflow_state(uri: str) -> str:
    from pipelines.tracking import without_credentials

    if uri.startswith("sqlite:///"):
        path = Path(uri.removeprefix("sqlite:///"))
        return f"{without_credentials(uri)} ({f'{path.stat().st_size / 2**20:.1f} MiB' if path.exists() else 'not created yet'})"
    import mlflow

    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    try:
        mlflow.MlflowClient(uri).search_experiments(max_results=1)
    except Exception as error:
        return f"{without_credentials(uri)} does not answer: {' '.join(str(error).split())[:120]}"
    return f"{without_credentials(uri)} answers"


def _ray_state(ray_run: RayRun) -> str:
    from pipelines.cluster import ray_session

    address = ray_run.address or os.environ.get("RAY_ADDRESS")
    if address in (None, "", "local"):
        return "no ray.address or RAY_ADDRESS: stages start a local Ray on this machine's cores"
    try:
        with ray_session(ray_run):
            import ray

            total = ray.cluster_resources()
            nodes = [node for node in ray.nodes() if node["Alive"]]
            return (
                f"{address} answers: {len(nodes)} node(s), {total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs"
            )
    except ValueError as error:
        return str(error)


if __name__ == "__main__":
    main(sys.argv[1:])
