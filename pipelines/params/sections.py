"""Sections of a settings file: checks, and errors of one line that name the key, the value given and the values allowed."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]

SHA256 = r"^[0-9a-fA-F]{64}$"
NAME = r"^[^\s\p{C}]([^\p{C}]*[^\s\p{C}])?$"
_PART = r"[^/:.%\"'\s\p{C}]([^/:.%\"'\p{C}]*[^/:.%\"'\s\p{C}])?"
MODEL_NAME = rf"^{_PART}(\.{_PART}\.{_PART})?$"
PATTERNS = {
    NAME: "a text that is not blank, without spaces at its ends or invisible characters",
    SHA256: "64 hexadecimal digits",
    MODEL_NAME: "a name that is not blank, without / : . %, quotes, spaces at its ends or invisible characters, or catalog.schema.name in Unity Catalog",
}

_reads: set[tuple[str, str]] | None = None


class Section(BaseModel):
    """A section of a settings file: unknown keys are refused, values are not converted, and nothing can be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    def __getattribute__(self, name: str) -> Any:
        if _reads is not None:
            fields = type(self).model_fields
            if name in fields:
                _reads.add((type(self).__name__, name))
            elif name == "model_dump":
                _record_all(self)
        return super().__getattribute__(name)


def _record_all(section: Section) -> None:
    assert _reads is not None
    for name, value in dict(section).items():
        _reads.add((type(section).__name__, name))
        if isinstance(value, Section):
            _record_all(value)


def record_reads() -> None:
    """Start to record which fields of which section this process reads; see `recorded_reads`."""
    global _reads
    _reads = set()


def recorded_reads() -> set[tuple[str, str]]:
    """Return the (class name, field name) pairs that were read since `record_reads`; a dump reads all fields of its section."""
    return set(_reads or ())


class ConflictError(ValueError):
    """A setting that contradicts another one."""


def require(condition: bool, key: str, given: str, allowed: str) -> None:
    """Raise ConflictError, which the schema reports as one line, unless ``condition`` holds."""
    if not condition:
        raise ConflictError(f"{key}: given {given}, allowed {allowed}")


Settings = TypeVar("Settings", bound=Section)


def parse_section(schema: type[Settings], tree: Any, origin: str, moved: Mapping[str, str] | None = None) -> Settings:
    """Check a tree of plain values against ``schema``.

    ``moved``: dotted keys that belong to another file, with the text that says where. Raises ValueError with one line that
    names ``origin`` and up to three of the wrong keys.
    """
    if not isinstance(tree, dict):
        raise ValueError(f"{origin}: must hold sections ({', '.join(field_names(schema))}), not {abbreviated(tree)}")
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        lines = list(dict.fromkeys(_explain(schema, item, moved or {}) for item in error.errors()))
        more = f" (and {len(lines) - 3} more)" if len(lines) > 3 else ""
        raise ValueError(f"{origin}: {'; '.join(lines[:3])}{more}") from None


def read_yaml(path: Path) -> Any:
    """Return plain values from a YAML 1.2 file (1e-3 is a number). Raises ValueError that names the file and the line."""
    try:
        with open(path, encoding="utf-8") as file:
            return YAML(typ="safe", pure=True).load(file)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text: {error.reason}") from None
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ValueError(f"{path}: line {line} is not valid YAML: {error.problem}") from None
    except YAMLError as error:
        raise ValueError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from None


def flatten(prefix: str, section: Section | Mapping[str, Any]) -> dict[str, Any]:
    """Return the values by dotted key, nested sections opened: ``flatten("train", train)["train.network.name"]``."""
    tree = section.model_dump(by_alias=True) if isinstance(section, Section) else section
    values: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        if isinstance(value, Mapping | Section):
            values |= flatten(key, value)
        else:
            values[key] = value
    return values


def field_names(schema: type[BaseModel]) -> list[str]:
    """Return the keys of a section as the file spells them."""
    return [field.alias or name for name, field in schema.model_fields.items()]


def abbreviated(value: Any) -> str:
    """Return the value as an error shows it, at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _explain(schema: type[BaseModel], error: Any, moved: Mapping[str, str]) -> str:
    if isinstance(error.get("ctx", {}).get("error"), ConflictError):
        return str(error["ctx"]["error"])
    location = tuple(part for part in error["loc"] if not _is_union_branch(part))
    key, kind, context = _dotted(location), error["type"], error.get("ctx", {})
    if kind == "missing":
        return f"{key}: is missing, allowed {_allowed_of(schema, location)}"
    if kind == "extra_forbidden":
        if key in moved:
            return f"{key}: {moved[key]}"
        names = field_names(_section_at(schema, location[:-1]))
        close = difflib.get_close_matches(str(location[-1]), names, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        return f"{key}: unknown key, given {abbreviated(error['input'])}, allowed {', '.join(names)}{hint}"
    phrases = {
        "greater_than_equal": "at least {ge}",
        "greater_than": "above {gt}",
        "less_than_equal": "at most {le}",
        "less_than": "below {lt}",
        "literal_error": "{expected}",
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "bool_type": "true or false",
        "string_type": "a string",
        "list_type": "a list",
        "finite_number": "a finite number",
        "too_short": "at least {min_length} entries",
        "too_long": "at most {max_length} entries",
        "model_type": "a section of keys",
        "model_attributes_type": "a section of keys",
        "dict_type": "a section of keys",
    }
    allowed = phrases[kind].format(**context) if kind in phrases else error["msg"]
    if kind == "string_pattern_mismatch":
        allowed = PATTERNS[context["pattern"]]
    field = _field_at(schema, location)
    if field is not None and field.description and kind not in ("too_short", "too_long", "list_type"):  # a union
        allowed = field.description
    return f"{key}: given {abbreviated(error['input'])}, allowed {allowed}"


def _is_union_branch(part: Any) -> bool:
    return isinstance(part, str) and (
        part.startswith(("constrained-", "literal[", "function-")) or part in ("int", "float", "str")
    )


def _dotted(location: tuple[Any, ...]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text or "the file"


def _section_at(schema: type[BaseModel], location: tuple[Any, ...]) -> type[BaseModel]:
    """Return the innermost section on the way to ``location``."""
    model = schema
    for part in location:
        for name, field in model.model_fields.items():
            annotation = field.annotation
            if part in (name, field.alias) and isinstance(annotation, type) and issubclass(annotation, BaseModel):
                model = annotation
                break
    return model


def _field_at(schema: type[BaseModel], location: tuple[Any, ...]) -> Any:
    """Return the innermost field on the way to ``location``, or None."""
    names = [part for part in location if isinstance(part, str)]
    if not names:
        return None
    section = _section_at(schema, tuple(names[:-1]))
    return next((field for name, field in section.model_fields.items() if names[-1] in (name, field.alias)), None)


def _allowed_of(schema: type[BaseModel], location: tuple[Any, ...]) -> str:
    section = _section_at(schema, location)
    if section is not _section_at(schema, location[:-1]):
        return f"a section with {', '.join(field_names(section))}"
    return "a value: it has no default"
