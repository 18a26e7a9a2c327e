from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from diffusion_core.schedules import make_schedule
from pipelines.data.shards import Manifest
from pipelines.params import load_params, with_overrides
from pipelines.training.checkpoint import (
    CheckpointMismatchError,
    check_checkpoint,
    load_checkpoint,
    origin_of,
    save_checkpoint,
)
from pipelines.training.loop import (
    Hooks,
    TrainingDivergedError,
    TrainSettings,
    TrainState,
    _batch,
    _read_ahead,
    autocast_dtype,
    learning_rate_at,
    new_state,
    rows,
    share_of_batch,
    train,
)
from pipelines.training.model import ema_model
from pipelines.training.settings import Best, read_best, train_settings

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = TrainSettings(
    seed=3,
    steps=12,
    batch_size=8,
    learning_rate=1e-3,
    warmup_steps=4,
    decay="cosine",
    weight_decay=0.0,
    grad_clip=1.0,
    ema_decay=0.999,
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
WITH_DROPOUT = replace(SETTINGS, network={**SETTINGS.network, "dropout": 0.3})
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


def batches(settings: TrainSettings, first: int, last: int, rank: int = 0, world_size: int = 1) -> list[dict]:
    """Return the arguments of the loss for these steps."""
    schedule = make_schedule(**settings.schedule)
    share = share_of_batch(settings.batch_size, rank, world_size)
    positions = torch.arange(share.start, share.stop)
    read = _read_ahead(settings, Noise(), share, first, last, pinned=False)
    return [_batch(settings, schedule, pixels, labels, positions, step) for step, pixels, labels in read]


@pytest.mark.parametrize("stop", [1, 5, 11])
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(tmp_path: Path, stop: int) -> None:
    whole = train(SETTINGS, Noise(), new_state(SETTINGS, CPU), Hooks(log_every=1))
    half = train(SETTINGS, Noise(), new_state(SETTINGS, CPU), Hooks(log_every=1), until=stop)
    save_checkpoint(half, tmp_path, "key")
    resumed = new_state(SETTINGS, CPU)
    load_checkpoint(resumed, tmp_path, "key")
    assert resumed.step == stop
    train(SETTINGS, Noise(), resumed, Hooks(log_every=1))
    assert torch.equal(weights(resumed), weights(whole))
    assert torch.equal(resumed.losses, whole.losses)
    assert torch.equal(resumed.grad_norms, whole.grad_norms)


def test_run_with_dropout_resumes_bit_for_bit_too(tmp_path: Path) -> None:
    whole = train(WITH_DROPOUT, Noise(), new_state(WITH_DROPOUT, CPU))
    half = train(WITH_DROPOUT, Noise(), new_state(WITH_DROPOUT, CPU), until=7)
    save_checkpoint(half, tmp_path, "key")
    resumed = new_state(WITH_DROPOUT, CPU)
    load_checkpoint(resumed, tmp_path, "key")
    assert torch.equal(weights(train(WITH_DROPOUT, Noise(), resumed)), weights(whole))


@pytest.mark.parametrize("world_size", [2, 3, 5, 7, 8])
def test_workers_with_uneven_shares_together_see_the_batch_of_one_worker(world_size: int) -> None:
    shares = [batches(SETTINGS, 3, 6, rank, world_size) for rank in range(world_size)]
    sizes = [len(share[0]["x0"]) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    for step, batch in enumerate(batches(SETTINGS, 3, 6)):
        for name in ("x0", "t", "eps", "condition"):
            assert torch.equal(torch.cat([share[step][name] for share in shares]), batch[name]), name


def test_64_images_on_3_workers_are_shared_as_22_21_and_21() -> None:
    shares = [share_of_batch(64, rank, 3) for rank in range(3)]
    assert [len(share) for share in shares] == [22, 21, 21]
    assert [position for share in shares for position in share] == list(range(64))


def gradient(settings: TrainSettings, rank: int = 0, world_size: int = 1) -> torch.Tensor:
    """Return the gradient of the first step on one rank, before DDP would average it."""
    parts: dict[int, torch.Tensor] = {}

    def watched(network: nn.Module) -> nn.Module:
        for number, parameter in enumerate(network.parameters()):
            parameter.register_post_accumulate_grad_hook(
                lambda p, number=number: parts.__setitem__(number, p.grad.clone().flatten())
            )
        return network

    train(settings, Noise(), new_state(settings, CPU), rank=rank, world_size=world_size, wrap=watched, until=1)
    return torch.cat([parts[number] for number in sorted(parts)])


@pytest.mark.parametrize("world_size", [2, 3, 5, 7])
def test_mean_gradient_of_workers_with_dropout_is_that_of_one_worker(
    world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "all_gather", lambda shares, own: [share.copy_(own) for share in shares])
    monkeypatch.setattr(dist, "all_reduce", lambda flags, op: None)
    mean = sum(gradient(WITH_DROPOUT, rank, world_size) for rank in range(world_size)) / world_size
    alone = gradient(WITH_DROPOUT)
    assert (mean - alone).norm() < 1e-5 * alone.norm()


def test_conditions_are_dropped_with_the_given_share() -> None:
    settings = replace(SETTINGS, batch_size=2000, condition_dropout=0.3, steps=1)
    [batch] = batches(settings, 0, 1)
    assert (batch["condition"] == 3).float().mean() == pytest.approx(0.3, abs=0.04)
    assert batch["t"].min() >= 0
    assert batch["t"].max() < 100
    assert batch["t"].double().mean() == pytest.approx(49.5, abs=3)


def test_rows_do_not_depend_on_the_cadence_of_hooks() -> None:
    logged: dict[int, list] = {}
    states = {}
    for every in (1, 3, 5, 100):
        own = logged[every] = []
        hooks = Hooks(log_every=every, checkpoint_every=every + 1, on_log=lambda p, own=own: own.append(dict(p.row)))
        states[every] = train(SETTINGS, Noise(), new_state(SETTINGS, CPU), hooks)
    for every, state in states.items():
        assert torch.equal(weights(state), weights(states[1]))
        assert torch.equal(state.losses, states[1].losses)
        assert rows(SETTINGS, states[1], every) == logged[every]
    assert [row["step"] for row in logged[5]] == [5, 10, 12]
    assert logged[5][1]["loss"] == pytest.approx(np.mean([row["loss"] for row in logged[1][5:10]]))
    assert logged[5][2]["loss"] == pytest.approx(np.mean([row["loss"] for row in logged[1][10:]]))


def test_history_survives_a_resume_with_another_log_every(tmp_path: Path) -> None:
    whole = train(SETTINGS, Noise(), new_state(SETTINGS, CPU))
    half = train(SETTINGS, Noise(), new_state(SETTINGS, CPU), Hooks(log_every=2), until=7)
    assert [row["step"] for row in rows(SETTINGS, half, 3)] == [3, 6], "a row that is not complete is not shown"
    save_checkpoint(half, tmp_path, "key")
    resumed = new_state(SETTINGS, CPU)
    load_checkpoint(resumed, tmp_path, "key")
    logged: list = []
    train(SETTINGS, Noise(), resumed, Hooks(log_every=4, on_log=lambda p: logged.append(dict(p.row))))
    assert rows(SETTINGS, resumed, 4) == rows(SETTINGS, whole, 4)
    assert logged == rows(SETTINGS, whole, 4)[1:]


def test_training_learns_images_that_their_class_decides() -> None:
    images = Noise()
    images.images = (images.labels * 100).to(torch.uint8).view(20, 1, 1, 1).expand(20, 1, 8, 8)
    settings = replace(SETTINGS, steps=200, batch_size=16, learning_rate=4e-3, condition_dropout=0.0)
    state = train(settings, images, new_state(settings, CPU))
    assert state.losses[-10:].mean() < 0.3 * state.losses[:10].mean()


@pytest.mark.parametrize(
    ("learning_rate", "where"),
    [(1e30, "losses"), (1e39, "weights, EMA weights not finite at step 1$")],
)
def test_diverged_state_is_never_checkpointed(learning_rate: float, where: str) -> None:
    """At 1e39 the first update overflows while the loss before it is finite."""
    settings = replace(SETTINGS, learning_rate=learning_rate, warmup_steps=0, steps=40)
    finite: list[bool] = []
    hooks = Hooks(
        log_every=1000, checkpoint_every=1, on_checkpoint=lambda s: finite.append(bool(weights(s).isfinite().all()))
    )
    with pytest.raises(TrainingDivergedError, match=where):
        train(settings, Noise(), new_state(settings, CPU), hooks)
    assert all(finite)


def test_diverged_state_is_noticed_at_the_next_log_step() -> None:
    settings = replace(SETTINGS, learning_rate=1e30, warmup_steps=0, steps=40)
    logged: list = []
    hooks = Hooks(log_every=10, on_log=logged.append)
    with pytest.raises(TrainingDivergedError, match="not finite at step 10"):
        train(settings, Noise(), new_state(settings, CPU), hooks)
    assert logged == []


def test_sample_picture_without_memory_does_not_stop_training_and_comes_after_the_checkpoint(
    caplog: pytest.LogCaptureFixture,
) -> None:
    saved: list[int] = []

    def on_sample(state: TrainState) -> None:
        assert saved[-1] == state.step
        raise torch.OutOfMemoryError("no memory")

    hooks = Hooks(checkpoint_every=6, sample_every=6, on_checkpoint=lambda s: saved.append(s.step), on_sample=on_sample)
    state = train(SETTINGS, Noise(), new_state(SETTINGS, CPU), hooks)
    assert state.step == 12
    assert saved == [6, 12]
    assert [record.message for record in caplog.records] == [
        "step 6: no GPU memory for the sample picture; it is skipped",
        "step 12: no GPU memory for the sample picture; it is skipped",
    ]


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


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"network": {**SETTINGS.network, "channels": 16}}, "differs"),
        ({"network": {**SETTINGS.network, "multipliers": [1, 2, 2], "attention_sizes": []}}, "differs"),
        ({"steps": 4}, "5 steps are more than 4"),
    ],
)
def test_checkpoint_that_does_not_fit_is_refused_and_leaves_the_state_unchanged(
    tmp_path: Path, changes: dict, reason: str
) -> None:
    save_checkpoint(train(SETTINGS, Noise(), new_state(SETTINGS, CPU), until=5), tmp_path, "key")
    state = new_state(replace(SETTINGS, **changes), CPU)
    before = weights(state)
    with pytest.raises(CheckpointMismatchError, match=f"does not fit the network or the settings: .*{reason}"):
        load_checkpoint(state, tmp_path, "key")
    assert torch.equal(weights(state), before)
    assert state.step == 0


@pytest.mark.parametrize("name", ["unet", "context_unet"])
def test_checkpoint_of_one_step_fits_each_network_of_the_params(tmp_path: Path, name: str) -> None:
    params = load_params(ROOT / "params.yaml").train
    small = params.network.model_copy(update={"name": name})
    manifest = Manifest({}, {}, (8, 8, 1), ("a", "b", "c"), {}, [], {}, "hash")
    settings = train_settings(params.model_copy(update={"network": small, "batch_size": 2}), 0, manifest, "fp32")
    save_checkpoint(train(settings, Noise(), new_state(settings, CPU), until=1), tmp_path, "key")
    resumed = new_state(settings, CPU)
    load_checkpoint(resumed, tmp_path, "key")
    assert resumed.step == 1


def test_checkpoint_names_the_device_and_torch_of_its_process(tmp_path: Path) -> None:
    save_checkpoint(train(SETTINGS, Noise(), new_state(SETTINGS, CPU), until=1), tmp_path, "key")
    assert origin_of(tmp_path) == {"torch": torch.__version__, "device_type": "cpu"}


def test_precision_decides_the_type_of_autocast() -> None:
    assert autocast_dtype(SETTINGS) is torch.float32
    assert autocast_dtype(replace(SETTINGS, precision="bf16")) is torch.bfloat16
    with pytest.raises(AssertionError, match="must be resolved"):
        autocast_dtype(replace(SETTINGS, precision="auto"))


def test_bf16_training_stays_near_float32() -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        settings = replace(SETTINGS, precision=precision)
        losses[precision] = train(settings, Noise(), new_state(settings, CPU)).losses
    assert losses["bf16"].mean() == pytest.approx(losses["fp32"].mean().item(), rel=0.05)
    assert not torch.equal(losses["bf16"], losses["fp32"])


def test_model_of_a_state_carries_the_ema_weights(tmp_path: Path) -> None:
    state = train(SETTINGS, Noise(), new_state(SETTINGS, CPU))
    model = ema_model(SETTINGS, state)
    own = dict(model.network.named_parameters())
    different = [name for name, value in state.network.named_parameters() if not torch.equal(value, own[name])]
    assert different, "EMA weights are not the raw ones"
    assert model.condition_dropout == 0.5


@pytest.mark.parametrize(("precision", "expected"), [("fp32", True), ("bf16", False)])
def test_memory_format_follows_the_precision(precision: str, expected: bool) -> None:
    settings = replace(SETTINGS, precision=precision)
    state = new_state(settings, torch.device("cpu"))
    weight = next(value for name, value in state.network.named_parameters() if name.endswith("conv1.weight"))
    assert weight.is_contiguous(memory_format=torch.channels_last) == expected


def test_choice_of_the_search_and_the_resolved_precision_reach_the_loop() -> None:
    manifest = Manifest({}, {}, (8, 8, 1), ("a", "b"), {}, [], {}, "hash")
    params = load_params(ROOT / "params.yaml")
    overrides = {"schedule": "linear", "objective": "eps", "weighting": "snr", "learning_rate": 0.5}
    used = with_overrides(params, overrides, "best.yaml")
    plain, tuned = (train_settings(each.train, 7, manifest, "bf16") for each in (params, used))
    assert (plain.schedule["name"], plain.objective) == ("cosine", "v")
    assert (tuned.schedule["name"], tuned.objective, tuned.weighting) == ("linear", "eps", "snr")
    assert tuned.learning_rate == 0.5
    assert (tuned.seed, tuned.precision) == (7, "bf16")
    assert tuned.network["condition"] == {"kind": "class", "size": 2}
    small = used.train.model_copy(update={"steps": 3})
    assert train_settings(small, 7, manifest, "fp32").warmup_steps == 3


def test_best_yaml_of_another_form_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "best.yaml"
    path.write_text("overrides: {objective: v}\ntrial: trial-1\ntie: []\n")
    assert read_best(path) == Best({"objective": "v"})
    path.write_text("overrides: {objective: v}\nresumed_across_changes: [pipelines.training.loop]\n")
    assert read_best(path) == Best({"objective": "v"}, ("pipelines.training.loop",))
    for text in ("- v\n", "trial: trial-1\n", "overrides: {batch_size: 3}\n", "overrides: v\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"best\.yaml: must hold overrides of schedule"):
            read_best(path)
