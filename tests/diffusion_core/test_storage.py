from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffusion_core.storage import atomic_folder, atomic_path, read_json, write_json


def test_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "a.json") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert read_json(tmp_path / "a.json") == {"x": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_folder_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "out") as folder:
        (folder / "part").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    for text in ("one", "two"):
        with atomic_folder(tmp_path / "out") as folder:
            (folder / text).write_text(text)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["two"], "the new folder takes the old one's place"


def test_files_of_a_killed_writer_are_overwritten(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from diffusion_core.storage import atomic_folder\n"
        "with atomic_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'half').write_text('x')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=False, env=os.environ)
    assert result.returncode == -9
    assert not (tmp_path / "out").exists()
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "whole").write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["whole"]


@pytest.mark.parametrize(
    ("text", "expected"), [(None, "cannot read"), ("{", "not valid JSON"), ("\udcff", "not valid JSON")]
)
def test_unreadable_json_is_named(tmp_path: Path, text: str | None, expected: str) -> None:
    path = tmp_path / "a.json"
    if text is not None:
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=expected):
        read_json(path)


def test_nan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert list(tmp_path.iterdir()) == []
