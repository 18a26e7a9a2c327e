"""Projects that are moved or copied, and DVC's temporary workspaces: the state is the project's."""

from __future__ import annotations

import json
import sqlite3
import sys
from pathlib import Path

import mlflow
import pytest

from tests.conftest import Project, kill_everything, make_project

pytestmark = pytest.mark.slow
CHAMPION = "models:/rediffuse-digits@champion"


def sample(project: Project, output: Path, below: str = "artifacts") -> bytes:
    """Sample from the champion in a subfolder of the project."""
    project.run(
        sys.executable, "-c",
        f"import os, sys; os.chdir({below!r}); from pipelines.cli import main; main(sys.argv[1:])",
        "sample", CHAMPION, "--labels", "3,7", "--num", "4", "--steps", "4", "--output", str(output),
        PYTHONPATH=str(project.folder),
    )  # fmt: skip
    return output.read_bytes()


def files(folder: Path) -> dict[str, int]:
    """When each file that a stage writes was written."""
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for place in ("runs", "mlartifacts", "artifacts", "metrics", "plots")
        for path in (folder / place).rglob("*")
        if path.is_file()
    } | {"mlflow.db": (folder / "mlflow.db").stat().st_mtime_ns}


def champion_of(project: Project) -> str:
    uri = f"sqlite:///{project.folder / 'mlflow.db'}"
    return str(mlflow.MlflowClient(uri, uri).get_model_version_by_alias("rediffuse-digits", "champion").version)


def runs_of(project: Project, stage: str) -> list[tuple[str, str]]:
    """The status and artifact folder of a stage's runs."""
    with sqlite3.connect(project.folder / "mlflow.db") as connection:
        return connection.execute("SELECT status, artifact_uri FROM runs WHERE name = ?", (stage,)).fetchall()


def registration_of(folder: Path) -> dict:
    return json.loads((folder / "artifacts/registration.json").read_text())


def test_moved_project_serves_its_champion_and_resumes_its_state(copied_project: Project, tmp_path: Path) -> None:
    before = sample(copied_project, tmp_path / "before.png")
    name = json.loads((copied_project.folder / "runs/workspace").read_text())["id"]
    project = Project(copied_project.folder.rename(tmp_path / "moved here"))
    try:
        assert sample(project, tmp_path / "after.png") == before
        assert json.loads((project.folder / "runs/workspace").read_text())["id"] == name
        assert "up to date" in project.repro()
        trained = {
            path: time for path, time in files(project.folder).items() if path.endswith("checkpoint.safetensors")
        }
        assert trained
        assert "from the beginning" not in project.stage("train")
        assert trained.items() <= files(project.folder).items(), "nothing was trained again"
        assert "it is already the champion" in project.stage("register")
        assert {status for status, _ in runs_of(project, "train")} == {"FINISHED"}
        assert all(uri.startswith(project.folder.as_uri()) for _, uri in runs_of(project, "train"))
        assert not copied_project.folder.exists()
    finally:
        kill_everything(project)


def test_copy_of_a_project_changes_nothing_in_the_original(
    finished_project: Project, copied_project: Project, tmp_path: Path
) -> None:
    before = files(finished_project.folder)
    sample(copied_project, tmp_path / "copy.png")
    copied_project.change(register__steps=2)
    copied_project.repro("-s", "register")
    assert files(finished_project.folder) == before
    runs = runs_of(copied_project, "register")
    assert len(runs) == 2
    assert all(uri.startswith(copied_project.folder.as_uri()) for _, uri in runs)
    ids = {
        json.loads((each.folder / "runs/workspace").read_text())["id"] for each in (finished_project, copied_project)
    }
    assert len(ids) == 2


@pytest.mark.parametrize("kind", ["--temp", "--queue"])
def test_experiment_in_a_temporary_workspace_keeps_runs_champion_and_state_in_the_project(
    copied_project: Project, kind: str, tmp_path: Path
) -> None:
    folder = copied_project.folder
    before = files(folder)
    copied_project.run("dvc", "exp", "run", kind, "--name", "tried", "-S", "evaluate.num_samples=80")
    if kind == "--queue":
        copied_project.run("dvc", "exp", "run", "--run-all")
    copied_project.run("dvc", "exp", "apply", "tried")
    result = registration_of(folder)
    assert result["candidate"]["num_samples"] == 80
    assert (result["version"], result["champion_version"]) == (1, 1)
    assert "it is already the champion" in result["reason"]
    new = files(folder).keys() - before.keys()
    assert [path for path in new if path.startswith("runs/evaluate/")], "a later run resumes from it"
    (_, first), (status, second) = runs_of(copied_project, "evaluate")
    assert status == "FINISHED"
    assert all(uri.startswith((folder / "mlartifacts").as_uri()) for uri in (first, second))
    assert champion_of(copied_project) == "1"
    assert sample(copied_project, tmp_path / "after.png")
    assert list(folder.glob(".dvc/tmp/exps/**/mlflow.db")) == []


def test_project_without_git_runs_with_the_setting_that_is_advised(tmp_path: Path) -> None:
    project = make_project(tmp_path / "project")
    (project.folder / ".git").rename(tmp_path / "git")
    assert "not a git repository" in project.repro("prepare", check=False)
    advice = [sys.executable, "-c", "from pipelines.workspace import git_advice; print(git_advice())"]
    project.run(*project.run(*advice).split("`")[3].split())
    assert "done in" in project.repro("prepare")
    assert project.run(*advice).strip() == "None"
