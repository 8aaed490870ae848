"""Wherever models are put in an order, a dead one comes after every live one."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import launcher.results
from eval.report import SCORE_NAMES, LoadedReport
from launcher.results import model_entry
from merging.outcome import Contestant, rank
from tests.helpers.run_folder import scores, write_report

SCORES = st.none() | st.dictionaries(st.sampled_from(SCORE_NAMES), st.none() | st.floats(0, 1))


@given(st.lists(st.tuples(st.booleans(), SCORES), max_size=6))
def test_the_pair_search_ranks_what_fails_a_gate_last(models):
    contestants = [
        Contestant(name=f"m{i}", role="trial", scores=values, alive=living and values is not None, gate=None if living else "dead")
        for i, (living, values) in enumerate(models)
    ]
    flags = [entry.alive for entry in rank(contestants).contestants]
    assert flags == sorted(flags, reverse=True)


@pytest.mark.parametrize("order", [1, -1])
def test_a_dead_parent_is_not_the_better_parent(order: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dead one has the higher final score: perfect MIA score, nothing retained. The live one is what the merge has to beat."""
    models = {
        "baseline": {"forgetting": 0.05, "retention": 0.95, "auc": 0.98},
        "dead": {"forgetting": 1.0, "retention": 0.1, "auc": 0.5},
        "live": {"forgetting": 0.3, "retention": 0.9, "auc": 0.9},
        "merged": {"forgetting": 0.6, "retention": 0.8, "auc": 0.55},
    }
    for name, values in models.items():
        write_report(tmp_path / name, model=name, **values)
    assert (scores(**models["dead"])["final_score"] or 0) > (scores(**models["live"])["final_score"] or 0)
    compared = []

    def difference(ours: LoadedReport, theirs: LoadedReport) -> dict:
        compared.append(theirs.model)
        return {}

    monkeypatch.setattr(launcher.results, "paired_difference", difference)
    parents = [launcher.results.read_report(tmp_path / name / "eval.json") for name in ("dead", "live")][::order]
    model_entry(run=tmp_path, name="merged", role="merged", label="m", folder=tmp_path / "merged", parents=parents)
    assert compared == ["live"]
