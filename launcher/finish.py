"""From finished trials to the report: pair, merge, final scores, results, page and model card."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher import elsewhere
from launcher.config import ExperimentConfig
from launcher.data import PreparedData
from launcher.merge_scorer import FOLD, MergeScorer, report_folder
from launcher.parallel_map import parallel_map
from launcher.results import LABELS, control_label, data_counts, gather_trials, model_entry, verdict_sentence, write_results
from launcher.scoring import FOLD_FILES, evaluate_folder
from launcher.search_space import TrialSpec
from merging.cheap import fit_recall
from merging.config import MergeConfig
from merging.examples import results_of_rows
from merging.gain import objective_gain
from merging.ledger import Failed, Ledger, Merge
from merging.merge import merge_checkpoint
from merging.pairs import NEVER_PARENTS, Candidate, cheap_candidate
from merging.search import search_pairs, single
from merging.task_vectors import checkpoint_hash
from trainers.checkpoint import finished_checkpoints
from trainers.errors import RunError
from trainers.files import append_jsonl, read_json, read_jsonl, write_json

if TYPE_CHECKING:
    from eval.report import LoadedReport
    from launcher.run_folder import Run
    from merging.outcome import Contestant, PairSearchResult

MEASUREMENTS = "pairs-measured.jsonl"
"""Every measurement of the pair search, appended as it is made: a search that was killed repeats none of them."""


def finish_run(
    run: Run,
    *,
    config: ExperimentConfig,
    data: PreparedData,
    specs: tuple[TrialSpec, ...],
    target: Path,
    ahead: elsewhere.Ahead = elsewhere.not_ahead,
) -> None:
    """Everything after the trials; repeats nothing that is already there.

    Args:
        run: the run.
        config: the experiment.
        data: its documents.
        specs: its trials.
        target: what they started from.
        ahead: computes on a machine with a GPU, where this one has none.

    Raises:
        RunError: after the report is written, if no trial is alive.
    """
    from launcher.audit_stage import audit_delivered
    from launcher.model_card import write_model_card
    from launcher.report import build_report

    trials = gather_trials(specs, run=run.folder)
    for trial in trials:
        if trial["status"] == "failed":
            run.console.warning(f"{trial['name']} failed and takes no part in what follows")
    scorer = scorer_of(run, config=config, data=data, trials=trials, target=target)
    with run.stage("pairs", "Pairs: merges measured on the validation documents"):
        with parallel_map(workers=config.pairs.workers, cpus=config.sweep.cpus_per_rank) as run_tasks:
            result = find_pair(run, config=config, trials=trials, scorer=scorer, run_tasks=run_tasks)
        run.console.line(f"  {result.sentence}")
    with run.stage("merge", "Merge: the best model, written and read again"):
        delivered = deliver(run, config=config, data=data, result=result, scorer=scorer, ahead=ahead)
    del scorer  # the model that it keeps in memory; an audit loads its own
    with run.stage("report", "Report"):
        results = assemble(run, config=config, trials=trials, result=result, delivered=delivered) | {"data": data_counts(data)}
        write_results(run.folder, results)
        if delivered is not None:
            write_model_card(run.folder, run.folder / "merged")
        page = build_report(run.folder)
    if delivered is not None:
        # After the report: an audit that takes the process down with it leaves the results behind.
        results["warnings"] += audit_delivered(run, config=config, data=data, target=target, ahead=ahead)
    # The stages that just ended belong into the timings, too.
    results |= {"run_finished": True, "timings": run.timings()}
    write_results(run.folder, results)
    if delivered is not None:
        write_model_card(run.folder, run.folder / "merged")
    build_report(run.folder)
    run.console.summary(results, paths={"model": run.folder / "merged"} if delivered else {})
    run.console.line(f"report   {page}")
    if delivered is None:
        raise RunError(
            "no trial is alive, so no model was written",
            where=str(page),
            why=results["verdict"]["sentence"],
            fix="search gentler settings: a lower train.learning_rate, fewer epochs, or larger retain weights",
        )


def scorer_of(run: Run, *, config: ExperimentConfig, data: PreparedData, trials: list[dict[str, Any]], target: Path) -> MergeScorer:
    """What measures merges of a run's checkpoints."""
    found = checkpoints_of(trials, run=run.folder, earlier_too=config.pairs.candidates == "checkpoints")
    return MergeScorer(run=run.folder, config=config, data=data, target=target, checkpoints=found)


def checkpoints_of(trials: list[dict[str, Any]], *, run: Path, earlier_too: bool = True) -> dict[str, Path]:
    """The checkpoints of the finished trials: the last one has its trial's name, an earlier one also its step, as ``trial-03@112``."""
    found = {}
    for trial in trials:
        if trial["status"] != "finished" or trial["validation"] is None:
            continue
        *earlier, last = finished_checkpoints(run / "trials" / trial["name"])
        found[trial["name"]] = last
        found |= {f"{trial['name']}@{int(folder.name.rpartition('-')[2])}": folder for folder in earlier if earlier_too}
    return found


def candidates_of(trials: list[dict[str, Any]], *, run: Path, scorer: MergeScorer, ledger: Ledger) -> list[Candidate]:
    """Checkpoints as the pair search sees them: validation scores only.

    Of the last ones the full evaluations are known. Earlier ones are measured without generation, and those that a first look shows to be
    dead or untouched are not looked at again.
    """
    baseline = read_json(run / "baseline" / FOLD_FILES[FOLD])["scores"]
    verdicts = {trial["name"]: trial["verdict"] for trial in trials}
    last = [name for name in scorer.checkpoints if name in verdicts]
    for name in last:
        report = _read_report(run / "trials" / name / FOLD_FILES[FOLD])
        results = results_of_rows(ledger.examples, rows=report.rows)
        if results is not None:
            ledger.know(single(name, scale=1.0), results)

    def look(names: list[str], *, stop: int) -> dict[str, Candidate]:
        scores = ledger.cheap([single(name, scale=1.0) for name in names], stop=stop)
        return {
            name: cheap_candidate(
                name=name, checkpoint=scorer.checkpoints[name], cheap=cheap, baseline=baseline, content_hash=ledger.hashes[name]
            )
            for name, cheap in zip(names, scores, strict=True)
            if not isinstance(cheap, Failed)
        }

    first = min(scorer.config.pairs.first_rung, ledger.num_examples)
    found = look([name for name in scorer.checkpoints if name not in verdicts], stop=first)
    found |= look([name for name, candidate in found.items() if candidate.verdict not in NEVER_PARENTS], stop=ledger.num_examples)
    for name, candidate in look(last, stop=ledger.num_examples).items():
        report = _read_report(run / "trials" / name / FOLD_FILES[FOLD])
        found[name] = Candidate(
            name=name,
            checkpoint=candidate.checkpoint,
            scores=report.scores,
            verdict=verdicts[name],
            terms=tuple(term["value"] for term in report.terms if term["value"] is not None),
            content_hash=candidate.content_hash,
            cheap=candidate.cheap,
        )
    return list(found.values())


def ledger_of(run: Path, *, scorer: MergeScorer, run_tasks: Callable[..., Any] = map, file: str = MEASUREMENTS) -> Ledger:
    """The measurements of a run that were made before, and a way to make others.

    Args:
        run: the run folder.
        scorer: measures.
        run_tasks: like the built-in ``map``.
        file: where measurements are kept.
    """
    path = run / file
    rows = [row for name in scorer.checkpoints if "@" not in name for row in _read_report(run / "trials" / name / FOLD_FILES[FOLD]).rows]
    return Ledger(
        examples=scorer.examples.examples if scorer.checkpoints else [],
        hashes=scorer.hashes(),
        work=scorer,
        recall=fit_recall(rows),
        run=run_tasks,
        # Only a full evaluation whose report is still there counts as made.
        kept={line["key"]: line["value"] for line in read_jsonl(path) if not _is_lost(line, run=run)},
        keep=lambda key, value: append_jsonl(path, {"key": key, "value": value}),
    )


def find_pair(
    run: Run, *, config: ExperimentConfig, trials: list[dict[str, Any]], scorer: MergeScorer, run_tasks: Callable[..., Any] = map
) -> PairSearchResult:
    """Search the pair and write ``pairs.json``; measurements of an earlier start are reused."""
    folder = run.folder
    ledger = ledger_of(folder, scorer=scorer, run_tasks=run_tasks)

    def report_of(entry: Contestant) -> LoadedReport:
        trial = folder / "trials" / entry.name / FOLD_FILES[FOLD]
        if entry.role == "trial" and trial.exists():
            return _read_report(trial)
        place = report_folder(folder, ledger.full_key(merge_of(entry))) / FOLD_FILES[FOLD]
        if not place.exists():  # another machine may have measured it
            run.storage.pull("pairs")
        return _read_report(place)

    def gain(entry: Contestant, other: Contestant) -> Mapping[str, float] | None:
        settings = config.pairs
        return objective_gain(report_of(entry), report_of(other), weights=settings.objective, confidence=settings.confidence)

    result = search_pairs(
        candidates=candidates_of(trials, run=folder, scorer=scorer, ledger=ledger),
        baseline_scores=read_json(folder / "baseline" / FOLD_FILES[FOLD])["scores"],
        measurements=ledger,
        config=config.pairs,
        merge=config.merge,
        gain=gain,
    )
    write_json(folder / "pairs.json", result.to_json())
    return result


def merge_of(entry: Contestant) -> Merge:
    """How a contestant is made of checkpoints."""
    return Merge(entry.parents, entry.config) if entry.config is not None else single(entry.name, scale=1.0)


def deliver(
    run: Run,
    *,
    config: ExperimentConfig,
    data: PreparedData,
    result: PairSearchResult,
    scorer: MergeScorer,
    ahead: elsewhere.Ahead = elsewhere.not_ahead,
) -> str | None:
    """Write the winner to ``merged/`` and score it, and score what it is compared with; the winner's name, or None.

    The winner of the validation fold is delivered even where that is a single checkpoint: a merge that does not pay is not handed out.
    """
    others = {control.name: Merge(control.parents, control.point.config) for control in result.controls}
    if result.best_merge is not None:
        others["ties"] = merge_of(result.best_merge)
        others |= {name: single(name, scale=1.0) for name in result.best_merge.parents}
    if result.reference is not None:
        others[result.reference.name] = single(result.reference.name, scale=1.0)
    delivered = _delivered_name(result)
    if delivered is not None and result.winner is not None:
        merge = merge_of(result.winner)
        folder = run.folder / "merged"
        parents = [scorer.checkpoints[name] for name in merge.trials]
        if not _is_made_of(folder, parents=parents, merge=merge.config):
            # A start before this one may have ended with other trials and another winner.
            _forget_scores(folder)
            merge_checkpoint(base=scorer.target, trials=parents, out=folder, config=merge.config)
        ahead(elsewhere.score_delivered_ahead, config=config, data=data, folder="merged", name="merged")
        evaluate_folder(folder, config=config, data=data, folder=folder, name="merged")
        run.console.line(f"  {delivered} written to {folder}")
    controls: dict[str, Merge] = {}
    for name, merge in others.items():
        place = model_place(run.folder, name=name, delivered=delivered)
        if place.parent.name == "controls":
            recipe = {"trials": [[trial, checkpoint_hash(scorer.checkpoints[trial])] for trial in merge.trials], "config": merge.config}
            recipe["config"] = merge.config.model_dump(mode="json")
            if not (place / "recipe.json").exists() or read_json(place / "recipe.json") != recipe:
                _forget_scores(place)
                write_json(place / "recipe.json", recipe)
            controls[f"controls/{name}"] = merge
    ahead(elsewhere.score_merges_ahead, scorer=scorer, merges=controls, folds=("test",))
    for name, merge in controls.items():
        scorer.evaluate(merge, folder=run.folder / name, name=name, folds=("test",))
    return delivered


def model_place(run: Path, *, name: str, delivered: str | None) -> Path:
    """Where the final scores of a model lie."""
    if name == delivered:
        return run / "merged"
    return run / "trials" / name if (run / "trials" / name / FOLD_FILES["test"]).exists() else run / "controls" / name


def _is_ahead(result: PairSearchResult) -> bool:
    """Whether the best merge was ahead of what was handed out, but not clear of noise."""
    return result.best_merge is not None and result.ranking.better(result.best_merge, result.winner)


def _delivered_name(result: PairSearchResult) -> str | None:
    if result.winner is None:
        return None
    return "ties" if result.winner.role == "merge" else result.winner.name


def _is_made_of(weights: Path, *, parents: list[Path], merge: MergeConfig) -> bool:
    if not (weights / "merge.json").exists():
        return False
    record = read_json(weights / "merge.json")
    hashes = [checkpoint_hash(parent) for parent in parents]
    return [trial["hash"] for trial in record["trials"]] == hashes and record["config"] == merge.model_dump(mode="json")


def _forget_scores(folder: Path) -> None:
    for file in FOLD_FILES.values():
        (folder / file).unlink(missing_ok=True)


def _is_lost(line: Mapping[str, Any], *, run: Path) -> bool:
    value = line.get("value")
    return value is None or (isinstance(value, dict) and not (report_folder(run, line["key"]) / FOLD_FILES[FOLD]).exists())


def _read_report(path: Path) -> LoadedReport:
    from eval.report import read_report

    return read_report(path)


def assemble(
    run: Run, *, config: ExperimentConfig, trials: list[dict[str, Any]], result: PairSearchResult, delivered: str | None
) -> dict[str, Any]:
    """The content of ``results.json``."""
    from eval.report import read_report

    folder = run.folder
    pair = result.best_merge.pair if result.best_merge else None

    def entry(name: str, role: str, label: str) -> dict[str, Any]:
        place = model_place(folder, name=name, delivered=delivered)
        return model_entry(run=folder, name=name, role=role, label=label, folder=place, parents=parents)

    models = [model_entry(run=folder, name="baseline", role="baseline", label=LABELS["baseline"], folder=folder / "baseline", parents=())]
    warnings = []
    chosen: dict[str, Any] | None = None
    parents: list[LoadedReport] = []
    if pair is not None and result.best_merge is not None and result.best_merge.config is not None:
        parents = [read_report(model_place(folder, name=name, delivered=delivered) / FOLD_FILES["test"]) for name in pair.trials]
        models += [entry(name, role, LABELS[role]) for name, role in zip(pair.trials, ("parent_over", "parent_under"), strict=True)]
        merge = result.best_merge.config
        chosen = {
            "over": pair.over.name,
            "under": pair.under.name,
            "method": merge.method,
            "density": merge.density,
            "scale": merge.scale,
            "weights": list(merge.trial_weights(2)),
        }
    # The model that was handed out comes first: tables that are cut off must not lose it.
    controls = sorted(result.controls, key=lambda control: control.name != delivered)
    models += [entry(control.name, "control", control_label(control.name, control.label)) for control in controls]
    if chosen is not None:
        models.append(
            entry("ties", "merged", LABELS["ties"] if chosen["method"] == "ties" else f"{chosen['method']} merge of both parents")
        )
    known = {model["name"] for model in models}
    for name in dict.fromkeys([delivered, result.reference.name if result.reference else None]):
        if name is not None and name not in known:
            models.append(entry(name, "control", "best single checkpoint"))
    judged = folder / "merged" / "eval.json" if delivered is not None else folder / "baseline" / "eval.json"
    warnings += [fold_note(config), *(str(note) for note in read_json(judged)["notes"])]
    target = read_json(folder / "target.json")
    sentence_facts = {"reason": result.reason, "pair_names": " and ".join(pair.trials) if pair else "", "ahead": _is_ahead(result)}
    merged = next((model for model in models if model["role"] == "merged"), None)
    difference = ((merged or {}).get("difference_to_best_parent") or {}).get("final_score")
    return {
        "schema_version": 1,
        "name": config.name,
        "run_finished": False,
        "fold": "test",
        "verdict": {
            "sentence": verdict_sentence(pairs=sentence_facts, models=models, delivered=delivered),
            "winner": delivered,
            "merge_beats_parents": None if difference is None else difference["difference"] > 0,
        },
        "target": {"path": target["path"], "memorised": target["memorised"]},
        "models": models,
        "pair": chosen,
        "trials": trials,
        "timings": run.timings(),
        "warnings": warnings,
    }


def fold_note(config: ExperimentConfig) -> str:
    """What the documents behind the final numbers were used for before."""
    forget = "Trials trained on every forget document, because all of them are to be forgotten"
    if "test" in config.data.rehearse:
        return (
            f"{forget}, and rehearsed the retain documents of the test fold too, as the benchmark does; what selection never saw are "
            "their scores. data.rehearse: [train] measures retention on documents that no trial rehearsed."
        )
    return f"{forget}; retain documents of the test fold were rehearsed by no trial."
