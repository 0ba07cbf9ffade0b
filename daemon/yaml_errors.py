"""Read YAML so that every complaint can name its line, and turn pydantic's complaints into ours."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

Location = tuple[int | str, ...]
_NUMBERS = {"tag:yaml.org,2002:int", "tag:yaml.org,2002:float"}
_OTHER_BASE = re.compile(r"[-+]?0[0-7_]+|.*:.*")


class ConfigError(Exception):
    """A configuration that cannot be used; the message holds one line for every problem."""


@dataclass(frozen=True, slots=True)
class Document:
    """Parsed YAML with the line of every key."""

    path: Path
    data: Any
    lines: Mapping[Location, int]

    def line_of(self, location: Location) -> int:
        """Return the line of the nearest place in the file that a location leads to."""
        while location and location not in self.lines:
            location = location[:-1]
        return self.lines.get(location, 1)


def read_yaml(path: Path) -> Document:
    """Parse a YAML file. Raises ConfigError for syntax errors, double keys and unreadable files."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from error
    lines: dict[Location, int] = {}
    problems: list[str] = []
    try:
        loader = yaml.SafeLoader(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    try:
        root = loader.get_single_node()
        if root is not None:
            _collect(root, (), lines, problems, path)
        if problems:
            raise ConfigError("\n".join(problems))
        data = None if root is None else loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise ConfigError(f"{path}:{line}: not valid YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    finally:
        loader.dispose()
    return Document(path, data, lines)


def _collect(node: yaml.Node, at: Location, lines: dict[Location, int], problems: list[str], path: Path) -> None:
    lines.setdefault(at, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                problems.append(f"{path}:{key.start_mark.line + 1}: {_dotted(at)}: a key must be plain text")
                continue
            where = (*at, key.value)
            line = key.start_mark.line + 1
            if where in lines:
                problems.append(f"{path}:{line}: {_dotted(where)}: given twice (also in line {lines[where]})")
            lines[where] = line
            _collect(value, where, lines, problems, path)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _collect(value, (*at, index), lines, problems, path)
    elif isinstance(node, yaml.ScalarNode) and node.tag in _NUMBERS and _OTHER_BASE.fullmatch(node.value):
        problems.append(
            f"{path}:{node.start_mark.line + 1}: {_dotted(at)}: YAML takes {node.value} for a number in base 8 or "
            "60; write it without leading zeros and colons, or in quotes where it is text"
        )


def describe_problems(document: Document, model: type[BaseModel], error: ValidationError) -> str:
    """Write one line `FILE:LINE: KEY: what is wrong, what is allowed` for each of pydantic's complaints."""
    found = []
    for problem in error.errors(include_url=False):
        if problem["type"] == "literal_error" and problem["ctx"]["expected"] == "False":
            continue  # a section that is not `off`: what is wrong with it as a section is said as well
        location = _without_tags(document.data, problem["loc"])
        line = document.line_of(location)
        message = _message(problem, model, document.data)
        found.append((line, f"{document.path}:{line}: {_dotted(location) or 'the file'}: {message}"))
    return "\n".join(text for _line, text in sorted(found))


def _message(problem: Any, model: type[BaseModel], data: Any) -> str:
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        allowed = ", ".join(_allowed_keys(model, problem["loc"][:-1]))
        return f"unknown key; allowed here: {allowed}"
    if kind == "missing":
        return "missing; it must be given"
    if kind == "union_tag_invalid":
        return f"{context['tag']!r} is unknown; allowed: {context['expected_tags'].replace(chr(39), '')}"
    if kind == "union_tag_not_found":
        return "missing key driver; allowed: synthetic, replay, pylon"
    if kind == "value_error":
        return str(context["error"])
    given = problem["input"]
    shown = f" (given: {given!r})" if isinstance(given, str | int | float | bool | None) else ""
    message = str(problem["msg"])
    return message[0].lower() + message[1:] + shown


def _without_tags(data: Any, location: Sequence[int | str]) -> Location:
    """Drop the names of union members, which pydantic puts between keys but no file contains."""
    kept: list[int | str] = []
    for index, part in enumerate(location):
        is_last = index == len(location) - 1
        if isinstance(data, Mapping):
            if part in data:
                data = data[part]
            elif not is_last:
                continue
        elif isinstance(data, Sequence) and not isinstance(data, str) and isinstance(part, int):
            data = data[part] if part < len(data) else None
        elif isinstance(part, str):
            continue
        kept.append(part)
    return tuple(kept)


def _allowed_keys(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    here: list[type[BaseModel]] = [model]
    for part in location:
        tagged = [m for m in here if _tag(m) == part]
        if tagged:
            here = tagged
            continue
        fields = [m.model_fields[part] for m in here if part in m.model_fields]
        if fields:  # else it is the name of a union's member
            here = [m for field in fields for m in _models_in(field)]
    return sorted({name for m in here for name in m.model_fields})


def _tag(model: type[BaseModel]) -> str | None:
    driver = model.model_fields.get("driver")
    return get_args(driver.annotation)[0] if driver else None


def _models_in(field: FieldInfo | Any) -> list[type[BaseModel]]:
    annotation = field.annotation if isinstance(field, FieldInfo) else field
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for member in get_args(annotation) for model in _models_in(member)]


def _dotted(location: Location) -> str:
    return ".".join(str(part) for part in location)
