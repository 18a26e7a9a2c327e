"""Earlier storages of a state: a changed ray.storage must not lose the checkpoints and trials in the storage before it."""

from __future__ import annotations

import logging

from pyarrow import fs

from diffusion_core.storage import read_json, write_json
from pipelines.cluster import is_uri
from pipelines.identity import State

STORAGES = "storages.json"

log = logging.getLogger("rediffuse")


def earlier_storages(state: State, storage: str) -> tuple[str, ...]:
    """Record ``storage`` in the state's folder, and return the other storages that earlier runs of this state used.

    The state's folder is always one of them. A storage that holds nothing or cannot be reached is skipped with a log line.
    """
    own = str(state.folder)
    recorded = _recorded(state)
    if storage not in (own, *recorded):
        write_json(state.folder / STORAGES, {"storages": [*recorded, storage]})
    others = dict.fromkeys(other for other in (own, *recorded) if other != storage)
    return tuple(other for other in others if other == own or _is_reachable(other))


def _recorded(state: State) -> list[str]:
    path = state.folder / STORAGES
    if not path.exists():
        return []
    try:
        return [str(storage) for storage in read_json(path)["storages"]]
    except (ValueError, KeyError, TypeError):
        log.warning("%s is damaged: ignored", path)
        return []


def _is_reachable(storage: str) -> bool:
    try:
        filesystem, path = fs.FileSystem.from_uri(storage) if is_uri(storage) else (fs.LocalFileSystem(), storage)
        found = filesystem.get_file_info(path).type == fs.FileType.Directory
    except (OSError, ValueError):  # pyarrow's errors are subclasses of these
        found = False
    if not found:
        log.info("earlier storage %s holds nothing or cannot be reached: skipped", storage)
    return found
