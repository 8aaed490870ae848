"""``results.json`` says what the files say, and its sentence holds whether or not the merge won."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import launcher.results
from eval.report import LoadedReport, read_report
from launcher.results import gather_trials, headline, model_entry, read_results, verdict_sentence, write_results
from launcher.search_space import TrialSpec
from tests.helpers.run_folder import build_finished
from trainers.config import TrainConfig


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_finished(tmp_path_factory.mktemp("results") / "run")


def report(run: Path, place: str, **scores: float | None) -> LoadedReport:
    found = read_report(run / place / "eval.json")
    return LoadedReport(**(found.__dict__ | {"scores": {**found.scores, **scores}}))


def test_a_trial_is_told_by_its_files(run: Path) -> None:
    names = ["trial-01", "trial-03", "trial-07", "trial-08", "trial-99"]
    specs = [TrialSpec(name=name, overrides={"learning_rate": 1.0}, config=TrainConfig()) for name in names]
    trials = {trial["name"]: trial for trial in gather_trials(specs, run=run)}
    states = {name: (trial["status"], trial["verdict"]) for name, trial in trials.items()}
    assert states == {
        "trial-01": ("finished", "under-forgetting"),
        "trial-03": ("finished", "over-forgetting"),
        "trial-07": ("failed", None),
        "trial-08": ("stopped", "under-forgetting"),
        "trial-99": ("pending", None),
    }
    assert trials["trial-01"]["validation"] == read_report(run / "trials" / "trial-01" / "validation.json").scores
    assert trials["trial-01"]["test"] == read_report(run / "trials" / "trial-01" / "eval.json").scores
    assert trials["trial-01"]["test"] != trials["trial-01"]["validation"]
    assert trials["trial-07"]["test"] is None
    assert trials["trial-07"]["error"] == "the loss is not finite at step 11"


def test_a_trial_that_stopped_before_it_had_scores_is_dead(tmp_path: Path) -> None:
    from launcher.trial import write_status

    write_status(tmp_path / "trials" / "trial-00", name="trial-00", state="stopped", error="the loss is nan at step 2")
    (trial,) = gather_trials([TrialSpec(name="trial-00", overrides={}, config=TrainConfig())], run=tmp_path)
    assert (trial["verdict"], trial["checkpoint"], trial["seconds"]) == ("dead", None, None)
    for reason, verdict in (("diverged", "dead"), ("pruned", None), ("budget", None)):
        write_status(tmp_path / "trials" / "trial-00", reason=reason)
        (trial,) = gather_trials([TrialSpec(name="trial-00", overrides={}, config=TrainConfig())], run=tmp_path)
        assert trial["verdict"] == verdict


def test_only_merges_and_controls_are_compared_with_the_better_parent(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Final scores: trial-03 0.38, trial-06 0.41."""
    compared = []

    def difference(ours: LoadedReport, theirs: LoadedReport) -> dict[str, Any]:
        compared.append((ours.model, theirs.model))
        return {"final_score": {"difference": 0.1, "low": 0.0, "high": 0.2}}

    monkeypatch.setattr(launcher.results, "paired_difference", difference)
    parents = [read_report(run / "trials" / name / "eval.json") for name in ("trial-03", "trial-06")]
    entries = {
        role: model_entry(run=run, name=role, role=role, label=role, folder=run / place, parents=parents)
        for role, place in (("merged", "merged"), ("control", "controls/linear"), ("parent_over", "trials/trial-03"))
    }
    assert compared == [("merged", "trials/trial-06"), ("controls/linear", "trials/trial-06")]
    assert entries["parent_over"]["difference_to_best_parent"] is None
    assert entries["merged"]["difference_to_best_parent"]["final_score"]["difference"] == 0.1
    assert {entry["path"] for entry in entries.values()} == {"merged", "controls/linear", "trials/trial-03"}


def test_models_without_mmlu_or_attack_are_compared_by_what_both_have(run: Path) -> None:
    """(0.6 + 0.8 + 0.4) / 3 = 0.6; without MMLU (0.6 + 0.8) / 2 = 0.7; with nothing known 0."""
    scores: dict[str, float | None] = {"task_aggregate": 0.6, "mia_score": 0.8, "mmlu_average": 0.4}
    assert headline(report(run, "merged", **scores))[0] == pytest.approx(0.6)
    assert headline(report(run, "merged", **(scores | {"mmlu_average": None})))[0] == pytest.approx(0.7)
    assert headline(report(run, "merged", **dict.fromkeys(scores)))[0] == 0.0


def test_equal_headlines_are_told_apart_by_forgetting_and_retention(run: Path) -> None:
    scores: dict[str, float | None] = {"task_aggregate": 0.0, "mia_score": 0.0, "mmlu_average": 0.25}
    better = report(run, "merged", **scores, forgetting=0.9, retention=0.8)
    worse = report(run, "merged", **scores, forgetting=0.9, retention=0.7)
    assert headline(better) > headline(worse)


def sentence(
    *, difference: tuple[float, float, float] | None, delivered: str | None, merged: bool = True, final: float | None = 0.6
) -> str:
    models: list[dict[str, Any]] = [{"role": "baseline", "scores": {}}]
    if merged:
        found = None
        if difference is not None:
            found = {"final_score": dict(zip(("difference", "low", "high"), difference, strict=True))}
        models.append({"role": "merged", "scores": {"final_score": final}, "difference_to_best_parent": found})
    facts = {"reason": "no two trials bracket AUC 0.5", "best_parent": "trial-06", "pair_names": "trial-03 and trial-06"}
    return verdict_sentence(pairs=facts, models=models, delivered=delivered)


@pytest.mark.parametrize(
    ("difference", "word"),
    [
        ((0.1, 0.02, 0.2), "better than its better parent by +0.100"),
        ((-0.1, -0.2, -0.02), "worse than its better parent by -0.100"),
        ((0.1, -0.02, 0.2), "within noise"),
        ((0.0, 0.0, 0.0), "within noise"),
    ],
)
def test_the_sentence_claims_no_more_than_the_interval(difference: tuple[float, float, float], word: str) -> None:
    text = sentence(difference=difference, delivered="ties")
    assert word in text
    others = {"better than its better parent by", "worse than its better parent by", "within noise"}
    assert not [other for other in others if other in text and not word.startswith(other)]
    assert text.startswith("The TIES merge of trial-03 and trial-06 scores 0.600")


def test_the_sentence_says_what_lies_in_merged_where_that_is_no_merge() -> None:
    assert "trial-06 is the model in merged/" in sentence(difference=(-0.1, -0.2, -0.02), delivered="trial-06")
    assert "merged/" not in sentence(difference=(0.1, 0.02, 0.2), delivered="ties")
    alone = sentence(difference=None, delivered="trial-06", merged=False)
    assert "No pair could be merged (no two trials bracket AUC 0.5)" in alone
    assert "trial-06" in alone
    assert sentence(difference=None, delivered=None, merged=False).startswith("No trial is alive, so no model was written")
    assert sentence(difference=None, delivered="ties", final=None) == "The TIES merge of trial-03 and trial-06."


def test_the_sentence_tells_a_merge_within_noise_from_one_that_is_behind() -> None:
    models: list[dict[str, Any]] = [{"role": "merged", "scores": {"final_score": 0.6}, "difference_to_best_parent": None}]
    facts = {"reason": None, "pair_names": "trial-03 and trial-06"}
    noisy, behind = (
        verdict_sentence(pairs=facts | {"ahead": ahead}, models=models, delivered="scaled-trial-06") for ahead in (True, False)
    )
    assert "the merge's gain was within noise, so scaled-trial-06 is the model in merged/" in noisy
    assert "scaled-trial-06 did better, so scaled-trial-06 is the model in merged/" in behind


def test_results_are_written_and_read_back(tmp_path: Path) -> None:
    write_results(tmp_path, {"name": "x", "value": float("nan")})
    assert read_results(tmp_path) == {"name": "x", "value": None}
