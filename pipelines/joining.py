"""How a process joins a Ray cluster as its owner set it up, and the line that says why it cannot."""

from __future__ import annotations

import json
import logging
import os
import platform
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ANSWER_SECONDS = 10.0
"""Time that a cluster has to answer. Ray itself waits for minutes, and then ends the process."""
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
"""The start of an HTTP/2 connection (RFC 9113, 3.4), which every Ray port answers with a frame of settings."""
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets it in a driver that `ray job submit` or a RayJob started."""
ADDRESS = "ray.address in run.yaml or RAY_ADDRESS"

log = logging.getLogger("rediffuse")


def join(address: str, environment: Mapping[str, str], packages: list[Path]) -> None:
    """Connect to the cluster at ``address``, with these packages and environment variables on its workers.

    address: host:port, ray://host:port or auto. Raises ValueError with one line if the cluster cannot be joined.
    """
    import ray

    check_answers(address)
    if not address.startswith("ray://"):
        check_cluster(_gcs_address(address))
    try:
        ray.init(
            address=address,
            runtime_env=runtime_environment(environment, packages, job_environment()),
            logging_level=logging.WARNING,
        )
    except Exception as error:  # Ray raises plain Exception too
        raise refusal(address, error) from None


def job_environment() -> dict[str, Any] | None:
    """Return the runtime environment of the job that started this process, or None if no job did."""
    text = os.environ.get(JOB_VARIABLE)
    return None if text is None else dict(json.loads(text).get("runtime_env") or {})


def runtime_environment(
    environment: Mapping[str, str], packages: list[Path], job: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return what `ray.init` adds to the runtime environment of ``job``: nothing that the job has set itself.

    Ray refuses a field or a variable that both name. The packages are left out if the job has py_modules, or if they lie in its
    working directory, which every worker has.
    """
    job = job or {}
    variables = {name: value for name, value in environment.items() if name not in (job.get("env_vars") or {})}
    added: dict[str, Any] = {"env_vars": variables} if variables else {}
    inside = "working_dir" in job and all(Path.cwd() in package.resolve().parents for package in packages)
    if "py_modules" not in job and not inside:
        added["py_modules"] = [str(package) for package in packages]
    return added


def check_answers(address: str) -> None:
    """Raise ValueError if no Ray answers at host:port: nobody listens, the port is silent, or it is another server's."""
    if address.startswith(("http://", "https://")):
        raise ValueError(
            f"{address} is the address of Ray's dashboard, which takes jobs: set RAY_API_SERVER_ADDRESS to it for `ray job submit`, "
            f"and {ADDRESS} to host:6379"
        )
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return
    try:
        connection = socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS)
    except (OSError, OverflowError) as error:
        raise refusal(address, error) from None
    with connection:
        if os.environ.get("RAY_USE_TLS") == "1":
            return
        try:
            connection.sendall(HELLO)
            answer = connection.recv(9)
        except TimeoutError:
            raise ValueError(
                f"{address} accepts connections but does not answer within {ANSWER_SECONDS:.0f} s: is it the port of a Ray head "
                f"(6379, or 10001 after ray://), and is the head alive (ray status)? Correct {ADDRESS}"
            ) from None
        except OSError as error:
            raise refusal(address, error) from None
    if answer[3:4] != b"\x04":
        raise ValueError(
            f"{address} is no Ray port, another server answers there (the dashboard?): set {ADDRESS} to the head's port, 6379 if "
            "the owner did not change it"
        )


def check_cluster(address: str) -> None:
    """Raise ValueError if the cluster refuses this process's token, or runs another Ray or Python."""
    from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    try:
        ensure_token_if_auth_enabled(create_token_if_missing=False)  # Ray aborts the process otherwise
        with _without_stderr():
            client = GcsClient(address=address)
            record = client.internal_kv_get(b"CLUSTER_METADATA", b"cluster", timeout=ANSWER_SECONDS)
    except Exception as error:
        raise refusal(address, error) from None
    if record:
        check_versions(address, json.loads(record))


def check_versions(address: str, record: Mapping[str, str]) -> None:
    """Raise ValueError if the cluster's Ray or Python is not this process's.

    Ray accepts another patch release of Python if RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL is minor.
    """
    import ray

    theirs, own = record.get("ray_version", "?"), ray.__version__
    if theirs != own:
        raise ValueError(
            f"the Ray cluster at {address} runs Ray {theirs}, this process Ray {own}: install ray=={theirs} here, or start the cluster "
            f"with Ray {own}"
        )
    theirs, own = record.get("python_version", "?"), platform.python_version()
    parts = 2 if os.environ.get("RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL") == "minor" else 3
    if theirs.split(".")[:parts] != own.split(".")[:parts]:
        other_patch = theirs.split(".")[:2] == own.split(".")[:2]
        remedy = " (or set RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL=minor)" if other_patch else ""
        raise ValueError(
            f"the Ray cluster at {address} runs Python {theirs}, this process Python {own}: create the environment here with Python "
            f"{theirs}{remedy}, or start the cluster with {own}"
        )


def refusal(address: str, error: BaseException) -> ValueError:
    """Return the line for an error of joining, with the remedy."""
    reason = " ".join((getattr(error, "strerror", None) or str(error)).split())
    kind = type(error).__name__
    if kind == "AuthenticationError" or "InvalidAuthToken" in reason or "Unauthenticated" in reason:
        if os.environ.get("RAY_AUTH_MODE") != "token":
            return ValueError(
                f"the Ray cluster at {address} uses token authentication, this process does not: set RAY_AUTH_MODE=token and "
                "RAY_AUTH_TOKEN_PATH (a file) or RAY_AUTH_TOKEN; the cluster's owner has the token"
            )
        if "no authentication token was found" in reason:
            return ValueError(
                "RAY_AUTH_MODE is token, but this process has no token: set RAY_AUTH_TOKEN_PATH (a file) or RAY_AUTH_TOKEN, or "
                f"unset RAY_AUTH_MODE if the cluster at {address} uses none"
            )
        return ValueError(
            f"the Ray cluster at {address} refuses this process's token: ask the cluster's owner for the right one and put it into "
            "the file of RAY_AUTH_TOKEN_PATH (default ~/.ray/auth_token) or into RAY_AUTH_TOKEN"
        )
    if "runtime env" in reason.lower() or kind == "RuntimeEnvSetupError":
        return ValueError(
            f"the Ray cluster at {address} cannot set up the runtime environment ({reason[:300]}): correct the runtime_env of the job "
            "(ray job submit --runtime-env), or set RAY_OVERRIDE_JOB_RUNTIME_ENV=1 to combine it with the stage's"
        )
    if "version mismatch" in reason.lower():
        return ValueError(
            f"the Ray cluster at {address} and this process differ: {reason[:300]}: install the cluster's versions here"
        )
    if "node" in reason.lower() and ("raylet" in reason.lower() or "ip address" in reason.lower()):
        return ValueError(
            f"this machine is not a node of the Ray cluster at {address} ({reason[:200]}): join it (ray start --address={address}), or "
            "submit the command (ray job submit -- dvc repro), or use the cluster's client port (ray://HOST:10001)"
        )
    return ValueError(
        f"no Ray cluster answers at {address} ({reason[:200]}): start it (ray start --head), or correct {ADDRESS}; without either, "
        "the stage starts a local Ray"
    )


def _gcs_address(address: str) -> str:
    """Return host:port of an address that may be auto. Raises ValueError if no cluster runs on this machine."""
    from ray._private.services import canonicalize_bootstrap_address_or_die

    if address != "auto":
        return address
    try:
        return canonicalize_bootstrap_address_or_die(address)
    except Exception as error:
        raise refusal(address, error) from None


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Drop what Ray's C++ code writes to stderr inside of the block: the error says it again."""
    copy = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(copy, 2)
        os.close(copy)
