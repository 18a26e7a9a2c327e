from __future__ import annotations

import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import workspace
from pipelines.workspace import (
    current_workspace,
    git_advice,
    in_project,
    project_root,
    project_run_settings,
    resolve_root,
    workspace_id,
)
from tests.conftest import ROOT


def make(folder: Path, **files: str) -> Path:
    """Make a folder that looks like a project."""
    for name in ("dvc.yaml", "params.yaml"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def temporary_workspace(project: Path, kind: str, inside: str = "") -> Path:
    """Make the folder that DVC runs an experiment of ``project`` in."""
    made = project / ".dvc" / "tmp" / "exps" / kind
    (made / ".dvc").mkdir(parents=True)
    return make(made / inside)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project, which is the working folder."""
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.delenv("REDIFFUSE_RUN", raising=False)
    made = make(tmp_path / "project")
    monkeypatch.chdir(made)
    return made


def test_project_is_found_from_every_subfolder(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert project_root() == project
    assert in_project("runs") == Path("runs")
    below = project / "notebooks" / "mine"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    assert project_root() == project
    assert in_project("runs") == project / "runs"
    monkeypatch.chdir(project.parent)
    assert project_root() == project.parent, "without a project it is the working folder"


@pytest.mark.parametrize("kind", ["standalone/tmpab12", "tmpab12"])
@pytest.mark.parametrize("inside", ["", "notebooks"])
def test_temporary_workspace_belongs_to_the_project_that_started_it(
    project: Path, kind: str, inside: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = temporary_workspace(project, kind)
    (made / inside).mkdir(exist_ok=True)
    monkeypatch.chdir(made / inside)
    assert project_root() == project
    assert in_project("mlflow.db") == project / "mlflow.db"


def test_project_in_a_subfolder_of_the_repository_is_found_from_its_temporary_workspace(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(project / "sub")
    monkeypatch.chdir(temporary_workspace(project, "tmpab12", "sub"))
    assert project_root() == project / "sub"


def test_temporary_workspace_on_another_disk_belongs_to_the_project(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = project.parent / "disk"
    (project / ".dvc").mkdir()
    disk.mkdir()
    (project / ".dvc" / "tmp").symlink_to(disk)
    made = temporary_workspace(project, "tmpab12")
    monkeypatch.chdir(made)
    assert Path.cwd() == disk / "exps" / "tmpab12"
    monkeypatch.setenv("DVC_ROOT", str(project))
    assert project_root() == project
    monkeypatch.chdir(project)
    assert project_root() == project, "DVC sets the variable for every stage"


def test_state_of_a_temporary_workspace_lies_in_the_project(project: Path) -> None:
    code = (
        "from pipelines.identity import identify, open_state; from pipelines.stage import LISTING_RECORDS, stage_lock\n"
        "from pipelines.cluster import state_storage\n"
        "state = open_state(identify('train', {}, {}, [open_state]))\n"
        "with stage_lock('train'): pass\n"
        "print(state.folder, LISTING_RECORDS, state_storage('runs', 'train', state), sep='\\n')"
    )
    made = temporary_workspace(project, "tmpab12")
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=made,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    folder, records, storage = result.stdout.splitlines()
    assert Path(folder).parent == project / "runs" / "train"
    assert (records, storage) == (str(project / "runs" / "prepared"), folder)
    assert (project / "runs" / "train.lock").exists()
    assert not (made / "runs").exists()


def test_relative_data_roots_belong_to_the_project(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_root("data") == Path("data")
    assert resolve_root("/data") == Path("/data")
    monkeypatch.setenv("HOME", str(project.parent))
    assert resolve_root("~/data") == project.parent / "data"
    made = temporary_workspace(project, "tmpab12")
    monkeypatch.chdir(made)
    assert resolve_root("data") == project / "data"
    (made / "versioned").mkdir()
    assert resolve_root("versioned") == Path("versioned"), "only the experiment has it"
    (project / "versioned").mkdir()
    assert resolve_root("versioned") == project / "versioned", "git may hold a part of the folder only"
    assert in_project("~/state") == project.parent / "state"
    with pytest.raises(ValueError, match="there is no home folder ~nobody-here"):
        in_project("~nobody-here/state")


def test_every_command_reads_the_run_settings_of_the_project(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert project_run_settings().tracking.uri is None
    (project / "run.yaml").write_text("tracking: {uri: http://server}\n")
    (project / "other.yaml").write_text("tracking: {uri: http://other}\n")
    (project / "below").mkdir()
    made = temporary_workspace(project, "tmpab12")
    for folder in (project, project / "below", made):
        monkeypatch.chdir(folder)
        monkeypatch.delenv("REDIFFUSE_RUN", raising=False)
        assert project_run_settings().tracking.uri == "http://server"
        monkeypatch.setenv("REDIFFUSE_RUN", "other.yaml")
        assert project_run_settings().tracking.uri == "http://other"
        monkeypatch.setenv("REDIFFUSE_RUN", "none.yaml")
        with pytest.raises(ValueError, match=r"none\.yaml"):
            project_run_settings()
    monkeypatch.delenv("REDIFFUSE_RUN")
    (made / "run.yaml").write_text("tracking: {uri: http://experiment}\n")  # as `dvc exp run -S run.yaml:...` does
    assert project_run_settings().tracking.uri == "http://experiment"


def test_workspace_keeps_its_name_until_it_is_copied(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = workspace_id()
    assert name == workspace_id() != ""
    monkeypatch.chdir(temporary_workspace(project, "tmpab12"))
    assert workspace_id() == name, "an experiment's runs are the project's"
    copy = project.parent / "copy"
    shutil.copytree(project, copy)
    monkeypatch.chdir(copy)
    own = current_workspace()
    assert own.id != name
    assert (own.former_roots, own.former_ids) == ((str(project),), (name,))
    assert current_workspace() == own
    monkeypatch.chdir(project)
    assert workspace_id() == name


def test_moved_workspace_keeps_its_name_and_remembers_where_it_was(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = workspace_id()
    places = [project, project.parent / "b c", project.parent / "project-2", project]
    for old, new in itertools.pairwise(places):
        old.rename(new)
        monkeypatch.chdir(new)
        moved = current_workspace()
        assert (moved.id, moved.root, moved.former_ids) == (name, str(new), ())
    assert moved.former_roots == (str(places[1]), str(places[2])), "it is back at the first place"


def test_copy_whose_original_was_renamed_before_it_ran_is_only_a_move(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = workspace_id()
    shutil.copytree(project, project.parent / "copy")
    shutil.rmtree(project)
    monkeypatch.chdir(project.parent / "copy")
    assert workspace_id() == name


def test_link_at_the_old_place_does_not_make_the_project_a_copy(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = current_workspace()
    project.rename(project.parent / "disk")
    project.symlink_to(project.parent / "disk")
    monkeypatch.chdir(project)
    assert current_workspace() == before


@pytest.mark.parametrize("same_place", [True, False])
def test_copy_on_another_host_has_a_name_of_its_own(
    project: Path, same_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = workspace_id()
    copy = project.parent / "copy"
    shutil.copytree(project, copy)
    shutil.rmtree(project)  # another host does not see it
    here = copy.rename(project) if same_place else copy
    monkeypatch.chdir(here)
    monkeypatch.setattr(socket, "gethostname", lambda: "another")
    own = current_workspace()
    assert own.id != name and own.former_ids == (name,)
    assert own.former_roots == (() if same_place else (str(project),))


def test_other_host_or_container_with_the_same_file_system_runs_the_same_workspace(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = workspace_id()
    monkeypatch.setattr(socket, "gethostname", lambda: "node-2")
    assert workspace_id() == name
    project.rename(project.parent / "mounted-elsewhere")
    monkeypatch.chdir(project.parent / "mounted-elsewhere")
    assert workspace_id() == name


@pytest.mark.parametrize("text", ["", "3f2a9c0d1e\n", "[]", "{}", '{"id": 1}', "1234567890123"])
def test_damaged_record_is_replaced(project: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    (project / "runs").mkdir()
    (project / "runs" / "workspace").write_text(text)
    name = workspace_id()
    assert json.loads((project / "runs" / "workspace").read_text())["id"] == name == workspace_id()
    assert [record.message for record in caplog.records] == [
        "runs/workspace is damaged: this project gets a new name for its MLflow runs"
    ]


def test_record_of_an_earlier_version_keeps_its_name(project: Path, caplog: pytest.LogCaptureFixture) -> None:
    (project / "runs").mkdir()
    (project / "runs" / "workspace").write_text("3f2a9c0d1e4b\n")
    assert workspace_id() == "3f2a9c0d1e4b" == json.loads((project / "runs" / "workspace").read_text())["id"]
    assert not caplog.records


def test_two_first_stages_agree_on_the_name(project: Path) -> None:
    code = "from pipelines.workspace import workspace_id; print(workspace_id())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    both = [
        subprocess.Popen([sys.executable, "-c", code], cwd=project, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    first, second = (process.communicate()[0].strip() for process in both)
    assert first == second != ""


def test_project_without_git_is_told_what_dvc_needs(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "_git_folder", lambda root: None)
    assert "dvc config --local core.no_scm true" in str(git_advice())
    (project / ".dvc").mkdir()
    (project / ".dvc" / "config").write_text("[core]\n    analytics = false\n")
    assert git_advice() is not None
    (project / ".dvc" / "config.local").write_text("[core]\n    no_scm = true\n")
    assert git_advice() is None
    (project / ".dvc" / "config.local").unlink()
    monkeypatch.undo()
    (project / ".git").mkdir()
    monkeypatch.chdir(project)
    assert git_advice() is None
