"""Console script ``rediffuse``: doctor, sample."""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.stage import REGISTRATION, one_line_errors, quiet_environment

if TYPE_CHECKING:
    from torch import Tensor

    from diffusion_core.artifact import DiffusionModel
    from diffusion_core.generation import SamplerSettings
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
JUDGED_WITH = ("steps", "eta", "guidance_scale", "spacing")
UNCONDITIONAL_NUM = 16
LONGEST_NAME = 60
"""Characters of a class name in a file name."""


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
        allow_abbrev=False,
        help="show versions, devices, settings, Ray, MLflow and storage: paste it into a bug report",
        description="Show versions, devices, settings, Ray, MLflow and storage, for bug reports. Changes nothing.",
    )
    doctor_parser.add_argument(
        "--cluster",
        action="store_true",
        help="test the Ray cluster of ray.address or RAY_ADDRESS (without either, a local Ray) for about a minute: every node, one "
        "DDP step, one sampling unit, one write to MLflow. Exit status 1 if anything is wrong",
    )
    doctor_parser.set_defaults(work=doctor)
    sample_parser = commands.add_parser(
        "sample",
        allow_abbrev=False,
        help="sample images from a trained model",
        description="Sample images from a trained model. The same seed and labels give the same images for any batch size. "
        "What is not given (steps, eta, guidance scale, spacing) is as the gate judged the model: a registered version knows it, "
        "and a model directory has it in registration.json beside it. Otherwise: deterministic, at most 50 steps.",
        epilog="example: rediffuse sample artifacts/model --labels 3,7 --num 64 --steps 50 --seed 0 --output picture.png",
    )
    sample_parser.add_argument(
        "model", help="a model directory, or models:/NAME@champion or models:/NAME/VERSION in MLflow's registry"
    )
    classes = sample_parser.add_mutually_exclusive_group()
    classes.add_argument(
        "--labels",
        help="class names, separated by commas, taken in turn (default: every class). Quote a name that holds a comma or "
        "starts with a quote, as in a CSV file: --labels '\"cat, black\",dog'",
    )
    classes.add_argument("--class-indices", help="class indices from 0, separated by commas, instead of names")
    sample_parser.add_argument(
        "--num",
        type=int,
        help=f"number of images (default: each class or label once, {UNCONDITIONAL_NUM} of a model without classes)",
    )
    sample_parser.add_argument(
        "--first",
        type=int,
        default=0,
        help="number of the first sample: --num 20 --first 20 continues --num 20 of the same seed (default: %(default)s)",
    )
    sample_parser.add_argument("--steps", type=int, help="sampling steps")
    sample_parser.add_argument("--eta", help="0 (deterministic) to 1 (DDPM), or sigma_hat (DDPM's larger variance)")
    sample_parser.add_argument("--guidance-scale", type=float, help="1: conditional, 0: unconditional, above 1: guided")
    sample_parser.add_argument("--spacing", help="uniform, leading, trailing, linspace or quadratic")
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
        default="samples.png",
        help="a .png for one picture of all images, or a folder for single files (default: %(default)s). A name with a dot is a "
        "folder if it is one already or ends in /. A folder that holds files is refused",
    )
    sample_parser.add_argument(
        "--overwrite", action="store_true", help="replace the .png files of the output folder, all of them"
    )
    sample_parser.set_defaults(work=sample)
    return parser


def sample(arguments: argparse.Namespace) -> None:
    """Sample images, and write them as one picture or as single files."""
    import torch
    from tqdm import tqdm

    from diffusion_core.generation import MOST_INDICES, generate, rows_per_call
    from diffusion_core.networks.memory import keep_freed_memory
    from diffusion_core.storage import atomic_path
    from pipelines.devices import driver_device
    from pipelines.pictures import picture_of, png
    from pipelines.workspace import home_expanded

    for name, lowest in (("num", 1), ("first", 0), ("batch_size", 1)):
        given = getattr(arguments, name)
        if given is not None and given < lowest:
            raise ValueError(f"--{name.replace('_', '-')}: given {given}, allowed at least {lowest}")
    output = home_expanded(arguments.output)
    is_folder = _check_output(output, arguments.output.endswith(("/", os.sep)), arguments.overwrite)
    keep_freed_memory()
    device = arguments.device or str(driver_device())
    model, judged = _load_model(arguments.model, device)
    settings = _sampler_settings(arguments, judged)
    chosen = _chosen_classes(arguments, model)
    num = arguments.num or (UNCONDITIONAL_NUM if chosen is None else len(chosen))
    first, end = arguments.first, arguments.first + num
    if end > MOST_INDICES:
        raise ValueError(f"--first: given {first} with {num} images, allowed samples up to number {MOST_INDICES - 1}")
    numbers = torch.arange(first, end)
    labels = None if chosen is None else chosen[numbers % len(chosen)]
    images = torch.empty((num, *model.image_shape), dtype=torch.uint8)
    block_size = rows_per_call(torch.device(device).type, min(num, arguments.batch_size))
    with tqdm(total=num, unit="image", desc=f"{settings.steps} steps, eta {settings.eta}") as bar:
        for rows in torch.arange(num).split(arguments.batch_size):
            condition = None if labels is None else labels[rows]
            blocks = generate(model, condition, numbers[rows], settings, seed=arguments.seed, block_size=block_size)
            for positions, block in blocks:
                images[rows[positions]] = block
                bar.update(len(positions))
    if is_folder:
        names = _file_names(model.class_names or [str(index) for index in range(model.condition.size)])
        digits = len(str(end - 1))
        stems = [f"{number:0{digits}d}" for number in numbers.tolist()]
        if labels is not None:
            stems = [f"{stem}-{names[label]}" for stem, label in zip(stems, labels.tolist(), strict=True)]
        pictures = (png(picture_of(image[None], columns=1, scale=1, gap=0)) for image in images)
        _write_set(output, zip((f"{stem}.png" for stem in stems), pictures, strict=True))
    else:
        with atomic_path(output) as temporary:
            temporary.write_bytes(png(picture_of(images, columns=min(8, num))))
    used = f"{settings.steps} steps, eta {settings.eta}, guidance {settings.guidance_scale:g}, {settings.spacing}"
    print(f"{num} images of {model.image_size}x{model.image_size} ({used}): {output}")


def _sampler_settings(arguments: argparse.Namespace, judged: SamplerSettings) -> SamplerSettings:
    """Return the requested sampler settings; what was not given is as ``judged``."""
    given = {name: getattr(arguments, name) for name in JUDGED_WITH if getattr(arguments, name) is not None}
    if given.get("eta", "sigma_hat") != "sigma_hat":
        try:
            given["eta"] = float(given["eta"])
        except ValueError:
            raise ValueError(f"--eta: given {given['eta']!r}, allowed a number from 0 to 1, or sigma_hat") from None
    return replace(judged, **given)


def _chosen_classes(arguments: argparse.Namespace, model: DiffusionModel) -> Tensor | None:
    """Return the class indices to take in turn: the given ones, or all. None for a model without a condition."""
    import torch

    from diffusion_core.condition_encoding import encode_class_indices, encode_classes

    kind = model.condition.kind
    if kind not in ("class", "none"):
        raise ValueError(
            f"{arguments.model} takes a condition of kind {kind}, this command samples classes only: "
            "use diffusion_core.generation.generate_images"
        )
    for option, given in (("--labels", arguments.labels), ("--class-indices", arguments.class_indices)):
        if given is not None and kind == "none":
            raise ValueError(f"{option}: {arguments.model} takes no condition, it has no classes")
    if kind == "none":
        return None
    if arguments.labels is not None:
        return encode_classes(_fields(arguments.labels, "--labels"), model.class_names)
    if arguments.class_indices is not None:
        return encode_class_indices(_fields(arguments.class_indices, "--class-indices"), model.condition.size)
    return torch.arange(model.condition.size)


def _fields(text: str, option: str) -> list[str]:
    """Split a list at its commas, as a line of a CSV file. Raises ValueError if it is empty or a quote stays open."""
    text = re.sub(r'"\s+(?=,|$)', '"', text)  # blanks after a quoted name
    try:
        fields = [field for line in csv.reader([text], skipinitialspace=True, strict=True) for field in line]
    except csv.Error as error:
        raise ValueError(f"{option}: given {text!r}, which is not a list separated by commas ({error})") from None
    if not fields:
        raise ValueError(f"{option}: given nothing, allowed a list separated by commas")
    return fields


def _check_output(output: Path, ends_in_slash: bool, overwrite: bool) -> bool:
    """Return whether the output is a folder.

    Raises ValueError if it is neither a folder nor a .png, or a folder with other content than this set may replace.
    """
    if output.is_dir():
        found = sorted(path for path in output.iterdir() if not path.name.startswith("."))
        if found and not overwrite:
            raise ValueError(
                f"--output: {output} already holds {found[0].name}{' and more' if len(found) > 1 else ''}: give a new or empty "
                "folder, or --overwrite to replace its images"
            )
        others = [path for path in found if path.is_dir() or path.suffix.lower() != ".png"]
        if others:
            raise ValueError(f"--output: {output} holds {others[0].name}, which is no .png file: give another folder")
        return True
    if output.exists() and (ends_in_slash or output.suffix.lower() != ".png"):
        raise ValueError(f"--output: {output} is a file, allowed a name that ends in .png, or a folder")
    if ends_in_slash or not output.suffix:
        return True
    if output.suffix.lower() != ".png":
        raise ValueError(
            f"--output: given {output}, allowed a name that ends in .png, or a folder (a new one with a dot ends in /)"
        )
    return False


def _file_names(class_names: Sequence[str]) -> list[str]:
    """Return a part of a file name per class. Those that would be equal, also without case, end in a dot and the class index."""
    plain = ["".join(c if c.isalnum() or c in "-_" else "_" for c in name)[:LONGEST_NAME] for name in class_names]
    folded = [name.casefold() for name in plain]
    counts = {name: folded.count(name) for name in set(folded)}
    return [
        name if counts[fold] == 1 else f"{name}.{index}"
        for index, (name, fold) in enumerate(zip(plain, folded, strict=True))
    ]


def _write_set(folder: Path, files: Iterable[tuple[str, bytes]]) -> None:
    """Write the files as a set: the folder gets all of them, instead of the .png files that it holds, or it stays as it is."""
    from diffusion_core.storage import atomic_folder

    if not folder.exists():
        with atomic_folder(folder) as temporary:
            for name, content in files:
                (temporary / name).write_bytes(content)
        return
    partial = (
        folder / ".partial"
    )  # inside, because the folder may be a mount or the working folder, which no rename replaces
    with atomic_folder(partial) as temporary:
        for name, content in files:
            (temporary / name).write_bytes(content)
    for path in folder.iterdir():
        if path.suffix.lower() == ".png" and not path.name.startswith("."):
            path.unlink()
    for path in partial.iterdir():
        path.replace(folder / path.name)
    partial.rmdir()


def _load_model(source: str, device: str) -> tuple[DiffusionModel, SamplerSettings]:
    """Load a DiffusionModel from a directory or from MLflow's registry, and the sampler settings that the gate judged it with.

    The settings of a directory are in registration.json beside it, if the gate judged these weights, else `default_settings`.
    """
    from diffusion_core.artifact import DiffusionModel
    from diffusion_core.generation import default_settings

    if not source.startswith("models:/"):
        model = DiffusionModel.load(Path(source), device)
        return model, _registered_settings(Path(source)) or default_settings(model)
    from pipelines.registry.registration import download_model, judged_settings
    from pipelines.tracking import connect_to_read
    from pipelines.workspace import project_run_settings

    connect_to_read(project_run_settings().tracking)
    with tempfile.TemporaryDirectory() as folder:
        model = DiffusionModel.load(download_model(source, Path(folder)), device)
        return model, judged_settings(Path(folder)) or default_settings(model)


def _registered_settings(folder: Path) -> SamplerSettings | None:
    """Return the sampler settings that the gate judged the weights in ``folder`` with, or None if it did not."""
    from diffusion_core.generation import SamplerSettings
    from diffusion_core.storage import read_json

    path = folder.resolve().with_name(REGISTRATION.name)
    if not path.exists():
        return None
    registration, description = read_json(path), read_json(folder / "model.json")
    if not isinstance(registration, dict) or registration.get("model_digest") != description["weights_sha256"]:
        return None
    candidate = registration.get("candidate")
    if not isinstance(candidate, dict) or not set(JUDGED_WITH) <= candidate.keys():
        raise ValueError(
            f"{path} is damaged: its candidate has no {', '.join(JUDGED_WITH)}; run the register stage again"
        )
    return SamplerSettings(**{name: candidate[name] for name in JUDGED_WITH})


def doctor(arguments: argparse.Namespace) -> None:
    """Show versions, devices, settings, Ray, MLflow and storage; with --cluster, test the cluster instead."""
    if arguments.cluster:
        _test_cluster()
        return
    from pipelines.params import PARAMS_PATH, RunSettings, load_params, run_settings_path
    from pipelines.tracking import changed_store, registry_uri, tracking_uri, without_credentials
    from pipelines.workspace import git_advice, in_project, project_root, project_run_settings

    _show("system", f"{platform.platform()}, Python {platform.python_version()}")
    _show("uv", _uv_version())
    for package in PACKAGES:
        try:
            _show(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            _show(package, "not installed")
    _show_devices()
    root = project_root()
    for name, path in (
        ("project disk", root),
        ("temporary disk", Path(tempfile.gettempdir())),
        ("shared memory", Path("/dev/shm")),
    ):
        if path.exists():
            _show(name, f"{shutil.disk_usage(path).free / 2**30:.0f} GiB free")
    _show("project", f"{root}, writable: {'yes' if os.access(root, os.W_OK) else 'no'}")
    if advice := git_advice():
        _show("git", advice)
    params_path = root / PARAMS_PATH
    if params_path.exists():
        _show("params.yaml", _validity(lambda: load_params(params_path)))
    else:
        _show("params.yaml", "not found: run this in the project's folder")
    run, run_path = RunSettings(), in_project(run_settings_path())
    state = _validity(project_run_settings)
    if state == "valid":
        run = project_run_settings()
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


def _test_cluster() -> None:
    """Print the table of the cluster's self-test. Exit status 1 if anything is wrong."""
    from pipelines.cluster_check import check_cluster
    from pipelines.workspace import project_run_settings

    if not check_cluster(project_run_settings(), lambda row: print(row, flush=True)):
        sys.exit(1)


def _show(name: str, value: object) -> None:
    print(f"{name:<22}{value}")


def _show_devices() -> None:
    import torch

    from pipelines.cpu_quota import usable_cpus
    from pipelines.devices import best_precision

    cpu = torch.device("cpu")
    cores = usable_cpus()
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
    from pipelines.tracking import database_of, without_credentials

    path = database_of(uri)
    if path is not None:
        size = f"{path.stat().st_size / 2**20:.1f} MiB" if path.exists() else "not created yet"
        return f"{without_credentials(uri)} ({size})"
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
        with ray_session(ray_run, compare=False):
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
