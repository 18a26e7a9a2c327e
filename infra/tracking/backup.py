"""Back up the MLflow server's databases and artifacts, or restore them: ``backup.py backup FOLDER``, ``backup.py restore FOLDER``.

Settings come from tracking.env. Needs pg_dump, pg_restore and psql of the server's version or newer, and boto3 for s3://.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

DATABASES = {"mlflow.dump": "MLFLOW_BACKEND_STORE_URI", "users.dump": "MLFLOW_AUTH_DATABASE_URI"}
ARTIFACTS = "MLFLOW_ARTIFACTS_DESTINATION"


def backup(folder: Path) -> None:
    """Write the databases and the artifacts into ``folder``. A second backup copies only artifacts that are new.

    The databases come first: each artifact that they name is then copied, also if runs go on meanwhile.
    """
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    for name, variable in DATABASES.items():
        part = folder / f"{name}.part"
        run(variable, "pg_dump", "--format=custom", f"--file={part}")
        part.replace(folder / name)
    print(f"{folder}: 2 databases, {copy(setting(ARTIFACTS), str(folder / 'artifacts'))} new artifacts")


def restore(folder: Path) -> None:
    """Load a backup into empty databases and copy its artifacts to where the server looks for them."""
    missing = [name for name in DATABASES if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} is no backup: {' and '.join(missing)} missing")
    for variable in DATABASES.values():
        tables = run(variable, "psql", "-Atc", "select count(*) from pg_tables where schemaname = 'public'")
        if int(tables) > 0:
            raise ValueError(
                f"the database of {variable} is not empty: stop the server, and drop and create the database"
            )
    for name, variable in DATABASES.items():
        database = database_environment(variable)["PGDATABASE"]
        run(
            variable, "pg_restore", "--no-owner", "--no-privileges", "--single-transaction", "--exit-on-error",
            f"--dbname={database}", str(folder / name),
        )  # fmt: skip
    print(f"{folder}: 2 databases, {copy(str(folder / 'artifacts'), setting(ARTIFACTS))} artifacts restored")


def copy(source: str, destination: str) -> int:
    """Copy the files that the destination lacks or has with another size. Return how many. Each is a folder or s3://bucket/folder."""
    present, copied = dict(sizes(destination)), 0
    for name, size in sizes(source):
        if present.get(name) == size:
            continue
        if not is_s3(source) and not is_s3(destination):
            target = Path(destination, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(Path(source, name), target)
        elif is_s3(source) and is_s3(destination):
            raise ValueError("a backup goes to a folder, not to s3://")
        elif is_s3(source):
            bucket, prefix = bucket_and_prefix(source)
            target = Path(destination, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(f"{target.name}.part")
            s3().download_file(bucket, prefix + name, str(part))
            part.replace(target)
        else:
            bucket, prefix = bucket_and_prefix(destination)
            s3().upload_file(str(Path(source, name)), bucket, prefix + name)
        copied += 1
    return copied


def sizes(place: str) -> Iterator[tuple[str, int]]:
    """Give the name, relative to ``place``, and the size of each file."""
    if is_s3(place):
        bucket, prefix = bucket_and_prefix(place)
        for page in s3().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            yield from ((item["Key"].removeprefix(prefix), item["Size"]) for item in page.get("Contents", []))
    else:
        for path in sorted(Path(place).rglob("*")):
            if path.is_file():
                yield path.relative_to(place).as_posix(), path.stat().st_size


def is_s3(place: str) -> bool:
    return place.startswith("s3://")


def bucket_and_prefix(place: str) -> tuple[str, str]:
    parts = urlsplit(place)
    prefix = parts.path.strip("/")
    return parts.netloc, f"{prefix}/" if prefix else ""


def s3() -> Any:
    import boto3

    for name in [name for name, value in os.environ.items() if name.startswith(("AWS_", "MLFLOW_")) and not value]:
        del os.environ[name]  # tracking.env has lines without a value
    return boto3.client("s3", endpoint_url=os.environ.get("MLFLOW_S3_ENDPOINT_URL"))


def setting(variable: str) -> str:
    value = os.environ.get(variable)
    if not value:
        raise ValueError(f"{variable} is not set: load tracking.env first (set -a; . ./tracking.env)")
    return value


def database_environment(variable: str) -> dict[str, str]:
    """Return the address of a database in libpq's variables: on the command line, every user of the machine would see the password."""
    parts = urlsplit(setting(variable))
    values = {
        "PGHOST": parts.hostname,
        "PGPORT": str(parts.port or 5432),
        "PGUSER": parts.username,
        "PGPASSWORD": parts.password,
        "PGDATABASE": parts.path.lstrip("/"),
    }
    return {name: unquote(value) for name, value in values.items() if value}


def run(variable: str, *command: str) -> str:
    try:
        result = subprocess.run(
            command, env={**os.environ, **database_environment(variable)}, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise ValueError(f"{command[0]} is missing: install postgresql-client") from None
    if result.returncode:
        raise ValueError(f"{command[0]} with {variable}: {result.stderr.strip().splitlines()[-1]}")
    return result.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["backup", "restore"])
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    try:
        (backup if arguments.action == "backup" else restore)(arguments.folder)
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
