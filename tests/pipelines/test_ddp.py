"""Training on Ray Train: any number of workers, and a resume on another number, give the same result."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist

from pipelines.cluster import ray_session
from pipelines.data.shards import SPLITS, write_manifest, write_shards
from pipelines.ddp.driver import raise_user_error, train_on_ray
from pipelines.ddp.progress import ProgressLog
from pipelines.ddp.sample_picture import sample_picture
from pipelines.ddp.surviving_state import hold_worker_lock, newest_checkpoint, rename_torn_snapshots, wait_for_workers
from pipelines.ddp.worker import broadcast_state
from pipelines.identity import State
from pipelines.params import RayRun
from pipelines.resources import TrainingPlan
from pipelines.training.checkpoint import check_checkpoint, load_checkpoint, save_checkpoint
from pipelines.training.loop import TrainState, learning_rate_at, new_state, rows, train
from tests.pipelines.test_training_loop import CPU, SETTINGS, WITH_DROPOUT, Noise, weights

STEPS = 100
LONG = replace(WITH_DROPOUT, steps=STEPS, batch_size=16, warmup_steps=10)
PLAN = TrainingPlan(
    num_workers=1, cpus_per_worker=1.0, gpus_per_worker=0.0, max_failures=0,
    log_every=10, checkpoint_every=25, sample_every=STEPS, reason="",
)  # fmt: skip


class Record:
    """Rows and pictures that a training sent to the driver."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.pictures: dict[int, bytes] = {}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty random images of 8x8 pixels in three classes."""
    folder = tmp_path_factory.mktemp("data")
    noise = Noise()
    images = noise.images.permute(0, 2, 3, 1).numpy()
    labels = noise.labels.numpy().astype(np.int64)
    shards = {split: write_shards(folder, split, [(images, labels)], 16) for split in SPLITS}
    counts = dict.fromkeys(SPLITS, 20)
    class_counts = {split: np.bincount(labels, minlength=3).tolist() for split in SPLITS}
    write_manifest(
        folder, counts=counts, class_counts=class_counts, shape=[8, 8, 1], class_names=["a", "b", "c"],
        transform={}, skipped=[], shards=shards,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    """A local Ray with three CPUs."""
    with ray_session(RayRun(num_cpus=3)):
        yield


def start_on_ray(
    storage: Path, data_dir: Path, on_row: Any, on_picture: Any = lambda step, picture: None, **changes: Any
) -> Path:
    state_dir = storage / "train" / "key"
    state_dir.mkdir(parents=True, exist_ok=True)
    return train_on_ray(
        LONG,
        replace(PLAN, **changes),
        data_dir=data_dir,
        storage=str(storage),
        state=State(state_dir, "key"),
        on_row=on_row,
        on_picture=on_picture,
    )


def run_on_ray(storage: Path, data_dir: Path, num_workers: int, **changes: Any) -> tuple[TrainState, Record]:
    """Train to the end; returns the final state and what the driver got."""
    record = Record()
    folder = start_on_ray(
        storage, data_dir, record.rows.append, record.pictures.__setitem__, num_workers=num_workers, **changes
    )
    state = new_state(LONG, CPU)
    load_checkpoint(state, folder, "key")
    return state, record


@pytest.fixture(scope="module")
def runs(ray: None, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[TrainState, Path]]:
    """The same training on one, two and three workers: final states and storage folders."""
    made = {}
    for num_workers in (1, 2, 3):
        storage = tmp_path_factory.mktemp(f"workers_{num_workers}")
        state, record = run_on_ray(storage, data_dir, num_workers)
        assert [row["step"] for row in record.rows] == list(range(10, STEPS + 1, 10))
        assert list(record.pictures) == [STEPS]
        made[num_workers] = state, storage
    return made


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [2, 3])
def test_loss_curve_does_not_depend_on_the_number_of_workers(
    runs: dict[int, tuple[TrainState, Path]], num_workers: int
) -> None:
    alone, together = runs[1][0], runs[num_workers][0]
    largest = ((together.losses - alone.losses).abs() / alone.losses).max()
    print(f"1 against {num_workers} workers: largest relative difference of a loss {largest:.1e}")
    assert len(alone.losses) == STEPS
    assert largest < 1e-5
    torch.testing.assert_close(together.grad_norms, alone.grad_norms, rtol=1e-3, atol=0.0)


def kill_a_worker() -> None:
    """Kill one Ray Train worker of the local Ray."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                process.kill()
                return


@pytest.fixture(scope="module")
def stopped(ray: None, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The storage of a training on two workers that was stopped between its first and last checkpoint."""
    from ray.train import TrainingFailedError  # only after ray_session, which sets what Ray reads when it is imported

    storage = tmp_path_factory.mktemp("stopped")

    def on_row(row: dict[str, Any]) -> None:
        if row["step"] == 30:
            kill_a_worker()

    with pytest.raises(TrainingFailedError):
        start_on_ray(storage, data_dir, on_row, num_workers=2, checkpoint_every=10)
    return storage


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 3])
def test_run_of_two_workers_resumes_on_another_number_of_workers(
    stopped: Path, runs: dict[int, tuple[TrainState, Path]], data_dir: Path, tmp_path: Path, num_workers: int
) -> None:
    whole, _ = runs[2]
    shutil.copytree(stopped, tmp_path / "storage")
    found = newest_checkpoint(str(tmp_path / "storage/train/key"), "key", tmp_path)
    assert found is not None
    at = check_checkpoint(found, "key")
    assert 0 < at < STEPS
    resumed, record = run_on_ray(tmp_path / "storage", data_dir, num_workers, log_every=20)
    assert [row["step"] for row in record.rows] == [20, 40, 60, 80, 100]
    assert ["images_per_s" in row for row in record.rows] == [step > at for step in (20, 40, 60, 80, 100)]
    assert torch.equal(resumed.losses[:at], whole.losses[:at])
    torch.testing.assert_close(resumed.losses, whole.losses, rtol=1e-5, atol=0.0)
    assert (weights(resumed) - weights(whole)).norm() < 1e-3 * weights(whole).norm()


@pytest.mark.slow
def test_finished_run_starts_no_workers(
    runs: dict[int, tuple[TrainState, Path]], data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, storage = runs[2]
    monkeypatch.setattr("ray.train.torch.TorchTrainer", lambda *args, **options: pytest.fail("Ray Train started"))
    again, record = run_on_ray(storage, data_dir, 2)
    assert torch.equal(weights(again), weights(whole))
    assert record.rows == []


def test_every_rank_gets_each_tensor_of_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """The broadcast of rank 0 is recorded, then played back to a fresh rank 1."""
    sent: list[torch.Tensor] = []
    source = train(SETTINGS, Noise(), new_state(SETTINGS, CPU), until=5)
    monkeypatch.setattr(dist, "broadcast", lambda tensor, src: sent.append(tensor.clone()))
    broadcast_state(source, rank=0)
    received = new_state(SETTINGS, CPU)
    queue = iter(sent)
    monkeypatch.setattr(dist, "broadcast", lambda tensor, src: tensor.copy_(next(queue)))
    broadcast_state(received, rank=1)
    assert next(queue, None) is None
    assert received.step == 5
    assert all(tensor.device == CPU for tensor in sent)
    for a, b in zip(source.network.parameters(), received.network.parameters(), strict=True):
        for name, slot in source.optimizer.state[a].items():
            own = received.optimizer.state[b][name]
            assert torch.equal(own, slot), name
            assert own.stride() == slot.stride(), name
    monkeypatch.undo()
    for state in (source, received):
        train(SETTINGS, Noise(), state)
    assert torch.equal(weights(received), weights(source))
    assert torch.equal(received.losses, source.losses)


def test_fresh_state_broadcasts_its_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[torch.Tensor] = []
    monkeypatch.setattr(dist, "broadcast", lambda tensor, src: sent.append(tensor))
    broadcast_state(new_state(SETTINGS, CPU), rank=0)
    assert [tensor.tolist() for tensor in sent] == [[0]]


def test_newest_whole_checkpoint_of_the_run_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert newest_checkpoint(str(tmp_path), "key", tmp_path / "copy") is None
    state = new_state(SETTINGS, CPU)
    for step, key in ((2, "key"), (4, "key"), (6, "key"), (8, "other")):
        folder = tmp_path / "train" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        save_checkpoint(train(SETTINGS, Noise(), state, until=step), folder, key)
    torn = tmp_path / "train/step_00000006/checkpoint.safetensors"
    torn.write_bytes(torn.read_bytes()[:100])
    expected = tmp_path / "train/step_00000004"
    assert newest_checkpoint(str(tmp_path), "key", tmp_path / "copy") == expected
    assert [record.message.split(": ")[0] for record in caplog.records] == ["checkpoint skipped"] * 2
    assert not (tmp_path / "copy").exists()
    copied = newest_checkpoint(f"file://{tmp_path}", "key", tmp_path / "copy")
    assert copied == tmp_path / "copy"
    assert (copied / "checkpoint.json").read_bytes() == (expected / "checkpoint.json").read_bytes()


def test_torn_snapshot_of_ray_is_renamed_and_a_whole_one_stays(tmp_path: Path) -> None:
    (tmp_path / "checkpoint_manager_snapshot.json").write_text('{"checkpoint_results": [')
    (tmp_path / "whole_snapshot.json").write_text("{}")
    rename_torn_snapshots(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint_manager_snapshot.torn",
        "whole_snapshot.json",
    ]


def test_driver_waits_for_workers_of_an_earlier_run(tmp_path: Path) -> None:
    wait_for_workers(tmp_path, seconds=0.0)
    hold_worker_lock(tmp_path)
    with pytest.raises(ValueError, match="workers of an earlier run still train"):
        wait_for_workers(tmp_path, seconds=0.0)


def test_error_of_a_user_is_found_under_the_errors_of_ray() -> None:
    class Wrapped(RuntimeError):
        def __init__(self, inner: BaseException) -> None:
            super().__init__("wrapped")
            self.worker_failures = {0: inner}

    inner = RuntimeError("task failed")
    inner.__cause__ = ValueError("cannot read the data set")
    with pytest.raises(ValueError, match=r"^cannot read the data set$"):
        raise_user_error(Wrapped(inner))
    assert raise_user_error(Wrapped(RuntimeError("our fault"))) is None


def test_sample_picture_shows_a_column_per_class() -> None:
    import io

    from PIL import Image

    picture = Image.open(io.BytesIO(sample_picture(SETTINGS, new_state(SETTINGS, CPU))))
    assert picture.size == (3 * (32 + 2) + 2, 4 * (32 + 2) + 2)


class FakeRun:
    """A run of MLflow that keeps what it gets."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.artifacts: list[str] = []

    def log_rows(self, rows: list[dict[str, float]]) -> None:
        self.logged += rows

    def log_artifact(self, path: Path, folder: str) -> None:
        self.artifacts.append(f"{folder}/{path.name}")


def test_flush_with_the_history_fills_in_rows_that_a_kill_has_lost(tmp_path: Path) -> None:
    state = train(SETTINGS, Noise(), new_state(SETTINGS, CPU))
    history = rows(SETTINGS, state, 2)
    run = FakeRun()
    progress = ProgressLog(run, SETTINGS.steps, tmp_path)
    progress.on_row({**history[-1], "images_per_s": 10.0, "seconds_left": 0.0})
    progress.on_picture(12, b"png")
    progress.flush(history)
    assert {row["step"] for row in run.logged} == {2, 4, 6, 8, 10, 12}
    assert run.logged[0]["train/images_per_s"] == 10.0
    assert run.logged[1] == {
        "step": 2,
        "train/loss": history[0]["loss"],
        "train/learning_rate": learning_rate_at(SETTINGS, 1),
        "train/grad_norm": history[0]["grad_norm"],
    }
    assert run.artifacts == ["samples/step_00000012.png"]
    assert (tmp_path / "step_00000012.png").read_bytes() == b"png"
