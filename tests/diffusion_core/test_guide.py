"""The code blocks of docs/diffusion_core.md, run in order, and the claims of its text."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT

GUIDE = ROOT / "docs" / "diffusion_core.md"


def run_guide(folder: Path) -> dict:
    """Run every Python block of the guide in one namespace and write its pictures into ``folder``."""
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    namespace: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in blocks:
            exec(compile(block, str(GUIDE), "exec"), namespace)
    return namespace


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("guide")
    return {**run_guide(folder), "folder": folder}


def nearest_class(pictures: torch.Tensor, guide: dict) -> torch.Tensor:
    """Return the majority class of the five nearest real images: an independent classifier."""
    distances = torch.cdist(pictures.flatten(1), guide["images"].flatten(1))
    return guide["conditions"].argmax(dim=1)[distances.topk(5, largest=False).indices].mode(dim=1).values


def test_samples_show_the_digits_of_their_condition(guide: dict) -> None:
    for pictures in guide["samples"]:
        assert (nearest_class(pictures, guide) == torch.arange(10)).sum() >= 8


def test_deterministic_samplers_agree_from_the_same_noise(guide: dict) -> None:
    ddim, ancestral, _, dpm, _, heun = guide["samples"]
    apart = (ddim - ancestral).abs().mean()
    assert (ddim - dpm).abs().mean() < 0.5 * apart
    assert (heun - dpm).abs().mean() < 0.5 * apart


def test_fixed_point_steps_close_the_gap_of_inversion(guide: dict) -> None:
    assert guide["gap_closed"] < 0.2 * guide["gap_plain"]


def test_edits_show_the_next_digit_and_stay_closer_to_the_image_than_new_samples(guide: dict) -> None:
    wanted = guide["next_digit"].argmax(dim=1)
    assert (nearest_class(guide["edited"], guide) == wanted).sum() >= 6
    fresh = guide["sample_ddim"](guide["denoiser"], guide["x_T"], guide["grid"], condition=guide["next_digit"])
    apart, new = ((pictures - guide["real"]).abs().mean() for pictures in (guide["edited"], fresh))
    assert apart < 0.8 * new


def test_pictures_are_written(guide: dict) -> None:
    names = re.findall(r"images/(\w+\.png)", GUIDE.read_text(encoding="utf-8"))
    for name in names:
        assert (guide["folder"] / name).stat().st_size > 200
