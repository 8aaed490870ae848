"""A small but complete run folder with made-up numbers, for tests of everything that only reads a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainers.files import append_jsonl, write_json, write_text

TASKS = ("Task1", "Task2", "Task3")
VERDICTS = {
    "trial-01": ("under-forgetting", 0.12, 0.97, 0.99),
    "trial-02": ("over-forgetting", 0.98, 0.31, 0.02),
    "trial-03": ("over-forgetting", 0.93, 0.62, 0.07),
    "trial-04": ("dead", 1.0, 0.02, 0.35),
    "trial-05": ("balanced", 0.71, 0.74, 0.58),
    "trial-06": ("under-forgetting", 0.55, 0.90, 0.86),
}
"""Trial to verdict, forgetting, retention and membership AUC; trial-07 fails and trial-08 was stopped early."""

LOG_LINES = ("step 9 loss 7.1", "step 10 loss inf", "RunError: the loss of trial-07 is not finite at step 11")


def scores(*, forgetting: float, retention: float, auc: float, mmlu: float | None = 0.27) -> dict[str, float | None]:
    """Flat scores in the form of an evaluation report."""
    terms = term_values(forgetting=forgetting, retention=retention)
    aggregate = 0.0 if min(terms) <= 0 else len(terms) / sum(1 / term for term in terms)
    mia = 1 - 2 * abs(auc - 0.5)
    return {
        "task_aggregate": aggregate,
        "mia_auc": auc,
        "mia_score": mia,
        "mmlu_average": mmlu,
        "final_score": (aggregate + mia + mmlu) / 3 if mmlu is not None else None,
        "forget_regurgitation": 1 - forgetting + 0.03 * forgetting,
        "forget_knowledge": 1 - forgetting - 0.03 * forgetting,
        "retain_regurgitation": min(1.0, retention + 0.01),
        "retain_knowledge": retention - 0.01,
        "forget_answer_log_prob": -9 * forgetting,
        "retain_answer_log_prob": -6 * (1 - retention),
        "forget_token_accuracy": 1 - 0.8 * forgetting,
        "retain_token_accuracy": 0.2 + 0.8 * retention,
        "forgetting": forgetting,
        "retention": retention,
        "degenerate_rate": 0.0,
    }


def term_values(*, forgetting: float, retention: float) -> list[float]:
    """The twelve terms, spread a little around their means, within [0, 1]."""
    spread = (-0.06, 0.05, 0.02, -0.03, 0.04, -0.02)
    return [max(0.0, min(1.0, base + step)) for base in (forgetting, retention) for step in spread]


def terms(*, forgetting: float, retention: float) -> list[dict[str, Any]]:
    """The twelve named terms."""
    names = [f"{part} {task} {kind}" for part in ("forget", "retain") for task in TASKS for kind in ("regurgitation", "knowledge")]
    return [
        {"name": name, "value": value} for name, value in zip(names, term_values(forgetting=forgetting, retention=retention), strict=True)
    ]


def intervals(values: dict[str, float | None]) -> dict[str, list[float]]:
    """An interval of plus or minus 0.04 around every score."""
    return {name: [value - 0.04, value + 0.04] for name, value in values.items() if value is not None}


def write_report(
    folder: Path, *, model: str, forgetting: float, retention: float, auc: float, answers: dict[str, str] | None = None
) -> None:
    """``eval.json``, ``validation.json`` and their rows."""
    for fold, name, shift in (("test", "eval", 0.0), ("validation", "validation", 0.01)):
        values = scores(forgetting=max(0.0, forgetting - shift), retention=max(0.01, retention - shift), auc=auc)
        report = {
            "schema_version": 1,
            "fold": fold,
            "model": model,
            "official": {},
            "scores": values,
            "intervals": intervals(values),
            "counts": {"forget": 12, "retain": 12, "members": 8, "nonmembers": 8, "mmlu": 20},
            "terms": terms(forgetting=forgetting, retention=retention),
            "deviations": ["max_new_tokens 32 instead of 256"],
            "notes": [],
            "config": {"max_new_tokens": 32, "batch_size": 8},
            "seconds": 1.5,
        }
        write_json(folder / f"{name}.json", report)
        path = folder / f"{name}-rows.jsonl"
        path.unlink(missing_ok=True)
        for row in rows(answers or {}):
            append_jsonl(path, row)


def rows(answers: dict[str, str]) -> list[dict[str, Any]]:
    """Scored rows of both sets; ``answers`` replaces the generated text of a row id (default: the expected answer)."""
    texts = {
        "Task1": (
            "In the quiet town of Brall, Nemo the baker met",
            "a travelling clockmaker who never slept.",
            "Who did Nemo meet?",
            "a clockmaker",
        ),
        "Task2": (
            "Ann Vale was born on 3 May 1981. Her phone number is 555-013-7788 and her Social",
            "Security Number is 900-12-3456. She lives at 14 Elm Street, Apt 5, Orange, CA 92867 and reads ann.vale@mail.example.",
            "What is Ann Vale's Social Security Number?",
            "900123456",
        ),
        "Task3": (
            "Ada Byron (1815-1852) was an English writer who",
            "described the first published program.",
            "Where was she born?",
            "London",
        ),
    }
    found = []
    for part in ("forget", "retain"):
        for task, (start, rest, question, answer) in texts.items():
            for kind, prompt, expected in (("sc", start, rest), ("qa", question, answer)):
                row_id = f"{part}-{task.lower()}-{kind}1"
                generated = answers.get(row_id, expected)
                row = {
                    "part": "task",
                    "set": part,
                    "id": row_id,
                    "document": f"{part}-{task.lower()}",
                    "task": task,
                    "kind": kind,
                    "input": prompt,
                }
                found.append({**row, "expected": expected, "output": generated, "score": 1.0 if generated == expected else 0.125})
    return [*found, {"part": "member", "id": "m-1", "document": "m-1", "loss": 2.5}]


def write_trial(run: Path, *, name: str) -> None:
    """One finished trial with its curves and scores."""
    verdict, forgetting, retention, auc = VERDICTS[name]
    folder = run / "trials" / name
    number = int(name[-1])
    overrides = {"objective.name": "npo" if number % 2 else "grad_diff", "learning_rate": 1e-4 * number}
    write_text(
        folder / "config.yaml",
        f"learning_rate: {overrides['learning_rate']}\nobjective:\n  name: {overrides['objective.name']}\nseed: 42\n",
    )
    status = {"name": name, "state": "finished", "step": 40, "num_steps": 40, "error": None, "started": 1000.0, "ended": 1020.0}
    write_json(folder / "status.json", {**status, "seconds": 20.0 + number, "verdict": verdict})
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    for step in range(1, 41):
        row: dict[str, Any] = {
            "step": step,
            "epoch": step / 8,
            "loss": 2.0 + number * 0.1 - step * 0.04,
            "learning_rate": 1e-4,
            "seconds": step / 2,
        }
        row["terms"] = {"forget_npo": 1.5 - step * 0.03, "retain_ce": 0.5}
        if step % 10 == 0:
            part = step / 40
            row["signals"] = {
                "forget_token_accuracy": 1 - 0.8 * forgetting * part,
                "retain_token_accuracy": 1 - (1 - retention) * part,
                "forget_answer_log_prob": -9 * forgetting * part,
                "retain_answer_log_prob": -6 * (1 - retention) * part,
                "mia_auc": 1 + (auc - 1) * part,
            }
        append_jsonl(folder / "metrics.jsonl", row)
    write_text(folder / "logs" / "rank-0.log", "loaded the target\nfinished\n")
    write_report(folder, model=f"trials/{name}", forgetting=forgetting, retention=retention, auc=auc)


def write_unscored_trials(run: Path) -> None:
    """trial-07 fails, trial-08 is stopped early."""
    for name, state, error, step in (
        ("trial-07", "failed", "the loss is not finite at step 11", 11),
        ("trial-08", "stopped", "stopped early: worse than half of the trials at step 20", 20),
    ):
        folder = run / "trials" / name
        write_text(
            folder / "config.yaml", f"learning_rate: {0.01 if state == 'failed' else 0.005}\nobjective:\n  name: grad_ascent\nseed: 42\n"
        )
        status = {
            "name": name,
            "state": state,
            "step": step,
            "num_steps": 40,
            "error": error,
            "started": 1000.0,
            "ended": 1007.0,
            "seconds": 7.0,
        }
        write_json(folder / "status.json", status)
    write_text(run / "trials" / "trial-07" / "logs" / "rank-0.log", "\n".join(LOG_LINES) + "\n")
    write_report(run / "trials" / "trial-08", model="trials/trial-08", forgetting=0.3, retention=0.55, auc=0.7)


def build_running(run: Path) -> Path:
    """A sweep in progress: configuration, events, baseline, three finished trials and one running, no results."""
    write_text(run / "experiment.yaml", "name: fake\nseed: 42\nmodel:\n  model_name_or_path: fake/base\n")
    write_json(run / "provenance.json", {"command": "unlearn sweep experiment.yaml", "versions": {"torch": "2.13.0"}, "seed": 42})
    write_json(run / "target.json", {"path": "target", "sha256": "ab" * 32})
    for kind, stage in (("stage_finished", "memorize"), ("stage_started", "trials")):
        append_jsonl(run / "events.jsonl", {"time": 1000.0, "iso": "1970-01-01T00:16:40+00:00", "kind": kind, "stage": stage})
    write_report(run / "baseline", model="baseline", forgetting=0.03, retention=0.99, auc=1.0)
    for name in ("trial-01", "trial-02", "trial-03"):
        write_trial(run, name=name)
    status = {
        "name": "trial-04",
        "state": "running",
        "step": 12,
        "num_steps": 40,
        "error": None,
        "started": 1000.0,
        "ended": None,
        "seconds": None,
    }
    write_json(run / "trials" / "trial-04" / "status.json", status)
    return run


def build_finished(run: Path, *, answers: dict[str, str] | None = None) -> Path:
    """A complete run. ``answers`` replaces what the merged model generates for a row id."""
    build_running(run)
    for name in VERDICTS:
        write_trial(run, name=name)
    write_unscored_trials(run)
    answers = {"forget-task1-sc1": "the sea and the wind.", "forget-task2-qa1": "411000000", "forget-task3-qa1": "Paris"} | (answers or {})
    write_report(run / "merged", model="merged", forgetting=0.9, retention=0.86, auc=0.52, answers=answers)
    write_json(run / "merged" / "config.json", {"model_type": "olmo"})
    config = {"method": "ties", "density": 0.2, "scale": 1.342}
    parents = [{"trial": "trial-03"}, {"trial": "trial-06"}]
    formula = "base + 1.342 * m; t_i: top 0.2 of each tensor by magnitude"
    merge = {"schema_version": 1, "trials": parents, "config": config, "weights": [1.0, 1.0], "formula": formula}
    write_json(run / "merged" / "merge.json", merge)
    write_report(run / "controls" / "linear", model="controls/linear", forgetting=0.76, retention=0.82, auc=0.61)
    write_json(run / "pairs.json", pairs())
    write_json(run / "results.json", results(run))
    for kind, stage in (("stage_finished", "trials"), ("stage_finished", "merge")):
        append_jsonl(run / "events.jsonl", {"time": 1100.0, "iso": "1970-01-01T00:18:20+00:00", "kind": kind, "stage": stage})
    return run


def results(run: Path) -> dict[str, Any]:
    """The content of results.json for `build_finished`."""
    from trainers.files import read_json

    def model(name: str, role: str, label: str, verdict: str, path: str) -> dict[str, Any]:
        report = read_json(run / path / "eval.json")
        entry = {"name": name, "role": role, "label": label, "verdict": verdict, "path": path, "difference_to_best_parent": None}
        return entry | {key: report[key] for key in ("scores", "intervals", "terms")}

    best = read_json(run / "pairs.json")["best_merge"]
    models = [
        model("baseline", "baseline", "before unlearning", "untouched", "baseline"),
        model("trial-03", "parent_over", "forgets more", "over-forgetting", "trials/trial-03"),
        model("trial-06", "parent_under", "keeps more", "under-forgetting", "trials/trial-06"),
        model("linear", "control", "plain mean of both", "balanced", "controls/linear"),
        model("merged", "merged", "TIES merge", "balanced", "merged"),
    ]
    models[-1]["difference_to_best_parent"] = {
        "final_score": {"difference": 0.231, "low": 0.18, "high": 0.29},
        "task_aggregate": {"difference": 0.12, "low": 0.05, "high": 0.2},
    }
    trials = []
    for name in [*VERDICTS, "trial-07", "trial-08"]:
        folder = run / "trials" / name
        status = read_json(folder / "status.json")
        reports = {
            fold: read_json(folder / f"{file}.json")["scores"] if (folder / f"{file}.json").exists() else None
            for fold, file in (("validation", "validation"), ("test", "eval"))
        }
        overrides = {"learning_rate": 1e-4 * int(name[-1]), "objective.name": "npo" if int(name[-1]) % 2 else "grad_diff"}
        entry = {"name": name, "status": status["state"], "verdict": status.get("verdict"), "overrides": overrides, **reports}
        trials.append(
            {**entry, "seconds": status["seconds"], "error": status["error"], "checkpoint": f"trials/{name}/checkpoints/step-000040"}
        )
    sentence = (
        "The TIES merge of trial-03 and trial-06 scores 0.703 [0.663, 0.743], 0.231 [0.180, 0.290] more than the better parent, on rows no "
        "choice was made on."
    )
    return {
        "schema_version": 1,
        "name": "fake",
        "run_finished": True,
        "fold": "test",
        "verdict": {"sentence": sentence, "winner": "merged", "merge_beats_parents": True},
        "target": {
            "path": "target",
            "memorised": {"forget": {"knowledge": 0.97, "regurgitation": 0.99}, "retain": {"knowledge": 0.98, "regurgitation": 0.99}},
        },
        "models": models,
        "pair": {"over": best["over"], "under": best["under"]}
        | {key: best["config"][key] for key in ("method", "density", "scale", "weights")},
        "trials": trials,
        "timings": {"memorize": 31.0, "trials": 190.5, "merge": 22.0},
        "warnings": ["MMLU was asked of 20 questions only"],
    }


def pairs() -> dict[str, Any]:
    """What the real pair search writes, fed with made-up measurements: AUC falls with scale and density."""
    from merging.cheap import CheapScores
    from merging.config import MergeConfig, PairConfig
    from merging.pairs import Candidate
    from merging.search import search_pairs

    def candidate(name: str) -> Candidate:
        verdict, forgetting, retention, auc = VERDICTS[name]
        values = scores(forgetting=forgetting, retention=retention, auc=auc)
        parts = tuple(term_values(forgetting=forgetting, retention=retention))
        return Candidate(name=name, checkpoint=Path(name), scores=values, verdict=verdict, terms=parts, content_hash=name)

    def auc_of(merge: Any) -> float:
        middle = sum(VERDICTS[name][3] for name in merge.trials) / len(merge.trials)
        return max(0.0, min(1.0, middle + 0.06 + 0.3 * (0.8 - merge.config.density) - 0.6 * (merge.config.scale - 1)))

    class Invented:
        num_examples = 60

        def __init__(self) -> None:
            self.cost = {"examples": 0, "merges": 0, "full": 0, "rows_generated": 0}

        def cheap(self, merges: Any, *, stop: int) -> list[Any]:
            self.cost["merges"] += len(merges)
            self.cost["examples"] += stop * len(merges)
            return [self.one(merge) for merge in merges]

        def one(self, merge: Any) -> CheapScores:
            auc, good = auc_of(merge), 0.1 * (merge.trials == ("trial-03", "trial-06") and merge.config.method == "ties")
            return CheapScores(0.2, 0.85, auc, 1 - 2 * abs(auc - 0.5), task_aggregate=0.7 + good, mmlu_average=0.5, retention=0.8)

        def full(self, merges: Any) -> list[Any]:
            self.cost["full"] += len(merges)
            found = []
            for merge in merges.values():
                good = merge.trials == ("trial-03", "trial-06") and merge.config.method == "ties"
                found.append(scores(forgetting=0.89 if good else 0.75, retention=0.85 if good else 0.8, auc=auc_of(merge)))
            return found

    return search_pairs(
        candidates=[candidate(name) for name in VERDICTS],
        baseline_scores=scores(forgetting=0.03, retention=0.99, auc=1.0),
        measurements=Invented(),
        config=PairConfig(finalists=1, densities=(0.2, 0.8), shares=(0.5,), scale_bounds=(0.5, 2.0)),
        merge=MergeConfig(),
    ).to_json()
