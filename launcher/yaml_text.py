"""YAML text to plain values with line numbers, and back.

The reading is YAML 1.2's core schema: ``1e-4`` is a number, ``no`` and ``2024-01-01`` and ``12:30`` are text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from trainers.errors import InputError

_INT = re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$")
_FLOAT = re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?$|^[-+]?[0-9]+[eE][-+]?[0-9]+$|^[-+]?\.inf$|^\.nan$")
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
_MERGE = re.compile(r"^<<$")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without YAML 1.1's guesses."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's own attribute)


_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", _NULL, ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", _MERGE, ["<"])


class _Dumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or our loader would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML folds some line breaks (U+0085, U+2028) in single quotes and loses them; double quotes escape them.
    style = '"' if re.search(r"[\n\r\x85\u2028\u2029]", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


@dataclass(frozen=True)
class YamlText:
    """The values of a YAML file, the line of every path in it, and its repeated or unusable keys."""

    values: dict[str, Any]
    lines: dict[str, int]
    bad_keys: tuple[tuple[str, int, str], ...] = field(default=())
    """(path, line, message)"""


def parse_yaml(text: str, *, where: str) -> YamlText:
    """Read one YAML mapping.

    Raises:
        InputError: if the text is not YAML, is empty or is not a mapping.
    """
    loader = _Loader(text) if _printable(text, where=where) else None
    assert loader is not None
    try:
        node = loader.get_single_node()
        if node is None:
            raise InputError("the file is empty", where=where, fix="start from `unlearn init --template quickstart`")
        if not isinstance(node, yaml.MappingNode):
            raise InputError("not a mapping of settings", where=f"{where}, line {node.start_mark.line + 1}", fix="write `key: value` lines")
        lines: dict[str, int] = {}
        bad: list[tuple[str, int, str]] = []
        _walk(node, path="", lines=lines, bad=bad, ancestors=())
        if any("alias" in message for _, _, message in bad):
            path, line, message = bad[0]
            raise InputError(message, where=f"{where}, line {line}, key {path}", fix="write the value out")
        return YamlText(values=loader.construct_document(node), lines=lines, bad_keys=tuple(bad))
    except yaml.YAMLError as error:
        raise _syntax_error(error, where=where) from None
    finally:
        loader.dispose()


def parse_scalar(text: str) -> Any:
    """The value of an override such as ``1e-4``, ``[1, 2]``, ``null`` or ``{values: [1, 2]}``.

    Raises:
        InputError: if the text is not YAML.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader: plain values only
    except yaml.YAMLError as error:
        raise _syntax_error(error, where="override") from None


def dump_values(values: Any) -> str:
    """YAML text, keys in the given order, that ``parse_yaml`` reads back to the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)


def join_path(path: str, key: str | int) -> str:
    """``a.b`` and ``c`` -> ``a.b.c``; ``a.b`` and 0 -> ``a.b[0]``."""
    if isinstance(key, int):
        return f"{path}[{key}]"
    return f"{path}.{key}" if path else str(key)


def _printable(text: str, *, where: str) -> bool:
    try:
        yaml.reader.Reader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise InputError(
            "a character that YAML does not allow", where=f"{where}, line {line}", fix="save the file as plain UTF-8 text"
        ) from None
    return True


def _walk(node: yaml.Node, *, path: str, lines: dict[str, int], bad: list[tuple[str, int, str]], ancestors: tuple[int, ...]) -> None:
    if id(node) in ancestors:
        bad.insert(0, (path, node.start_mark.line + 1, "an alias that contains itself"))
        return
    ancestors = (*ancestors, id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[join_path(path, index)] = item.start_mark.line + 1
            _walk(item, path=join_path(path, index), lines=lines, bad=bad, ancestors=ancestors)
    elif isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            name = str(getattr(key_node, "value", "?"))
            here = join_path(path, name)
            if key_node.tag != "tag:yaml.org,2002:str":
                bad.append((here, line, "keys must be text; put it in quotes"))
            elif name in seen:
                bad.append((here, line, f"given twice, first in line {seen[name]}; delete one"))
            seen.setdefault(name, line)
            lines[here] = line
            _walk(value_node, path=here, lines=lines, bad=bad, ancestors=ancestors)


def _syntax_error(error: yaml.YAMLError, *, where: str) -> InputError:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    if "'\\t'" in problem:
        problem, fix = "a tab where YAML wants spaces", "indent with spaces"
    else:
        fix = "check indentation, colons and quotes in that line and the one above"
    line = f", line {mark.line + 1}" if mark is not None and where != "override" else ""
    return InputError(f"not valid YAML: {problem}", where=f"{where}{line}", fix=fix)
