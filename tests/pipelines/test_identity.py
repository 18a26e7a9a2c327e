from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path

import pytest

from pipelines import identity as module
from pipelines.identity import (
    MACHINERY,
    PACKAGES,
    State,
    changed_modules,
    closure_digest,
    identify,
    import_closure,
    open_state,
    source_digest,
    stage_dependencies,
)
from pipelines.measurement.measure import measure
from pipelines.params import read_yaml
from pipelines.training.checkpoint import save_checkpoint
from pipelines.training.loop import train
from tests.conftest import ROOT

STAGES = ("prepare", "reference", "tune", "train", "evaluate", "register", "report")


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the sources that a test may change, and a working directory of its own."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    module._source_of.cache_clear()
    yield tmp_path
    module._source_of.cache_clear()


def training_identity(steps: int = 10):
    return identify("train", {"steps": steps}, {"data": "a"}, [train, save_checkpoint])


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text(encoding="utf-8") + text, encoding="utf-8")


def test_comments_docstrings_layout_and_unrelated_modules_keep_the_key(sources: Path) -> None:
    before = training_identity().key
    append(sources / "diffusion_core/losses.py", "\n# a comment\n")
    text = (sources / "diffusion_core/ema.py").read_text()
    tree = ast.parse(text)
    assert ast.get_docstring(tree)
    (sources / "diffusion_core/ema.py").write_text(
        ast.unparse(tree).replace(ast.get_docstring(tree, clean=False), "other")
    )
    for name in ("editing", "metrics/kid", "inversion", "samplers", "guidance", "generation", "likelihood", "artifact"):
        append(sources / f"diffusion_core/{name}.py", "\ndef added() -> int:\n    return 1\n")
    for name in ("tracking", "cluster", "stage", "resources", "ddp/driver", "ddp/worker", "params/schema", "report"):
        append(sources / f"pipelines/{name}.py", "\ndef added() -> int:\n    return 1\n")
    assert training_identity().key == before


@pytest.mark.parametrize(
    "name", ["losses", "ema", "noise", "random_draws", "networks/unet", "networks/blocks", "schedules", "objectives"]
)
def test_code_that_computes_changes_the_key(sources: Path, name: str) -> None:
    before = training_identity()
    append(sources / f"diffusion_core/{name}.py", "\nADDED = 1\n")
    after = training_identity()
    assert after.key != before.key
    assert changed_modules(before.code, after.code) == (f"diffusion_core.{name.replace('/', '.')}",)


def test_settings_and_inputs_change_the_key_and_their_order_does_not() -> None:
    one = identify("train", {"a": 1, "b": 2}, {"data": "x", "model": "y"}, [train])
    assert identify("train", {"b": 2, "a": 1}, {"model": "y", "data": "x"}, [train]).key == one.key
    for settings, inputs in (({"a": 1, "b": 3}, one.inputs), (one.settings, {"data": "z", "model": "y"})):
        assert identify("train", settings, inputs, [train]).key != one.key


def test_digest_ignores_what_does_not_compute(tmp_path: Path) -> None:
    path = tmp_path / "m.py"

    def digest(text: str) -> str:
        path.write_text(text, encoding="utf-8")
        return source_digest(path)

    first = digest('"""Doc."""\n\ndef f(x):\n    """Doc."""\n    return x + 1\n')
    assert digest("def f(x):\n    # why\n    return (x +\n        1)\n") == first
    assert digest("def f(x):\n    return x + 2\n") != first
    assert digest("class A:\n    'doc'\n    b = 1\n    'more'\n") == digest("class A:\n    b = 1\n")


@pytest.mark.parametrize("functions", [(train, save_checkpoint), (measure,)], ids=["train", "measure"])
def test_closures_hold_no_machinery(functions: tuple) -> None:
    closure = import_closure([function.__module__ for function in functions])
    assert not [name for name in closure if any(name == m or name.startswith(f"{m}.") for m in MACHINERY)]
    assert "diffusion_core" in closure, "packages around a module run too"


def test_relative_imports_and_imports_inside_functions_are_followed(sources: Path) -> None:
    (sources / "pipelines/first.py").write_text("def f():\n    from .data import shards\n    return shards\n")
    closure = import_closure(["pipelines.first"])
    assert {"pipelines.data.shards", "pipelines.data", "diffusion_core.storage"} <= set(closure)


@pytest.mark.parametrize("stage", STAGES)
def test_code_deps_of_dvc_yaml_are_the_import_closure(stage: str) -> None:
    declared = read_yaml(ROOT / "dvc.yaml")["stages"][stage]["deps"]
    code = sorted(path for path in declared if path.split("/")[0] in PACKAGES and path.endswith(".py"))
    assert code == stage_dependencies(stage)
    templates = [path for path in declared if path.split("/")[0] in PACKAGES and not path.endswith(".py")]
    assert templates == (["pipelines/reporting/page.html.jinja"] if stage == "report" else [])


def test_state_is_found_again_and_other_settings_start_fresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")
    state = open_state(training_identity(10))
    (state.folder / "checkpoint").write_text("x")
    assert caplog.text == ""
    again = open_state(training_identity(10))
    assert again == state
    assert (again.folder / "checkpoint").exists()
    other = open_state(training_identity(11))
    assert other.folder != state.folder
    assert "differs in steps" in caplog.text


def work_in(state: State) -> None:
    (state.folder / "step_00000010").mkdir()
    (state.folder / "step_00000010" / "checkpoint.json").write_text("x")


def test_state_of_other_code_is_named_and_continued_only_by_force(sources: Path, caplog) -> None:
    caplog.set_level("INFO")
    old = open_state(training_identity())
    work_in(old)
    append(sources / "diffusion_core/losses.py", "\nADDED = 1\n")
    fresh = open_state(training_identity())
    assert fresh.folder != old.folder
    assert "the code of diffusion_core.losses has changed" in caplog.text
    forced = open_state(training_identity(), "force")  # as the log line recommends, after an interrupt
    assert (forced.folder, forced.key) == (old.folder, old.key)
    assert forced.changed_modules == ("diffusion_core.losses",)
    assert open_state(training_identity(), "auto") == forced, "it stays continued by force"


def test_forced_state_stays_marked_for_the_code_that_began_it(sources: Path) -> None:
    old = open_state(training_identity())
    work_in(old)
    losses = (sources / "diffusion_core/losses.py").read_text()
    append(sources / "diffusion_core/losses.py", "\nADDED = 1\n")
    open_state(training_identity(), "force")
    append(sources / "diffusion_core/ema.py", "\nADDED = 1\n")
    assert open_state(training_identity(), "force").changed_modules == ("diffusion_core.ema", "diffusion_core.losses")
    (sources / "diffusion_core/losses.py").write_text(losses)
    (sources / "diffusion_core/ema.py").write_text((ROOT / "diffusion_core/ema.py").read_text())
    again = open_state(training_identity())
    assert again.folder == old.folder
    assert again.changed_modules == ("diffusion_core.ema", "diffusion_core.losses")


def test_force_does_not_leave_work_of_its_own(sources: Path) -> None:
    work_in(open_state(training_identity()))
    append(sources / "diffusion_core/losses.py", "\nADDED = 1\n")
    fresh = open_state(training_identity())
    work_in(fresh)
    assert open_state(training_identity(), "force") == fresh


def test_damaged_pointer_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.chdir(tmp_path)
    state = open_state(training_identity())
    for content in ("{", "{}", "[1]"):
        (state.folder / "continues.json").write_text(content)
        assert open_state(training_identity()) == state
    assert "is damaged: ignored" in caplog.text


def test_damaged_records_of_other_states_are_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    state = open_state(training_identity(10))
    (state.folder / "identity.json").write_text("{")
    assert open_state(training_identity(11)).folder.is_dir()


def test_same_weights_of_other_library_code_differ_in_the_closure_digest(sources: Path) -> None:
    before = closure_digest(measure)
    append(sources / "diffusion_core/samplers.py", "\n# comment\n")
    assert closure_digest(measure) == before
    append(sources / "diffusion_core/samplers.py", "\nADDED = 1\n")
    assert closure_digest(measure) != before


def test_identity_is_recorded_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    state = open_state(training_identity(10))
    record = json.loads((state.folder / "identity.json").read_text())
    assert record["settings"] == {"steps": 10}
    assert "diffusion_core.losses" in record["code"]
