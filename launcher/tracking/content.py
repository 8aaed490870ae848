"""What trackers are told of a run, read from its folder alone: one tracked run per trial, one each for baseline, merge and report.

Nothing here knows a tracker, so that every one is told the same. Keys and paths are taken out before anything leaves the folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.forgetting import classify
from eval.report import SCORE_NAMES
from launcher.masking import hide_places, redact
from launcher.report_data import FOLD_FILES, flatten, is_number, numbers, read_report, read_yaml
from launcher.trial import ENDED
from trainers.errors import InputError
from trainers.files import read_json, sha256_file, sha256_json

BASELINE, MERGE, REPORT = "baseline", "merge", "report"

Value = float | int | str | bool


@dataclass(frozen=True)
class Description:
    """A tracked run as it is opened.

    Args:
        name: ``baseline``, the trial's name, ``merge`` or ``report``: the name of its folder or id.
        job_type: ``baseline``, ``trial``, ``merge`` or ``report``.
        title: the name that people read.
        group: the sweep's name.
        config: settings, nested.
        tags: words to filter by.
    """

    name: str
    job_type: str
    title: str
    group: str
    config: dict[str, Any]
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """Rows of named columns; None where a value is not known."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Value | None, ...], ...]


@dataclass(frozen=True)
class Facts:
    """What is known of a tracked run once it has ended.

    Args:
        summary: scores, verdict and state by dotted name.
        succeeded: False for what failed.
        tables: by name.
        images: PNG files by name.
        page: an HTML file.
        files: other files to keep beside the run.
    """

    summary: dict[str, Value]
    succeeded: bool = True
    tables: dict[str, Table] = field(default_factory=dict)
    images: dict[str, Path] = field(default_factory=dict)
    page: Path | None = None
    files: tuple[Path, ...] = ()

    @property
    def hash(self) -> str:
        """Changes if and only if a tracker has to be told again."""
        tables = {name: [table.columns, table.rows] for name, table in self.tables.items()}
        images = {name: sha256_file(path) for name, path in self.images.items()}
        return sha256_json([self.summary, self.succeeded, tables, images])[:16]


def run_names(run: Path) -> list[str]:
    """The tracked runs that may exist by now, in the order in which they are made."""
    trials = sorted(path.parent.name for path in (run / "trials").glob("*/config.yaml"))
    return [BASELINE, *trials, MERGE, REPORT]


def sources(run: Path, name: str) -> tuple[Path, ...]:
    """The files that a tracked run's facts are read from; while none of them changes, neither do the facts."""
    if name == BASELINE:
        return tuple(run / BASELINE / f"{file}.json" for file in FOLD_FILES.values())
    if name in (MERGE, REPORT):
        return (run / "results.json", run / "report.html")
    return (run / "trials" / name / "status.json",)


def describe(run: Path, name: str, *, tags: Sequence[str] = ()) -> Description:
    """The tracked run as it is opened."""
    experiment = read_yaml(run / "experiment.yaml") or {}
    group = str(experiment.get("name") or run.resolve().name)
    common: dict[str, Any] = {"experiment": {key: experiment.get(key) for key in ("name", "seed", "model", "data")}}
    if name in (BASELINE, MERGE, REPORT):
        title = {BASELINE: "before unlearning", MERGE: "merge", REPORT: "report"}[name]
        if name == MERGE:
            common |= {"merge": _mapping(run / "results.json").get("pair")}
        if name == REPORT:
            common = {"experiment": experiment, **_provenance(run)}
        return Description(name=name, job_type=name, title=title, group=group, config=hide_places(redact(common)), tags=tuple(tags))
    trial = read_yaml(run / "trials" / name / "config.yaml") or {}
    train: Mapping[str, Any] = trial.get("train") or {}
    objective = str((train.get("objective") or {}).get("name") or "")
    rate = train.get("learning_rate")
    title = " ".join(word for word in (name, objective, f"lr={rate:.3g}" if is_number(rate) else "") if word)
    config = common | {"train": train, "overrides": trial.get("overrides") or {}}
    return Description(
        name=name,
        job_type="trial",
        title=title,
        group=group,
        config=hide_places(redact(config)),
        tags=(*tags, *((objective,) if objective else ())),
    )


def step_values(metrics: Mapping[str, Any]) -> dict[str, float | int]:
    """One line of ``metrics.jsonl`` as flat numbers: ``loss``, ``terms/forget_npo``, ``signals/mia_auc``; ``step`` among them."""
    return {name.replace(".", "/"): value for name, value in flatten(metrics).items() if is_number(value)}


def facts_of(run: Path, name: str, *, over: bool) -> Facts | None:
    """What is known of a tracked run that has ended; None while it has not.

    Args:
        run: the run folder.
        name: of the tracked run.
        over: whether the sweep's process has ended, so that a trial which failed is not started again.
    """
    if name == BASELINE:
        reports = {fold: read_report(run / BASELINE, fold=fold) for fold in FOLD_FILES}
        return Facts(summary=_scores(reports)) if all(reports.values()) else None
    if name not in (MERGE, REPORT):
        return _trial_facts(run, name, over=over)
    results = _mapping(run / "results.json")
    if not results.get("run_finished") or not (over or _page_is_built(run)):
        return None
    return _merge_facts(results) if name == MERGE else _report_facts(run, results)


def _page_is_built(run: Path) -> bool:
    """Whether the report belongs to the results: it is built after them."""
    page = run / "report.html"
    return page.exists() and page.stat().st_mtime_ns >= (run / "results.json").stat().st_mtime_ns


def _trial_facts(run: Path, name: str, *, over: bool) -> Facts | None:
    folder = run / "trials" / name
    status = _mapping(folder / "status.json")
    state = status.get("state")
    if state not in ENDED and not (state == "failed" and (over or status.get("retry") is False)):
        return None
    reports = {fold: read_report(folder, fold=fold) for fold in FOLD_FILES}
    summary = {"state": str(state), **_scores(reports)}
    for key in ("reason", "seconds", "step", "num_steps", "errors", "preemptions"):
        if status.get(key) is not None:
            summary[key] = status[key]
    before = read_report(run / BASELINE, fold="validation").get("scores")
    after = reports["validation"].get("scores")
    if before and after:
        summary["verdict"] = str(classify(scores=after, baseline=before).verdict)
    return Facts(summary=summary, succeeded=state != "failed")


def _merge_facts(results: Mapping[str, Any]) -> Facts | None:
    """Scores of the merge, or of what was delivered in its place where no pair could be merged."""
    verdict = results.get("verdict") or {}
    models = results.get("models") or []
    merged = next((model for model in models if model.get("role") == "merged"), None)
    merged = merged or next((model for model in models if model.get("name") == verdict.get("winner")), None)
    if merged is None:
        return None
    difference = flatten({"difference_to_best_parent": merged.get("difference_to_best_parent") or {}})
    summary = _slashed({"test": numbers(merged.get("scores")), **numbers(difference)})
    words: dict[str, Value] = {
        "model": str(merged.get("label")),
        "verdict": str(merged.get("verdict")),
        "delivered": str(verdict.get("winner")),
    }
    return Facts(summary=summary | words)


def _report_facts(run: Path, results: Mapping[str, Any]) -> Facts:
    verdict = results.get("verdict") or {}
    winner: Mapping[str, Any] = next((model for model in results.get("models") or [] if model.get("name") == verdict.get("winner")), {})
    summary: dict[str, Value] = {"verdict": str(verdict.get("sentence") or ""), "delivered": str(verdict.get("winner"))}
    page, others = run / "report.html", [run / "results.json", run / "trials.csv"]
    return Facts(
        summary=summary | _slashed({"test": numbers(winner.get("scores"))}),
        succeeded=verdict.get("winner") is not None,
        tables={"models": _models_table(results.get("models") or []), "trials": _trials_table(results.get("trials") or [])},
        images={path.stem: path for path in sorted((run / "plots").glob("*.png"))},
        page=page if page.exists() else None,
        files=tuple(path for path in others if path.exists()),
    )


def _models_table(models: Sequence[Mapping[str, Any]]) -> Table:
    words = ("label", "name", "role", "verdict")
    rows = [
        tuple(_word(model.get(word)) for word in words)
        + tuple(numbers(model.get("scores")).get(score) for score in SCORE_NAMES)
        + tuple((model.get("intervals") or {}).get("final_score") or (None, None))
        for model in models
    ]
    return Table(columns=(*words, *SCORE_NAMES, "final_score_low", "final_score_high"), rows=tuple(rows))


def _trials_table(trials: Sequence[Mapping[str, Any]]) -> Table:
    searched = list(dict.fromkeys(key for trial in trials for key in trial.get("overrides") or {}))
    columns = ["name", "status", "verdict", "seconds", *searched]
    columns += [f"{fold}/{score}" for fold in FOLD_FILES for score in SCORE_NAMES]
    rows = [
        (
            _word(trial.get("name")),
            _word(trial.get("status")),
            _word(trial.get("verdict")),
            trial.get("seconds"),
            *(_cell((trial.get("overrides") or {}).get(key)) for key in searched),
            *(numbers(trial.get(fold)).get(score) for fold in FOLD_FILES for score in SCORE_NAMES),
        )
        for trial in trials
    ]
    # A column of a table has one type: settings that are a number here and a word there are all shown as words.
    mixed = [index for index in range(len(columns)) if len({isinstance(row[index], str) for row in rows if row[index] is not None}) > 1]
    rows = [tuple(str(cell) if index in mixed and cell is not None else cell for index, cell in enumerate(row)) for row in rows]
    return Table(columns=tuple(columns), rows=tuple(rows))


def _scores(reports: Mapping[str, Mapping[str, Any]]) -> dict[str, Value]:
    return _slashed({fold: numbers(report.get("scores")) for fold, report in reports.items()})


def _slashed(value: Mapping[str, Any]) -> dict[str, Value]:
    return {name.replace(".", "/"): item for name, item in flatten(value).items()}


def _word(value: Any) -> str | None:
    return None if value is None else str(value)


def _cell(value: Any) -> Value | None:
    if value is None or isinstance(value, (bool, str)) or is_number(value):
        return value
    return str(value)


def _provenance(run: Path) -> dict[str, Any]:
    provenance = _mapping(run / "provenance.json")
    return {key: provenance.get(key) for key in ("versions", "git", "seeds", "hashes", "machine")}


def _mapping(path: Path) -> dict[str, Any]:
    """A JSON mapping; empty while it is not there."""
    try:
        value = read_json(path)
    except InputError:
        return {}
    return value if isinstance(value, dict) else {}
