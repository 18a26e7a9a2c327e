from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion_core.networks.conditioning import ConditionSpec
from diffusion_core.schedules import make_schedule
from pipelines.training.checkpoint import check_checkpoint, load_checkpoint, save_checkpoint
from pipelines.training.grids import image_grid
from pipelines.training.loop import (
    Hooks,
    TrainingDivergedError,
    TrainSettings,
    TrainState,
    _batches,
    dataset_indices,
    ema_model,
    learning_rate_at,
    new_state,
    resolve_precision,
    train,
)

SETTINGS = TrainSettings(
    seed=3,
    steps=12,
    batch_size=8,
    learning_rate=1e-3,
    warmup_steps=4,
    condition_dropout=0.5,
    horizontal_flip=True,
    precision="fp32",
    network={
        "name": "unet", "image_size": 8, "image_channels": 1, "channels": 8, "multipliers": [1, 2], "num_res_blocks": 1,
        "attention_sizes": [4], "condition": {"kind": "class", "size": 3},
    },
    schedule={"name": "cosine", "num_steps": 100},
    objective="v",
    weighting="snr_plus_one",
    class_names=("a", "b", "c"),
)  # fmt: skip
CPU = torch.device("cpu")


class Noise:
    """Twenty random images."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.images = torch.from_numpy(rng.integers(0, 256, (20, 1, 8, 8), dtype=np.uint8))
        self.labels = torch.from_numpy(rng.integers(0, 3, 20))

    def __len__(self) -> int:
        return 20

    def gather(self, indices: np.ndarray):
        return self.images[indices], self.labels[indices]


def weights(state: TrainState) -> torch.Tensor:
    parts = [*state.network.state_dict().values(), *state.ema.network.state_dict().values()]
    return torch.cat([part.flatten() for part in parts])


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("stop", [1, 5, 11])
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(tmp_path: Path, stop: int) -> None:
    whole = train(SETTINGS, Noise(), new_state(SETTINGS, CPU), Hooks(log_every=1))
    half = train(SETTINGS, Noise(), new_state(SETTINGS, CPU), Hooks(log_every=1), until=stop)
    save_checkpoint(half, tmp_path, "key")
    resumed = new_state(replace(SETTINGS), CPU)
    load_checkpoint(resumed, tmp_path, "key")
    assert resumed.step == stop
    train(SETTINGS, Noise(), resumed, Hooks(log_every=1))
    assert torch.equal(weights(resumed), weights(whole))
    assert resumed.history == whole.history


def test_run_with_dropout_resumes_bit_for_bit_too(tmp_path: Path) -> None:
    settings = replace(SETTINGS, network={**SETTINGS.network, "dropout": 0.3})
    whole = train(settings, Noise(), new_state(settings, CPU))
    half = train(settings, Noise(), new_state(settings, CPU), until=7)
    save_checkpoint(half, tmp_path, "key")
    resumed = new_state(settings, CPU)
    load_checkpoint(resumed, tmp_path, "key")
    assert torch.equal(weights(train(settings, Noise(), resumed)), weights(whole))


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_workers_together_see_the_batch_of_one_worker(world_size: int) -> None:
    schedule, condition = make_schedule(**SETTINGS.schedule), ConditionSpec(**SETTINGS.network["condition"])

    def batches(rank: int, size: int) -> list[dict]:
        return [batch for _, batch in _batches(SETTINGS, Noise(), schedule, condition, 3, 6, rank, size, CPU)]

    alone = batches(0, 1)
    shares = [batches(rank, world_size) for rank in range(world_size)]
    for step, batch in enumerate(alone):
        for name in ("x0", "t", "eps", "condition"):
            assert torch.equal(torch.cat([share[step][name] for share in shares]), batch[name]), name


def test_every_epoch_shows_each_image_once_in_an_order_of_its_own() -> None:
    first, second = (dataset_indices(0, 20, np.arange(20 * e, 20 * (e + 1))) for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(20))
    assert not np.array_equal(first, second)
    across = dataset_indices(0, 20, np.arange(15, 25))
    assert np.array_equal(across, np.concatenate([first[15:], second[:5]]))


def test_conditions_are_dropped_as_often_as_asked() -> None:
    settings = replace(SETTINGS, batch_size=2000, condition_dropout=0.3, steps=1)
    schedule, condition = make_schedule(**SETTINGS.schedule), ConditionSpec(**SETTINGS.network["condition"])
    [(_, batch)] = list(_batches(settings, Noise(), schedule, condition, 0, 1, 0, 1, CPU))
    assert (batch["condition"] == 3).float().mean() == pytest.approx(0.3, abs=0.04)
    assert batch["t"].min() >= 0
    assert batch["t"].max() < 100
    assert batch["t"].double().mean() == pytest.approx(49.5, abs=3)


def test_training_learns_images_that_their_class_decides() -> None:
    images = Noise()
    images.images = (images.labels * 100).to(torch.uint8).view(20, 1, 1, 1).expand(20, 1, 8, 8)
    settings = replace(SETTINGS, steps=200, batch_size=16, learning_rate=4e-3, condition_dropout=0.0)
    state = train(settings, images, new_state(settings, CPU))
    assert state.history[-1]["loss"] < 0.3 * state.history[0]["loss"]


def test_diverged_training_names_the_settings() -> None:
    settings = replace(SETTINGS, learning_rate=1e30, warmup_steps=0, steps=40)
    with pytest.raises(TrainingDivergedError, match=r"train\.learning_rate"):
        train(settings, Noise(), new_state(settings, CPU), Hooks(log_every=1))


def test_learning_rate_rises_and_falls() -> None:
    rates = [learning_rate_at(SETTINGS, step) for step in range(12)]
    assert rates[:4] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3])
    assert rates[4] == pytest.approx(1e-3)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert learning_rate_at(SETTINGS, 12) == pytest.approx(0.0, abs=1e-12)
    assert learning_rate_at(replace(SETTINGS, decay="constant"), 11) == 1e-3


def test_torn_and_foreign_checkpoints_are_refused(tmp_path: Path) -> None:
    state = train(SETTINGS, Noise(), new_state(SETTINGS, CPU), until=2)
    save_checkpoint(state, tmp_path, "key")
    assert check_checkpoint(tmp_path, "key") == 2
    with pytest.raises(ValueError, match="belongs to run key"):
        check_checkpoint(tmp_path, "other")
    tensors = tmp_path / "checkpoint.safetensors"
    content = tensors.read_bytes()
    tensors.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="torn"):
        load_checkpoint(new_state(SETTINGS, CPU), tmp_path, "key")
    tensors.write_bytes(content)
    (tmp_path / "checkpoint.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        check_checkpoint(tmp_path, "key")


def test_precision_follows_the_hardware_only_when_asked() -> None:
    assert resolve_precision("fp32", CPU) is torch.float32
    assert resolve_precision("bf16", CPU) is torch.bfloat16
    assert resolve_precision("auto", CPU) in (torch.float32, torch.bfloat16)


def test_bf16_training_stays_near_float32() -> None:
    rows = {}
    for precision in ("fp32", "bf16"):
        settings = replace(SETTINGS, precision=precision)
        rows[precision] = train(settings, Noise(), new_state(settings, CPU)).history[-1]["loss"]
    assert rows["bf16"] == pytest.approx(rows["fp32"], rel=0.05)


def test_model_of_a_state_carries_the_ema_weights(tmp_path: Path) -> None:
    state = train(SETTINGS, Noise(), new_state(SETTINGS, CPU))
    model = ema_model(SETTINGS, state)
    own = dict(model.network.named_parameters())
    different = [name for name, value in state.network.named_parameters() if not torch.equal(value, own[name])]
    assert different, "EMA weights are not the raw ones"
    assert model.condition_dropout == 0.5


def test_grid_shows_every_image_in_its_place() -> None:
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 1, 4, 4) * 40
    picture = np.asarray(image_grid(images, columns=3, scale=2, gap=1))
    assert picture.shape == (2 * 9 + 1, 3 * 9 + 1)
    for index in range(6):
        top, left = 1 + (index // 3) * 9, 1 + (index % 3) * 9
        assert (picture[top : top + 8, left : left + 8] == index * 40).all()


@pytest.mark.parametrize(("precision", "expected"), [("fp32", True), ("bf16", False)])
def test_network_and_batch_lie_as_their_precision_wants(precision: str, expected: bool) -> None:
    settings = replace(SETTINGS, precision=precision)
    state = new_state(settings, torch.device("cpu"))
    weight = next(value for name, value in state.network.named_parameters() if name.endswith("conv1.weight"))
    assert weight.is_contiguous(memory_format=torch.channels_last) == expected
