"""From finished trials to the report: pair, merge, final scores, results, page and model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.config import ExperimentConfig
from launcher.data import PreparedData
from launcher.results import LABELS, gather_trials, model_entry, read_results, verdict_sentence, write_results
from launcher.scoring import evaluate_fold, evaluate_folder
from launcher.search_space import TrialSpec
from merging.config import MergeConfig
from merging.in_memory import MergeSession
from merging.merge import merge_checkpoint
from merging.pairs import Candidate, CheapScores, Pair
from merging.search import search_pairs
from merging.task_vectors import checkpoint_hash, open_task_vector
from trainers.checkpoint import finished_checkpoints
from trainers.distributed import Rank
from trainers.errors import RunError
from trainers.files import append_jsonl, read_json, read_jsonl, write_json

if TYPE_CHECKING:
    from launcher.run_folder import Run
    from merging.outcome import PairSearchResult

MEASUREMENTS = "pairs-measured.jsonl"
"""Every measurement of the pair search, appended as it is made: a search that was killed repeats none of them."""


def finish_run(run: Run, *, config: ExperimentConfig, data: PreparedData, specs: tuple[TrialSpec, ...], target: Path) -> None:
    """Everything after the trials; repeats nothing that is already there.

    Raises:
        RunError: after the report is written, if no trial is alive.
    """
    from launcher.model_card import write_model_card
    from launcher.report import build_report

    trials = gather_trials(specs, run=run.folder)
    for trial in trials:
        if trial["status"] == "failed":
            run.console.warning(f"{trial['name']} failed and takes no part in what follows")
    with run.stage("pairs", "Pairs: merges measured on the validation documents"):
        result = find_pair(run, config=config, data=data, trials=trials, target=target)
        run.console.line(f"  {result.sentence}")
    with run.stage("merge", "Merge: the best model, written and read again"):
        delivered = deliver(run, config=config, data=data, result=result, target=target)
    with run.stage("report", "Report"):
        write_results(run.folder, assemble(run, config=config, trials=trials, result=result, delivered=delivered))
        if delivered is not None:
            write_model_card(run.folder, run.folder / "merged")
        page = build_report(run.folder)
    # The stage that just ended belongs into the timings, too.
    results = read_results(run.folder) | {"run_finished": True, "timings": run.timings()}
    write_results(run.folder, results)
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


def candidates_of(trials: list[dict[str, Any]], *, run: Path) -> list[Candidate]:
    """Finished trials as the pair search sees them: validation scores only."""
    found = []
    for trial in trials:
        folder = run / "trials" / trial["name"]
        if trial["status"] != "finished" or trial["validation"] is None:
            continue
        report = read_json(folder / "validation.json")
        found.append(
            Candidate(
                name=trial["name"],
                checkpoint=finished_checkpoints(folder)[-1],
                scores=report["scores"],
                verdict=trial["verdict"],
                terms=tuple(term["value"] for term in report["terms"] if term["value"] is not None),
            )
        )
    return found


def find_pair(run: Run, *, config: ExperimentConfig, data: PreparedData, trials: list[dict[str, Any]], target: Path) -> PairSearchResult:
    """Search the pair and write ``pairs.json``; measurements of an earlier start are reused."""
    from eval.mia import mia_score
    from eval.runner import loss_only
    from trainers.modeling import load_model, load_tokenizer

    candidates = candidates_of(trials, run=run.folder)
    device = Rank().device
    tokenizer = load_tokenizer(target)
    model = load_model(target, dtype=config.eval.dtype, device=device)
    vectors = {candidate.name: open_task_vector(base=target, trial=candidate.checkpoint) for candidate in candidates}
    session = MergeSession(model=model, base=target, vectors=list(vectors.values())) if vectors else None
    fold = "validation"

    def apply(pair: Pair, merge: MergeConfig) -> None:
        assert session is not None
        session.apply([vectors[name].trial for name in pair.trials], merge)

    def cheap(pair: Pair, merge: MergeConfig) -> CheapScores:
        apply(pair, merge)
        signals = loss_only(
            model=model, tokenizer=tokenizer, data=data.folds[fold], attack=data.attack_of(fold), config=config.eval, device=device
        )
        values = {name: getattr(signals, name) for name in ("forget_token_accuracy", "retain_token_accuracy", "forget_answer_log_prob",
                                                            "retain_answer_log_prob", "mia_auc")}  # fmt: skip
        return CheapScores.from_scores(values | {"mia_score": None if signals.mia_auc is None else mia_score(signals.mia_auc)})

    def full(pair: Pair, merge: MergeConfig, name: str) -> Mapping[str, float | None]:
        apply(pair, merge)
        return evaluate_fold(model, tokenizer=tokenizer, config=config, data=data, fold=fold, name=name, device=device).scores

    path = run.folder / MEASUREMENTS
    result = search_pairs(
        candidates=candidates,
        baseline_scores=read_json(run.folder / "baseline" / "validation.json")["scores"],
        measure_cheap=cheap,
        measure_full=full,
        config=config.pairs,
        merge=config.merge,
        done={line["key"]: line["entry"] for line in read_jsonl(path)},
        record=lambda key, entry: append_jsonl(path, {"key": key, "entry": entry}),
    )
    write_json(run.folder / "pairs.json", result.to_json())
    return result


def deliver(run: Run, *, config: ExperimentConfig, data: PreparedData, result: PairSearchResult, target: Path) -> str | None:
    """Write the winner to ``merged/`` and score it, and score what it is compared with; the winner's name, or None.

    The winner of the validation fold is delivered even where that is a single trial: a merge that does not pay is not handed out.
    """
    checkpoints = {candidate.name: candidate.checkpoint for candidate in result.candidates}
    merges: dict[str, tuple[list[Path], MergeConfig]] = {}
    if result.best_merge is not None and result.best_merge.pair is not None and result.best_merge.config is not None:
        parents = [checkpoints[name] for name in result.best_merge.pair.trials]
        merges = {"ties": (parents, result.best_merge.config), "linear": (parents, MergeConfig(method="linear"))}
    winner = result.winner
    if winner is None:
        delivered = None
    elif winner.role == "trial":
        delivered = winner.name
        merges[winner.name] = ([checkpoints[winner.name]], MergeConfig(method="linear"))
    else:
        delivered = "ties"
    for name, (parents, merge) in merges.items():
        is_delivered = name == delivered
        folder = run.folder / ("merged" if is_delivered else f"controls/{name}")
        weights = folder if is_delivered else folder / "model"
        if not _is_made_of(weights, parents=parents, merge=merge):
            # A start before this one may have ended with other trials and another winner.
            for file in ("eval.json", "validation.json"):
                (folder / file).unlink(missing_ok=True)
            merge_checkpoint(base=target, trials=parents, out=weights, config=merge)
        evaluate_folder(weights, config=config, data=data, folder=folder, name=str(folder.relative_to(run.folder)))
        if not is_delivered:
            _drop_weights(weights)
    if delivered is not None:
        run.console.line(f"  {delivered} written to {run.folder / 'merged'}")
    return delivered


def _is_made_of(weights: Path, *, parents: list[Path], merge: MergeConfig) -> bool:
    if not (weights / "merge.json").exists():
        return False
    record = read_json(weights / "merge.json")
    hashes = [checkpoint_hash(parent) for parent in parents]
    return [trial["hash"] for trial in record["trials"]] == hashes and record["config"] == merge.model_dump(mode="json")


def _drop_weights(folder: Path) -> None:
    """A control's weights can be made again from ``merge.json``; only its scores are kept."""
    for file in folder.glob("*.safetensors"):
        file.unlink()


def assemble(
    run: Run, *, config: ExperimentConfig, trials: list[dict[str, Any]], result: PairSearchResult, delivered: str | None
) -> dict[str, Any]:
    """The content of ``results.json``."""
    from eval.report import read_report

    folder = run.folder
    pair = result.best_merge.pair if result.best_merge else None
    models = [model_entry(run=folder, name="baseline", role="baseline", label=LABELS["baseline"], folder=folder / "baseline", parents=())]
    warnings = []
    if pair is not None and result.best_merge is not None and result.best_merge.config is not None:
        parents = [read_report(folder / "trials" / name / "eval.json") for name in pair.trials]
        for name, role in zip(pair.trials, ("parent_over", "parent_under"), strict=True):
            models.append(
                model_entry(run=folder, name=name, role=role, label=LABELS[role], folder=folder / "trials" / name, parents=parents)
            )
        for name, role in (("linear", "control"), ("ties", "merged")):
            place = folder / "merged" if delivered == name else folder / "controls" / name
            models.append(model_entry(run=folder, name=name, role=role, label=LABELS[name], folder=place, parents=parents))
        merge = result.best_merge.config
        chosen: dict[str, Any] | None = {
            "over": pair.over.name,
            "under": pair.under.name,
            "method": merge.method,
            "density": merge.density,
            "scale": merge.scale,
            "weights": list(merge.trial_weights(2)),
        }
    else:
        chosen, parents = None, []
    if delivered is not None and delivered not in {model["name"] for model in models}:
        models.append(
            model_entry(run=folder, name=delivered, role="control", label="best single trial", folder=folder / "merged", parents=parents)
        )
    judged = folder / "merged" / "eval.json" if delivered is not None else folder / "baseline" / "eval.json"
    warnings += [fold_note(config), *(str(note) for note in read_json(judged)["notes"])]
    target = read_json(folder / "target.json")
    sentence_facts = {"reason": result.reason, "pair_names": " and ".join(pair.trials) if pair else ""}
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
