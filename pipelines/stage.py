"""What every stage does around its work: settings, one process at a time, and errors of one line."""

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
from pipelines.params import PARAMS_PATH, Params, load_params

RUNS = Path("runs")
DATA = Path("artifacts/data")
REFERENCE = Path("artifacts/reference")
SEARCH = Path("artifacts/search")
MODEL = Path("artifacts/model")
EVALUATION = Path("artifacts/evaluation")
REGISTRATION = Path("artifacts/registration.json")
REPORT = Path("artifacts/report")
METRICS = Path("metrics")
PLOTS = Path("plots")

log = logging.getLogger("rediffuse")

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_AUTH_MODE": "token",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "DVC_NO_ANALYTICS": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}
"""Telemetry off, and the settings of Ray that the stages rely on; a value from outside wins."""


def quiet_environment() -> None:
    """Set what Ray and MLflow read from the environment. Call before importing either."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


def run_stage(name: str, work: Callable[[Params], None]) -> None:
    """The body of ``python -m pipelines.<name>``: reads the settings, takes the stage's lock, works, reports errors.

    A ValueError (what a user can cause) or an OSError becomes one line on stderr and exit status 1; the environment
    variable REDIFFUSE_TRACEBACK=1 shows the traceback. Anything else is our own fault and keeps its traceback.
    """
    parser = argparse.ArgumentParser(prog=f"python -m pipelines.{name}", description=(work.__doc__ or "").strip())
    parser.add_argument("--params", type=Path, default=PARAMS_PATH, help="the settings (default: %(default)s)")
    arguments = parser.parse_args()
    quiet_environment()
    logging.basicConfig(level=logging.WARNING, format=f"%(asctime)s {name}: %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.INFO)
    with one_line_errors(name):
        params = load_params(arguments.params)
        with stage_lock(name):
            started = time.monotonic()
            work(params)
            log.info("done in %.0f s", time.monotonic() - started)


@contextmanager
def one_line_errors(name: str) -> Iterator[None]:
    """Turn what a user can cause into one line and exit status 1."""
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get("REDIFFUSE_TRACEBACK") == "1":
            raise
        sys.stdout.flush()
        print(f"{name}: error: {describe_error(error)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"{name}: interrupted; run it again to go on", file=sys.stderr)
        sys.exit(130)


def describe_error(error: BaseException) -> str:
    """One line for an error, also where Ray wrapped it."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        return describe_error(cause)
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    return " ".join(str(error).split())


@contextmanager
def stage_lock(name: str, folder: Path = RUNS) -> Iterator[None]:
    """Hold the stage's lock in this project; wait, saying so, while another process holds it.

    The kernel lets go of the lock when its holder dies, however it dies.
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
                    log.info("waiting: process %s runs this stage here already", file.read().strip() or "?")
                waited += 1
                time.sleep(1.0)
        file.seek(0)
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
        yield


def check_writable(*folders: Path) -> None:
    """Raise ValueError before the work starts where a stage could not write its results."""
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
