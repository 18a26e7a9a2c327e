"""MLflow's store in the project's folder: a SQLite file whose rows hold absolute locations of artifacts.

MLflow makes every location absolute, also one that is given as relative. So the rows are rewritten when the project has been
moved or copied: else a model is not found, and the next run writes into the old place.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

ARTIFACTS = "mlartifacts"
DATABASE = "mlflow.db"
BUSY_SECONDS = 60.0
"""Seconds to wait for another process that has locked the store."""
LOCATIONS = (
    ("experiments", "artifact_location", ""),
    ("runs", "artifact_uri", ""),
    ("logged_models", "artifact_location", ""),
    ("model_versions", "source", ""),
    ("model_versions", "storage_location", ""),
    ("trace_tags", "value", "key = 'mlflow.artifactLocation'"),
)
"""The columns that hold locations, and which of their rows do."""


def reanchor(database: Path, former_roots: Iterable[str], root: Path) -> dict[Path, int]:
    """Rewrite the locations below a former root of the project so that they lie below ``root``, in one transaction.

    Besides ``former_roots``, the parent of an experiment's ``mlartifacts`` is a former root if that folder is gone or belongs to
    another store. Returns the number of locations of runs and models that were rewritten, by former root. Raises ValueError if the file cannot be changed.
    """
    former = [Path(each) for each in former_roots]
    counts: dict[Path, int] = {}
    try:
        with closing(
            sqlite3.connect(f"{database.absolute().as_uri()}?mode=rw", uri=True, timeout=BUSY_SECONDS)
        ) as connection:
            columns = [each for each in LOCATIONS if _has_column(connection, *each[:2])]
            former = sorted({*former, *_left_behind(connection, columns, root)} - {root})
            if not former:
                return {}
            with connection:
                for table, column, condition in columns:
                    for location in _locations(connection, table, column, condition):
                        old = _root_of(location, (root, *former))
                        if old is None or old == root:
                            continue
                        where = f"{column} = ?" + (f" AND {condition}" if condition else "")
                        changed = connection.execute(
                            f"UPDATE {table} SET {column} = ? WHERE {where}", (_moved(location, old, root), location)
                        )
                        if table != "experiments":
                            counts[old] = counts.get(old, 0) + changed.rowcount
    except sqlite3.Error as error:
        raise ValueError(
            f"{database} names locations outside of this project and cannot be changed ({error}); make it writable"
            if former
            else f"{database} cannot be read as MLflow's store: {error}"
        ) from None
    return counts


def local_path(location: str) -> Path | None:
    """Return the path that a location of MLflow names: a path or a file URI. None for other URIs and relative paths."""
    parts = urlsplit(location)
    if parts.scheme == "file":
        return Path(unquote(location.partition("://")[2]) if "://" in location else unquote(parts.path))
    return Path(location) if location.startswith("/") else None


def _left_behind(connection: sqlite3.Connection, columns: list[tuple[str, str, str]], root: Path) -> set[Path]:
    """Return the roots outside of the project that the experiments' locations tell, if no record does."""
    found = set()
    for table, column, condition in columns:
        if table != "experiments":
            continue
        for location in _locations(connection, table, column, condition):
            path = local_path(location)
            if path is None or path.name != ARTIFACTS or path.is_relative_to(root):
                continue
            own = root / ARTIFACTS
            if own.exists() and path.exists() and path.samefile(own):  # the project's folder under another name
                continue
            if not path.exists() or (path.parent / DATABASE).exists():
                found.add(path.parent)
    return found


def _has_column(connection: sqlite3.Connection, table: str, column: str) -> bool:
    return any(row[1] == column for row in connection.execute(f"PRAGMA table_info({table})"))


def _locations(connection: sqlite3.Connection, table: str, column: str, condition: str) -> list[str]:
    where = f" WHERE {condition}" if condition else ""
    rows = connection.execute(f"SELECT DISTINCT {column} FROM {table}{where}").fetchall()
    return [row[0] for row in rows if isinstance(row[0], str)]


def _root_of(location: str, roots: Iterable[Path]) -> Path | None:
    """Return the longest of the roots that a location lies below: one may contain another."""
    path = local_path(location)
    below = [root for root in roots if path is not None and path.is_relative_to(root)]
    length: Callable[[Path], int] = lambda root: len(root.parts)  # noqa: E731
    return max(below, key=length, default=None)


def _moved(location: str, old: Path, root: Path) -> str:
    path = local_path(location)
    assert path is not None
    moved = root / path.relative_to(old)
    return moved.as_uri() if location.startswith("file:") else str(moved)
