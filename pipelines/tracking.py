"""MLflow runs. Only this module, the registry and the command line import MLflow.

A stage has one run per key and settings, and continues it after a restart. The driver is the only writer of a run; workers send
their rows to the driver.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from diffusion_core.storage import read_json, write_json
from pipelines.local_store import ARTIFACTS, DATABASE, local_path, reanchor
from pipelines.outbox import Outbox
from pipelines.params import TrackingRun
from pipelines.stage import METRICS, PLOTS, log, quiet_environment
from pipelines.workspace import current_workspace, home_expanded, in_project, project_root

T = TypeVar("T")
KEY_TAG, STAGE_TAG, WORKSPACE_TAG = "rediffuse.key", "rediffuse.stage", "rediffuse.workspace"
PARENT_TAG = "mlflow.parentRunId"
METRICS_PER_CALL = 1000
PARAMS_PER_CALL = 100
LONGEST_PARAM = 6000
AWAY_CODES = {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED"}
ENDING_S = 10.0
"""How long a run that fails or is killed waits for a server that is away."""

LAST_STORES = "runs/mlflow_stores.json"
"""The stores that the last run wrote to, without credentials."""


def tracking_uri(tracking: TrackingRun) -> str:
    """Return the configured store: tracking.uri, else MLFLOW_TRACKING_URI, else mlflow.db in the project.

    The path of a SQLite file is absolute; a relative one belongs to the project, also in a subfolder and a temporary workspace.
    """
    return _anchored(tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{DATABASE}")


def registry_uri(tracking: TrackingRun) -> str:
    """Return the store of the model registry: MLFLOW_REGISTRY_URI, else the tracking store.

    Databricks keeps models with aliases in Unity Catalog, so `databricks` becomes `databricks-uc`, as in MLflow itself.
    """
    uri = tracking_uri(tracking)
    default = uri.replace("databricks", "databricks-uc", 1) if _is_databricks(uri) else uri
    return _anchored(os.environ.get("MLFLOW_REGISTRY_URI") or default)


def connect(tracking: TrackingRun) -> Any:
    """Return an MlflowClient of the configured stores. Creates their tables and the experiment before workers write.

    Waits for a server that the last run wrote to and that is away now. Raises ValueError if a store cannot be reached, refuses the
    login, is MLflow's old file store, or keeps its artifacts where this project is not.
    """
    uri, registry = _usable_stores(tracking)
    _follow_the_project(uri, registry)
    database = database_of(uri)
    used_before = database is None and _last_stores().get("tracking") == without_credentials(uri)
    try:
        open_store = partial(_open_store, tracking.experiment, uri, registry)
        client, experiment = _outbox(tracking).ask(open_store) if used_before else open_store()
    except Exception as error:
        if used_before and isinstance(error, ValueError):  # the outbox has given up
            raise
        reason = refusal(error, uri) or (
            f"MLflow store {without_credentials(uri)} cannot be used: {_first_line(error)}; check tracking.uri or MLFLOW_TRACKING_URI"
        )
        raise ValueError(reason) from None
    place = local_path(experiment.artifact_location) if database is not None else None
    if place is not None and not place.is_relative_to(project_root()):
        former = any(place.is_relative_to(root) for root in current_workspace().former_roots)
        if former or (_in_project(uri) is not None and not place.exists()):
            state = "where this project was before" if former else "which does not exist"
            raise ValueError(
                f"the experiment {tracking.experiment} in {without_credentials(uri)} keeps its artifacts in {place}, {state}: "
                "bring the folder back, or set another tracking.experiment"
            )
    return client


def connect_to_read(tracking: TrackingRun) -> Any:
    """Return an MlflowClient of the configured stores for a command that only reads. It creates no store.

    Raises ValueError if the store of the models does not exist.
    """
    uri, registry = _usable_stores(tracking)
    missing = database_of(registry)
    if missing is not None and not missing.exists():
        raise ValueError(
            f"MLflow store {without_credentials(registry)} does not exist yet: no model has been registered; run dvc repro, or check tracking.uri"
        )
    _follow_the_project(uri, registry)
    return _client(uri, registry)


def _open_store(name: str, uri: str, registry: str) -> tuple[Any, Any]:
    """Return a client of the stores and the experiment of that name. Creates the tables and the experiment if they are missing."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST

    database = database_of(uri)
    with contextlib.chdir(project_root()):  # MLflow puts a new store's artifacts below the working folder
        client = _client(uri, registry)
        if client.get_experiment_by_name(name) is None:
            # an outside store keeps its artifacts beside itself, so that they stay where they are if the project is moved
            beside = project_root() if database is None or _in_project(uri) else database.parent
            location = (beside / ARTIFACTS).as_uri() if uri.startswith("sqlite") else None
            with contextlib.suppress(MlflowException):  # another process has just created it
                client.create_experiment(name, artifact_location=location)
        experiment = client.get_experiment_by_name(name)
    if experiment is None:
        raise MlflowException(
            f"the experiment {name} is deleted or cannot be created", error_code=RESOURCE_DOES_NOT_EXIST
        )
    return client, experiment


def _client(uri: str, registry: str) -> Any:
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
    logging.getLogger("urllib3").setLevel(
        logging.ERROR
    )  # a warning per attempt; the outbox says once that the server is away
    import mlflow

    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(registry)
    return mlflow.MlflowClient(tracking_uri=uri, registry_uri=registry)


def _usable_stores(tracking: TrackingRun) -> tuple[str, str]:
    """Return the addresses of the stores. Raises ValueError if one is of a kind that is not supported."""
    quiet_environment()
    uri, registry = tracking_uri(tracking), registry_uri(tracking)
    for store in (uri, registry):
        if not _is_databricks(store) and ("://" not in store or store.startswith("file:")):
            raise ValueError(
                f"MLflow store {without_credentials(store)}: the file store is not supported; use sqlite:///mlflow.db, databricks or "
                "a server's http address"
            )
    if _is_databricks(uri) and not tracking.experiment.startswith("/"):
        raise ValueError(
            f"tracking.experiment: given {tracking.experiment!r}, allowed a workspace path on Databricks, "
            f"such as /Shared/{tracking.experiment}"
        )
    return uri, registry


def _follow_the_project(*stores: str) -> None:
    """Rewrite the locations in the stores in the project's folder if the project has been moved or copied."""
    for store in dict.fromkeys(stores):
        database = _in_project(store)
        if database is None or not database.exists():
            continue
        root = project_root()
        counts = reanchor(database, current_workspace().former_roots, root)
        for old, count in counts.items():
            log.info("%s: %d locations in %s are now in %s", without_credentials(store), count, old, root)
        if counts and not (root / ARTIFACTS).is_dir():
            log.warning(
                "%s names artifacts that are not in this project: copy %s from %s, or earlier models cannot be loaded",
                without_credentials(store),
                ARTIFACTS,
                " or ".join(map(str, counts)),
            )


@dataclass(frozen=True)
class Run:
    """One MLflow run. Only this process writes to it.

    ``known`` holds the points that the run has, as {metric: {step: (value, timestamp)}}. A metric's history is read once, when it
    is first logged; a run that is ``new`` has none. While the server is away, ``outbox`` keeps what is logged.
    """

    client: Any
    experiment_id: str
    run_id: str
    tags: Mapping[str, str]
    new: bool = False
    known: dict[str, dict[int, tuple[float, int]]] = field(default_factory=dict, compare=False, repr=False)
    outbox: Outbox | None = field(default=None, compare=False, repr=False)

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log summary values. A value that differs from the run's at ``step`` replaces it on MLflow's pages."""
        self._send(partial(self._log_metrics, dict(metrics), step, _now()))

    def log_rows(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Log rows of metrics, each with its ``step``. Skips the points that the run already has."""
        self._send(partial(self._log_rows, [dict(row) for row in rows], _now()))

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Log a file or a folder, which must stay as it is until the run ends."""
        self._send(lambda: self.client.log_artifact(self.run_id, str(path), folder))

    def log_missing_artifacts(self, paths: Sequence[Path], folder: str) -> None:
        """Log the files that the run's ``folder`` lacks: a kill while the server was away has lost them."""

        def log_missing() -> None:
            present = {Path(artifact.path).name for artifact in self.client.list_artifacts(self.run_id, folder)}
            for path in paths:
                if path.name not in present:
                    self.client.log_artifact(self.run_id, str(path), folder)

        self._send(log_missing)

    def log_dict(self, value: Any, name: str) -> None:
        self._send(lambda: self.client.log_dict(self.run_id, value, name))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        for key, value in tags.items():
            self._send(partial(self.client.set_tag, self.run_id, key, value))

    def finish(self, status: str = "FINISHED") -> None:
        self._send(lambda: self.client.set_terminated(self.run_id, status))

    def wait(self) -> None:
        """Return as soon as all that was logged is in the store. Raises ValueError if its server stays away."""
        if self.outbox is not None:
            self.outbox.wait()

    def child(self, name: str, params: Mapping[str, Any]) -> Run:
        """Create the nested run of that name, or continue it if this run already has one with these params."""
        tags = {**self.tags, KEY_TAG: f"{self.tags[KEY_TAG]}/{name}", PARENT_TAG: self.run_id}
        return _open(self.client, self.experiment_id, name, tags, params, {PARENT_TAG: self.run_id}, self.outbox)

    def _send(self, call: Callable[[], Any]) -> None:
        attempt = partial(_retry, call)
        if self.outbox is None:
            attempt()
        else:
            self.outbox.send(attempt)

    def _log_metrics(self, metrics: Mapping[str, float], step: int, now: int) -> None:
        points = []
        for name, value in metrics.items():
            former = self._points(name).get(step)
            if former is None:
                points.append((name, float(value), now, step))
            elif not _same(former[0], float(value)):
                points.append((name, float(value), max(now, former[1] + 1), step))  # the latest timestamp is shown
        self._log(points)

    def _log_rows(self, rows: Sequence[Mapping[str, float]], now: int) -> None:
        self._log(
            [
                (name, float(value), now, int(row["step"]))
                for row in rows
                for name, value in row.items()
                if name != "step" and int(row["step"]) not in self._points(name)
            ]
        )

    def _points(self, name: str) -> dict[int, tuple[float, int]]:
        if name not in self.known:
            history = [] if self.new else self.client.get_metric_history(self.run_id, name)
            in_order = sorted(history, key=lambda point: (point.timestamp, point.value))
            self.known[name] = {point.step: (point.value, point.timestamp) for point in in_order}
        return self.known[name]

    def _log(self, points: Sequence[tuple[str, float, int, int]]) -> None:
        from mlflow.entities import Metric

        for start in range(0, len(points), METRICS_PER_CALL):
            chunk = points[start : start + METRICS_PER_CALL]
            self.client.log_batch(self.run_id, metrics=[Metric(*point) for point in chunk])
            for name, value, timestamp, step in chunk:
                self.known[name][step] = (value, timestamp)


@contextmanager
def stage_run(
    tracking: TrackingRun, stage: str, key: str, *, settings: Mapping[str, Any], tags: Mapping[str, str]
) -> Iterator[Run]:
    """Create the run of this stage, key and settings, or continue it. It ends as FINISHED, FAILED, or KILLED on an interrupt.

    ``settings`` are the flat settings that the stage used; they become the run's params and params.json. ``tags`` describe the
    inputs and the machine (``rediffuse.data_hash``); the commit is added. Runs of this stage that an earlier process left RUNNING
    here end as KILLED, because the caller holds the stage's lock.

    While the server is away, what is logged is kept. At its end the run waits for the server for tracking.wait_minutes; raises
    ValueError after that.
    """
    client = connect(tracking)
    report_changed_store(tracking)
    experiment_id = client.get_experiment_by_name(tracking.experiment).experiment_id
    workspace = current_workspace()
    identity = {KEY_TAG: f"{workspace.id}/{stage}/{key}", STAGE_TAG: stage, WORKSPACE_TAG: workspace.id}
    everything = {**identity, "rediffuse.fingerprint": key, **_git_tags(), **tags}
    run = _open(client, experiment_id, stage, everything, settings, tags, _outbox(tracking))
    own_store = _in_project(tracking_uri(tracking)) is not None  # a copied store also holds the runs of the original
    for name in (workspace.id, *(workspace.former_ids if own_store else ())):
        _end_abandoned(run, name, stage)
    run.log_dict(dict(settings), "params.json")
    try:
        yield run
    except (KeyboardInterrupt, SystemExit):
        _end_with_children(run, "KILLED")
        raise
    except BaseException:
        _end_with_children(run, "FAILED")
        raise
    _end_children(run, "KILLED")  # children that a kill interrupted and this process did not resume
    run.finish()
    run.wait()


def find_runs(client: Any, experiment_id: str, tags: Mapping[str, str]) -> list[Any]:
    """Return the runs that carry all these tags, the oldest first."""
    query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    return _retry(
        lambda: client.search_runs([experiment_id], query, order_by=["attributes.start_time ASC"], max_results=1000)
    )


def changed_store(tracking: TrackingRun) -> str | None:
    """Return one line that says where the earlier runs and champions are if the stores have changed, else None."""
    former, now = _last_stores(), _stores(tracking)
    lines = []
    for kind, what, setting in (
        ("tracking", "runs", "tracking.uri"),
        ("registry", "champions", "tracking.uri or MLFLOW_REGISTRY_URI"),
    ):
        if former.get(kind) not in (None, now[kind]):
            lines.append(f"{what} now go to {now[kind]}, the earlier {what} are in {former[kind]} (see {setting})")
    return f"the MLflow store has changed: {'; '.join(lines)}" if lines else None


def report_changed_store(tracking: TrackingRun) -> None:
    """Log once that the stores have changed, and remember the new ones in runs/."""
    changed = changed_store(tracking)
    if changed:
        log.warning("%s", changed)
    record = in_project(LAST_STORES)
    if changed or not record.exists():
        write_json(record, _stores(tracking))


def _last_stores() -> dict[str, str]:
    """Return the stores that the last run wrote to; empty before the first run."""
    record = in_project(LAST_STORES)
    return read_json(record) if record.exists() else {}


def without_credentials(uri: str) -> str:
    """Return a store's address without credentials, and relative to the project if it is a file in it."""
    parts = urlsplit(uri)
    if parts.scheme.startswith("sqlite"):
        path, root = Path(uri.partition(":///")[2]), project_root()
        place = (root / path).resolve()
        return f"{parts.scheme}:///{place.relative_to(root) if place.is_relative_to(root) else path}"
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _stores(tracking: TrackingRun) -> dict[str, str]:
    return {
        "tracking": without_credentials(tracking_uri(tracking)),
        "registry": without_credentials(registry_uri(tracking)),
    }


def database_of(uri: str) -> Path | None:
    """Return the file of a SQLite store, or None."""
    path = uri.partition(":///")[2].partition("?")[0]
    return project_root() / home_expanded(path) if uri.startswith("sqlite") and path else None


def _in_project(uri: str) -> Path | None:
    """Return the file of a SQLite store that lies in the project's folder, or None."""
    database = database_of(uri)
    return database if database is not None and database.resolve().is_relative_to(project_root()) else None


def _anchored(uri: str) -> str:
    """Return a store's address; the path of a SQLite file becomes absolute."""
    database = database_of(uri)
    if database is None:
        return uri
    before, _, path = uri.partition(":///")
    _, mark, query = path.partition("?")
    return f"{before}:///{database}{mark}{query}"


def _is_databricks(uri: str) -> bool:
    return uri.partition(":")[0] in ("databricks", "databricks-uc")


def _open(
    client: Any,
    experiment_id: str,
    name: str,
    tags: Mapping[str, str],
    params: Mapping[str, Any],
    current: Mapping[str, str],
    outbox: Outbox | None,
) -> Run:
    """Create or continue the run of this key, also if the server is away for a while.

    A run with other params is not continued, because MLflow cannot change a param. ``current``: tags updated on a resumed run; other
    tags keep their first values.
    """

    def opening() -> Run:
        from mlflow.entities import Param

        values = {key: str(value)[:LONGEST_PARAM] for key, value in params.items()}
        identity = {key: tags[key] for key in (KEY_TAG, PARENT_TAG) if key in tags}
        found = [
            run
            for run in find_runs(client, experiment_id, identity)
            if all(values.get(key, value) == value for key, value in run.data.params.items())
        ]
        if found:
            run_id, known = found[0].info.run_id, found[0].data.params
            if found[0].info.status != "RUNNING":
                _retry(lambda: client.update_run(run_id, status="RUNNING"))
        else:
            run_id = _retry(lambda: client.create_run(experiment_id, run_name=name, tags=dict(tags))).info.run_id
            known = {}
        missing = [Param(key, value) for key, value in values.items() if key not in known]
        for start in range(0, len(missing), PARAMS_PER_CALL):
            _retry(partial(client.log_batch, run_id, params=missing[start : start + PARAMS_PER_CALL]))
        if found:
            for key, value in current.items():
                if found[0].data.tags.get(key) != value:
                    _retry(partial(client.set_tag, run_id, key, value))
        return Run(client, experiment_id, run_id, dict(tags), new=not found, outbox=outbox)

    return opening() if outbox is None else outbox.ask(opening)


def _end_abandoned(current: Run, workspace: str, stage: str) -> None:
    def end_abandoned() -> None:
        for run in find_runs(current.client, current.experiment_id, {WORKSPACE_TAG: workspace, STAGE_TAG: stage}):
            own = current.run_id in (run.info.run_id, run.data.tags.get(PARENT_TAG))
            if run.info.status == "RUNNING" and not own:
                current.client.set_terminated(run.info.run_id, "KILLED")

    current._send(end_abandoned)


def _end_with_children(run: Run, status: str) -> None:
    if run.outbox is not None:
        run.outbox.limit_s = ENDING_S
    try:
        _end_children(run, status)
        run.finish(status)
        run.wait()
    except Exception as error:  # the error that ends the stage matters more than this one
        log.warning("could not end the MLflow run: %s", _first_line(error))


def _end_children(run: Run, status: str) -> None:
    def end_children() -> None:
        for child in find_runs(run.client, run.experiment_id, {PARENT_TAG: run.run_id}):
            if child.info.status == "RUNNING":
                run.client.set_terminated(child.info.run_id, status)

    run._send(end_children)


def _git_tags() -> dict[str, str]:
    """Return the commit; ``git_commit`` ends in -dirty if a tracked file differs from it.

    Files that the pipeline writes (metrics, plots, dvc.lock) do not count, because each `dvc repro` changes them.
    """

    def git(*arguments: str) -> str:
        result = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
        return result.stdout.strip() if result.returncode == 0 else ""

    commit = git("rev-parse", "HEAD") or "unknown"
    written = [f":(exclude){path}" for path in (METRICS, PLOTS, "dvc.lock")]
    dirty = git("status", "--porcelain", "--untracked-files=no", "--", ".", *written)
    return {"mlflow.source.git.commit": commit, "git_commit": f"{commit}-dirty" if dirty else commit}


def refusal(error: BaseException, uri: str) -> str | None:
    """Return one line with the remedy if a server refuses the login or the host name, else None."""
    match = re.search(r"error code (401|403)\b", str(error))
    code = match[1] if match else {"UNAUTHENTICATED": "401", "PERMISSION_DENIED": "403"}.get(_code(error))
    if code is None:
        return None
    server = f"the MLflow server {without_credentials(uri)}"
    if "Invalid Host" in str(error):
        host = urlsplit(uri).netloc.rpartition("@")[2]
        return f"{server} does not answer to this host name (403): add {host} to MLFLOW_SERVER_ALLOWED_HOSTS where it is started"
    if code == "401":
        return f"{server} refuses the login (401): set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    return (
        f"{server} does not permit this (403): its administrator can give the user of MLFLOW_TRACKING_USERNAME and "
        "MLFLOW_TRACKING_PASSWORD the permission to edit the experiment and the model"
    )


def _outbox(tracking: TrackingRun) -> Outbox:
    """Return the outbox of the tracking store. A local database is never away."""
    uri = tracking_uri(tracking)
    is_away = (lambda error: False) if database_of(uri) is not None else _is_away
    return Outbox(f"the MLflow server {without_credentials(uri)}", is_away, 60 * tracking.wait_minutes)


def _is_away(error: Exception) -> bool:
    """Whether an error means that the server, or what it needs, does not answer now."""
    import requests
    from mlflow.exceptions import InvalidUrlException, MlflowException

    if isinstance(error, requests.RequestException):
        return True
    return (
        isinstance(error, MlflowException) and not isinstance(error, InvalidUrlException) and _code(error) in AWAY_CODES
    )


def _code(error: BaseException) -> str:
    return str(getattr(error, "error_code", ""))


def _retry(call: Callable[[], T], attempts: int = 5) -> T:
    """Call, and retry while a local database is locked. An error of a server is raised at once, because MLflow has retried.

    Raises ValueError, with the remedy, if the server refuses the login.
    """
    from mlflow.exceptions import MlflowException, RestException

    for attempt in range(attempts):
        try:
            return call()
        except MlflowException as error:
            import mlflow

            reason = refusal(error, mlflow.get_tracking_uri())
            if reason is not None:
                raise ValueError(reason) from None
            from_server = isinstance(error, RestException) or str(error).startswith("API request")
            if from_server or attempt + 1 == attempts or "INVALID_PARAMETER" in _code(error):
                raise
            time.sleep(0.2 * 2**attempt)
    raise AssertionError


def _now() -> int:
    return int(time.time() * 1000)


def _same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
