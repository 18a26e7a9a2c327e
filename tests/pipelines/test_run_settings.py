from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.params import RunSettings, load_run_settings, parse_run_settings, read_yaml
from tests.conftest import ROOT

SHIPPED = [ROOT / "run.yaml", *sorted((ROOT / "run").glob("*.yaml"))]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_file_is_valid(path: Path) -> None:
    load_run_settings(path)


def test_shipped_run_yaml_lists_every_key_with_its_default() -> None:
    assert load_run_settings(ROOT / "run.yaml") == RunSettings()
    schema = {name: list(section) for name, section in RunSettings().model_dump().items() if isinstance(section, dict)}
    tree = read_yaml(ROOT / "run.yaml")
    assert {name: list(section) for name, section in tree.items() if isinstance(section, dict)} == schema
    assert {path.stem for path in SHIPPED[1:]} == {"laptop", "gpu", "cluster"}


def test_all_counts_are_auto_by_default() -> None:
    run = RunSettings()
    for section in (run.train, run.tune, run.evaluate):
        assert set(section.model_dump().values()) == {"auto"}
    assert run.ray.num_cpus == "auto"


@pytest.mark.parametrize(
    ("tree", "key", "allowed"),
    [
        ({"train": {"num_workers": 0}}, "train.num_workers", "a whole number of at least 1, or auto"),
        ({"train": {"num_workers": 1.5}}, "train.num_workers", "a whole number of at least 1, or auto"),
        ({"train": {"num_workers": "all"}}, "train.num_workers", "a whole number of at least 1, or auto"),
        ({"train": {"num_worker": 2}}, "train.num_worker", "did you mean num_workers?"),
        ({"train": {"steps": 2}}, "train.steps", "unknown key"),
        ({"train": 3}, "train", "a section"),
        ({"evaluate": {"gpus_per_task": -1}}, "evaluate.gpus_per_task", "a number of at least 0, or auto"),
        ({"tune": {"cpus_per_trial": 0}}, "tune.cpus_per_trial", "a number above 0, or auto"),
        ({"train": {"max_failures": -1}}, "train.max_failures", "a whole number of at least 0, or auto"),
        ({"resume": "always"}, "resume", "'auto' or 'force'"),
        ({"ray": {"num_cpus": 0}}, "ray.num_cpus", "at least 1"),
        ({"ray": {"storage": ""}}, "ray.storage", "not blank"),
        ({"tracking": {"experiment": " "}}, "tracking.experiment", "not blank"),
        ({"tracking": {"uri": ""}}, "tracking.uri", "not blank"),
        ({"tracking": {"uri": 3}}, "tracking.uri", "a string"),
        ({"reference": {"device": "tpu"}}, "reference.device", "'cuda'"),
    ],
)
def test_wrong_run_settings_give_one_line_that_names_the_key(tree: dict[str, Any], key: str, allowed: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_run_settings(tree)
    message = str(caught.value)
    assert message.startswith("run.yaml: ")
    assert f" {key}: " in message
    assert allowed in message
    assert "\n" not in message


def test_environment_variable_selects_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("REDIFFUSE_RUN", raising=False)
    assert load_run_settings() == RunSettings(), "without a run.yaml everything is auto"
    (tmp_path / "run.yaml").write_text("train: {num_workers: 3}\n")
    assert load_run_settings().train.num_workers == 3
    (tmp_path / "other.yaml").write_text("train:\nray: {storage: elsewhere}\n")
    monkeypatch.setenv("REDIFFUSE_RUN", "other.yaml")
    assert (load_run_settings().train.num_workers, load_run_settings().ray.storage) == ("auto", "elsewhere")
    monkeypatch.setenv("REDIFFUSE_RUN", "absent.yaml")
    with pytest.raises(ValueError, match=r"absent\.yaml: cannot be read"):
        load_run_settings()
    (tmp_path / "empty.yaml").write_text("")
    monkeypatch.setenv("REDIFFUSE_RUN", "empty.yaml")
    assert load_run_settings() == RunSettings()
