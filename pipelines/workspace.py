"""The project that a command works on: its folder, its name, and where it was before.

A command may run in a subfolder of the project, or in a temporary workspace that DVC makes below ``.dvc/tmp/exps`` (`dvc exp run
--temp`, `--queue`) and deletes afterwards. The default MLflow store, ``runs/`` and relative data roots belong to the project itself.
"""

from __future__ import annotations

import configparser
import fcntl
import logging
import os
import re
import socket
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffusion_core.storage import read_json, write_json
from pipelines.params import RunSettings, load_run_settings
from pipelines.params.run_settings import RUN_PATH, RUN_VARIABLE

log = logging.getLogger("rediffuse")

PROJECT_FILES = ("dvc.yaml", "params.yaml")
RECORD = "workspace"


def project_root() -> Path:
    """Return the project's folder (absolute, links resolved), the nearest one at or above the working folder that has dvc.yaml and params.yaml.

    In a temporary workspace it is the project that started the experiment. Without such a folder it is the working folder.
    """
    folder = _versioned_folder()
    return _started_from(folder) or folder


def in_project(path: str | Path) -> Path:
    """Return a path of the project. It stays relative if the working folder is the project's folder. ``~`` is the home folder.

    Raises ValueError as `home_expanded` does.
    """
    root = project_root()
    path = home_expanded(path)
    return path if root == Path.cwd().resolve() else root / path


def home_expanded(path: str | Path) -> Path:
    """Replace ``~`` in the path by the home folder. Raises ValueError if the user or the home folder does not exist."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{path}: there is no home folder {Path(path).parts[0]}; give the whole path") from None


def resolve_root(given: str | Path) -> Path:
    """Return the file or folder that params.yaml names. ``~`` is the home folder; other relative paths belong to the project.

    In a temporary workspace, a path that exists only there is read there. Raises ValueError as `home_expanded` does.
    """
    path, own = home_expanded(given), in_project(given)
    return path if path.exists() and not own.exists() else own


def project_run_settings() -> RunSettings:
    """Return the settings of the project's run.yaml, or of the file that REDIFFUSE_RUN names, from any subfolder.

    An experiment in a temporary workspace may have a run.yaml of its own. Raises ValueError as `load_run_settings` does.
    """
    named = os.environ.get(RUN_VARIABLE)
    if named:
        return load_run_settings(Path(named) if Path(named).exists() else in_project(named))
    own = _versioned_folder() / RUN_PATH
    path = RUN_PATH if RUN_PATH.exists() else own if own.exists() else in_project(RUN_PATH)
    return load_run_settings(path) if path.exists() else RunSettings()


def git_advice() -> str | None:
    """Return one line that says what DVC needs if the project is not in a git repository, else None."""
    root = project_root()
    if _git_folder(root) is not None:
        return None
    configured = configparser.ConfigParser(interpolation=None, strict=False)
    try:
        configured.read(root / ".dvc" / name for name in ("config", "config.local"))
        if configured.getboolean("core", "no_scm", fallback=False):
            return None
    except (configparser.Error, ValueError):
        pass  # DVC itself names what is wrong in its configuration
    return "none here: `dvc repro` needs `dvc config --local core.no_scm true`; `dvc exp` needs a git repository"


def _git_folder(root: Path) -> Path | None:
    """Return the .git at or above the project (a file in a worktree), or None."""
    return next((each / ".git" for each in (root, *root.parents) if (each / ".git").exists()), None)


def _versioned_folder() -> Path:
    """Return the folder of the files that git versions: the project's, or that of a temporary workspace."""
    here = Path.cwd().resolve()
    return next((each for each in (here, *here.parents) if _is_project(each)), here)


def _is_project(folder: Path) -> bool:
    return all((folder / name).is_file() for name in PROJECT_FILES)


def _started_from(folder: Path) -> Path | None:
    """Return the project that started the experiment if ``folder`` is in a temporary workspace of DVC, else None."""
    exps = next((each for each in folder.parents if each.parts[-3:] == (".dvc", "tmp", "exps")), None)
    main = exps.parents[2] if exps is not None else None
    if exps is None and os.environ.get("DVC_ROOT"):  # .dvc/tmp may be a link to another disk
        main = Path(os.environ["DVC_ROOT"]).resolve()
        exps = (main / ".dvc" / "tmp" / "exps").resolve()
    if exps is None or main is None or not folder.is_relative_to(exps) or folder == exps:
        return None
    outermost_first = [
        each for each in reversed((folder, *folder.parents)) if each.is_relative_to(exps) and each != exps
    ]
    workspace = next((each for each in outermost_first if (each / ".dvc").is_dir()), folder)
    inside = main / folder.relative_to(workspace)
    return inside if inside.is_dir() else main


RUNS = in_project("runs") if _started_from(Path.cwd().resolve()) else Path("runs")
"""Folder of the stages' resumable state and the project's records. It is relative, because stages run in the project's folder; absolute
in a temporary workspace."""


@dataclass(frozen=True)
class Workspace:
    """A working copy's name, and where it is. It keeps the MLflow runs of copies apart that share a server.

    ``former_roots``: folders that its local MLflow store has been in; ``former_ids``: names of the working copies that it was
    copied from. ``inode`` is that of its folder runs/: on a shared file system it is the same for every host.
    """

    id: str
    root: str
    host: str
    inode: int
    former_roots: tuple[str, ...] = ()
    former_ids: tuple[str, ...] = ()


def workspace_id() -> str:
    """Return the name of this working copy. It is made once, and a copy gets its own."""
    return current_workspace().id


def current_workspace() -> Workspace:
    """Return the record of this working copy, brought up to date if the project was moved or copied.

    A copy gets a new name: the place where the record was made still holds a working copy of that name, or this is another host
    with another file system. Anything else is a move and keeps the name.
    """
    root = project_root()
    path = root / "runs" / RECORD
    recorded = _read(path)
    if recorded is not None and _is_here(recorded, root):
        return recorded
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f"{RECORD}.lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        recorded = _read(path)
        if recorded is not None and _is_here(recorded, root):
            return recorded
        settled = _settle(recorded, root)
        write_json(path, asdict(settled))
    return settled


def _settle(recorded: Workspace | None, root: Path) -> Workspace:
    """Return the record of a working copy that is new here, was moved here, or was copied here."""
    own = uuid.uuid4().hex[:12]
    host, inode = socket.gethostname(), (root / "runs").stat().st_ino
    if recorded is None and (name := _former_name(root / "runs" / RECORD)):
        return Workspace(name, str(root), host, inode)
    if recorded is None:
        if (root / "runs" / RECORD).exists():
            log.warning("%s is damaged: this project gets a new name for its MLflow runs", in_project("runs") / RECORD)
        return Workspace(own, str(root), host, inode)
    copied = _is_elsewhere(recorded, root) or (recorded.host != host and recorded.inode != inode)
    roots = tuple(sorted({*recorded.former_roots, recorded.root} - {str(root)}))
    if not copied:
        if recorded.root != str(root):
            log.info("this project was moved here from %s", recorded.root)
        return Workspace(recorded.id, str(root), host, inode, roots, recorded.former_ids)
    log.info("this project is a copy of %s on %s: from now on its runs are its own", recorded.root, recorded.host)
    return Workspace(own, str(root), host, inode, roots, (*recorded.former_ids, recorded.id))


def _former_name(path: Path) -> str | None:
    """Return the name in a record of an earlier version, which held nothing else."""
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return text if re.fullmatch(r"[0-9a-f]{12}", text) else None


def _is_here(recorded: Workspace, root: Path) -> bool:
    """Return True if the record was made here, or in this folder under another name of it (a mount)."""
    inode = (root / "runs").stat().st_ino
    if recorded.root == str(root):
        return recorded.host == socket.gethostname() or recorded.inode == inode
    old = Path(recorded.root) / "runs" / RECORD
    try:
        return old.samefile(root / "runs" / RECORD)
    except OSError:
        return False


def _is_elsewhere(recorded: Workspace, root: Path) -> bool:
    """Return True if the place where the record was made still holds a working copy of that name."""
    if recorded.root == str(root):
        return False
    other = _read(Path(recorded.root) / "runs" / RECORD)
    return other is not None and other.id == recorded.id


def _read(path: Path) -> Workspace | None:
    """Return a record, or None if there is none or it is damaged."""
    try:
        values: dict[str, Any] = read_json(path)
        lists = {name: tuple(str(each) for each in values.pop(name)) for name in ("former_roots", "former_ids")}
        return Workspace(str(values["id"]), str(values["root"]), str(values["host"]), int(values["inode"]), **lists)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
