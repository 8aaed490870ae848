"""Intervals and paired differences over resampled documents."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from eval.aggregate import ScoredRow, aggregated_terms, task_aggregate, task_means
from eval.bootstrap import draw_weights, intervals, paired_difference, point_scores
from eval.mia import attack_auc
from eval.report import SCORE_NAMES, LoadedReport
from trainers.data.types import Kind
from trainers.errors import InputError


def make_rows(documents: int, *, seed: int = 0, shift: float = 0.0) -> list[dict]:
    """Rows over three tasks whose completion and question of a document go together."""
    rng = np.random.default_rng(seed)
    rows = []
    for name in ("forget", "retain"):
        for i in range(documents):
            level = min(1.0, max(0.05, rng.uniform(0.1, 0.9) + shift))
            for kind, score in (("sc", level), ("qa", float(level > 0.5))):
                rows.append(
                    {"part": "task", "set": name, "id": f"{name}{i}{kind}1", "document": f"{name}{i}", "task": f"Task{i % 3 + 1}"}
                    | {"kind": kind, "expected": "a b", "output": "a b" if i else "", "score": score}
                    | {"answer_log_prob": -2.0 * (1 - level) - 0.1, "num_tokens": 4, "token_accuracy": round(level * 4) / 4}
                    | {"extraction_strength": round(level * 4) / 4}
                )
    for part, center in (("member", 1.0), ("nonmember", 1.3)):
        rows += [{"part": part, "id": f"{part}{i}", "document": f"{part}{i}", "loss": rng.normal(center, 0.5)} for i in range(documents)]
    rows += [{"part": "mmlu", "id": f"bio/{i}", "document": f"bio/{i}", "task": "bio", "correct": i % 5 < 2} for i in range(documents)]
    return rows


def report(rows: list[dict], name: str = "m") -> LoadedReport:
    scores = {key: value if math.isfinite(value) else None for key, value in point_scores(rows).items()}
    return LoadedReport(
        fold="test", model=name, official={}, scores=scores, intervals={}, counts={}, terms=[], deviations=[], notes=[], config={},
        seconds=0.0, rows=rows, path=Path("eval.json"),
    )  # fmt: skip


def limits(rows, **changes):
    return intervals(rows, **{"scores": point_scores(rows), "samples": 400, "seed": 1, "confidence": 0.95} | changes)


def test_drawing_every_document_once_gives_the_scores_themselves():
    rows = make_rows(30)
    scored = {
        name: [ScoredRow(r["task"], Kind(r["kind"]), r["score"]) for r in rows if r["part"] == "task" and r["set"] == name]
        for name in ("forget", "retain")
    }
    terms = aggregated_terms(forget=task_means(scored["forget"]), retain=task_means(scored["retain"]))
    losses = {part: [r["loss"] for r in rows if r["part"] == part] for part in ("member", "nonmember")}
    actual = point_scores(rows)
    assert actual["task_aggregate"] == pytest.approx(task_aggregate([term.value for term in terms]), abs=1e-12)
    assert actual["task_aggregate"] > 0
    assert actual["mia_auc"] == pytest.approx(attack_auc(member_losses=losses["member"], nonmember_losses=losses["nonmember"]), abs=1e-12)
    assert actual["degenerate_rate"] == pytest.approx(1 / 30, abs=1e-12)
    assert set(actual) == set(SCORE_NAMES)


def test_intervals_contain_their_points():
    rows = make_rows(30)
    points, found = point_scores(rows), limits(rows)
    assert set(found) == set(SCORE_NAMES)
    for name, (low, high) in found.items():
        assert low <= points[name] <= high, name
    assert found["mia_auc"][0] < points["mia_auc"] < found["mia_auc"][1]


def test_intervals_shrink_with_more_documents():
    """By about the root of 16."""
    few, many = limits(make_rows(18)), limits(make_rows(288))
    for name in ("forget_regurgitation", "mia_auc", "mmlu_average", "retention"):
        ratio = (few[name][1] - few[name][0]) / (many[name][1] - many[name][0])
        assert 2.5 < ratio < 7, name


def test_intervals_follow_from_the_seed():
    rows = make_rows(12)
    assert limits(rows) == limits(rows)
    assert limits(rows) != limits(rows, seed=2)


def test_rows_of_a_document_are_drawn_together():
    """Two copies of every row in the same document tell nothing new; as documents of their own they would."""
    rows = make_rows(30)
    copies = [row | {"id": row["id"] + "x"} for row in rows if row["part"] == "task"]
    strangers = [row | {"document": row["document"] + "x"} for row in copies]
    width = lambda found: found["forget_regurgitation"][1] - found["forget_regurgitation"][0]  # noqa: E731
    assert width(limits(rows + copies)) == pytest.approx(width(limits(rows)), abs=1e-12)
    assert width(limits(rows + strangers)) < 0.85 * width(limits(rows))


def test_every_task_keeps_its_number_of_documents():
    units = [("a", "Task1"), ("b", "Task1"), ("c", "Task2")]
    weights = draw_weights(units, samples=50, seed=0, part="forget")
    assert (weights[:, :2].sum(1) == 2).all()
    assert (weights[:, 2] == 1).all()


def test_a_zero_term_makes_the_interval_of_the_aggregate_zero():
    rows = make_rows(12)
    rows = [row | {"score": 0.0} if row.get("set") == "retain" and row["kind"] == "qa" else row for row in rows]
    assert limits(rows)["task_aggregate"] == [0.0, 0.0]


def test_a_diverged_model_has_no_log_probability_and_no_crash():
    rows = [row | {"answer_log_prob": None} if row["part"] == "task" else row for row in make_rows(6)]
    rows = [row | {"loss": None} if row["part"] == "member" else row for row in rows]
    assert math.isnan(point_scores(rows)["forget_answer_log_prob"])
    assert point_scores(rows)["mia_auc"] == 0.0
    assert "forget_answer_log_prob" not in limits(rows)


def test_a_model_does_not_differ_from_itself():
    a = report(make_rows(12))
    assert paired_difference(a, a, samples=50)["final_score"] == {"difference": 0.0, "low": 0.0, "high": 0.0}


def test_pairing_cancels_what_the_models_share():
    """b scores 0.05 more on every retain completion: the paired interval is a point, each model's own interval is wide."""
    base = make_rows(30)
    better = [row | {"score": row["score"] + 0.05} if row.get("set") == "retain" and row["kind"] == "sc" else row for row in base]
    found = paired_difference(report(better), report(base), samples=200)["retain_regurgitation"]
    assert found["difference"] == pytest.approx(0.05, abs=1e-12)
    assert (found["low"], found["high"]) == pytest.approx((0.05, 0.05), abs=1e-12)
    own = limits(base)["retain_regurgitation"]
    assert own[1] - own[0] > 0.05


def test_the_order_of_rows_does_not_matter_to_a_pair():
    a, b = report(make_rows(12)), report(make_rows(12, seed=5))
    shuffled = replace(b, rows=b.rows[::-1])
    there, back = (
        paired_difference(a, b, samples=50, score_names=["mia_auc"]),
        paired_difference(a, shuffled, samples=50, score_names=["mia_auc"]),
    )
    assert there["mia_auc"] == pytest.approx(back["mia_auc"], abs=1e-12)


def test_reports_about_other_documents_cannot_be_paired():
    with pytest.raises(InputError, match="not scored on the same documents"):
        paired_difference(report(make_rows(12)), report(make_rows(13)), samples=10)


def test_a_score_that_one_report_lacks_is_left_out():
    a = report(make_rows(9))
    b = report([row for row in a.rows if row["part"] != "mmlu"])
    found = paired_difference(a, b, samples=20)
    assert "mmlu_average" not in found
    assert "task_aggregate" in found


def test_extraction_strength_is_a_mean_over_the_rows_that_have_one():
    rows = make_rows(12)
    strengths = [row["extraction_strength"] for row in rows if row.get("set") == "forget"]
    assert point_scores(rows)["forget_extraction_strength"] == pytest.approx(sum(strengths) / len(strengths), abs=1e-12)
    some = [
        row | {"extraction_strength": None if row["kind"] == "qa" else row["extraction_strength"]} if "set" in row else row for row in rows
    ]
    own = [row["extraction_strength"] for row in some if row.get("set") == "forget" and row["kind"] == "sc"]
    assert point_scores(some)["forget_extraction_strength"] == pytest.approx(sum(own) / len(own), abs=1e-12)
    assert own != strengths
    without = [{key: value for key, value in row.items() if key != "extraction_strength"} for row in rows]
    assert math.isnan(point_scores(without)["forget_extraction_strength"])
    assert set(SCORE_NAMES) - set(limits(without)) == {"forget_extraction_strength", "retain_extraction_strength"}


# ---- coverage: how often an interval holds the truth


def correlated(rng: np.random.Generator, *, documents: int = 40, each: int = 6, better: float = 0.0) -> list[dict]:
    """Retain completions whose scores are mostly their document's: level ~ U(0.1, 0.7), row = level + U(-0.1, 0.1) + better; mean 0.4."""
    rows = []
    for i in range(documents):
        level = rng.uniform(0.1, 0.7) + better
        for j in range(each):
            rows.append(
                {"part": "task", "set": "retain", "id": f"d{i}sc{j}", "document": f"d{i}", "task": "Task1", "kind": "sc", "output": "a"}
                | {"score": level + rng.uniform(-0.1, 0.1), "answer_log_prob": -1.0, "num_tokens": 2, "token_accuracy": 0.5}
            )
    return rows


def share_covered(found: list[tuple[float, float]], *, truth: float) -> float:
    return sum(low <= truth <= high for low, high in found) / len(found)


def retain_limits(rows: list[dict], seed: int) -> tuple[float, float]:
    low, high = limits(rows, scores={"retain_regurgitation": point_scores(rows)["retain_regurgitation"]}, samples=200, seed=seed)[
        "retain_regurgitation"
    ]
    return low, high


def test_intervals_over_documents_cover_and_intervals_over_rows_do_not():
    """250 data sets of 40 documents with 6 rows each, correlation 0.9 within a document. A 95 % interval over documents holds the
    mean in 95 % of them (a bit less: percentile intervals of 40 values are 1 to 2 % short; three standard errors are 4 %). Rows taken
    for documents promise a spread that is too small by about the root of 5.5, and cover about 60 %."""
    rng = np.random.default_rng(0)
    samples = [correlated(rng) for _ in range(250)]
    by_document = [retain_limits(rows, seed) for seed, rows in enumerate(samples)]
    by_row = [retain_limits([row | {"document": row["id"]} for row in rows], seed) for seed, rows in enumerate(samples)]
    assert 0.89 <= share_covered(by_document, truth=0.4) <= 0.985
    assert share_covered(by_row, truth=0.4) < 0.75


def test_intervals_of_an_auc_cover():
    """Losses N(0, 1) and N(1, 1): P(member < stranger) = Phi(1 / sqrt(2)) = 0.76025."""
    rng = np.random.default_rng(3)
    found = []
    for seed in range(250):
        rows = [
            {"part": part, "id": f"{i}", "document": f"{i}", "loss": float(rng.normal(mean, 1))}
            for part, mean in (("member", 0.0), ("nonmember", 1.0))
            for i in range(50)
        ]
        found.append(tuple(limits(rows, samples=200, seed=seed)["mia_auc"]))
    assert 0.89 <= share_covered(found, truth=0.76025) <= 0.985
    assert share_covered(found, truth=0.66) < 0.5, "an interval that is merely wide would hold this, too"


def test_paired_differences_cover_and_are_narrower_than_those_of_two_models_apart():
    """Both models are scored on the same documents; the second one's documents are 0.05 better, rows vary on their own."""
    rng = np.random.default_rng(4)
    found, apart = [], []
    for seed in range(150):
        state = rng.integers(1 << 30)
        a = correlated(np.random.default_rng(state), better=0.05)
        b = [row | {"score": row["score"] - 0.05 + rng.uniform(-0.2, 0.2)} for row in a]
        difference = paired_difference(report(a), report(b), samples=200, seed=seed, score_names=["retain_regurgitation"])
        found.append((difference["retain_regurgitation"]["low"], difference["retain_regurgitation"]["high"]))
        apart.append(retain_limits(a, seed))
    assert 0.89 <= share_covered(found, truth=0.05) <= 0.995
    width = [high - low for low, high in found]
    assert np.mean(width) < 0.5 * np.mean([high - low for low, high in apart])
