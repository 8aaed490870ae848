"""What a run folder holds, read from its files alone and tolerant of whatever is still missing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from trainers.errors import InputError
from trainers.files import read_json, read_jsonl

RUN_MARKERS = ("experiment.yaml", "events.jsonl", "results.json", "provenance.json")
FOLD_FILES = {"test": "eval", "validation": "validation"}


@dataclass(frozen=True)
class RunData:
    """One run as plain values; ``missing`` names in words what is not there (yet)."""

    run: Path
    results: dict[str, Any]
    experiment: dict[str, Any]
    provenance: dict[str, Any]
    target: dict[str, Any]
    pairs: dict[str, Any]
    merge: dict[str, Any]
    audit: dict[str, Any]
    events: tuple[dict[str, Any], ...]
    models: tuple[dict[str, Any], ...]
    trials: tuple[dict[str, Any], ...]
    missing: tuple[str, ...] = field(default=())

    @property
    def name(self) -> str:
        """The run's name: from its results, its configuration or its folder."""
        return str(self.results.get("name") or self.experiment.get("name") or self.run.resolve().name)

    def model(self, role: str) -> dict[str, Any] | None:
        """The first model of a role, or None."""
        return next((model for model in self.models if model.get("role") == role), None)

    @property
    def delivered(self) -> dict[str, Any] | None:
        """The model that the run handed out, or None while it has handed out none."""
        winner = (self.results.get("verdict") or {}).get("winner")
        return next((model for model in self.models if model["name"] == winner), None)

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end."""
        return bool(self.results.get("run_finished"))

    @property
    def fold(self) -> str:
        """The fold of the final numbers."""
        return str(self.results.get("fold") or "test")


def require_run_folder(run: Path) -> Path:
    """The folder itself, if it looks like a run.

    Raises:
        InputError: if there is no such folder or it holds none of a run's files.
    """
    run = Path(run)
    if not run.is_dir():
        raise InputError("no such run folder", where=str(run), fix="give the folder that a sweep or the quickstart wrote")
    if not any((run / name).exists() for name in RUN_MARKERS):
        raise InputError(
            "not a run folder",
            where=str(run),
            why=f"it holds none of {', '.join(RUN_MARKERS)}",
            fix="give the folder that a sweep or the quickstart wrote (--out RUN)",
        )
    return run


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number (a bool is none)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def numbers(value: Any) -> dict[str, float]:
    """The entries of a mapping that are numbers; anything else counts as absent."""
    return {str(key): item for key, item in value.items() if is_number(item)} if isinstance(value, Mapping) else {}


def read_run(run: Path) -> RunData:
    """Everything the report shows about a run.

    Raises:
        InputError: if ``run`` is not a run folder. A missing or unreadable part is named in ``missing`` instead.
    """
    run = require_run_folder(run)
    missing: list[str] = []

    def mapping(relative: str, meaning: str | None) -> dict[str, Any]:
        return _read_mapping(run, relative=relative, meaning=meaning, missing=missing)

    results = mapping("results.json", "final results: verdict, final table, differences")
    experiment = _read_yaml(run, missing=missing)
    trials = _trials(run, results=results, missing=missing)
    target = mapping("target.json", "which model the trials started from")
    provenance = mapping("provenance.json", "versions, seeds and hashes")
    pairs = mapping("pairs.json", "why this pair was chosen")
    merge = mapping("merged/merge.json", "the merge recipe")
    audit = mapping("audit.json", None)
    models = _models(run, results=results, missing=missing)
    return RunData(
        run=run,
        results=results,
        experiment=experiment,
        provenance=provenance,
        target=results.get("target") or target,
        pairs=pairs,
        merge=merge,
        audit=audit,
        events=tuple(event for event in read_jsonl(run / "events.jsonl") if isinstance(event, dict)),
        models=models,
        trials=trials,
        missing=tuple(missing),
    )


def read_report(folder: Path, *, fold: str) -> dict[str, Any]:
    """``eval.json`` (fold test) or ``validation.json`` of a folder; empty where it is missing or broken."""
    try:
        value = read_json(folder / f"{FOLD_FILES[fold]}.json")
    except InputError:
        return {}
    return value if isinstance(value, dict) else {}


def read_rows(folder: Path, *, fold: str) -> list[dict[str, Any]]:
    """The scored rows beside an evaluation report; empty where there are none."""
    return [row for row in read_jsonl(folder / f"{FOLD_FILES[fold]}-rows.jsonl") if isinstance(row, dict)]


def read_metrics(run: Path, *, trial: str) -> list[dict[str, Any]]:
    """The training curve of a trial, one dictionary per logged optimizer step."""
    return [row for row in read_jsonl(run / "trials" / trial / "metrics.jsonl") if isinstance(row, dict) and is_number(row.get("step"))]


def last_log_lines(run: Path, *, trial: str, count: int = 12, width: int = 300) -> list[str]:
    """The end of a trial's ``logs/rank-0.log``: at most ``count`` lines of at most ``width`` characters."""
    path = run / "trials" / trial / "logs" / "rank-0.log"
    try:
        with open(path, "rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 64 * 1024))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return [line[:width] for line in lines[-count:]]


def flatten(value: Mapping[str, Any], *, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat.update(flatten(item, prefix=f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = item
    return flat


def _read_mapping(run: Path, *, relative: str, meaning: str | None, missing: list[str]) -> dict[str, Any]:
    path = run / relative
    if not path.exists():
        if meaning:
            missing.append(f"{relative} is not there yet ({meaning})")
        return {}
    try:
        value = read_json(path)
    except (InputError, OSError) as error:
        missing.append(f"{relative} could not be read: {str(error).splitlines()[0]}")
        return {}
    if not isinstance(value, dict):
        missing.append(f"{relative} could not be read: it is not a JSON object")
        return {}
    return value


def _read_yaml(run: Path, *, missing: list[str]) -> dict[str, Any]:
    path = run / "experiment.yaml"
    if not path.exists():
        missing.append("experiment.yaml is not there yet (the configuration)")
        return {}
    value = read_yaml(path)
    if value is None:
        missing.append("experiment.yaml could not be read: it is not a YAML mapping")
    return value or {}


def read_yaml(path: Path) -> dict[str, Any] | None:
    """A YAML mapping with string keys, or None where the file is missing or holds anything else."""
    import yaml

    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    return {str(key): item for key, item in value.items()} if isinstance(value, dict) else None


def _trials(run: Path, *, results: Mapping[str, Any], missing: list[str]) -> tuple[dict[str, Any], ...]:
    """Trials of results.json first, completed from the trial folders, which are newer while a sweep runs."""
    known = {str(trial.get("name")): dict(trial) for trial in results.get("trials") or [] if isinstance(trial, dict)}
    folders = sorted(path for path in (run / "trials").glob("*") if path.is_dir() and not path.name.startswith("."))
    configs = {folder.name: flatten(read_yaml(folder / "config.yaml") or {}) for folder in folders}
    differing = _differing_settings(configs)
    for folder in folders:
        status = _read_mapping(run, relative=f"trials/{folder.name}/status.json", meaning=None, missing=missing)
        trial = known.setdefault(folder.name, {"name": folder.name})
        if not results.get("run_finished"):
            trial["status"] = status.get("state") or trial.get("status")
        trial["status"] = trial.get("status") or "pending"
        for key in ("verdict", "seconds", "error", "step", "num_steps", "reason", "errors", "preemptions"):
            if trial.get(key) is None and status.get(key) is not None:
                trial[key] = status[key]
        if not trial.get("overrides"):
            trial["overrides"] = status.get("overrides") or {key: value for key, value in configs[folder.name].items() if key in differing}
        for fold in FOLD_FILES:
            if not numbers(trial.get(fold)):
                trial[fold] = read_report(folder, fold=fold).get("scores")
    for trial in known.values():
        trial.setdefault("status", "pending")
        trial["overrides"] = dict(trial.get("overrides") or {})
        for fold in FOLD_FILES:
            trial[fold] = numbers(trial.get(fold))
    if not known:
        missing.append("no trial has begun")
    return tuple(known[name] for name in sorted(known))


def _differing_settings(configs: Mapping[str, Mapping[str, Any]]) -> set[str]:
    known = [config for config in configs.values() if config]
    keys = {key for config in known for key in config}
    return {key for key in keys if len({str(config.get(key)) for config in known}) > 1}


def _models(run: Path, *, results: Mapping[str, Any], missing: list[str]) -> tuple[dict[str, Any], ...]:
    """Models of results.json, or what the folders hold so far, each with its test and validation scores."""
    models = [dict(model) for model in results.get("models") or [] if isinstance(model, dict)]
    if not models:
        models = [{"name": "baseline", "role": "baseline", "label": "before unlearning", "path": "baseline"}]
        models += [
            {"name": folder.name, "role": "control", "label": f"control: {folder.name}", "path": f"controls/{folder.name}"}
            for folder in sorted((run / "controls").glob("*"))
            if folder.is_dir()
        ]
        models.append({"name": "merged", "role": "merged", "label": "merged", "path": "merged"})
    found = []
    for model in models:
        folder = run / str(model.get("path") or model.get("name"))
        reports = {fold: read_report(folder, fold=fold) for fold in FOLD_FILES}
        fold = str(results.get("fold") or "test")
        report = reports.get(fold) or {}
        model["scores"] = numbers(model.get("scores")) or numbers(report.get("scores"))
        model["intervals"] = model.get("intervals") or report.get("intervals") or {}
        model["terms"] = model.get("terms") or report.get("terms") or []
        model["validation"] = numbers(reports["validation"].get("scores"))
        model["counts"] = report.get("counts") or {}
        model["deviations"] = [str(text) for text in report.get("deviations") or []]
        model["notes"] = [str(text) for text in report.get("notes") or []]
        model["config"] = report.get("config") or {}
        model.setdefault("label", model.get("name"))
        if model["scores"] or model["validation"]:
            found.append(model)
        else:
            missing.append(f"{model.get('path') or model.get('name')} has no scores yet")
    return tuple(found)


def base_name(name: Any) -> tuple[str, int | None]:
    """The trial of a checkpoint and its step: ``trial-03@112`` is step 112 of trial-03; a bare name is a trial's last checkpoint."""
    trial, _, step = str(name).partition("@")
    return trial, int(step) if step.isdigit() else None


def pair_names(data: RunData) -> dict[str, str]:
    """The checkpoints of the pair, ``over`` and ``under``; before the results are there, those of the search's best merge."""
    best = data.pairs.get("best_merge")
    pair = data.results.get("pair") or (best if isinstance(best, Mapping) else None) or {}
    return {side: str(pair[side]) for side in ("over", "under") if pair.get(side)} if pair.get("over") and pair.get("under") else {}


def pareto_names(points: Sequence[tuple[str, float, float]]) -> list[str]:
    """Names of the (name, x, y) points that no other point beats in both, more of both being better; by rising x."""
    front = [
        (name, x, y)
        for name, x, y in points
        if not any(other_x >= x and other_y >= y and (other_x > x or other_y > y) for _, other_x, other_y in points)
    ]
    return [name for name, _, _ in sorted(front, key=lambda point: (point[1], -point[2]))]
