"""The project itself: imports, the lock, files that must not be there."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib

import pytest

from tests.conftest import ROOT


def readme_commands() -> tuple[str, str]:
    """Return the README's two commands: the whole pipeline, and the tests."""
    lines = re.findall(r"^```bash\n(.+)\n```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    (pipeline,) = [line for line in lines if line.endswith("dvc repro")]
    (tests,) = [line for line in lines if line.endswith("pytest")]
    return pipeline, tests


def test_diffusion_core_brings_in_no_ray_mlflow_or_dvc() -> None:
    modules = sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / "diffusion_core").rglob("*.py")
        if path.stem != "stable_diffusion"
    )
    code = (
        f"import sys, importlib\nfor name in {modules!r}: importlib.import_module(name)\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'ray', 'mlflow', 'dvc', 'pipelines', 'pandas', 'pydantic'}))"
    )
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


def test_bare_training_loop_needs_no_more_than_torch() -> None:
    code = (
        "import sys, pipelines.training.bare\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'ray', 'mlflow', 'dvc', 'pydantic', 'ruamel', 'pandas', 'optuna'}))"
    )
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


def test_lock_pins_hashes_and_names_no_index() -> None:
    text = (ROOT / "requirements.lock").read_text()
    assert "--hash=sha256:" in text
    assert not re.search(r"https?://", text)
    for package in ("ray", "torch", "mlflow", "dvc", "torch-fidelity", "optuna"):
        assert re.search(rf"^{package}(\[[^]]*\])?==", text, re.MULTILINE), package


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_no_tracked_file_names_a_machine_or_holds_a_pickle() -> None:
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert "uv.lock" not in files
    assert not [name for name in files if name.endswith((".pkl", ".pt", ".pth", ".db"))]
    pattern = re.compile("/" + r"(work|root|home)/[a-z]")
    for name in files:
        path = ROOT / name
        if path.suffix in (".py", ".yaml", ".toml", ".md", ".json", ".lock", "") and path.is_file():
            assert not pattern.search(path.read_text(encoding="utf-8", errors="ignore")), name


def test_readme_commands_install_only_into_ignored_folders() -> None:
    for command in readme_commands():
        folder = re.match(r"python3 -m venv (\S+) && \1/bin/pip install --quiet uv && \1/bin/uv run ", command)
        assert folder, command
        for name in (".gitignore", ".dvcignore"):
            assert folder[1] in {line.strip("/") for line in (ROOT / name).read_text().splitlines()}, name


def test_any_supported_python_on_the_machine_is_used() -> None:
    assert not (ROOT / ".python-version").exists()  # uv would download that version
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["uv"]
    assert settings["python-preference"] == "system"


def test_ci_runs_the_readme_test_command() -> None:
    assert readme_commands()[1] in (ROOT / ".ci/run").read_text(encoding="utf-8")
