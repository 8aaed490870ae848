"""From trials to results on a real run in miniature: what is measured, kept, resumed, delivered and compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import launcher.finish as finish
from eval.report import read_report
from launcher.config import ExperimentConfig
from launcher.data import PreparedData, prepare_data
from launcher.load import load_experiment
from launcher.results import gather_trials
from launcher.run_folder import Run, claim_run
from launcher.scoring import evaluate_folder
from launcher.search_space import TrialSpec
from launcher.stages import obtain_target, plan_sweep, prepare_trials
from launcher.trial import TrialTask, run_trial
from merging.ledger import Merge
from merging.outcome import PairSearchResult
from merging.search import single
from tests.helpers.small_run import ABSURD, GENTLE, HARSH, write_small_data, write_small_experiment
from trainers.files import read_json, read_jsonl

pytestmark = pytest.mark.slow


FIRM = HARSH | {"objective.forget_weight": 0.3}
"""Its AUC ends below 0.5."""


class Small:
    """A run whose trials have ended, and how to finish it."""

    def __init__(self, folder: Path, *, config: ExperimentConfig, data: PreparedData, specs: tuple[TrialSpec, ...], target: Path) -> None:
        self.run = Run(folder)
        self.config, self.data, self.specs, self.target = config, data, specs, target

    def copy(self, folder: Path, **pairs: Any) -> Small:
        """The same in another folder, maybe with another search."""
        shutil.copytree(self.run.folder, folder)
        config = self.config.model_copy(update={"pairs": self.config.pairs.model_copy(update=pairs)})
        return Small(folder, config=config, data=self.data, specs=self.specs, target=self.target)

    @property
    def trials(self) -> list[dict[str, Any]]:
        return gather_trials(self.specs, run=self.run.folder)

    @property
    def scorer(self) -> finish.MergeScorer:
        return finish.scorer_of(self.run, config=self.config, data=self.data, trials=self.trials, target=self.target)

    def find(self, **more: Any) -> PairSearchResult:
        return finish.find_pair(self.run, config=self.config, trials=self.trials, scorer=self.scorer, **more)

    def finish(self) -> None:
        finish.finish_run(self.run, config=self.config, data=self.data, specs=self.specs, target=self.target)

    @property
    def measured(self) -> list[str]:
        return [line["key"] for line in read_jsonl(self.run.folder / finish.MEASUREMENTS)]

    @property
    def record(self) -> dict[str, Any]:
        """``pairs.json`` without costs and places."""
        record = read_json(self.run.folder / "pairs.json")
        record.pop("cost")
        for candidate in record["candidates"]:
            candidate.pop("checkpoint")
        return record


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """Three trials of four checkpoints; the third does not survive its second step."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("finish")
    data = write_small_data(root / "data")
    file = write_small_experiment(
        root / "small.yaml",
        data=data,
        storage=root,
        sweep__num_trials=3,
        sweep__start_points=[FIRM, GENTLE, ABSURD],
        train__objective={"name": "grad_diff", "forget_weight": {"values": [0.1, 0.3]}, "retain_ce_weight": 1.0},
        train__checkpoints=4,
        train__signals=0,
        pairs__densities=[0.8, 1.0],
        pairs__scale_steps=2,
        pairs__first_rung=32,
        pairs__finalists=2,
    )
    experiment = load_experiment(file, [])
    config, prepared = experiment.config, prepare_data(experiment.config)
    specs = plan_sweep(experiment, data=prepared).specs
    run = claim_run(config, space=experiment.space, data=prepared, resume=True)
    target = obtain_target(run, config=config, data=prepared)
    evaluate_folder(target, config=config, data=prepared, folder=run.folder / "baseline", name="baseline")
    prepare_trials(run, config=config, data=prepared, specs=specs, target=target)
    for spec in specs:
        for _ in run_trial(TrialTask(run=str(run.folder), name=spec.name)):
            pass
    return Small(run.folder, config=config, data=prepared, specs=specs, target=target)


@pytest.fixture(scope="module")
def searched(ended: Small, tmp_path_factory: pytest.TempPathFactory) -> Small:
    """The same with its search done, undisturbed."""
    small = ended.copy(tmp_path_factory.mktemp("searched") / "run")
    small.find()
    return small


def test_every_checkpoint_is_a_candidate_and_last_ones_cost_nothing(searched: Small) -> None:
    candidates = {entry["name"]: entry for entry in searched.record["candidates"]}
    assert {"trial-00", "trial-01"} < set(candidates)
    assert {name.partition("@")[0] for name in candidates if "@" in name} == {"trial-00", "trial-01"}
    assert "trial-02" not in candidates, "it stopped"
    assert [entry["complete"] for name, entry in sorted(candidates.items())] == ["@" not in name for name in sorted(candidates)]
    ledger = finish.ledger_of(searched.run.folder, scorer=searched.scorer, file="elsewhere.jsonl")
    finish.candidates_of(searched.trials, run=searched.run.folder, scorer=searched.scorer, ledger=ledger)
    assert ledger.cost["examples"] <= 6 * ledger.num_examples, "six earlier checkpoints, and nothing else"
    scores = ledger.cheap([single("trial-00", scale=1.0)], stop=ledger.num_examples)[0]
    report = read_report(searched.run.folder / "trials" / "trial-00" / "validation.json")
    assert scores.mia_auc == pytest.approx(report.scores["mia_auc"])


def test_only_last_checkpoints_if_that_is_asked_for(ended: Small, tmp_path: Path) -> None:
    small = ended.copy(tmp_path / "run", candidates="last")
    assert sorted(small.scorer.checkpoints) == ["trial-00", "trial-01"]


def test_a_search_that_was_killed_repeats_nothing(searched: Small, ended: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at its fourth and again at its ninth measurement: every line once, and the same record to the digit."""
    small = ended.copy(tmp_path / "run")
    honest = finish.append_jsonl
    for limit in (3, 8):

        def append(path: Path, value: Any, limit: int = limit) -> None:
            if len(read_jsonl(path)) >= limit:
                raise KeyboardInterrupt
            honest(path, value)

        monkeypatch.setattr(finish, "append_jsonl", append)
        with pytest.raises(KeyboardInterrupt):
            small.find()
        assert len(small.measured) == limit
    monkeypatch.setattr(finish, "append_jsonl", honest)
    small.find()
    assert small.measured == searched.measured
    assert len(set(small.measured)) == len(small.measured)
    assert small.record == searched.record
    assert read_json(small.run.folder / "pairs.json")["cost"]["reused"] == 8


def test_a_finished_search_loads_no_model(searched: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    before = searched.measured
    monkeypatch.setattr("trainers.modeling.load_model", lambda *args, **more: pytest.fail("a model was loaded"))
    record = searched.record
    searched.find()
    assert (searched.measured, searched.record) == (before, record)


def test_a_lost_report_is_made_again(searched: Small, tmp_path: Path) -> None:
    small = searched.copy(tmp_path / "run")
    shutil.rmtree(small.run.folder / "pairs")
    small.find()
    assert len(small.measured) > len(searched.measured)
    assert small.record == searched.record


def test_the_run_ends_with_everything_that_a_merge_is_compared_with(searched: Small, tmp_path: Path) -> None:
    small = searched.copy(tmp_path / "run")
    small.finish()
    run = small.run.folder
    results, pairs = read_json(run / "results.json"), read_json(run / "pairs.json")
    models = {model["name"]: model for model in results["models"]}
    assert results["run_finished"] is True
    assert {control["name"] for control in pairs["controls"]} <= set(models)
    assert {"linear", "unanimous", "ties"} <= set(models)
    assert sum(name.startswith("scaled-") for name in models) >= 2
    for model in models.values():
        assert model["scores"] == read_report(run / model["path"] / "eval.json").scores
        assert read_report(run / model["path"] / "eval.json").fold == "test"
    for role in ("parent_over", "parent_under", "merged"):
        assert sum(model["role"] == role for model in models.values()) == 1, role
    assert results["verdict"]["winner"] in models
    page = (run / "report.html").read_text()
    assert all(control["label"] in page for control in pairs["controls"])
    stamps = {path: path.stat().st_mtime_ns for path in run.rglob("*eval.json")}
    small.finish()
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*eval.json")} == stamps, "nothing is scored twice"


def test_another_winner_replaces_what_was_delivered(searched: Small, tmp_path: Path) -> None:
    """Delivered first as the search says, then with a single trial in its place: scores and recipe are the new one's."""
    from dataclasses import replace

    small = searched.copy(tmp_path / "run")
    result, scorer = small.find(), small.scorer
    arguments = {"config": small.config, "data": small.data, "scorer": scorer}
    finish.deliver(small.run, result=result, **arguments)
    before = read_json(small.run.folder / "merged" / "merge.json")
    trial = next(entry for entry in result.contestants if entry.role == "trial" and entry is not result.winner)
    name = finish.deliver(small.run, result=replace(result, winner=trial), **arguments)
    after = read_json(small.run.folder / "merged" / "merge.json")
    assert name == trial.name
    assert [one["trial"] for one in after["trials"]] != [] != before["trials"]
    assert after["config"]["method"] == "linear"
    scores = read_report(small.run.folder / "merged" / "eval.json").scores
    known = scorer.evaluate(Merge((trial.name,), single(trial.name, scale=1.0).config), folder=tmp_path / "x", name="x", folds=("test",))
    assert scores["task_aggregate"] == pytest.approx(known["scores"]["task_aggregate"], abs=1e-6)


@pytest.mark.ray
def test_two_workers_find_the_same(searched: Small, ended: Small, tmp_path: Path) -> None:
    """Measurements made by two processes: the same numbers in the same order."""
    from launcher.parallel_map import parallel_map

    small = ended.copy(tmp_path / "run")
    with parallel_map(workers=2, cpus=1.0) as run_tasks:
        assert run_tasks is not map
        small.find(run_tasks=run_tasks)
    assert small.measured == searched.measured
    assert json.dumps(small.record) == json.dumps(searched.record)
