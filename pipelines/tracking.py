"""MLflow, and nothing else knows MLflow (but the registry, which is MLflow's).

A stage has one run for one fingerprint: started again, it goes on with that run. The driver is the only writer of a run;
workers send it what is to be logged.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pipelines.params import Params, Tracking
from pipelines.stage import log, quiet_environment
from pipelines.state import stage_params, workspace_id

T = TypeVar("T")
KEY_TAG, STAGE_TAG, WORKSPACE_TAG = "rediffuse.key", "rediffuse.stage", "rediffuse.workspace"
METRICS_A_CALL = 1000


def tracking_uri(tracking: Tracking) -> str:
    """The configured store: params, then MLFLOW_TRACKING_URI, then mlflow.db in the project (absolute)."""
    return tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').resolve()}"


def connect(tracking: Tracking):
    """An MlflowClient of the configured store, its tables and the experiment made before anyone else writes.

    Raises ValueError where the store cannot be reached or is MLflow's old file store.
    """
    quiet_environment()
    uri = tracking_uri(tracking)
    if "://" not in uri or uri.startswith("file:"):
        raise ValueError(
            f"MLflow store {uri}: the file store is not supported; use sqlite:///mlflow.db or a server's http address"
        )
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    import mlflow
    from mlflow.exceptions import MlflowException

    local = uri.startswith("sqlite:")
    try:
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)
        client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
        if client.get_experiment_by_name(tracking.experiment) is None:
            location = Path("mlartifacts").resolve().as_uri() if local else None
            with contextlib.suppress(MlflowException):  # another process has made it in this moment
                client.create_experiment(tracking.experiment, artifact_location=location)
        if client.get_experiment_by_name(tracking.experiment) is None:
            raise MlflowException(f"the experiment {tracking.experiment} could not be made, or is deleted")
    except Exception as error:
        raise ValueError(
            f"MLflow store {uri} cannot be used: {_first_line(error)}; check tracking.uri or MLFLOW_TRACKING_URI"
        ) from None
    return client


@dataclass(frozen=True)
class Run:
    """One MLflow run, written by this process alone."""

    client: Any
    experiment_id: str
    run_id: str
    tags: Mapping[str, str]

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        self.log_rows([{"step": step, **metrics}])

    def log_rows(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Log rows of metrics, each with its ``step``; a point that the run already has is not logged again."""
        from mlflow.entities import Metric

        names = sorted({name for row in rows for name in row if name != "step"})
        known = {name: {point.step for point in self.client.get_metric_history(self.run_id, name)} for name in names}
        now = int(time.time() * 1000)
        metrics = [
            Metric(name, float(value), now, int(row["step"]))
            for row in rows
            for name, value in row.items()
            if name != "step" and int(row["step"]) not in known[name]
        ]
        for start in range(0, len(metrics), METRICS_A_CALL):
            chunk = metrics[start : start + METRICS_A_CALL]
            _retry(partial(self.client.log_batch, self.run_id, metrics=chunk))

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        _retry(lambda: self.client.log_artifact(self.run_id, str(path), folder))

    def log_dict(self, value: Any, name: str) -> None:
        _retry(lambda: self.client.log_dict(self.run_id, value, name))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        for key, value in tags.items():
            _retry(partial(self.client.set_tag, self.run_id, key, value))

    def finish(self, status: str = "FINISHED") -> None:
        _retry(lambda: self.client.set_terminated(self.run_id, status))

    def child(self, name: str, params: Mapping[str, Any]) -> Run:
        """The nested run of that name: found again where this run has it already."""
        tags = {**self.tags, KEY_TAG: f"{self.tags[KEY_TAG]}/{name}", "mlflow.parentRunId": self.run_id}
        return _open(self.client, self.experiment_id, name, tags, params)


@contextmanager
def stage_run(params: Params, stage: str, key: str, data_hash: str) -> Iterator[Run]:
    """The run of this stage and fingerprint: made, or continued. It ends as FINISHED, FAILED, or KILLED on an interrupt.

    Runs of this stage that an earlier process left RUNNING here are ended as KILLED: the caller holds the stage's lock.
    """
    client = connect(params.tracking)
    experiment_id = client.get_experiment_by_name(params.tracking.experiment).experiment_id
    workspace = workspace_id()
    tags = {
        KEY_TAG: f"{workspace}/{stage}/{key}",
        STAGE_TAG: stage,
        WORKSPACE_TAG: workspace,
        "rediffuse.fingerprint": key,
        "rediffuse.data_hash": data_hash,
        **_git_tags(),
    }
    _end_abandoned(client, experiment_id, workspace, stage, tags[KEY_TAG])
    run = _open(client, experiment_id, stage, tags, stage_params(stage, params))
    run.log_dict(params.model_dump(by_alias=True), "params.json")
    try:
        yield run
    except (KeyboardInterrupt, SystemExit):
        _end_with_children(run, "KILLED")
        raise
    except BaseException:
        _end_with_children(run, "FAILED")
        raise
    _end_children(run, "KILLED")  # one that is still open was cut off by a kill and never taken up again
    run.finish()


def find_runs(client: Any, experiment_id: str, tags: Mapping[str, str]) -> list[Any]:
    """The runs that carry all these tags, the oldest first."""
    query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    return _retry(
        lambda: client.search_runs([experiment_id], query, order_by=["attributes.start_time ASC"], max_results=1000)
    )


def _open(client: Any, experiment_id: str, name: str, tags: Mapping[str, str], params: Mapping[str, Any]) -> Run:
    from mlflow.entities import Param

    found = find_runs(client, experiment_id, {KEY_TAG: tags[KEY_TAG]})
    if found:
        run_id = found[0].info.run_id
        if found[0].info.status != "RUNNING":
            _retry(lambda: client.update_run(run_id, status="RUNNING"))
    else:
        run_id = _retry(lambda: client.create_run(experiment_id, run_name=name, tags=dict(tags))).info.run_id
    known = found[0].data.params if found else {}
    missing = [Param(key, str(value)[:6000]) for key, value in params.items() if key not in known]
    for start in range(0, len(missing), 100):
        chunk = missing[start : start + 100]
        _retry(partial(client.log_batch, run_id, params=chunk))
    return Run(client, experiment_id, run_id, dict(tags))


def _end_abandoned(client: Any, experiment_id: str, workspace: str, stage: str, key: str) -> None:
    for run in find_runs(client, experiment_id, {WORKSPACE_TAG: workspace, STAGE_TAG: stage}):
        if run.info.status == "RUNNING" and not run.data.tags[KEY_TAG].startswith(key):
            client.set_terminated(run.info.run_id, "KILLED")


def _end_with_children(run: Run, status: str) -> None:
    try:
        _end_children(run, status)
        run.finish(status)
    except Exception as error:  # the error that ends the stage matters more than this one
        log.warning("could not end the MLflow run: %s", _first_line(error))


def _end_children(run: Run, status: str) -> None:
    for child in find_runs(run.client, run.experiment_id, {"mlflow.parentRunId": run.run_id}):
        if child.info.status == "RUNNING":
            run.client.set_terminated(child.info.run_id, status)


def _git_tags() -> dict[str, str]:
    def git(*arguments: str) -> str:
        result = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
        return result.stdout.strip() if result.returncode == 0 else ""

    commit = git("rev-parse", "HEAD") or "unknown"
    return {"mlflow.source.git.commit": commit, "git_commit": commit}


def _retry(call: Callable[[], T], attempts: int = 5) -> T:
    """A store that is locked or restarting for a moment is asked again."""
    from mlflow.exceptions import MlflowException, RestException

    for attempt in range(attempts):
        try:
            return call()
        except RestException:
            raise
        except MlflowException as error:
            if attempt + 1 == attempts or "INVALID_PARAMETER" in str(getattr(error, "error_code", "")):
                raise
            time.sleep(0.2 * 2**attempt)
    raise AssertionError


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
