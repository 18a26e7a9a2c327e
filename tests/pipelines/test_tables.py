from __future__ import annotations

import csv
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.tables import read_csv, write_csv

CELL = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"))


@given(columns=st.lists(CELL, min_size=2, max_size=4, unique=True), data=st.data())
def test_any_text_comes_back_unchanged(tmp_path_factory: pytest.TempPathFactory, columns: list[str], data) -> None:
    rows = data.draw(st.lists(st.fixed_dictionaries(dict.fromkeys(columns, CELL)), max_size=4))
    path = tmp_path_factory.mktemp("tables") / "table.csv"
    write_csv(path, columns, rows)
    assert read_csv(path) == rows
    with open(path, newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == rows


def test_pandas_and_csv_read_quotes_commas_and_line_breaks(tmp_path: Path) -> None:
    names = ['a "b"', "c, d", "e\nf", "g\rh", "i\r\nj", '"', ",", "\n", "'", "ü"]
    write_csv(tmp_path / "t.csv", ["class", "images"], [{"class": name, "images": 3} for name in names])
    assert list(pd.read_csv(tmp_path / "t.csv", dtype=str)["class"]) == names
    assert [row["class"] for row in read_csv(tmp_path / "t.csv")] == names


def test_numbers_keep_their_value_and_none_is_an_empty_cell(tmp_path: Path) -> None:
    rows = [{"step": 1, "fid": 0.1 + 0.2, "error": None, "unused": "x"}]
    write_csv(tmp_path / "t.csv", ["step", "fid", "error"], rows)
    assert (tmp_path / "t.csv").read_bytes() == b"step,fid,error\n1,0.30000000000000004,\n"


def test_table_is_unchanged_if_its_rows_raise(tmp_path: Path) -> None:
    write_csv(tmp_path / "t.csv", ["a", "b"], [{"a": 1, "b": 2}])
    with pytest.raises(KeyError):
        write_csv(tmp_path / "t.csv", ["a", "b"], [{"a": 3, "b": 4}, {"a": 5}])
    assert read_csv(tmp_path / "t.csv") == [{"a": "1", "b": "2"}]
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]


@pytest.mark.parametrize("content", [None, "", "a,b\n1\n", "a,b\n1,2,3\n", 'a,b\n"1,2\n'])
def test_missing_or_damaged_table_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "t.csv").write_text(content)
    with pytest.raises(ValueError, match=r"cannot read .*t\.csv.*run the stage that writes it again"):
        read_csv(tmp_path / "t.csv")
