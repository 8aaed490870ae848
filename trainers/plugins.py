"""Files of a user that add objectives, merge methods or metrics, without a change to this package.

A plugin is one Python file. Running it registers what it adds (``register_objective``, ``register_method``, ``register_metric``). A process
knows the plugins that were named to it, and no others: what happens to be installed changes no run.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

from trainers.errors import InputError
from trainers.files import sha256_file

GROUP = "unlearn_ties.plugins"
"""Entry points by which installed packages give their plugins a short name."""
_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")


@dataclass(frozen=True)
class Plugin:
    """A plugin's file with the hash of its content."""

    file: Path
    sha256: str

    @property
    def module(self) -> str:
        """The name that its module has in this process: that of the file, wherever it lies."""
        return "unlearn_plugin_" + re.sub(r"\W", "_", self.file.stem)


_active: dict[str, Plugin] = {}
"""The plugins of this process, by module name."""
_undo: dict[str, list[Callable[[], object]]] = {}
_owners: dict[tuple[str, str], str] = {}
"""Which plugin's module registered a (kind, name)."""
_loading: list[Plugin] = []


def find_plugin(text: str, *, beside: Path) -> Plugin:
    """The plugin that a configuration or a command line names.

    Args:
        text: a path that ends in ``.py``, absolute, or below ``beside`` or the working folder; else the name of an entry point of the group
            ``unlearn_ties.plugins``, or of an importable module that is one file.
        beside: folder of the configuration.

    Raises:
        InputError: if there is no such file or module.
    """
    if text.endswith(".py"):
        given = Path(text).expanduser()
        places = [given] if given.is_absolute() else list(dict.fromkeys([Path(beside) / given, Path.cwd() / given]))
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise InputError(
                f"the plugin {text} is not there",
                where=" and ".join(str(place) for place in places),
                fix="give the path of a Python file, from the folder of the configuration or the one you work in",
            )
        return _plugin(found.resolve())
    module = next((point.module for point in entry_points(group=GROUP) if point.name == text), text)
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):
        spec = None
    if spec is None or spec.origin is None or spec.submodule_search_locations is not None or not spec.origin.endswith(".py"):
        package = spec is not None and spec.submodule_search_locations is not None
        raise InputError(
            f"the plugin {text!r} is a package, not one file" if package else f"there is no plugin {text!r}",
            where=f"neither a file that ends in .py, nor an entry point of {GROUP}, nor a module that can be imported here",
            fix="name the module in it that registers something" if package else f"for a file, write {text}.py",
        )
    return _plugin(Path(spec.origin).resolve())


def _plugin(file: Path) -> Plugin:
    return Plugin(file, sha256_file(file))


def active_plugins() -> tuple[Plugin, ...]:
    """The plugins of this process."""
    return tuple(_active.values())


def use_plugins(plugins: Sequence[Plugin]) -> None:
    """Make these the plugins of this process: load what is new, forget what is not among them; the same again does nothing.

    Raises:
        InputError: if a file cannot be run, or registers something wrong or nothing; naming its line.
    """
    wanted: dict[str, Plugin] = {}
    for plugin in plugins:
        if plugin.module in wanted:
            raise InputError(
                f"two plugins are called {plugin.file.name}",
                where=f"{wanted[plugin.module].file} and {plugin.file}",
                why="a run keeps each plugin under its file's name",
                fix="rename one of them, or name it once",
            )
        wanted[plugin.module] = plugin
    for module, known in list(_active.items()):
        if module not in wanted or wanted[module].sha256 != known.sha256:
            _forget(module)
    for module, plugin in wanted.items():
        if module not in _active:
            _load(plugin)


def _load(plugin: Plugin) -> None:
    spec = importlib.util.spec_from_file_location(plugin.module, plugin.file)
    assert spec is not None
    module = ModuleType(plugin.module)
    module.__spec__, module.__file__ = spec, str(plugin.file)
    _undo[plugin.module] = []
    sys.modules[plugin.module] = module
    _loading.append(plugin)
    try:
        # Not through the import system, which would write a cache folder beside the user's file.
        exec(compile(plugin.file.read_bytes(), str(plugin.file), "exec"), module.__dict__)
        if not _undo[plugin.module]:
            raise InputError(
                f"the plugin {plugin.file.name} registers nothing",
                where=str(plugin.file),
                fix="call register_objective, register_method or register_metric in it; docs/extending.md has an example of each",
            )
    except Exception as error:
        _forget(plugin.module)
        raise _failed(plugin, error) from error
    except BaseException:
        _forget(plugin.module)
        raise
    finally:
        _loading.pop()
    _active[plugin.module] = plugin


def _failed(plugin: Plugin, error: Exception) -> InputError:
    line = line_of(error, file=plugin.file)
    where = str(plugin.file) + (f", line {line}" if line else "")
    if line and (text := _source_line(plugin.file, line)):
        where += f": {text}"
    if isinstance(error, InputError):
        return InputError(error.what, where=where, why=error.why, fix=error.fix)
    said = error.msg if isinstance(error, SyntaxError) else str(error)
    return InputError(
        f"the plugin {plugin.file.name} cannot be loaded: {type(error).__name__}: {said}",
        where=where,
        fix="correct the file; what it imports must be installed on every machine",
    )


def line_of(error: BaseException, *, file: Path | str) -> int | None:
    """The last line of a file that an error passed through, or that the parser did not understand."""
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return error.lineno
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return lines[-1] if lines else None


def _source_line(file: Path, line: int) -> str:
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    return lines[line - 1].strip() if line <= len(lines) else ""


def _forget(module: str) -> None:
    for undo in reversed(_undo.pop(module, [])):
        undo()
    _active.pop(module, None)
    sys.modules.pop(module, None)


def register(kind: str, name: str, *, taken: Collection[str], undo: Callable[[], object]) -> None:
    """Take a name for what a plugin adds, before it is added.

    Args:
        kind: objective, merge method or metric.
        name: of lower-case letters, digits and underscores.
        taken: names that are in use.
        undo: takes it away again.

    Raises:
        InputError: if the name cannot be used.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InputError(
            f"{kind} {name!r}: this cannot be a name",
            why="a name has lower-case letters, digits and _, and begins with a letter",
            fix=f"for instance my_{kind.split()[-1]}",
        )
    owner = _owners.get((kind, name))
    if name in taken or owner is not None:
        by = "it is built in" if owner is None else f"{owner} registers it"
        raise InputError(f"{kind} {name} exists already", why=by, fix="choose another name")
    plugin = _loading[-1] if _loading else None
    _owners[kind, name] = plugin.file.name if plugin else "a call outside of any plugin"

    def forget() -> None:
        del _owners[kind, name]
        undo()

    _undo.setdefault(plugin.module if plugin else "", []).append(forget)


def origin_now() -> Plugin | None:
    """The plugin that is being loaded."""
    return _loading[-1] if _loading else None
