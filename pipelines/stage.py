"""The frame of every stage: settings, one process at a time, and errors of one line."""

from __future__ import annotations

import argparse
import fcntl
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusion_core.storage import write_text
from pipelines.data.listing import listing_changes
from pipelines.params import (
    PARAMS_PATH,
    Params,
    RunSettings,
    declared_params,
    load_params,
    load_run_settings,
    read_yaml,
    record_reads,
    recorded_reads,
)
from pipelines.termination import STATUS, exit_on_sigterm, sigterm_received
from pipelines.workspace import RUNS, project_run_settings

DATA = Path("artifacts/data")
REFERENCE = Path("artifacts/reference")
SEARCH = Path("artifacts/search")
MODEL = Path("artifacts/model")
EVALUATION = Path("artifacts/evaluation")
REGISTRATION = Path("artifacts/registration.json")
REPORT = Path("artifacts/report")
METRICS = Path("metrics")
PLOTS = Path("plots")
LISTING_RECORDS = RUNS / "prepared"
"""Records of the image folder that prepare read and of its files' modification times. They depend on the machine, so they are
not artifacts."""

log = logging.getLogger("rediffuse")

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "DVC_NO_ANALYTICS": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",  # less GPU memory is lost between blocks of different sizes
}
"""Environment variables that turn telemetry off and configure Ray, MLflow and torch for the stages. Existing values win."""


def quiet_environment() -> None:
    """Set the environment variables that Ray and MLflow read. Call it before importing either."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


def run_stage(name: str, work: Callable[[Params, RunSettings], None]) -> None:
    """Run a stage, as ``python -m pipelines.<name>`` does: read the settings, take its lock, call ``work``, report errors.

    ``work`` gets the params that dvc.yaml declares for the stage, and run.yaml. A ValueError (what a user can cause) or an OSError
    becomes one line on stderr and exit status 1; REDIFFUSE_TRACEBACK=1 shows the traceback. Any other error is our fault and
    keeps its traceback. REDIFFUSE_PARAMS_READ=FILE writes the params that the stage read into that file.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m pipelines.{name}",
        description=(work.__doc__ or "").strip(),
        epilog="REDIFFUSE_RUN=FILE selects another file than run.yaml.",
    )
    parser.add_argument(
        "--params", type=Path, default=PARAMS_PATH, help="what decides the result (default: %(default)s)"
    )
    parser.add_argument("--run", type=Path, help="where and how to run (default: REDIFFUSE_RUN, else run.yaml)")
    arguments = parser.parse_args()
    quiet_environment()
    exit_on_sigterm()
    logging.basicConfig(level=logging.WARNING, format=f"%(asctime)s {name}: %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.INFO)
    with one_line_errors(name):
        params = load_params(arguments.params)
        declared = read_yaml(Path("dvc.yaml"))["stages"][name].get("params", [])
        run = load_run_settings(arguments.run) if arguments.run else project_run_settings()
        with stage_lock(name):
            started = time.monotonic()
            if name != "prepare" and (changes := listing_changes(DATA, LISTING_RECORDS)) is not None:
                log.warning("%s", changes)
            reads_file = os.environ.get("REDIFFUSE_PARAMS_READ")
            if reads_file:
                record_reads()
            work(declared_params(params, declared), run)
            if reads_file:
                with open(reads_file, "a", encoding="utf-8") as file:
                    file.writelines(f"{name} {section}.{field}\n" for section, field in sorted(recorded_reads()))
            log.info("done in %.0f s", time.monotonic() - started)


@contextmanager
def one_line_errors(name: str) -> Iterator[None]:
    """Turn errors that a user can cause into one line and exit status 1. SIGTERM gives one line and exit status 143."""
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get("REDIFFUSE_TRACEBACK") == "1":
            raise
        sys.stdout.flush()
        print(f"{name}: error: {describe_error(error)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"{name}: interrupted; run the same command again to resume", file=sys.stderr)
        sys.exit(130)
    except SystemExit:
        if not sigterm_received():
            raise
        print(f"{name}: stopped by SIGTERM; run the same command again to resume", file=sys.stderr)
        sys.exit(STATUS)  # a SystemExit that passes through ray.get or ray.wait loses its status


def describe_error(error: BaseException) -> str:
    """Return an error as one line, without Ray's wrapper."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        return describe_error(cause)
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    return " ".join(str(error).split())


@contextmanager
def stage_lock(name: str, folder: Path = RUNS) -> Iterator[None]:
    """Hold the stage's lock in this project. Wait, with a log line, while another process holds it.

    The kernel releases the lock when its holder dies, for whatever reason.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / f"{name}.lock", "a+")  # noqa: SIM115
    except OSError as error:
        raise ValueError(f"cannot write into {folder}: {error.strerror}; make the project's folder writable") from None
    with file:
        waited = 0
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if waited % 30 == 0:
                    file.seek(0)
                    log.info("waiting: process %s is already running this stage here", file.read().strip() or "?")
                waited += 1
                time.sleep(1.0)
        file.seek(0)
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
        yield


def check_writable(*folders: Path) -> None:
    """Raise ValueError if a folder is not writable. Call it before the work starts."""
    for folder in folders:
        probe = folder / ".writable"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_text(probe, "")
            probe.unlink()
        except OSError as error:
            raise ValueError(
                f"cannot write into {folder}: {error.strerror}; check its owner, permissions and free space"
            ) from None
