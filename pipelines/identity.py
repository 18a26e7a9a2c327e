"""Identity of a result (settings, inputs, code), and the folder of the state that a stage resumes from.

A result depends on settings, inputs, and the code that computes it. The code is the import closure of the function that
computes the result, derived from the sources: each module is hashed as a syntax tree without docstrings, so a comment or a
docstring changes nothing. The modules of `MACHINERY` decide where and how a result is computed, not the result; an import
contract keeps them out of the closures.

`dvc repro` deletes a stage's outputs before it runs the stage, so resumable state lies outside of them, under ``runs/``,
in a folder named by the key of the identity. The same identity resumes; another identity starts from the beginning.
"""

from __future__ import annotations

import ast
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import diffusion_core
from diffusion_core.storage import read_json, write_json
from pipelines.workspace import RUNS

log = logging.getLogger("rediffuse")

ROOT = Path(diffusion_core.__file__).resolve().parents[1]
PACKAGES = ("diffusion_core", "pipelines")
MACHINERY = (
    "pipelines.params",
    "pipelines.stage",
    "pipelines.identity",
    "pipelines.workspace",
    "pipelines.local_store",
    "pipelines.resources",
    "pipelines.cluster",
    "pipelines.joining",
    "pipelines.autoscaling",
    "pipelines.cluster_check",
    "pipelines.node_facts",
    "pipelines.cpu_quota",
    "pipelines.devices",
    "pipelines.tracking",
    "pipelines.outbox",
    "pipelines.storages",
    "pipelines.durations",
    "pipelines.ddp",
    "pipelines.search.driver",
    "pipelines.search.worker",
    "pipelines.measurement.distributed",
    "pipelines.measurement.distributed_reference",
    "pipelines.termination",
)
"""Modules and packages that decide where and how a result is computed, but not the result."""

IDENTITY_FILE, CONTINUES_FILE, CONTINUED_FILE = "identity.json", "continues.json", "continued.json"
RECORDS = (IDENTITY_FILE, CONTINUES_FILE, CONTINUED_FILE)
"""Files of a state folder that hold no work and do not point to any."""


@dataclass(frozen=True)
class Identity:
    """Settings (JSON values), input digests and module digests that a result of ``stage`` depends on."""

    stage: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    code: Mapping[str, str]

    @property
    def key(self) -> str:
        """16 hexadecimal digits over all of it."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()[:16]

    def as_dict(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "settings": dict(self.settings),
            "inputs": dict(self.inputs),
            "code": dict(self.code),
        }


@dataclass(frozen=True)
class State:
    """The folder of resumable state (absolute, it exists) and the key under which it is filed.

    ``changed_modules``: modules that differed when state of other code was continued here by force; empty if it never was.
    """

    folder: Path
    key: str
    changed_modules: tuple[str, ...] = ()


def identify(
    stage: str, settings: Mapping[str, Any], inputs: Mapping[str, str], computed_by: Sequence[Callable[..., Any]]
) -> Identity:
    """The identity of a result that the functions ``computed_by`` compute from these settings and inputs.

    settings: JSON values; inputs: the digest of each input by name.
    """
    plain = json.loads(json.dumps(dict(settings)))
    modules = import_closure([function.__module__ for function in computed_by])
    return Identity(stage, plain, dict(inputs), {name: source_digest(path) for name, path in modules.items()})


def open_state(identity: Identity, resume: Literal["auto", "force"] = "auto") -> State:
    """The folder ``runs/<stage>/<key>`` of this identity, made if it is missing.

    With ``resume="force"``, and no work of this identity yet, the newest state of the same settings and inputs but other code
    is continued. It stays marked as such, for every identity that opens it later. Log lines say what is continued, and what
    state of other code or other settings exists.
    """
    base = RUNS / identity.stage
    folder = base / identity.key
    continued = _read_pointer(folder, base)
    if continued is None and not _holds_work(folder):
        others = [found for found in _recorded_identities(base) if found[0].key != identity.key]
        same = [found for found in others if _same_work(found[0], identity) and _holds_work(found[1])]
        if same:
            other, path = max(same, key=lambda found: (found[1] / IDENTITY_FILE).stat().st_mtime)
            modules = ", ".join(changed_modules(other.code, identity.code))
            if resume == "force":
                log.warning("resume: force: resuming state %s, made with different code in %s", path, modules)
                _mark_continued(path, changed_modules(other.code, identity.code))
                write_json(folder / CONTINUES_FILE, {"key": path.name})
                continued = path
            else:
                log.info(
                    "starting from the beginning: the code of %s has changed since state %s was made "
                    "(resume: force in run.yaml continues that state)",
                    modules,
                    path,
                )
        elif others and not (folder / IDENTITY_FILE).exists():
            other, path = max(others, key=lambda found: (found[1] / IDENTITY_FILE).stat().st_mtime)
            log.info(
                "starting from the beginning: state %s differs in %s", path, ", ".join(_differences(other, identity))
            )
    if continued is None:
        write_json(folder / IDENTITY_FILE, identity.as_dict())
        continued = folder
    return State(continued.resolve(), continued.name, _marked_modules(continued))


def changed_modules(old: Mapping[str, str], new: Mapping[str, str]) -> tuple[str, ...]:
    """The modules whose digest differs, or that only one of the two closures has, sorted."""
    return tuple(sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name)))


def closure_digest(*functions: Callable[..., Any]) -> str:
    """SHA-256 over the syntax trees of the import closure of the modules that define ``functions``."""
    modules = import_closure([function.__module__ for function in functions])
    return hashlib.sha256(
        json.dumps({name: source_digest(path) for name, path in modules.items()}, sort_keys=True).encode()
    ).hexdigest()


def stage_dependencies(stage: str) -> list[str]:
    """The ``deps`` of a stage in dvc.yaml that are code: its module and what it imports, without `MACHINERY`; sorted paths."""
    modules = import_closure([f"pipelines.{stage}"], without=MACHINERY)
    return sorted(path.relative_to(ROOT).as_posix() for path in modules.values())


def import_closure(modules: Sequence[str], without: Sequence[str] = ()) -> dict[str, Path]:
    """These modules and every module of the project that they import, directly or not: {name: source file}, sorted.

    Imports are read from the source, also those inside functions. ``without``: modules or packages to skip, with everything
    that only they import.
    """
    found: dict[str, Path] = {}
    pending = list(modules)
    while pending:
        name = pending.pop()
        if name in found or any(name == skipped or name.startswith(f"{skipped}.") for skipped in without):
            continue
        path = _source_of(name)
        assert path is not None, f"{name} is not a module of the project"
        found[name] = path
        pending += _imports_of(name, path)
    return dict(sorted(found.items()))


def source_digest(path: Path) -> str:
    """SHA-256 of a module's syntax tree without docstrings: comments, layout and docstrings do not change it."""
    return _digest_of(path.read_bytes())


@lru_cache(maxsize=1024)
def _digest_of(source: bytes) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [part for part in node.body if not _is_docstring(part)]
    return hashlib.sha256(_plain(tree).encode()).hexdigest()


def _plain(node: Any) -> str:
    """A syntax tree as text, the same for every supported Python: `ast.dump` differs in the empty fields that it shows."""
    if isinstance(node, ast.AST):
        fields = [(name, value) for name, value in ast.iter_fields(node) if value is not None and value != []]
        return f"{type(node).__name__}({', '.join(f'{name}={_plain(value)}' for name, value in fields)})"
    if isinstance(node, list):
        return f"[{', '.join(_plain(item) for item in node)}]"
    return repr(node)


def _is_docstring(node: ast.stmt) -> bool:
    """A string that stands alone: a docstring, or the text below an attribute."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _imports_of(name: str, path: Path) -> list[str]:
    """Modules of the project that a module imports, with the packages around them."""
    imported: list[str] = []
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name if path.name == "__init__.py" else name.rpartition(".")[0]
                parents = package.split(".")
                package = ".".join(parents[: len(parents) - node.level + 1])
                base = f"{package}.{base}" if base else package
            imported += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    own = [module for module in imported if module.split(".")[0] in PACKAGES]
    packages = [
        ".".join(module.split(".")[:depth]) for module in [*own, name] for depth in range(1, module.count(".") + 1)
    ]
    return [module for module in dict.fromkeys([*own, *packages]) if _source_of(module) is not None]


@lru_cache(maxsize=1024)
def _source_of(name: str) -> Path | None:
    base = ROOT.joinpath(*name.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


def _read_pointer(folder: Path, base: Path) -> Path | None:
    """The state that a forced resume of this identity continues, or None. A damaged pointer is ignored with a warning."""
    if not (folder / CONTINUES_FILE).exists():
        return None
    try:
        continued = base / str(read_json(folder / CONTINUES_FILE)["key"])
    except (ValueError, KeyError, TypeError):
        log.warning("%s is damaged: ignored", folder / CONTINUES_FILE)
        return None
    if not (continued / IDENTITY_FILE).exists():
        return None
    log.info("resuming state %s, made with different code in %s", continued, ", ".join(_marked_modules(continued)))
    return continued


def _mark_continued(folder: Path, modules: Sequence[str]) -> None:
    """Record in a state folder that code which differs in these modules continued it."""
    write_json(folder / CONTINUED_FILE, {"modules": sorted({*_marked_modules(folder), *modules})})


def _marked_modules(folder: Path) -> tuple[str, ...]:
    if not (folder / CONTINUED_FILE).exists():
        return ()
    return tuple(str(module) for module in read_json(folder / CONTINUED_FILE)["modules"])


def _holds_work(folder: Path) -> bool:
    """Return True if a state folder holds anything besides records and locks."""
    return any(path.is_file() and path.name not in RECORDS and path.suffix != ".lock" for path in folder.rglob("*"))


def _recorded_identities(base: Path) -> list[tuple[Identity, Path]]:
    found = []
    for path in sorted(base.glob(f"*/{IDENTITY_FILE}")):
        try:
            found.append((Identity(**json.loads(path.read_text(encoding="utf-8"))), path.parent))
        except (OSError, ValueError, TypeError):
            continue
    return found


def _same_work(one: Identity, other: Identity) -> bool:
    return dict(one.settings) == dict(other.settings) and dict(one.inputs) == dict(other.inputs)


def _differences(old: Identity, new: Identity) -> list[str]:
    """The settings and inputs in which two identities differ, at most six, for a log line."""
    names = [
        name
        for part in ("settings", "inputs")
        for name in sorted({**getattr(old, part), **getattr(new, part)})
        if getattr(old, part).get(name) != getattr(new, part).get(name)
    ]
    return [*names[:6], "..."] if len(names) > 6 else names
