"""Console script ``rediffuse``: doctor, sample."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path

from pipelines.stage import one_line_errors, quiet_environment


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
        help="show versions, devices, Ray, MLflow and storage: paste it into a bug report",
        description="Show versions, devices, Ray, MLflow and storage, for bug reports. Changes nothing.",
    )
    doctor_parser.set_defaults(work=doctor)
    sample_parser = commands.add_parser(
        "sample",
        help="make images with a trained model",
        description="Make images with a trained model. The same seed and labels give the same images, whatever the batch size.",
        epilog="example: rediffuse sample artifacts/model --labels 3,7 --num 64 --steps 50 --seed 0 --output grid.png",
    )
    sample_parser.add_argument(
        "model", help="a model directory, or models:/NAME@champion, models:/NAME/VERSION in MLflow's registry"
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
        help="images held at a time; changes memory, not the images (default: %(default)s)",
    )
    sample_parser.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    sample_parser.add_argument(
        "--output",
        type=Path,
        default=Path("samples.png"),
        help="a .png for one grid, or a folder for single files (default: %(default)s)",
    )
    sample_parser.set_defaults(work=sample)
    return parser


def sample(arguments: argparse.Namespace) -> None:
    """Make images and write them as one grid or as single files."""
    import torch
    from tqdm import tqdm

    from diffusion_core.generation import SamplerSettings, generate
    from diffusion_core.networks.memory import keep_freed_memory
    from diffusion_core.storage import atomic_path
    from pipelines.training.grids import image_grid, png

    for name in ("num", "batch_size"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: given {getattr(arguments, name)}, allowed at least 1")
    if arguments.output.suffix and arguments.output.suffix.lower() != ".png":
        raise ValueError(f"--output: given {arguments.output}, allowed a name that ends in .png, or a folder")
    keep_freed_memory()
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = _load_model(arguments.model, device)
    try:
        eta = arguments.eta if arguments.eta == "sigma_hat" else float(arguments.eta)
    except ValueError:
        raise ValueError(f"--eta: given {arguments.eta!r}, allowed a number from 0 to 1, or sigma_hat") from None
    settings = SamplerSettings(steps=arguments.steps, eta=eta, guidance_scale=arguments.guidance_scale)
    wanted = arguments.labels.split(",") if arguments.labels else list(range(len(model.class_names)))
    chosen = model.class_labels(wanted)
    labels = chosen[torch.arange(arguments.num) % len(chosen)]
    images = torch.empty((arguments.num, *model.image_shape), dtype=torch.uint8)
    with tqdm(total=arguments.num, unit="image", desc=f"{settings.steps} steps, eta {arguments.eta}") as bar:
        for start in range(0, arguments.num, arguments.batch_size):
            indices = torch.arange(start, min(start + arguments.batch_size, arguments.num))
            for positions, block in generate(model, labels[indices], indices, settings, seed=arguments.seed):
                images[indices[positions]] = block
                bar.update(len(positions))
    if arguments.output.suffix:
        with atomic_path(arguments.output) as temporary:
            temporary.write_bytes(png(image_grid(images, columns=min(8, arguments.num))))
    else:
        arguments.output.mkdir(parents=True, exist_ok=True)
        digits = len(str(arguments.num - 1))
        for index, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            name = "".join(c if c.isalnum() or c in "-_" else "_" for c in model.class_names[label])
            picture = image_grid(image[None], columns=1, scale=1, gap=0)
            (arguments.output / f"{index:0{digits}d}-{name}.png").write_bytes(png(picture))
    print(f"{arguments.num} images of {model.image_size}x{model.image_size}: {arguments.output}")


def _load_model(where: str, device: str):
    """A DiffusionModel from a directory or from MLflow's registry."""
    from diffusion_core.artifact import DiffusionModel

    if not where.startswith("models:/"):
        return DiffusionModel.load(Path(where), device)
    import mlflow
    from mlflow.exceptions import MlflowException

    from pipelines.params import Tracking
    from pipelines.tracking import tracking_uri

    mlflow.set_tracking_uri(tracking_uri(Tracking()))
    with tempfile.TemporaryDirectory() as folder:
        try:
            root = Path(mlflow.artifacts.download_artifacts(where, dst_path=folder))
        except MlflowException as error:
            raise ValueError(
                f"{where}: {' '.join(str(error).split())}; the store is {tracking_uri(Tracking())}"
            ) from None
        found = sorted(root.rglob("model.json"))
        if not found:
            raise ValueError(f"{where} holds no diffusion model")
        return DiffusionModel.load(found[0].parent, device)


def doctor(arguments: argparse.Namespace) -> None:
    """Show versions, devices, Ray, MLflow and storage."""
    import torch

    from pipelines.params import PARAMS_PATH, Tracking, load_params
    from pipelines.tracking import tracking_uri
    from pipelines.training.loop import has_bf16

    def show(name: str, value: object) -> None:
        print(f"{name:<22}{value}")

    show("system", f"{platform.platform()}, Python {platform.python_version()}")
    for package in (
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
    ):
        try:
            show(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            show(package, "not installed")
    show(
        "cpu",
        f"{len(os.sched_getaffinity(0))} cores, {torch.backends.cpu.get_cpu_capability()}, bf16 {'yes' if has_bf16(torch.device('cpu')) else 'no'}",
    )
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            show(
                f"cuda:{index}",
                f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, capability {properties.major}.{properties.minor}",
            )
    else:
        show("cuda", "none")
    for name, path in (
        ("project disk", Path.cwd()),
        ("temporary disk", Path(tempfile.gettempdir())),
        ("shared memory", Path("/dev/shm")),
    ):
        if path.exists():
            show(name, f"{shutil.disk_usage(path).free / 2**30:.0f} GiB free")
    show("project", f"writable: {'yes' if os.access('.', os.W_OK) else 'no'}")
    tracking = Tracking()
    if PARAMS_PATH.exists():
        try:
            tracking = load_params().tracking
            show("params.yaml", "valid")
        except ValueError as error:
            show("params.yaml", f"wrong: {error}")
    else:
        show("params.yaml", "none here: run this in the project's folder")
    show("MLflow", _mlflow_state(tracking_uri(tracking)))
    show("Ray", _ray_state())


def _mlflow_state(uri: str) -> str:
    if uri.startswith("sqlite:///"):
        path = Path(uri.removeprefix("sqlite:///"))
        return f"{uri} ({f'{path.stat().st_size / 2**20:.1f} MiB' if path.exists() else 'not made yet'})"
    import mlflow

    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    try:
        mlflow.MlflowClient(uri).search_experiments(max_results=1)
    except Exception as error:
        return f"{uri} does not answer: {' '.join(str(error).split())[:120]}"
    return f"{uri} answers"


def _ray_state() -> str:
    from pipelines.cluster import ray_session
    from pipelines.params import Ray

    address = os.environ.get("RAY_ADDRESS")
    if not address:
        return "no RAY_ADDRESS: stages start a local Ray on this machine's cores"
    try:
        with ray_session(Ray()):
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
