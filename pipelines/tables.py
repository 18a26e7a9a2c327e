"""CSV files: one writer and one reader for every stage."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion_core.storage import atomic_path


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    r"""Write the columns of the rows as CSV, UTF-8 with "\n" line ends; the file is complete or absent.

    Values are written as ``str`` gives them, None as an empty cell. Cells with quotes, commas or line breaks are quoted.
    Keys of a row that are not in ``columns`` are ignored.
    """
    with (
        atomic_path(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        for cells in (list(columns), *([row[column] for column in columns] for row in rows)):
            file.write(",".join(_quoted("" if cell is None else str(cell)) for cell in cells) + "\n")


def read_csv(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file, as strings by column. Raises ValueError if it cannot be read or a row does not fit."""
    try:
        with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
            columns, *rows = csv.reader(file, strict=True)
        return [dict(zip(columns, row, strict=True)) for row in rows]
    except OSError as error:
        reason = error.strerror
    except (csv.Error, ValueError) as error:
        reason = f"not a table ({error})"
    raise ValueError(f"cannot read {path}: {reason}; run the stage that writes it again")


def _quoted(cell: str) -> str:
    # csv.writer leaves a lone carriage return unquoted before Python 3.13, and readers end the row there
    return '"' + cell.replace('"', '""') + '"' if any(mark in cell for mark in ',"\n\r') else cell
