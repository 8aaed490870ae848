"""The plugins of an experiment: found from its file, kept in its run folder, and loaded in every process of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainers.errors import InputError
from trainers.files import read_json, sha256_file, write_bytes
from trainers.plugins import Plugin, find_plugin, use_plugins

FOLDER = "plugins"
RECORD = "experiment.json"


def load_given(named: Any, *, beside: Path, where: str) -> list[str]:
    """Load what a configuration's ``plugins`` names, so that the names they add are valid in the rest of it.

    Args:
        named: the value of ``plugins``; what is no list of texts is left to the schema.
        beside: folder of the configuration.
        where: file, for messages.

    Returns:
        The absolute paths of the files.

    Raises:
        InputError: if one cannot be found or loaded.
    """
    texts = named if isinstance(named, list) and all(isinstance(text, str) for text in named) else []
    plugins = []
    for index, text in enumerate(texts):
        try:
            plugins.append(find_plugin(text, beside=beside))
        except InputError as error:
            raise InputError(
                error.what, where=f"{where}, plugins[{index}]; looked for: {error.where}", why=error.why, fix=error.fix
            ) from None
    use_plugins(plugins)
    return [str(plugin.file) for plugin in plugins]


def use_named(texts: Sequence[Path | str]) -> tuple[Plugin, ...]:
    """Load the plugins of a command line.

    Raises:
        InputError: if one cannot be found or loaded.
    """
    plugins = tuple(find_plugin(str(text), beside=Path.cwd()) for text in texts)
    use_plugins(plugins)
    return plugins


def plugin_hashes(files: Sequence[str]) -> dict[str, str]:
    """Content hash of each plugin by the name of its file; what a run's results depend on."""
    return {Path(file).name: sha256_file(Path(file)) for file in files}


def kept_names(files: Sequence[str]) -> list[str]:
    """The same plugins below a run folder."""
    return [f"{FOLDER}/{Path(file).name}" for file in files]


def keep_plugins(run: Path, *, files: Sequence[str]) -> None:
    """Copy plugins into a run, where its other processes and machines find them."""
    for file in files:
        copy = Path(run) / FOLDER / Path(file).name
        content = Path(file).read_bytes()
        if not copy.exists() or copy.read_bytes() != content:
            write_bytes(copy, content)


def use_run_plugins(run: Path | str) -> None:
    """Load the plugins that a run was claimed with, from its own copies; the same again does nothing.

    Raises:
        InputError: if a copy is missing or was changed.
    """
    record = Path(run) / RECORD
    if not record.exists():
        return
    known: Mapping[str, str] = read_json(record).get("plugins") or {}
    plugins = []
    for name, digest in known.items():
        file = Path(run) / FOLDER / name
        if not file.is_file() or sha256_file(file) != digest:
            raise InputError(
                f"the run's copy of the plugin {name} is not the one that it was started with",
                where=str(file),
                why="the run's other results were computed with that one",
                fix="put it back, or start a new run",
            )
        plugins.append(Plugin(file.resolve(), digest))
    use_plugins(plugins)
