"""Projects in temporary folders: the real code, dvc.yaml and params.yaml, with small budgets."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from ruamel.yaml import YAML

from pipelines.stage import quiet_environment

quiet_environment()  # `uv run pytest` makes Ray start each worker with `uv run` otherwise
settings.register_profile(
    "no deadline", deadline=None
)  # on a busy machine, examples take longer than hypothesis allows
settings.load_profile("no deadline")
if "PYTEST_XDIST_WORKER" in os.environ:  # two files at a time: threads of both would wait for the same two cores
    torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"
COPIED = ("pipelines", "diffusion_core", "dvc.yaml", "params.yaml", "run.yaml", "run", "preset", "budget", ".dvcignore")
PARAMS_READ = "runs/params_read.txt"
SMOKE_RUN = {"train": {"log_every": 2, "checkpoint_every": 12, "sample_every": 24}}
"""run.yaml of test projects: few checkpoints, because each report to Ray Train takes half a second."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest file first: the other processes take the rest meanwhile."""
    items.sort(key=lambda item: item.path.name != "test_pipeline.py")


def merge(tree: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Put nested changes into a tree of settings; a dotted key reaches down."""
    for key, value in changes.items():
        *parents, last = key.split(".")
        inner = tree
        for parent in parents:
            inner = inner.setdefault(parent, {})
        if isinstance(value, Mapping) and isinstance(inner.get(last), dict):
            merge(inner[last], value)
        else:
            inner[last] = value


@dataclass
class Project:
    """A working copy of the project that stages run in."""

    folder: Path

    def environment(self, **more: str) -> dict[str, str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "REDIFFUSE_"))}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        environment["GIT_CONFIG_GLOBAL"] = os.devnull
        return {**environment, **more}

    @property
    def params(self) -> dict[str, Any]:
        return YAML(typ="safe").load(self.folder / "params.yaml")

    def change(self, **changes: Any) -> None:
        """Change params.yaml; a double underscore in a name stands for the dot."""
        tree = self.params
        merge(tree, {key.replace("__", "."): value for key, value in changes.items()})
        with open(self.folder / "params.yaml", "w", encoding="utf-8") as file:
            YAML().dump(tree, file)

    def change_run(self, **changes: Any) -> None:
        """Change run.yaml in the same way."""
        path = self.folder / "run.yaml"
        tree = YAML(typ="safe").load(path) or {}
        merge(tree, {key.replace("__", "."): value for key, value in changes.items()})
        with open(path, "w", encoding="utf-8") as file:
            YAML().dump(tree, file)

    def start(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        """Start a command in its own session, with its output in a file that ``output`` reads."""
        log = open(self.folder / "command.log", "a+", encoding="utf-8")  # noqa: SIM115
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment(**environment),
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *command: str, check: bool = True, timeout: float = 600, **environment: str) -> str:
        """Run a command to its end and return its output."""
        result = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment(**environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check and result.returncode != 0:
            raise AssertionError(f"{' '.join(command)} ended with {result.returncode}:\n{result.stdout[-6000:]}")
        return result.stdout

    def stage(self, name: str, **options: Any) -> str:
        return self.run(sys.executable, "-m", f"pipelines.{name}", **options)

    def repro(self, *arguments: str, **options: Any) -> str:
        return self.run("dvc", "repro", *arguments, **options)

    def output(self) -> str:
        return (self.folder / "command.log").read_text(encoding="utf-8", errors="replace")

    def commit(self) -> None:
        self.run("git", "add", "-A")
        self.run("git", "-c", "user.name=t", "-c", "user.email=t@t.invalid", "commit", "-qm", "state")


def make_project(folder: Path, *, run: Mapping[str, Any] | None = None, **changes: Any) -> Project:
    """A project with the smoke budget and these changes of params.yaml and run.yaml, under git and DVC."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, folder / name)
    (folder / ".dvc").mkdir()
    shutil.copy2(ROOT / ".dvc" / "config", folder / ".dvc" / "config")
    shutil.copy2(ROOT / ".dvc" / ".gitignore", folder / ".dvc" / ".gitignore")
    shutil.copytree(ROOT / ".dvc" / "plots", folder / ".dvc" / "plots")
    shutil.copy2(ROOT / ".gitignore", folder / ".gitignore")
    project = Project(folder)
    smoke = YAML(typ="safe").load(folder / "budget" / "smoke.yaml")
    tree = project.params
    merge(tree, smoke)
    merge(tree, {key.replace("__", "."): value for key, value in changes.items()})
    with open(folder / "params.yaml", "w", encoding="utf-8") as file:
        YAML().dump(tree, file)
    with open(folder / "run.yaml", "w", encoding="utf-8") as file:
        run_tree = {section: dict(values) for section, values in SMOKE_RUN.items()}
        merge(run_tree, run or {})
        YAML().dump(run_tree, file)
    project.run("git", "init", "-q", "-b", "main")
    project.commit()
    return project


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    """A fresh project with the smoke budget."""
    made = make_project(tmp_path / "project")
    yield made
    kill_everything(made)


@pytest.fixture(scope="session")
def finished_project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A project whose whole pipeline has been run once. Tests that change it must use `copied_project`."""
    made = make_project(tmp_path_factory.mktemp("finished") / "project")
    made.repro(REDIFFUSE_PARAMS_READ=str(made.folder / PARAMS_READ))
    made.commit()
    yield made
    kill_everything(made)


@pytest.fixture
def copied_project(finished_project: Project, tmp_path: Path) -> Iterator[Project]:
    """A copy of the finished project that a test may change. Its MLflow store is its own."""
    copy = tmp_path / "copy"
    shutil.copytree(finished_project.folder, copy, symlinks=True)
    made = Project(copy)
    yield made
    kill_everything(made)


def wait_until(condition: Callable[[], Any], seconds: float, what: str, project: Project | None = None) -> Any:
    """Poll until the condition is true and return its value. Fail with the project's output after ``seconds``."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds:.0f} s: {what}\n{project.output()[-4000:] if project else ''}")


def processes_of(project: Project) -> list[int]:
    """Every process whose working directory is in the project: stages, Ray's own processes, and workers."""
    import psutil

    found = []
    for process in psutil.process_iter():
        try:
            inside = process.cwd().startswith(str(project.folder))
        except (psutil.Error, OSError):
            continue
        if inside and process.pid != os.getpid():
            found.append(process.pid)
    return found


def kill_everything(project: Project) -> None:
    """Send SIGKILL to all processes of the project until none is left."""
    for _ in range(50):
        pids = processes_of(project)
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if not pids:
            return
        time.sleep(0.1)
