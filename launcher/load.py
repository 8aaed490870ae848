"""A YAML file, with overrides from the command line, to a checked experiment; every problem is told at once."""

from __future__ import annotations

import copy
import difflib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from launcher.config import ExperimentConfig, train_relations
from launcher.masking import hide_secrets, names_secret, secrets_of
from launcher.problems import Problem, field_at, findings, looks_secret, mask, nearest, report
from launcher.search_space import Choice, Domain, Range, SearchSpace, flatten_overrides, set_path
from launcher.templates import find_recipe, template_names
from launcher.yaml_text import dump_values, join_path, parse_scalar, parse_yaml
from trainers.config import TrainConfig
from trainers.errors import InputError

_DOMAIN_KEYS = ("values", "min", "max", "distribution")
_DISTRIBUTIONS = ("uniform", "log_uniform", "int_uniform")
_PLACEHOLDERS: dict[str, Any] = {"name": "placeholder", "data": {"path": "placeholder"}}
"""Stand-ins for required settings, so that the rest is checked even where they are missing."""

Lines = dict[str, int | str]


@dataclass(frozen=True)
class LoadedExperiment:
    """A checked experiment, the settings of ``train`` that it searches, and the file it came from.

    Where a setting is searched, ``config.train`` holds the first of its values or the middle of its range.
    """

    config: ExperimentConfig
    space: SearchSpace
    source: Path


def load_experiment(
    path: Path, overrides: Sequence[str] = (), *, require: Literal["one_trial", "target"] | None = None
) -> LoadedExperiment:
    """Read and check an experiment.

    Args:
        path: YAML file, or the name of a shipped recipe where there is no such file.
            ``${oc.env:NAME}`` and other OmegaConf interpolations are resolved.
        overrides: ``a.b=c`` with a YAML value; ``c`` may be a domain such as ``{values: [1, 2]}``.
        require: what the command needs beyond a valid file: ``one_trial`` refuses searched settings,
            ``target`` refuses a file without a ``target`` section.

    Raises:
        InputError: naming every problem with its path, line and remedy.
    """
    path = find_recipe(Path(path))
    values, lines, problems = _read(path, overrides)
    secrets = _secret_problems(values, environment=os.environ)
    if not secrets:
        _load_plugins(values, path=path)
    values, space = _lift_domains(values, problems=problems)
    config, valid = _validate(values, space=space, problems=problems)
    _check_candidates(valid, points=_start_points(values), space=space, problems=problems)
    if require == "one_trial":
        problems += [
            Problem(
                f"train.{name}", f"is searched, but one trial needs one value: add for instance train.{name}={json.dumps(domain.middle)}"
            )
            for name, domain in space.domains.items()
        ]
    if require == "target" and values.get("target") is None:
        problems.append(
            Problem("target", "is required: how to build the target model; add a `target:` section (`target: {}` takes the defaults)")
        )
    hidden = {secret.path for secret in secrets}
    problems = secrets + [problem for problem in problems if problem.path not in hidden]
    if problems or config is None:
        raise InputError(report([_with_line(problem, lines) for problem in problems], source=path.name))
    return LoadedExperiment(config=config, space=space, source=path)


def dump_yaml(config: ExperimentConfig, *, space: SearchSpace | None = None) -> str:
    """The complete configuration as YAML; loading it gives the same configuration (and the same search space)."""
    values = config.model_dump(mode="json")
    if "seed" not in config.train.model_fields_set:
        del values["train"]["seed"]  # derived for each trial; a number here would fix it for all
    for path, domain in (space or SearchSpace()).domains.items():
        set_path(values["train"], path, domain.spec())
    return dump_values(_escape(values))


def _read(path: Path, overrides: Sequence[str]) -> tuple[dict[str, Any], Lines, list[Problem]]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        beside = [file.name for file in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        shipped = template_names() if path.parent == Path() else []
        near = difflib.get_close_matches(path.name, [*beside, *shipped], n=1)
        hint = f'did you mean "{path.parent / near[0]}"?' if near else "`unlearn init --template quickstart` writes one to start from"
        raise InputError("configuration file not found", where=mask(str(path)), fix=hint) from None
    except IsADirectoryError:
        raise InputError("a folder where a YAML file is expected", where=str(path), fix=f"try {path / 'experiment.yaml'}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 text (byte {error.start})", where=str(path), fix="save the file as UTF-8") from None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path), fix="check the file's permissions") from None
    parsed = parse_yaml(text, where=path.name)
    lines: Lines = dict(parsed.lines)
    problems = [Problem(where, message, line=line) for where, line, message in parsed.bad_keys]
    if any("keys must be text" in problem.message for problem in problems):
        raise InputError(report(problems, source=path.name))
    return _apply_overrides(parsed.values, overrides, lines=lines, problems=problems), lines, problems


def _apply_overrides(values: dict[str, Any], overrides: Sequence[str], *, lines: Lines, problems: list[Problem]) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        tree = OmegaConf.create(values)
        for override in overrides:
            key, equals, text = override.partition("=")
            key = key.strip()
            if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*|\[\d+\])*", key):
                problems.append(Problem(override, "overrides are key=value, for instance train.learning_rate=1e-4", line="override"))
                continue
            try:
                # merge=False: `train.lora={r: 8}` and a new search domain replace what the file says, they do not mix with it.
                OmegaConf.update(tree, key, parse_scalar(text), merge=False)
            except InputError as error:
                problems.append(Problem(key, f"{error.what}; put the value in quotes", text, "override"))
            except (OmegaConfBaseException, ValueError, TypeError) as error:
                problems.append(Problem(key, f"cannot be set: {str(error).splitlines()[0]}", line="override"))
            else:
                lines[key] = "override"
        resolved = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        problem = Problem(
            str(getattr(error, "full_key", None) or "(root)"),
            f"{mask(str(error.msg or error).splitlines()[0])}; ${{oc.env:NAME}} reads the environment, \\${{ is a plain text ${{",
        )
        raise InputError(report([*problems, _with_line(problem, lines)], source="configuration")) from None
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def _secret_problems(values: Mapping[str, Any], *, environment: Mapping[str, str]) -> list[Problem]:
    """A problem for everything that is an access key: by its look, by the name of its setting, or because the environment calls it one."""
    known = secrets_of(environment)
    fix = "keys do not belong in a configuration; delete it and set it in the environment"
    found = dict.fromkeys(_secret_names(values), "is the name of an access key")
    for where, text in _texts(values):
        if looks_secret(text) or hide_secrets(text, secrets=known) != text:
            found[where] = "looks like an access key"
    return [Problem(where, f"{what}: {fix}") for where, what in found.items()]


def _secret_names(values: Any, path: str = "") -> Iterator[str]:
    """Paths of the settings that hold a text and are named like an access key."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            place = join_path(path, str(key))
            if isinstance(value, str) and names_secret(str(key)):
                yield place
            yield from _secret_names(value, place)
    elif isinstance(values, list):
        for index, value in enumerate(values):
            yield from _secret_names(value, join_path(path, index))


def _load_plugins(values: dict[str, Any], *, path: Path) -> None:
    """Load the plugins, whose names are valid in what follows, and name each by its file."""
    from launcher.plugins import load_given

    files = load_given(values.get("plugins"), beside=path.absolute().parent, where=path.name)
    if files:
        values["plugins"] = files


# ---- search domains


def _lift_domains(values: dict[str, Any], *, problems: list[Problem]) -> tuple[dict[str, Any], SearchSpace]:
    """The values with every domain replaced by its middle, and the domains by dotted path below ``train``."""
    values = copy.deepcopy(values)
    domains: dict[str, Domain] = {}

    def lift(section: dict[str, Any], prefix: str) -> None:
        for name, value in list(section.items()):
            path = f"{prefix}.{name}" if prefix else name
            if not isinstance(value, dict):
                continue
            if not set(value) & set(_DOMAIN_KEYS):
                lift(value, path)
                continue
            domain = _parse_domain(value, path=path, problems=problems)
            if domain is None:
                del section[name]
            else:
                section[name] = copy.deepcopy(domain.middle)
                domains[path] = domain

    if isinstance(values.get("train"), dict):
        lift(values["train"], "")
    return values, SearchSpace(domains)


def _parse_domain(spec: dict[str, Any], *, path: str, problems: list[Problem]) -> Domain | None:
    full, before = f"train.{path}", len(problems)
    field = field_at(TrainConfig, path)
    if field is None:
        parent = path.rpartition(".")[0]
        known = list(TrainConfig.model_fields) if not parent else _fields_below(parent)
        problems.append(Problem(full, "unknown key" + nearest(path.rpartition(".")[2], known)))
        return None
    if path == "engine" or path == "engine.ranks":
        problems.append(
            Problem(full, "cannot be searched: the resources of a sweep are planned once; write one number, or run one sweep for each")
        )
    problems += [Problem(f"{full}.{name}", "unknown key" + nearest(str(name), _DOMAIN_KEYS)) for name in spec if name not in _DOMAIN_KEYS]
    if "values" in spec:
        mixed = [name for name in ("min", "max", "distribution") if name in spec]
        if mixed:
            problems.append(Problem(full, f"`values` and `{mixed[0]}` together: give either `values`, or `min` and `max`"))
        items = spec["values"]
        if not isinstance(items, list) or not items:
            problems.append(Problem(f"{full}.values", "must be a list of at least one value, for instance [1e-5, 1e-4]", items))
        elif len({json.dumps(item, sort_keys=True, default=str) for item in items}) < len(items):
            problems.append(Problem(f"{full}.values", "lists a value twice; delete one", items))
        return Choice(tuple(items)) if len(problems) == before else None
    return _parse_range(spec, full=full, whole=field.annotation in (int, int | None), problems=problems)


def _parse_range(spec: dict[str, Any], *, full: str, whole: bool, problems: list[Problem]) -> Range | None:
    before = len(problems)
    for name in ("min", "max"):
        if name not in spec:
            problems.append(Problem(full, f"a range needs `min` and `max`; add `{name}`, or give `values`"))
        elif isinstance(spec[name], bool) or not isinstance(spec[name], (int, float)) or not math.isfinite(spec[name]):
            problems.append(Problem(f"{full}.{name}", "must be a finite number; use `values` for anything else", spec[name]))
        elif whole and not isinstance(spec[name], int):
            problems.append(Problem(f"{full}.{name}", "must be a whole number", spec[name]))
    distribution = spec.get("distribution", "int_uniform" if whole else "uniform")
    if distribution not in _DISTRIBUTIONS:
        problems.append(Problem(f"{full}.distribution", f"must be one of {', '.join(_DISTRIBUTIONS)}", distribution))
    elif whole and distribution != "int_uniform":
        problems.append(Problem(f"{full}.distribution", "draws fractions for a whole number: use int_uniform, or `values`", distribution))
    elif not whole and distribution == "int_uniform" and not all(isinstance(spec.get(name), int) for name in ("min", "max")):
        problems.append(Problem(f"{full}.distribution", "needs whole numbers in `min` and `max`", distribution))
    if len(problems) > before:
        return None
    if spec["min"] >= spec["max"]:
        problems.append(Problem(full, f"min = {spec['min']} is not below max = {spec['max']}; swap them, or write one number"))
    elif distribution == "log_uniform" and spec["min"] <= 0:
        problems.append(Problem(f"{full}.min", "must be > 0 for log_uniform", spec["min"]))
    return Range(spec["min"], spec["max"], distribution) if len(problems) == before else None


def _fields_below(path: str) -> list[str]:
    from launcher.problems import model_of

    field = field_at(TrainConfig, path)
    model = model_of(field.annotation) if field else None
    return list(model.model_fields) if model else []


# ---- validation


def _validate(values: dict[str, Any], *, space: SearchSpace, problems: list[Problem]) -> tuple[ExperimentConfig | None, dict[str, Any]]:
    """Validate, take out what is wrong, and validate again, so that rules between settings are reached as well."""
    values, removed = copy.deepcopy(values), set[str]()
    searched = {f"train.{path}" for path in space.domains}
    first: ExperimentConfig | None = None
    for attempt in range(8):
        try:
            config = ExperimentConfig.model_validate_json(json.dumps(values, default=str), strict=True)
            return (config if attempt == 0 else first), values
        except ValidationError as error:
            found = findings(error, root=ExperimentConfig, values=values)
        if all(one.kind == "relation" for one in found):
            problems += [problem for one in found for problem in one.problems if not _touched(one.depends, removed)]
            return None, values
        for one in found:
            path = one.problems[0].path
            # What was taken out before may be the only cause of a later complaint about the section around it.
            if path not in searched and not _touched((path,), removed):
                problems += one.problems
            if one.kind != "unknown":
                removed.add(path)
        for one in reversed(found):  # from the end, because taking out an item moves those after it
            _take_out(values, one.location, kind=one.kind)
    return None, values


def _touched(paths: Sequence[str], removed: set[str]) -> bool:
    return any(gone == path or gone.startswith((f"{path}.", f"{path}[")) for path in paths for gone in removed)


def _take_out(values: Any, location: tuple[str | int, ...], *, kind: str) -> None:
    if not location:
        return
    *parents, leaf = location
    for step in parents:
        if step not in (range(len(values)) if isinstance(values, list) else values):
            return  # a problem of the whole has taken it out already
        values = values[step]
    if kind == "missing" or (len(location) == 1 and leaf in _PLACEHOLDERS):
        values[leaf] = copy.deepcopy(_PLACEHOLDERS.get(str(leaf)))
    elif leaf in (range(len(values)) if isinstance(values, list) else values):
        del values[leaf]


def _start_points(values: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """The start points that are mappings, with their place in the file."""
    sweep = values.get("sweep")
    points = sweep.get("start_points") if isinstance(sweep, dict) else None
    return [(index, point) for index, point in enumerate(points if isinstance(points, list) else ()) if isinstance(point, dict)]


def _check_candidates(
    values: dict[str, Any], *, points: Sequence[tuple[int, dict[str, Any]]], space: SearchSpace, problems: list[Problem]
) -> None:
    """Every value of a list, both ends of a range and every start point must make a valid trial."""
    base = values.get("train") or {}
    known = {(problem.path, problem.message) for problem in _trial_problems(base, {})}
    for path, domain in space.domains.items():
        for label, value in domain.ends:
            for problem in _trial_problems(base, {path: value}):
                if problem.path == f"train.{path}" or problem.path.startswith((f"train.{path}.", f"train.{path}[")):
                    problems.append(Problem(f"train.{path}.{label}", problem.message, value))
                elif (problem.path, problem.message) not in known:
                    problems.append(Problem(f"train.{path}.{label}", f"{problem.path}: {problem.message}", value))
    for index, point in points:
        for problem in _trial_problems(base, flatten_overrides(point)):
            if (problem.path, problem.message) in known:
                continue
            name = problem.path.removeprefix("train.")
            problems.append(Problem(join_path("sweep.start_points", index) + f".{name}", problem.message, problem.value))


def _trial_problems(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> list[Problem]:
    values = copy.deepcopy(dict(base))
    for path, value in overrides.items():
        set_path(values, path, value)
    try:
        config = TrainConfig.model_validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        return [problem for one in findings(error, root=TrainConfig, values=values, prefix="train.") for problem in one.problems]
    return [Problem(relation.path, relation.message) for relation in train_relations(config)]


# ---- small helpers


def _texts(values: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every text with its path, keys included."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield join_path(path, str(key)), str(key)
            yield from _texts(value, join_path(path, str(key)))
    elif isinstance(values, list):
        for index, value in enumerate(values):
            yield from _texts(value, join_path(path, index))
    else:
        yield path, str(values)


def _escape(values: Any) -> Any:
    """The same values with all of their texts escaped."""
    if isinstance(values, dict):
        return {key: _escape(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_escape(value) for value in values]
    return escape_text(values) if isinstance(values, str) else values


def escape_text(text: str) -> str:
    """The text as OmegaConf reads it back unchanged, also where it contains ``${``."""
    return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text)


def _with_line(problem: Problem, lines: Lines) -> Problem:
    """The problem with the line of its path, or of the nearest section around it."""
    if problem.line is not None:
        return problem
    path = problem.path
    while path and path not in lines:
        path = path[: max(path.rfind("."), path.rfind("["), 0)]
    return Problem(problem.path, problem.message, problem.value, lines.get(path))
