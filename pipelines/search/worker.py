"""The function that a Ray Tune trial runs, and the folder of its results and checkpoint."""

from __future__ import annotations

import contextlib
import fcntl
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from pyarrow import fs

from diffusion_core.storage import atomic_folder, write_text
from pipelines.cluster import is_uri
from pipelines.data.shards import open_split
from pipelines.devices import prepare_process
from pipelines.measurement.reference import Reference, load_reference
from pipelines.search.records import Choice, TrialResult
from pipelines.search.trial import judge_rung, trial_settings
from pipelines.stage import log
from pipelines.training.checkpoint import load_checkpoint, save_checkpoint
from pipelines.training.loop import Hooks, TrainSettings, TrainState, new_state

CHECKPOINT_EVERY = 500
"""Steps between the checkpoints of a trial within a rung. A killed trial repeats at most these."""


@dataclass(frozen=True)
class TrialWork:
    """Settings that all trials share. ``storage`` is a folder or a URI; ``earlier`` are the storages of earlier runs.

    Paths are absolute, because trials run in another working directory.
    """

    settings: TrainSettings
    data_dir: str
    reference_dir: str
    data_hash: str
    storage: str
    earlier: tuple[str, ...]
    key: str
    num_samples: int
    ddim_steps: int
    threads: int


def run_rung(config: Mapping[str, Any], work: TrialWork) -> None:
    """Judge the trial ``config["choice"]`` at step ``config["rung"]``, and report its ``fid`` to Ray Tune.

    Resumes from the trial's checkpoint of an earlier rung. Skips a rung that already has a result.
    """
    from ray import tune

    choice, rung = Choice(**config["choice"]), int(config["rung"])
    folder = TrialFolder(work.storage, choice)
    with folder.locked():
        result = stored_result(work, choice, rung)
        if result is None:
            device = prepare_process(work.threads)
            settings, key = trial_settings(work.settings, choice), f"{work.key}/{choice.name}"
            state = new_state(settings, device)
            for storage in (work.storage, *work.earlier):
                TrialFolder(storage, choice).restore(state, key, rung)
            images = open_split(Path(work.data_dir), "train")
            reference = _load_reference(work.reference_dir, work.data_hash, str(device))

            def save(state: TrainState) -> None:
                if state.step < rung:  # that of the rung follows its result
                    folder.save_checkpoint(state, key)

            result = judge_rung(
                settings,
                state,
                images,
                reference,
                rung,
                num_samples=work.num_samples,
                ddim_steps=work.ddim_steps,
                hooks=Hooks(checkpoint_every=CHECKPOINT_EVERY, on_checkpoint=save),
            )
            if result.diverged:
                log.warning("%s diverged before step %d: %s", choice, rung, result.reason)
            else:
                folder.save_checkpoint(state, key)
            folder.save_result(result)
    tune.report({"fid": result.fid})


def stored_result(work: TrialWork, choice: Choice, step: int) -> TrialResult | None:
    """Return the trial's result at a rung, from its storage or an earlier one; None if there is none."""
    results = (TrialFolder(storage, choice).result(step) for storage in (work.storage, *work.earlier))
    return next((result for result in results if result is not None), None)


class TrialFolder:
    """The folder ``<storage>/trials/<name>`` of a trial, local or at a URI: one result per rung, and the newest checkpoint."""

    def __init__(self, storage: str, choice: Choice) -> None:
        self.local = not is_uri(storage)
        self.filesystem: fs.FileSystem = fs.LocalFileSystem()
        self.path = f"{storage.rstrip('/')}/trials/{choice.name}"
        if not self.local:
            self.filesystem, self.path = fs.FileSystem.from_uri(self.path)

    def result(self, step: int) -> TrialResult | None:
        """Return the result at a rung; None if it is missing or damaged."""
        try:
            with self.filesystem.open_input_stream(self._result_path(step)) as file:
                content = json.loads(file.read(), parse_constant=_refuse_constant)
            return TrialResult(**{**content, "leave_one_out": tuple(content["leave_one_out"])})
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def save_result(self, result: TrialResult) -> None:
        text = json.dumps(asdict(result), allow_nan=False) + "\n"
        if self.local:
            write_text(Path(self._result_path(result.step)), text)
            return
        self.filesystem.create_dir(self.path, recursive=True)
        with self.filesystem.open_output_stream(self._result_path(result.step)) as file:  # complete when it is closed
            file.write(text.encode())

    def save_checkpoint(self, state: TrainState, key: str) -> None:
        """Write the checkpoint of ``state``, then remove the older ones."""
        path = f"{self.path}/step_{state.step:08d}"
        if self.local:
            with atomic_folder(Path(path)) as folder:
                save_checkpoint(state, folder, key)
        else:
            with tempfile.TemporaryDirectory() as scratch:
                save_checkpoint(state, Path(scratch), key)
                self.filesystem.create_dir(path, recursive=True)
                fs.copy_files(scratch, path, destination_filesystem=self.filesystem)
        for step, older in self._checkpoints():
            if step < state.step:
                self.filesystem.delete_dir(older)

    def restore(self, state: TrainState, key: str, most: int) -> None:
        """Load the newest whole checkpoint of at most ``most`` steps into ``state``, if it is newer than ``state``."""
        for step, path in self._checkpoints():
            if not state.step < step <= most:
                continue
            try:
                if self.local:
                    load_checkpoint(state, Path(path), key)
                else:
                    with tempfile.TemporaryDirectory() as scratch:
                        fs.copy_files(path, scratch, source_filesystem=self.filesystem)
                        load_checkpoint(state, Path(scratch), key)
                return
            except ValueError as error:
                log.warning("checkpoint skipped: %s", error)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the trial's lock; wait for processes of a killed search. A URI has no lock."""
        if not self.local:
            yield
            return
        Path(self.path).mkdir(parents=True, exist_ok=True)
        with open(f"{self.path}/lock", "a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _checkpoints(self) -> list[tuple[int, str]]:
        """Return (step, path) of the checkpoints, the newest first."""
        listing = self.filesystem.get_file_info(fs.FileSelector(self.path, allow_not_found=True))
        found = [(int(info.base_name[5:]), info.path) for info in listing if info.base_name.startswith("step_")]
        return sorted(found, reverse=True)

    def _result_path(self, step: int) -> str:
        return f"{self.path}/rung_{step:05d}.json"


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} in a result")


@lru_cache(maxsize=1)
def _load_reference(folder: str, data_hash: str, device: str) -> Reference:
    reference = load_reference(Path(folder), data_hash)
    reference.extractor.to(torch.device(device))
    reference.classifier.to(device)
    return reference
