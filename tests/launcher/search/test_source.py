"""Where trials come from when all are known: the longest first, and none twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.search.source import FixedSource, Outcome, epochs_cost, outcome_of
from launcher.search_space import Choice, SearchSpace, draw_trials
from launcher.trial import write_status
from trainers.config import TrainConfig
from trainers.files import append_jsonl, write_json

SPECS = draw_trials(base=TrainConfig(), space=SearchSpace({"num_train_epochs": Choice((3, 8, 5, 1))}), num_trials=4, search="grid", seed=1)


def asked(source: FixedSource) -> list[str]:
    names = []
    while (spec := source.ask()) is not None:
        names.append(spec.name)
    return names


def test_the_longest_comes_first_under_its_own_name() -> None:
    source = FixedSource(SPECS, cost=epochs_cost)
    assert asked(source) == ["trial-01", "trial-02", "trial-00", "trial-03"]
    assert source.specs == SPECS


def test_equal_trials_come_in_the_order_of_the_draw() -> None:
    assert asked(FixedSource(SPECS, cost=lambda config: 1.0)) == [spec.name for spec in SPECS]


@pytest.mark.parametrize(
    ("state", "reason", "again"),
    [
        ("finished", None, False),
        ("stopped", "diverged", False),
        ("stopped", "pruned", False),
        ("stopped", "budget", True),
        ("stopped", "interrupted", True),
        ("failed", "error", True),
        ("running", None, True),
        ("pending", None, True),
    ],
)
def test_what_is_over_is_not_asked_for_again(state: str, reason: str | None, again: bool) -> None:
    source = FixedSource(SPECS, cost=epochs_cost)
    source.tell("trial-02", Outcome(state, reason))
    assert ("trial-02" in asked(source)) is again


def test_an_outcome_has_the_evaluation_or_else_the_last_signals(tmp_path: Path) -> None:
    assert outcome_of(tmp_path) == Outcome("pending")
    for step, value in ((1, -1.0), (2, -2.0)):
        append_jsonl(tmp_path / "metrics.jsonl", {"step": step, "signals": {"forget_answer_log_prob": value}})
    append_jsonl(tmp_path / "metrics.jsonl", {"step": 3})
    write_status(tmp_path, state="stopped", reason="pruned")
    assert outcome_of(tmp_path) == Outcome("stopped", "pruned", {"forget_answer_log_prob": -2.0})
    write_json(tmp_path / "validation.json", {"scores": {"forget_answer_log_prob": -3.0}})
    assert outcome_of(tmp_path).signals == {"forget_answer_log_prob": -3.0}
