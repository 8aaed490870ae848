"""What a run was made with, and the two commands that make it again, without the private places of a machine."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from launcher.masking import hide_places, redact
from launcher.report_data import RunData, flatten, is_number
from launcher.report_text import number, without_paths

_MAX_CONFIGURATION = 20000


def provenance_view(data: RunData) -> dict[str, Any]:
    """Versions, code, machine, seeds and hashes in groups; how it was scored; the commands; the resolved configuration.

    Returns:
        ``groups`` (title to rows of key and value), ``memorised``, ``counts``, ``remarks``, ``timings``, ``command``, ``again`` (two
        commands with what each does) and ``experiment`` (YAML).
    """
    memorised = data.target.get("memorised")
    reported = [model for model in data.models if model.get("deviations") or model.get("notes")]
    remarks = [without_paths(text) for model in reported for text in [*model["deviations"], *model["notes"]]]
    return {
        "groups": _groups(data),
        "memorised": {key: number(value) for key, value in flatten(memorised).items()} if isinstance(memorised, Mapping) else {},
        "counts": next((model["counts"] for model in data.models if model.get("counts")), {}),
        "remarks": list(dict.fromkeys(remarks)),
        "timings": {str(key): value for key, value in (data.results.get("timings") or {}).items() if is_number(value)},
        "command": public_command(data),
        "again": commands_again(data),
        "starts": len(data.provenance.get("starts") or []),
        "experiment": configuration(data),
    }


def command_text(data: RunData) -> str | None:
    """The command that produced the run, or None if it was not recorded."""
    command = data.provenance.get("command")
    if isinstance(command, (list, tuple)):
        return shlex.join(str(part) for part in command)
    return str(command) if command else None


def public_command(data: RunData) -> str | None:
    """The same without the folders of the machine that it was given on."""
    command = command_text(data)
    return without_paths(command) if command else None


def commands_again(data: RunData) -> list[dict[str, str]]:
    """Two commands: the code and the configuration as they were, and the run. RUN stands for the run folder."""
    git, versions = _mapping(data.provenance.get("git")), _mapping(data.provenance.get("versions"))
    if git.get("commit"):
        code = f"git checkout {git['commit']} && pip install -c constraints.txt ."
        note = "The code as it was"
        note += ", but for changes that had not been committed then: this commit alone is not it." if git.get("dirty") else "."
    else:
        code = f"pip install -c constraints.txt .    # of release {versions.get('unlearn-ties') or 'not recorded'}"
        note = "The code: it was not run from a git checkout, so only its release is known."
    words = data.provenance.get("command")
    if isinstance(words, (list, tuple)) and "quickstart" in words and not any(str(word).startswith("--data") for word in words):
        options = [str(word) for word in words[1:]]
        run = without_paths(shlex.join(["unlearn", *_without_option(options, "--out"), "--out", "runs/again"]))
        what = "The whole run from the documents on: they are invented from the seed."
    else:
        run = "unlearn sweep RUN/experiment.yaml name=again"
        what = "The whole run from its resolved configuration; data and model must lie where it says, or be named: data.path=DIR."
    return [{"command": code, "does": note}, {"command": run, "does": what}]


def configuration(data: RunData) -> str:
    """The resolved configuration as YAML, without keys and private places."""
    import yaml

    if not data.experiment:
        return ""
    return yaml.safe_dump(hide_places(redact(data.experiment)), sort_keys=False, allow_unicode=True)[:_MAX_CONFIGURATION]


def _groups(data: RunData) -> dict[str, list[tuple[str, Any]]]:
    facts = hide_places(redact({key: value for key, value in data.provenance.items() if key not in ("command", "folder", "starts")}))
    groups = {
        title: list(flatten(facts.pop(key)).items())
        for key, title in (("versions", "Versions"), ("git", "Code"), ("machine", "Hardware"), ("seeds", "Seeds"), ("hashes", "Hashes"))
        if isinstance(facts.get(key), Mapping)
    }
    target = flatten(hide_places(redact({key: value for key, value in data.target.items() if key != "memorised"})))
    groups["Target model"] = list(target.items())
    groups["Other"] = [(key, value) for key, value in flatten(facts).items() if key != "schema_version"]
    return {title: rows for title, rows in groups.items() if rows}


def _without_option(words: list[str], option: str) -> list[str]:
    found, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word == option:
            skip = True
        elif not word.startswith(f"{option}="):
            found.append(word)
    return found


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
