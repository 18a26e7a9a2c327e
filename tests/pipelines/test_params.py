from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from pipelines.params import declared_params, flatten, load_params, parse_params, read_yaml, with_overrides
from tests.conftest import ROOT, merge

DEFAULT = read_yaml(ROOT / "params.yaml")
MISSING = object()
PRESETS = sorted((ROOT / "preset").glob("*.yaml"))


def changed(**changes: Any) -> dict[str, Any]:
    tree = copy.deepcopy(DEFAULT)
    for key, value in changes.items():
        *parents, last = key.split("__")
        inner = tree
        for parent in parents:
            inner = inner[parent]
        if value is MISSING:
            del inner[last]
        else:
            inner[last] = value
    return tree


WRONG = [
    ({"train__steps": -5}, "train.steps", "at least 1"),
    ({"train__steps": 0}, "train.steps", "at least 1"),
    ({"train__steps": "many"}, "train.steps", "a whole number"),
    ({"train__steps": 1.5}, "train.steps", "a whole number"),
    ({"train__steps": None}, "train.steps", "a whole number"),
    ({"train__steps": MISSING}, "train.steps", "is missing"),
    ({"train__setps": 3}, "train.setps", "did you mean steps?"),
    ({"trian": {}}, "trian", "did you mean train?"),
    ({"train": MISSING}, "train", "is missing"),
    ({"train": 3}, "train", "a section"),
    ({"seed": -1}, "seed", "at least 0"),
    ({"seed": True}, "seed", "a whole number"),
    ({"train__learning_rate": 0.0}, "train.learning_rate", "above 0"),
    ({"train__learning_rate": float("nan")}, "train.learning_rate", "finite"),
    ({"train__learning_rate": float("inf")}, "train.learning_rate", "finite"),
    ({"train__ema_decay": 1.0}, "train.ema_decay", "below 1"),
    ({"train__precision": "fp16"}, "train.precision", "'auto', 'fp32' or 'bf16'"),
    ({"train__batch_size": 0}, "train.batch_size", "at least 1"),
    ({"train__num_workers": 2}, "train.num_workers", "has moved to run.yaml"),
    ({"train__log_every": 10}, "train.log_every", "set train.log_every there"),
    ({"evaluate__cpus_per_task": 1}, "evaluate.cpus_per_task", "has moved to run.yaml"),
    ({"tune__max_concurrent": 2}, "tune.max_concurrent", "has moved to run.yaml"),
    ({"ray": {"address": None}}, "ray", "has moved to run.yaml"),
    ({"tracking": {"uri": None}}, "tracking", "has moved to run.yaml"),
    ({"evaluate__grid_rows": 4}, "evaluate.grid_rows", "set evaluate.picture_rows"),
    ({"report__trajectory_images": 8}, "report.trajectory_images", "set evaluate.trajectory_images"),
    ({"train__learning_rate": 0.1}, "train.learning_rate", "within tune.space.learning_rate"),
    ({"train__diffusion__schedule": "scaled_linear"}, "train.diffusion.schedule", "one of tune.space.schedule"),
    ({"tune__space__weighting": ["snr"]}, "train.diffusion.weighting", "one of tune.space.weighting"),
    ({"evaluate__batch_size": "many"}, "evaluate.batch_size", "a whole number of at least 1, or auto"),
    ({"train__warmup_steps": 5000}, "train.warmup_steps", "at most train.steps"),
    ({"train__network__name": "vit"}, "train.network.name", "'unet' or 'context_unet'"),
    ({"train__network__multipliers": []}, "train.network.multipliers", "at least 1"),
    ({"train__network__attention_sizes": [16]}, "train.network.attention_sizes", "[8, 4]"),
    ({"train__diffusion__schedule": "karras"}, "train.diffusion.schedule", "'cosine'"),
    ({"train__diffusion__zero_terminal_snr": True}, "tune.space.objective", "v and x0"),
    (
        {"train__diffusion__zero_terminal_snr": True, "train__diffusion__objective": "eps"},
        "train.diffusion.objective",
        "v or x0",
    ),
    (
        {"train__condition_dropout": 0.0, "evaluate__guidance_scale": 2.0},
        "evaluate.guidance_scale",
        "condition_dropout",
    ),
    ({"prepare__source": "imagenet"}, "prepare.source", "'digits', 'torchvision' or 'folder'"),
    ({"prepare__source": "torchvision"}, "prepare.dataset", "torchvision.datasets"),
    ({"prepare__source": "folder"}, "prepare.root", "the folder"),
    ({"prepare__dataset": "MNIST"}, "prepare.dataset", "only with prepare.source torchvision"),
    ({"prepare__channels": 2}, "prepare.channels", "1 or 3"),
    ({"prepare__image_size": 9}, "prepare.image_size", "a multiple of 2"),
    ({"prepare__test_fraction": 1.0}, "prepare.test_fraction", "below 1"),
    ({"reference__inception_sha256": "a" * 64}, "reference.inception_sha256", "only with reference.extractor"),
    ({"reference__extractor": "resnet"}, "reference.extractor", "'inception-v3-compat'"),
    ({"tune__grace_steps": 500}, "tune.grace_steps", "at most tune.steps"),
    ({"tune__space__learning_rate": [0.1, 0.01]}, "tune.space.learning_rate", "the lowest first"),
    ({"tune__space__objective": ["eps", "w"]}, "tune.space.objective[1]", "'eps', 'x0' or 'v'"),
    ({"tune__enabled": "yes"}, "tune.enabled", "true or false"),
    ({"tune__ddim_steps": 2000}, "tune.ddim_steps", "at most train.diffusion.num_steps"),
    ({"evaluate__etas": [0.0, 1.5]}, "evaluate.etas[1]", "a number from 0 to 1, or sigma_hat"),
    ({"evaluate__etas": [0.0, 0.0]}, "evaluate.etas", "each value once"),
    ({"evaluate__steps": [2000, 50]}, "evaluate.steps", "at most train.diffusion.num_steps"),
    (
        {"evaluate__shard_size": 100, "evaluate__batch_size": 64},
        "evaluate.shard_size",
        "a multiple of evaluate.batch_size",
    ),
    ({"evaluate__num_samples": 1}, "evaluate.num_samples", "at least 2"),
    ({"register__steps": 7}, "register.steps", "one of evaluate.steps"),
    ({"register__eta": 0.3}, "register.eta", "one of evaluate.etas"),
    ({"register__model_name": "a/b"}, "register.model_name", "without"),
    ({"register__model_name": " "}, "register.model_name", "not blank"),
    ({"register__model_name": "digits "}, "register.model_name", "not blank"),
    ({"register__model_name": "di\ngits"}, "register.model_name", "not blank"),
    ({"register__model_name": "\u200b"}, "register.model_name", "not blank"),
    ({"register__model_name": "main. .digits"}, "register.model_name", "not blank"),
    ({"report__title": "  "}, "report.title", "not blank"),
    ({"report__title": ""}, "report.title", "not blank"),
]


@pytest.mark.parametrize(("changes", "key", "allowed"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_wrong_params_give_one_line_that_names_the_key_and_what_is_allowed(
    changes: dict[str, Any], key: str, allowed: str
) -> None:
    with pytest.raises(ValueError) as caught:
        parse_params(changed(**changes))
    message = str(caught.value)
    assert "\n" not in message
    assert f" {key}: " in message
    assert allowed in message
    for value in changes.values():
        if (
            value is not MISSING
            and not isinstance(value, dict)
            and "missing" not in message
            and len(changes) == 1
            and " has " not in message
        ):
            assert "given " in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: [1, 2\n", "line"),
        ("seed: 1\nseed: 2\n", "line 2"),
        ("", "must hold sections"),
        ("- 1\n- 2\n", "must hold sections"),
        ("\tseed: 1\n", "line 1"),
    ],
)
def test_files_that_are_not_params_give_one_line(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        load_params(path)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_binary_files_give_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        load_params(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ValueError, match="not UTF-8"):
        load_params(tmp_path / "binary.yaml")


def test_exponents_without_a_point_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text((ROOT / "params.yaml").read_text().replace("learning_rate: 0.003", "learning_rate: 3e-3"))
    assert load_params(path).train.learning_rate == 0.003


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
@pytest.mark.parametrize("smoke", [False, True])
def test_every_preset_gives_valid_params_on_top_of_the_default(preset: Path, smoke: bool) -> None:
    tree = copy.deepcopy(DEFAULT)
    merge(tree, read_yaml(preset))
    if smoke:
        merge(tree, read_yaml(ROOT / "budget" / "smoke.yaml"))
    parse_params(tree)


def test_first_trial_may_lie_outside_the_space_if_nothing_is_searched() -> None:
    parse_params(changed(tune__enabled=False, train__learning_rate=0.1))


def test_stage_reads_only_the_params_that_are_declared_for_it() -> None:
    whole = parse_params(DEFAULT)
    part = declared_params(whole, ["seed", "train.batch_size", "train.network", "register"])
    assert (part.seed, part.train.batch_size, part.register_) == (0, 64, whole.register_)
    assert part.train.network == whole.train.network
    for read in (lambda: part.evaluate, lambda: part.train.steps, lambda: part.train.diffusion):
        with pytest.raises(AttributeError):
            read()
    assert set(part.train.model_dump()) == {"batch_size", "network"}
    assert whole.train.steps == 1200, "the whole params stay whole"


def test_overrides_of_the_search_are_checked_and_applied() -> None:
    whole = parse_params(DEFAULT)
    used = with_overrides(whole, {"schedule": "linear", "learning_rate": 0.5}, "best.yaml")
    assert (used.train.diffusion.schedule, used.train.learning_rate) == ("linear", 0.5)
    assert used.train.diffusion.objective == whole.train.diffusion.objective
    with pytest.raises(ValueError, match=r"best\.yaml \(train\): diffusion\.objective: given 'w'"):
        with_overrides(whole, {"objective": "w"}, "best.yaml")


def test_flattened_settings_have_dotted_keys() -> None:
    values = flatten("train", parse_params(DEFAULT).train)
    assert values["train.network.channels"] == 24
    assert not any(isinstance(value, dict) for value in values.values())


def test_digits_preset_takes_every_other_preset_back_to_the_default() -> None:
    for preset in PRESETS:
        tree = copy.deepcopy(DEFAULT)
        merge(tree, read_yaml(preset))
        merge(tree, read_yaml(ROOT / "preset" / "digits.yaml"))
        assert parse_params(tree) == parse_params(DEFAULT), preset.stem
