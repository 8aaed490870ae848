"""Table and figure of an audit, from a made-up result."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from launcher.audit_plot import audit_plot
from launcher.audit_table import attack_table, console_lines, level_table, markdown, membership_table, model_table, share


def estimate(value: float) -> dict[str, Any]:
    return {"value": value, "interval": [value - 0.1, value + 0.1]}


def score(recovered: float | None, *, control: float | None = 0.0, clear: bool = False, mended: bool = False) -> dict[str, Any]:
    return {
        "before": 1.0,
        "unlearned": 0.1,
        "after": None if recovered is None else 0.1 + 0.9 * recovered,
        "control": None if control is None else 0.1,
        "control_after": None if control is None else 0.1,
        "recovered": None if recovered is None else estimate(recovered),
        "control_recovered": None if recovered is None or control is None else estimate(control),
        "excess": None if recovered is None else estimate(recovered),
        "clear": clear,
        "mended": mended,
    }


def result(*, membership: bool = True, never_seen: bool = True) -> dict[str, Any]:
    scores = {"forget_regurgitation": 0.1, "forget_knowledge": 0.0, "forget_answer_log_prob": -4.0, "retain_regurgitation": 0.9}
    model = {"path": "models/merged", "scores": scores | {"mmlu_average": None}, "degenerate": {"forget": 0.25, "retain": None}}
    still = {"before": 1.0, "unlearned": 0.1, "control": 0.1, "remaining": None}
    family = {"before": 1.0, "unlearned": 0.6, "control": 0.5 if never_seen else None, "standard_error": 0.04}
    return {
        "verdict": "hidden",
        "reasons": ["int4 brings back 90%."],
        "weaker": ["Not asked for: sampling."],
        "models": dict.fromkeys(("unlearned", "before", *(("never-seen",) if never_seen else ())), model),
        "attacks": {
            "int4": {"scores": {
                "forget_regurgitation": score(0.9, clear=True),
                "forget_knowledge": score(2.5, control=-3.0),
                "forget_answer_log_prob": score(0.6, mended=True),
            }},
            "prefix-50": {"scores": {
                "forget_regurgitation": score(0.05, control=None),
                "forget_knowledge": score(None),
                "forget_answer_log_prob": score(None),
            }},
        },
        "remaining": dict.fromkeys(("forget_regurgitation", "forget_knowledge", "forget_answer_log_prob", "extraction_strength"), still),
        "membership": {"all": {"loss": family, "min_k_20": family}} if membership else {},
        "data": {"forget_rows": 30, "retain_rows": 30, "nonmembers": 8, "documents": {"forget": ["a", "b"], "retain": ["c"]}},
        "settings": {"seed": 0},
        "unrelated_text": "non-member documents",
    }  # fmt: skip


def test_a_share_is_percent_with_its_interval() -> None:
    assert share(estimate(0.62)) == "62 % [52, 72]"
    assert share(estimate(0.62), interval=False) == "62 %"
    assert share({"value": 0.5, "interval": None}) == "50 %"
    assert share(None) == share({"value": None}) == "-"


def test_the_table_marks_what_is_clear_and_what_was_only_mended() -> None:
    head, int4, prefix = attack_table(result())
    assert head[1:3] == ["completions (ROUGE-L)", "control"]
    assert int4 == ["int4", "90 % [80, 100] *", "0 %", "250 % [240, 260]", "-300 %", "60 % [50, 70] °", "0 %"]
    assert prefix == ["prefix-50", "5 % [-5, 15]", "-", "-", "-", "-", "-"]


def test_columns_without_numbers_are_left_out() -> None:
    head, *rows = model_table(result())
    assert "MMLU" not in head
    assert [row[0] for row in rows] == ["before unlearning", "audited model", "never saw the forget set"]
    assert rows[0][-2:] == ["25 %", "-"]
    assert len(model_table(result(never_seen=False))) == 3
    assert [row[:2] for row in level_table(result())[1:]] == [
        ["int4", "completions (ROUGE-L)"], ["int4", "questions (exact match)"], ["int4", "answer log-prob (nats/token)"],
        ["prefix-50", "completions (ROUGE-L)"],
    ]  # fmt: skip


def test_membership_rows_have_the_error_and_only_the_models_there_are() -> None:
    assert [row[0] for row in membership_table(result())] == ["membership AUC", "all, before", "all, audited", "all, never seen"]
    assert membership_table(result())[2][1] == "0.600 ±0.040"
    assert [row[0] for row in membership_table(result(never_seen=False))][-1] == "all, audited"
    assert membership_table(result(membership=False)) == []


def test_console_and_page_begin_with_the_verdict_and_explain_their_marks() -> None:
    lines = console_lines(result())
    assert lines[1] == "verdict: hidden"
    assert any(line.startswith("* ") for line in lines)
    assert any(line.startswith("° ") for line in lines)
    page = markdown(result())
    assert page.startswith("# Audit of models/merged\n\n**verdict: hidden**\n")
    tables = [block for block in page.split("\n\n") if block.startswith("|")]
    assert len(tables) == 4
    assert all(len({line.count("|") for line in table.split("\n")}) == 1 for table in tables)


@pytest.mark.parametrize("membership", [True, False])
@pytest.mark.parametrize("never_seen", [True, False])
def test_the_figure_has_a_panel_per_score_and_the_words_of_its_points(membership: bool, never_seen: bool) -> None:
    plot = audit_plot(result(membership=membership, never_seen=never_seen))
    assert plot.png.startswith(b"\x89PNG")
    for text in ("completions", "questions", "answer log-probability", "Verdict: hidden", "clearly more than the control", "not measured"):
        assert f"{text}</text>" in plot.svg
    assert ("membership</text>" in plot.svg) is membership


def test_the_figure_shows_the_numbers() -> None:
    """The same result gives the same bytes, another number others."""
    one, again, other = result(), result(), copy.deepcopy(result())
    other["attacks"]["int4"]["scores"]["forget_regurgitation"]["recovered"]["value"] = 0.85
    assert audit_plot(one).svg == audit_plot(again).svg
    assert audit_plot(one).svg != audit_plot(other).svg


def test_an_audit_without_any_comparison_has_a_figure_too() -> None:
    bare = result(membership=False)
    bare["attacks"] = {}
    assert "no attack could be compared</text>" in audit_plot(bare).svg
    assert "verdict: hidden" in markdown(bare)
