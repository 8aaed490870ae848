"""Problems of a configuration, in the words of its author: path, value, line, what is expected."""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum
from typing import Any

import annotated_types
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from launcher.yaml_text import join_path
from trainers.names import OpenNames

_TOKENS = re.compile(r"hf_[A-Za-z0-9]{16,}|wandb_v\d+_[A-Za-z0-9_]{16,}|sk-[A-Za-z0-9_-]{20,}|AKIA[A-Z0-9]{16}")
_WANDB = re.compile(r"[0-9a-fA-F]{40}")
_ABSENT = object()


@dataclass(frozen=True)
class Problem:
    """One thing to change. ``value`` is shown as YAML would write it."""

    path: str
    message: str
    value: Any = _ABSENT
    line: int | str | None = None

    def left(self) -> str:
        """The left column of a report: path, value and line."""
        text = self.path
        if self.value is not _ABSENT:
            shown = json.dumps(self.value, ensure_ascii=False, default=str)
            text += " = " + (shown if len(shown) <= 40 else shown[:37] + "...")
        if self.line is not None:
            text += f" (line {self.line})" if isinstance(self.line, int) else f" ({self.line})"
        return text


def report(problems: Sequence[Problem], *, source: str) -> str:
    """All problems under one heading, in the order of the file; anything that looks like a key is masked."""
    unique = list({(problem.path, problem.message): problem for problem in problems}.values())
    unique.sort(key=lambda problem: (problem.line if isinstance(problem.line, int) else 1 << 30, problem.path))
    width = min(max(len(problem.left()) for problem in unique), 52)
    lines = [f"{source}: {len(unique)} problem{'s' if len(unique) > 1 else ''}"]
    lines += [f"  {problem.left():<{width}}  {problem.message}" for problem in unique]
    return mask("\n".join(lines))


def looks_secret(text: str) -> bool:
    """Whether a value looks like an access key: a W&B key (40 hex digits) or a token with a known beginning."""
    return bool(_WANDB.fullmatch(text.strip()) or _TOKENS.search(text))


def mask(text: str) -> str:
    """The text with everything that looks like a key replaced."""
    return re.sub(rf"{_TOKENS.pattern}|\b{_WANDB.pattern}\b", "[hidden]", text)


def nearest(name: str, known: Sequence[str]) -> str:
    """`; did you mean "beta"?`, or the known names where none is near."""
    folded = {one.lower().replace("-", "_"): one for one in known}
    match = get_close_matches(name.lower().replace("-", "_"), folded, n=1, cutoff=0.6)
    if match:
        return f'; did you mean "{folded[match[0]]}"?'
    return f"; known: {', '.join(known)}" if known else ""


# ---- the schema


def model_of(annotation: Any) -> type[BaseModel] | None:
    """The model of an annotation such as ``LoraConfig | None``."""
    for option in _options(annotation):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def field_at(root: type[BaseModel], path: str) -> FieldInfo | None:
    """The field of a dotted path, or None if there is none."""
    model: type[BaseModel] | None = root
    field = None
    for name in re.sub(r"\[\d+\]", "", path).split("."):
        if model is None or name not in model.model_fields:
            return None
        field = model.model_fields[name]
        model = model_of(field.annotation)
    return field


def expected(field: FieldInfo, *, item: bool = False) -> str:
    """What a field takes, in words: `a number in (0, 1]: share of the steps`; for ``item`` what each item of its list is."""
    options = _options(field.annotation)
    if item:
        lists = [option for option in options if typing.get_origin(option) in (tuple, list)]
        options = tuple(dict.fromkeys(inner for option in lists for inner in typing.get_args(option) if inner is not Ellipsis))
    words = [_words(option, field) for option in options if option is not types.NoneType]
    text = " or ".join(words) + (", or null" if types.NoneType in options else "")
    return text + (f": {field.description}" if field.description else "")


def _options(annotation: Any) -> tuple[Any, ...]:
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return typing.get_args(annotation)
    return (annotation,)


def _choices(annotation: Any) -> tuple[str, ...]:
    if typing.get_origin(annotation) is typing.Literal:
        return tuple(str(value) for value in typing.get_args(annotation))
    if isinstance(annotation, type) and issubclass(annotation, OpenNames):
        return annotation.known()
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return tuple(str(member.value) for member in annotation)
    return ()


def _words(annotation: Any, field: FieldInfo) -> str:
    if choices := _choices(annotation):
        return f"one of {', '.join(choices)}"
    if annotation is bool:
        return "true or false"
    if annotation is int:
        return "a whole number" + _bounds(field)
    if annotation is float:
        return "a number" + _bounds(field)
    if annotation is str:
        return "text"
    origin = typing.get_origin(annotation) or annotation
    if origin in (tuple, list):
        inner = typing.get_args(annotation)
        choices = _choices(inner[0]) if inner else ()
        return "a list" + (f" of {', '.join(choices)}" if choices else "")
    return "a mapping of settings"


def _bounds(field: FieldInfo) -> str:
    low: tuple[str, str, Any] | None = None
    high: tuple[str, str, Any] | None = None
    for rule in field.metadata:
        if isinstance(rule, annotated_types.Gt):
            low = (">", "(", rule.gt)
        elif isinstance(rule, annotated_types.Ge):
            low = (">=", "[", rule.ge)
        elif isinstance(rule, annotated_types.Lt):
            high = ("<", ")", rule.lt)
        elif isinstance(rule, annotated_types.Le):
            high = ("<=", "]", rule.le)
    if low and high:
        return f" in {low[1]}{low[2]}, {high[2]}{high[1]}"
    bound = low or high
    return f" {bound[0]} {bound[2]}" if bound else ""


# ---- pydantic's errors


@dataclass(frozen=True)
class Finding:
    """A pydantic error: where in the values, and the problems to tell."""

    location: tuple[str | int, ...]
    """Steps into the values that were validated."""
    problems: tuple[Problem, ...]
    depends: tuple[str, ...] = ()
    """The settings that a relation between settings was read from."""
    kind: str = ""
    """relation, unknown, missing, or pydantic's name of the error."""


def findings(error: ValidationError, *, root: type[BaseModel], values: Mapping[str, Any], prefix: str = "") -> list[Finding]:
    """One finding per place; the branches of a union are one place.

    Args:
        root: the model that was validated.
        values: what it was validated from.
        prefix: put before every path, ending in a dot where not empty.
    """
    places: dict[tuple[str | int, ...], Finding] = {}
    location: tuple[str | int, ...]
    for one in error.errors(include_url=False):
        if one["type"] == "relations":
            relations = one["ctx"]["relations"]
            for relation in relations:
                location = ("relations", relation.path)
                places[location] = Finding(location, (Problem(prefix + relation.path, relation.message),), relation.depends, "relation")
            continue
        location, value = _location(one["loc"], values, missing=one["type"] == "missing")
        place = _finding(one, root=root, location=location, value=value, prefix=prefix)
        places.setdefault(location, place)
    return list(places.values())


def _location(loc: Sequence[str | int], values: Any, *, missing: bool) -> tuple[tuple[str | int, ...], Any]:
    """The part of pydantic's location that exists in the values (it adds names of union branches), and the value there."""
    done: list[str | int] = []
    for index, step in enumerate(loc):
        known = step in values if isinstance(values, Mapping) else isinstance(values, list) and isinstance(step, int) and step < len(values)
        if known:
            values = values[step]
        else:
            if missing:
                return (*done, *loc[index:]), _ABSENT
            break
        done.append(step)
    return tuple(done), values


def _finding(one: Any, *, root: type[BaseModel], location: tuple[str | int, ...], value: Any, prefix: str) -> Finding:
    path = ""
    for step in location:
        path = join_path(path, step)
    kind, field = one["type"], field_at(root, path)
    shown = _ABSENT if isinstance(value, (dict, list)) else value
    if kind == "extra_forbidden":
        parent = field_at(root, path.rpartition(".")[0]) if "." in path else None
        model = model_of(parent.annotation) if parent else root
        message = "unknown key" + nearest(str(location[-1]), list(model.model_fields) if model else [])
        kind, shown = "unknown", _ABSENT
    elif one["loc"] and one["loc"][-1] == "[key]":
        # The allowed keys of a dict with literal keys stand in pydantic's message only, in quotes.
        message = "unknown key" + nearest(str(location[-1]), re.findall(r"'([^']+)'", one["msg"]))
        kind, shown = "unknown", _ABSENT
    elif kind == "missing":
        message = f"is required: {expected(field)}" if field else "is required"
    elif kind == "value_error":
        message = str(one["ctx"]["error"]) if "ctx" in one else one["msg"]
    elif field is not None:
        item = isinstance(location[-1], int)
        message = f"must be {expected(field, item=item)}"
        if isinstance(value, str):
            inner = typing.get_args(field.annotation) if item else _options(field.annotation)
            near = nearest(value, [name for option in inner for name in _choices(option)])
            message += near if "did you mean" in near else ""
        elif isinstance(value, dict) and model_of(field.annotation) is None:
            message += " (searched settings stand under `train` and have `values`, or `min` and `max`)"
    else:
        message = one["msg"][0].lower() + one["msg"][1:]
    return Finding(location, (Problem(prefix + (path or "(root)"), message, shown),), kind=kind)
