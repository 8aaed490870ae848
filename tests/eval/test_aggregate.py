"""The twelve terms, the task aggregate and the official result dictionary."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.aggregate import ScoredRow, aggregated_terms, final_score, official_block, set_means, task_aggregate, task_means
from eval.mia import mia_score
from trainers.data.types import Kind

PUBLISHED_TERMS = [0.654, 0.670, 0.579, 0.380, 0.652, 0.327, 0.346, 0.330, 0.421, 0.620, 0.348, 0.673]


def rows(**scores):
    """Task -> (completion scores, question scores)."""
    return [
        ScoredRow(task=task, kind=kind, score=value)
        for task, values in scores.items()
        for kind, group in zip((Kind.COMPLETION, Kind.QUESTION), values, strict=True)
        for value in group
    ]


FORGET = rows(Task2=([0.5], [0.0, 1.0]), Task1=([0.2, 0.4], [0.25]), Task3=([0.1], [0.5]))
RETAIN = rows(Task1=([0.9], [1.0]), Task2=([0.8], [0.5]), Task3=([0.6], [0.75]))


def test_the_published_run_is_reproduced():
    """The published terms are rounded to 3 digits, the published aggregate is not."""
    assert task_aggregate(PUBLISHED_TERMS) == pytest.approx(0.4573713239290549, abs=5e-4)
    assert final_score(aggregate=0.4573713239290549, mia=mia_score(0.998304), mmlu=0.495) == pytest.approx(0.3186, abs=5e-5)


@pytest.mark.parametrize(("parts", "final"), [((0.827, 0.847, 0.443), 0.706), ((0.964, 0.894, 0.275), 0.711)])
def test_the_leaderboards_arithmetic_holds(parts, final):
    aggregate, mia, mmlu = parts
    assert round(final_score(aggregate=aggregate, mia=mia, mmlu=mmlu), 3) == final


def test_a_single_zero_term_makes_the_aggregate_zero():
    assert task_aggregate([1.0] * 11 + [0.0]) == 0.0
    assert task_aggregate([1.0] * 11 + [1e-3]) > 0.0


def test_an_undefined_term_makes_the_aggregate_undefined_unless_another_is_zero():
    assert math.isnan(task_aggregate([0.5, math.nan]))
    assert task_aggregate([0.0, math.nan]) == 0.0
    assert math.isnan(task_aggregate([]))


@given(st.lists(st.floats(1e-3, 1), min_size=1, max_size=12))
def test_the_aggregate_is_the_harmonic_mean(values):
    assert task_aggregate(values) == pytest.approx(len(values) / math.fsum(1 / value for value in values), abs=1e-12)
    assert task_aggregate(values) == statistics.harmonic_mean(values)


def test_terms_come_in_the_official_order_with_forget_inverted():
    """Task1: 1 - (0.2 + 0.4) / 2 = 0.7 and 1 - 0.25 = 0.75, and so on."""
    terms = aggregated_terms(forget=task_means(FORGET), retain=task_means(RETAIN))
    assert [term.name for term in terms[:3]] == ["forget Task1 regurgitation", "forget Task1 knowledge", "forget Task2 regurgitation"]
    assert [term.value for term in terms] == pytest.approx([0.7, 0.75, 0.5, 0.5, 0.9, 0.5, 0.9, 1.0, 0.8, 0.5, 0.6, 0.75], abs=1e-12)


def test_overall_scores_weigh_rows_not_tasks():
    """Completions 0.5, 0.2, 0.4, 0.1 -> 0.3; the mean of the task means would be 0.3 as well only by accident: (0.5+0.3+0.1)/3.
    Questions 0, 1, 0.25, 0.5 -> 0.4375, against 0.4167 for the mean of tasks."""
    means = set_means(FORGET)
    assert (means.regurgitation, means.knowledge) == pytest.approx((0.3, 0.4375), abs=1e-12)


def test_official_keys_and_their_order():
    block = official_block(forget=FORGET, retain=RETAIN, mia_auc=0.75, mmlu_average=0.4)
    assert list(block) == [
        "forget-set",
        "retain-set",
        "mia_loss_acc",
        "mmlu_average",
        "aggregated-terms",
        "aggregate-score",
        "harmonic-mean-task-aggregate",
        "mia_final_score",
    ]
    assert list(block["forget-set"]) == ["overall-regurgitation-score", "overall-knowledge-score", "Task1", "Task2", "Task3"]
    assert list(block["forget-set"]["Task1"]) == ["regurgitation-score", "knowledge-score"]
    assert block["forget-set"]["Task1"]["knowledge-score"] == 0.25, "values inside forget-set are not inverted"
    assert len(block["aggregated-terms"]) == 12
    assert block["aggregate-score"] == pytest.approx((block["harmonic-mean-task-aggregate"] + 0.4 + 0.5) / 3, abs=1e-12)


@pytest.mark.parametrize(("auc", "mmlu"), [(None, 0.4), (0.75, None), (None, None)])
def test_the_aggregate_is_minus_one_when_a_part_is_missing(auc, mmlu):
    block = official_block(forget=FORGET, retain=RETAIN, mia_auc=auc, mmlu_average=mmlu)
    assert block["aggregate-score"] == -1
    assert "mia_final_score" not in block
    assert ("mia_loss_acc" in block, "mmlu_average" in block) == (auc is not None, mmlu is not None)


def test_a_task_without_questions_has_an_undefined_term():
    block = official_block(forget=rows(Task1=([0.5], [])), retain=RETAIN, mia_auc=0.5, mmlu_average=0.4)
    assert math.isnan(block["aggregated-terms"][1])
    assert math.isnan(block["harmonic-mean-task-aggregate"])
    assert math.isnan(block["aggregate-score"])


SCORED = st.lists(
    st.builds(
        ScoredRow,
        task=st.sampled_from(["Task1", "Task2"]),
        kind=st.sampled_from([Kind.COMPLETION, Kind.QUESTION]),
        score=st.sampled_from([0.0, 0.1, 1 / 3, 0.7, 1.0]),
    ),
    min_size=1,
    max_size=12,
)


def same(a: float, b: float) -> bool:
    return (math.isnan(a) and math.isnan(b)) or abs(a - b) <= 1e-12


@given(SCORED, SCORED, st.randoms())
def test_order_and_copies_of_rows_change_no_key(forget, retain, random):
    """Copies of all rows, that is: of one row alone they would change the means (next test)."""
    settings = {"mia_auc": 0.6, "mmlu_average": 0.4}
    block = official_block(forget=forget, retain=retain, **settings)
    shuffled = official_block(forget=random.sample(forget, len(forget)), retain=random.sample(retain, len(retain)), **settings)
    copied = official_block(forget=forget * 3, retain=retain * 2, **settings)
    for other in (shuffled, copied):
        assert list(other) == list(block)
        assert all(map(same, block["aggregated-terms"], other["aggregated-terms"]))
        assert same(block["aggregate-score"], other["aggregate-score"])


def test_a_row_that_is_counted_twice_changes_its_mean():
    """Scores 0, 1 -> 0.5; 0, 1, 1 -> 2 / 3: why padding copies of several processes would matter."""
    twice = [*rows(Task1=([0.0, 1.0], [])), *rows(Task1=([1.0], []))]
    assert set_means(twice).regurgitation == pytest.approx(2 / 3, abs=1e-12)


def test_means_add_from_left_to_right():
    """1e-16 a thousand times, then 1: from the left the small ones count; a compensated or backward sum gives another last digit."""
    values = [1.0, *[1e-16] * 1000]
    expected = 0.0
    for value in values:
        expected += value
    assert set_means(rows(Task1=(values, []))).regurgitation == expected / 1001 == 1 / 1001
    assert math.fsum(values) / 1001 != 1 / 1001


def test_no_rows_have_no_means():
    means = set_means([])
    assert math.isnan(means.regurgitation)
    assert math.isnan(means.knowledge)
    block = official_block(forget=[], retain=[], mia_auc=None, mmlu_average=None)
    assert block["aggregated-terms"] == []
    assert math.isnan(block["harmonic-mean-task-aggregate"])


def test_a_task_without_a_scored_row_still_has_its_terms():
    block = official_block(forget=FORGET, retain=RETAIN, mia_auc=0.5, mmlu_average=0.4, retain_tasks=["Task0", "Task1"])
    assert list(block["retain-set"])[2:] == ["Task0", "Task1", "Task2", "Task3"]
    assert len(block["aggregated-terms"]) == 14
    assert math.isnan(block["aggregated-terms"][6])
    assert math.isnan(block["aggregate-score"])
    assert not math.isnan(official_block(forget=FORGET, retain=RETAIN, mia_auc=0.5, mmlu_average=0.4)["aggregate-score"])


def test_a_zero_is_the_integer_of_the_statistics_module():
    block = official_block(forget=rows(Task1=([1.0], [0.5])), retain=RETAIN, mia_auc=0.5, mmlu_average=0.3)
    assert block["harmonic-mean-task-aggregate"] == 0
    assert isinstance(block["harmonic-mean-task-aggregate"], int)
    assert block["aggregate-score"] == pytest.approx((0 + 0.3 + 1) / 3, abs=1e-12)


def test_a_harmonic_mean_by_hand():
    """Three terms 1, 1/2, 1/4: reciprocals 1 + 2 + 4 = 7, so 3 / 7."""
    assert task_aggregate([1.0, 0.5, 0.25]) == pytest.approx(3 / 7, abs=1e-15)


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=12), st.floats(0.1, 1))
def test_the_aggregate_lies_between_its_terms_scales_with_them_and_is_at_most_the_mean(values, factor):
    aggregate = task_aggregate(values)
    assert min(values) - 1e-12 <= aggregate <= sum(values) / len(values) + 1e-12
    assert task_aggregate([factor * value for value in values]) == pytest.approx(factor * aggregate, rel=1e-12)
    assert task_aggregate(values[::-1]) == aggregate
