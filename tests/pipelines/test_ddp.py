"""Training on Ray Train: any number of workers, and a resume on another number, give the same result."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist

from pipelines import identity
from pipelines import train as stage
from pipelines.cluster import ray_session
from pipelines.data.shards import SPLITS, Manifest, open_split, write_manifest, write_shards
from pipelines.ddp import driver
from pipelines.ddp import worker as worker_module
from pipelines.ddp.driver import draining, raise_user_error, train_on_ray
from pipelines.ddp.progress import ProgressLog
from pipelines.ddp.progress_picture import progress_picture
from pipelines.ddp.surviving_state import hold_worker_lock, newest_checkpoint, rename_torn_snapshots, wait_for_workers
from pipelines.ddp.worker import broadcast_state
from pipelines.identity import State
from pipelines.params import Params, RayRun, RunSettings, load_params, with_overrides
from pipelines.resources import Node, TrainingPlan
from pipelines.storages import earlier_storages
from pipelines.training.checkpoint import CheckpointMismatchError, check_checkpoint, load_checkpoint, save_checkpoint
from pipelines.training.loop import TrainSettings, TrainState, learning_rate_at, new_state, rows, train
from pipelines.training.settings import train_settings
from tests.pipelines.test_training_loop import CPU, ROOT, SETTINGS, WITH_DROPOUT, Noise, weights

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
        storage=str(state_dir),
        earlier=(),
        state=State(state_dir, "key"),
        on_row=on_row,
        on_picture=on_picture,
    )


def run_on_ray(storage: Path, data_dir: Path, num_workers: int, **changes: Any) -> tuple[TrainState, Record]:
    """Train to the end. Return the final state and the messages that the driver got."""
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
def test_run_of_two_workers_resumes_on_three_workers(
    stopped: Path, runs: dict[int, tuple[TrainState, Path]], data_dir: Path, tmp_path: Path
) -> None:
    whole, _ = runs[2]
    found = newest_checkpoint(str(stopped / "train/key"), "key", tmp_path)
    assert found is not None
    at = check_checkpoint(found, "key")
    assert 0 < at < STEPS
    resumed, record = run_on_ray(stopped, data_dir, 3, log_every=20)
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


def test_progress_picture_shows_a_column_per_class() -> None:
    import io

    from PIL import Image

    picture = Image.open(io.BytesIO(progress_picture(SETTINGS, new_state(SETTINGS, CPU))))
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

    def log_missing_artifacts(self, paths: list[Path], folder: str) -> None:
        for path in paths:
            if f"{folder}/{path.name}" not in self.artifacts:
                self.log_artifact(path, folder)


def test_flush_with_the_history_adds_the_rows_that_a_kill_has_lost(tmp_path: Path) -> None:
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


class FakeQueue:
    """A queue of Ray that lives in this process."""

    def __init__(self) -> None:
        self.messages: list[Any] = []

    def put(self, message: Any) -> None:
        self.messages.append(message)

    def get(self, timeout: float) -> Any:
        from ray.util.queue import Empty

        if not self.messages:
            raise Empty
        return self.messages.pop(0)

    def empty(self) -> bool:
        return not self.messages


@pytest.mark.parametrize("num_workers", [1, 2])
def test_worker_without_gpu_memory_ends_the_training_at_once_with_the_settings_to_change(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    class Context:
        get_world_rank = staticmethod(lambda: num_workers - 1)
        get_world_size = staticmethod(lambda: num_workers)

    steps: list[str] = []

    def out_of_memory(*args: Any, **options: Any) -> None:
        steps.append("step")
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("ray.train.get_context", Context)
    monkeypatch.setattr("ray.train.torch.get_device", lambda: CPU)
    monkeypatch.setattr(worker_module, "prepare_process", lambda threads: CPU)
    monkeypatch.setattr(worker_module, "train", out_of_memory)
    monkeypatch.setattr(worker_module, "broadcast_state", lambda state, rank: None)
    monkeypatch.setattr("torch.distributed.new_group", lambda backend: None)
    queue, stop = FakeQueue(), FakeQueue()
    config = {
        "settings": asdict(SETTINGS), "data_dir": str(data_dir), "state_dir": str(tmp_path), "storage_path": str(tmp_path),
        "key": "key", "queue": queue, "stop": stop, "threads": 1, "hooks": {},
    }  # fmt: skip
    with (
        pytest.raises(ValueError, match=r"lower train\.batch_size or train\.network\.channels .* or add workers"),
        draining(queue, lambda row: None, lambda step, picture: None),
    ):
        worker_module.worker(config)
    worker_module.worker(config)
    assert steps == ["step"], "Ray's retry does not train again"


def test_storages_of_earlier_runs_are_recorded_and_unreachable_ones_are_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="rediffuse")
    state = State(tmp_path / "state", "key")
    state.folder.mkdir()
    own, local, uri = str(state.folder), str(tmp_path / "local"), f"file://{tmp_path}/remote"
    for folder in ("local", "remote"):
        (tmp_path / folder).mkdir()
    assert earlier_storages(state, own) == ()
    assert not list(state.folder.iterdir()), "the default storage is not recorded"
    assert earlier_storages(state, local) == (own,)
    assert earlier_storages(state, uri) == (own, local)
    assert earlier_storages(state, own) == (local, uri)
    shutil.rmtree(tmp_path / "remote")
    assert caplog.records == []
    assert earlier_storages(state, local) == (own,)
    assert [record.message for record in caplog.records] == [
        f"earlier storage {uri} holds nothing or cannot be reached: skipped"
    ]


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_newest_checkpoint_of_all_storages_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    state = new_state(SETTINGS, CPU)
    for step, storage in ((4, "one"), (8, "two"), (12, "three")):
        folder = tmp_path / storage / f"train/step_{step:08d}"
        folder.mkdir(parents=True)
        save_checkpoint(train(SETTINGS, Noise(), state, until=step), folder, "key")
    torn = tmp_path / "three/train/step_00000012/checkpoint.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1])
    one, two, three = (f"{scheme}{tmp_path}/{name}" for name in ("one", "two", "three"))
    resumed_at: list[int] = []

    def fit(settings: TrainSettings, plan: TrainingPlan, data_dir: Path, storage: str, *rest: Any) -> None:
        found = newest_checkpoint(storage, "key", tmp_path / "found")
        resumed_at.append(check_checkpoint(found, "key") if found is not None else 0)

    monkeypatch.setattr(driver, "_fit", fit)
    for storage, earlier in ((one, (three, two)), (two, (one,)), (f"{scheme}{tmp_path}/new", (one,))):
        train_on_ray(
            SETTINGS, PLAN, data_dir=tmp_path, storage=storage, earlier=earlier, state=State(tmp_path, "key"),
            on_row=lambda row: None, on_picture=lambda step, picture: None,
        )  # fmt: skip
    assert resumed_at == [8, 8, 8]


class FakeStageRun(FakeRun):
    """A run of MLflow that the train stage can use."""

    def log_metrics(self, metrics: dict[str, float], step: int) -> None: ...
    def log_dict(self, value: Any, name: str) -> None: ...
    def set_tags(self, tags: dict[str, str]) -> None: ...


class TrainStage:
    """The train stage in this process, without Ray and MLflow. ``stop_at`` interrupts it after a checkpoint at that step."""

    def __init__(self, params: Params) -> None:
        self.params = params
        self.stop_at: int | None = None
        self.resumed_at: list[int] = []

    def fit(
        self, settings: TrainSettings, plan: TrainingPlan, data_dir: Path, storage: str, state: State, *rest: Any
    ) -> None:
        current = new_state(settings, CPU)
        folder = newest_checkpoint(storage, state.key, Path("found"))
        if folder is not None:
            load_checkpoint(current, folder, state.key)
        self.resumed_at.append(current.step)
        train(settings, open_split(data_dir, "train"), current, until=self.stop_at)
        target = Path(storage.removeprefix("file://")) / f"train/step_{current.step:08d}"
        target.mkdir(parents=True)
        save_checkpoint(current, target, state.key)
        if self.stop_at is not None:
            raise ValueError("interrupted by the test")

    def run(self, *, stop_at: int | None = None, storage: str = "runs", resume: str = "auto") -> dict[str, Any]:
        """Run the stage. Return the provenance of its model."""
        self.stop_at = stop_at
        stage.train(self.params, RunSettings(resume=resume, ray=RayRun(storage=storage)))
        return json.loads(Path("artifacts/model/model.json").read_text())["provenance"]


@pytest.fixture
def train_stage(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainStage:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(data_dir, "artifacts/data")
    Path("artifacts/search").mkdir()
    Path("artifacts/search/best.yaml").write_text("overrides: {}\n")
    params = load_params(ROOT / "params.yaml")
    network = params.train.network.model_copy(update={"channels": 8, "multipliers": [1, 2], "attention_sizes": []})
    small = {"steps": 12, "warmup_steps": 4, "batch_size": 8, "precision": "fp32", "network": network}
    made = TrainStage(params.model_copy(update={"train": params.train.model_copy(update=small)}))
    monkeypatch.setattr(driver, "_fit", made.fit)
    monkeypatch.setattr(stage, "ray_session", contextlib.nullcontext)
    monkeypatch.setattr(stage, "cluster_nodes", lambda: [Node(1.0)])
    monkeypatch.setattr(stage, "place", lambda plan: None)
    monkeypatch.setattr(stage, "check_shared", lambda folders: None)
    monkeypatch.setattr(stage, "stage_run", lambda *args, **options: contextlib.nullcontext(FakeStageRun()))
    return made


def change_the_code(monkeypatch: pytest.MonkeyPatch, mark: str = "changed") -> None:
    """Let pipelines/training/loop.py have other code."""
    digest = identity.source_digest
    monkeypatch.setattr(identity, "source_digest", lambda path: digest(path) + (mark if path.name == "loop.py" else ""))


def test_forced_resumes_of_training_and_search_are_named_in_the_provenance(
    train_stage: TrainStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="interrupted by the test"):
        train_stage.run(stop_at=6)
    change_the_code(monkeypatch)
    provenance = train_stage.run(resume="force")
    assert train_stage.resumed_at == [0, 6]
    assert provenance["resumed_across_changes"] == ["pipelines.training.loop"]
    assert "search_resumed_across_changes" not in provenance
    Path("artifacts/search/best.yaml").write_text("overrides: {}\nresumed_across_changes: [pipelines.search.trial]\n")
    assert train_stage.run()["search_resumed_across_changes"] == ["pipelines.search.trial"]
    assert train_stage.resumed_at == [0, 6], "the finished training is not repeated"


def test_forced_resume_across_another_network_ends_at_once_and_auto_starts_from_the_beginning(
    train_stage: TrainStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="interrupted by the test"):
        train_stage.run(stop_at=6)
    change_the_code(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(
            driver, "new_state", lambda settings, device: new_state(replace(settings, network=SETTINGS.network), device)
        )
        with pytest.raises(ValueError, match=r"does not fit the network .*: set resume: auto in run\.yaml") as caught:
            train_stage.run(resume="force")
    assert not isinstance(caught.value, CheckpointMismatchError)
    assert train_stage.resumed_at == [0], "no worker was started"
    assert "resumed_across_changes" not in train_stage.run()
    assert train_stage.resumed_at == [0, 0]


def test_changed_storage_does_not_restart_the_training(train_stage: TrainStage, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="interrupted by the test"):
        train_stage.run(stop_at=4)
    with pytest.raises(ValueError, match="interrupted by the test"):
        train_stage.run(stop_at=8, storage=f"file://{tmp_path}/bucket")
    train_stage.run(storage="other")
    train_stage.run()
    assert train_stage.resumed_at == [0, 4, 8]


def test_key_of_a_training_holds_the_settings_of_the_loop_only() -> None:
    params = load_params(ROOT / "params.yaml")
    manifest = Manifest({}, {}, (8, 8, 1), ("a", "b"), {}, [], {}, "hash")

    def key_of(changed: Params, precision: str = "fp32") -> str:
        return stage.train_identity(train_settings(changed.train, changed.seed, manifest, precision), "hash").key

    def changed(network: dict[str, Any] | None = None, **settings: Any) -> Params:
        own = params.train.network.model_copy(update=network or {})
        return params.model_copy(update={"train": params.train.model_copy(update={**settings, "network": own})})

    key = key_of(params)
    assert key_of(changed(precision="fp32")) == key_of(changed(precision="auto")) == key
    chosen = {"learning_rate": 1.5e-3}
    assert key_of(with_overrides(changed(learning_rate=2e-3), chosen, "best.yaml")) == key_of(changed(**chosen))
    assert key_of(changed(steps=8, warmup_steps=8)) == key_of(changed(steps=8, warmup_steps=9))
    other = {"name": "context_unet"}
    assert key_of(changed({**other, "dropout": 0.1})) == key_of(changed(other)) != key
    different = [key_of(params, "bf16"), key_of(changed(steps=8)), key_of(params.model_copy(update={"seed": 1}))]
    assert len({key, *different}) == 4
