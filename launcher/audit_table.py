"""The table of an audit, for the console and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SCORES = (
    ("forget_regurgitation", "completions (ROUGE-L)"),
    ("forget_knowledge", "questions (exact match)"),
    ("forget_answer_log_prob", "answer log-prob (nats/token)"),
)
_MODELS = (("before", "before unlearning"), ("unlearned", "audited model"), ("never-seen", "never saw the forget set"))
_MARKS = {"clear": "* clearly more than the control", "mended": "° no more than the never-seen model has under the same attack"}
_KEPT = (
    ("forget_regurgitation", "forget R-L"),
    ("forget_knowledge", "forget EM"),
    ("forget_answer_log_prob", "forget log-prob"),
    ("retain_regurgitation", "retain R-L"),
    ("retain_knowledge", "retain EM"),
    ("mmlu_average", "MMLU"),
    ("mia_auc", "AUC"),
)


def share(estimate: Mapping[str, Any] | None, *, interval: bool = True) -> str:
    """``62 % [55, 70]``; ``-`` where there is none."""
    if estimate is None or estimate.get("value") is None:
        return "-"
    limits = estimate.get("interval")
    text = f"{round(100 * estimate['value'])} %"
    return text + (f" [{round(100 * limits[0])}, {round(100 * limits[1])}]" if interval and limits else "")


def number(value: float | None) -> str:
    """Three decimals; ``-`` where there is none."""
    return "-" if value is None else f"{value:.3f}"


def model_table(result: Mapping[str, Any]) -> list[list[str]]:
    """What the models score without any attack, and the shares of completions that are no text any more."""
    columns = [(name, title) for name, title in _KEPT if any(found["scores"].get(name) is not None for found in result["models"].values())]
    head = ["without attack", *(title for _, title in columns), "degenerate (forget)", "degenerate (retain)"]
    rows = [head]
    for role, title in _MODELS:
        if role in result["models"]:
            found = result["models"][role]
            broken = [share({"value": found["degenerate"][side]}) for side in ("forget", "retain")]
            rows.append([title, *(number(found["scores"].get(name)) for name, _ in columns), *broken])
    return rows


def attack_table(result: Mapping[str, Any]) -> list[list[str]]:
    """Recovered share and the control's own, by attack and score; marked where it is clearly more than the control's."""
    rows = [["recovered", *(text for _, title in SCORES for text in (title, "control"))]]
    for name, found in result["attacks"].items():
        row = [name]
        for score, _ in SCORES:
            one = found["scores"][score]
            row += [
                share(one["recovered"]) + (" *" if one["clear"] else " °" if one["mended"] else ""),
                share(one["control_recovered"], interval=False),
            ]
        rows.append(row)
    still = result["remaining"]
    if any(one["remaining"] for one in still.values()):
        row = ["(still there as it is)"]
        for score, _ in SCORES:
            row += [share(still[score]["remaining"]), ""]
        rows.append(row)
    return rows


def level_table(result: Mapping[str, Any]) -> list[list[str]]:
    """The scores themselves, by attack."""
    head = ["attack", "score", "before", "audited", "attacked", "control", "control attacked", "recovered", "control", "beyond control"]
    rows = [head]
    for name, found in result["attacks"].items():
        for score, title in SCORES:
            one = found["scores"][score]
            if one["after"] is None:
                continue
            levels = [number(one[key]) for key in ("before", "unlearned", "after", "control", "control_after")]
            shares = [share(one[key]) for key in ("recovered", "control_recovered", "excess")]
            rows.append([name, title, *levels, *shares])
    return rows


def membership_table(result: Mapping[str, Any]) -> list[list[str]]:
    """AUC of each family by task: audited model with standard error, target before unlearning and control beside it."""
    rows: list[list[str]] = []
    for task, families in result["membership"].items():
        if not rows:
            rows.append(["membership AUC", *families])
        for key, title in (("before", "before"), ("unlearned", "audited"), ("control", "never seen")):
            cells = [number(one[key]) for one in families.values()]
            if key == "unlearned":
                cells = [f"{cell} ±{one['standard_error']:.3f}" for cell, one in zip(cells, families.values(), strict=True)]
            if any(cell != "-" for cell in cells):
                rows.append([f"{task}, {title}", *cells])
    return rows


def sentences(result: Mapping[str, Any]) -> list[str]:
    """The verdict with its reasons, and what it does not rest on."""
    lines = [f"verdict: {result['verdict']}", *(f"  {reason}" for reason in result["reasons"])]
    strength = result["remaining"].get("extraction_strength")
    if strength is not None:
        levels = ", ".join(
            f"{title} {number(strength[key])}"
            for key, title in (("before", "before"), ("unlearned", "audited"), ("control", "never seen"))
            if strength[key] is not None
        )
        lines.append(f"extraction strength of completions: {levels}")
    return lines + [f"weaker: {text}" for text in result["weaker"]]


def console_lines(result: Mapping[str, Any]) -> list[str]:
    """Verdict, models, attacks and membership as lines of even columns."""
    lines = ["", *sentences(result)]
    for table in (model_table(result), attack_table(result), membership_table(result)):
        if table:
            lines += ["", *_columns(table)]
    for key, text in _MARKS.items():
        if any(one[key] for found in result["attacks"].values() for one in found["scores"].values()):
            lines.append(text)
    return lines


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width) for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def markdown(result: Mapping[str, Any]) -> str:
    """The same for a page, with the scores themselves."""
    verdict, *rest = sentences(result)
    parts = [f"# Audit of {result['models']['unlearned']['path']}", f"**{verdict}**", "\n".join(f"- {line.strip()}" for line in rest)]
    parts += [_markdown_table(table) for table in (model_table(result), attack_table(result)) if len(table) > 1]
    parts.append(
        "Recovered: (attacked - audited) / (before - audited) with a 95 % bootstrap interval over documents; beside it the gain of the "
        "control as the same share. \\*: clearly more than the control. °: no more than the never-seen model has under the same "
        "attack, so that damage was repaired rather than knowledge found. A dash: nothing was clearly forgotten by this score, or the "
        "attack does not measure it."
    )
    parts += [_markdown_table(table) for table in (level_table(result), membership_table(result)) if len(table) > 1]
    settings = result["settings"]
    parts.append(
        f"{result['data']['forget_rows']} forget rows of {len(result['data']['documents']['forget'])} documents, "
        f"{result['data']['retain_rows']} retain rows, {result['data']['nonmembers']} non-members; seed {settings['seed']}; "
        f"base {result['models']['before']['path']}"
        + (f"; never seen {result['models']['never-seen']['path']}" if "never-seen" in result["models"] else "")
        + f". Unrelated text: {result['unrelated_text']}."
    )
    return "\n\n".join(parts) + "\n"


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(rows[0]), "|" + " --- |" * len(rows[0]), *(line(row) for row in rows[1:])])
