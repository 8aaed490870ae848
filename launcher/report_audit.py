"""What the audit of the delivered model found, in the form that the page shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.audit_table import attack_table, level_table, membership_table, model_table
from launcher.report_data import RunData
from launcher.report_text import without_paths
from trainers.files import weights_hash

MEANINGS = {
    "gone": "No attack that was run brought back more than it does from a model that never knew.",
    "hidden": "Something of the forget set can still be brought out, or is in plain sight.",
    "dead": "The model was destroyed: that it does not answer says nothing about forgetting.",
    "untouched": "The model behaves as before unlearning.",
}
_FILES = ("audit.json", "audit.md", "audit.png", "audit-rows.jsonl")
_NEEDED = {"verdict", "reasons", "weaker", "models", "attacks", "membership", "remaining", "data", "settings"}


def audit_view(data: RunData) -> dict[str, Any]:
    """Verdict, reasons and tables of ``audit.json``; where there is none, the command that makes it.

    Returns:
        ``verdict`` (a word or None), ``meaning``, ``reasons``, ``weaker``, ``tables`` (name, title, head, rows), ``control`` (what the
        attacks were compared with), ``documents`` and ``files`` (names beside the page); and ``command``.
    """
    audit = audit_of(data)
    if audit is None:
        told = "audit.json is of other weights than those in merged/" if is_of_other_weights(data) else "audit.json does not hold an audit"
        problem = told if data.audit else None
        return {"verdict": None, "command": audit_command(data), "problem": problem}
    tables = [
        {"name": name, "title": title, "head": table[0], "rows": table[1:]}
        for name, title, table in (
            ("audit_attacks", "Share of the forgotten that each attack brings back", attack_table(audit)),
            ("audit_models", "The models without any attack", model_table(audit)),
            ("audit_levels", "The scores themselves", level_table(audit)),
            ("audit_membership", "Membership AUC by attack family", membership_table(audit)),
        )
        if len(table) > 1
    ]
    return {
        "verdict": str(audit["verdict"]),
        "meaning": MEANINGS.get(str(audit["verdict"]), ""),
        "reasons": [without_paths(text) for text in audit["reasons"]],
        "weaker": [without_paths(text) for text in audit["weaker"]],
        "tables": tables,
        "control": "a model that never saw the forget set" if "never-seen" in audit["models"] else None,
        "documents": len((audit["data"].get("documents") or {}).get("forget") or []),
        "seed": (audit["settings"] or {}).get("seed"),
        "files": [name for name in _FILES if (data.run / name).exists()],
        "command": audit_command(data),
        "problem": None,
    }


def audit_of(data: RunData) -> dict[str, Any] | None:
    """The audit, if the file holds a complete one of the delivered weights, of the form that its tables and figures read."""
    audit = data.audit
    if not audit.keys() >= _NEEDED or is_of_other_weights(data):
        return None
    try:
        for table in (attack_table, model_table, level_table, membership_table):
            table(audit)
    except (KeyError, TypeError, AttributeError, ValueError):
        return None
    return audit


def is_of_other_weights(data: RunData) -> bool:
    """Whether the model in ``merged/`` was replaced after its audit; a copy of a run without its weights cannot tell."""
    models = data.audit.get("models")
    audited = (models.get("unlearned") or {}).get("weights_hash") if isinstance(models, Mapping) else None
    merged = data.run / "merged"
    return bool(audited) and any(merged.glob("*.safetensors")) and audited != weights_hash(merged)


def audit_command(data: RunData) -> str:
    """What makes ``RUN/audit.json``; RUN stands for the run folder."""
    own = (data.run / "target").is_dir()
    section = data.experiment.get("data")
    given: Mapping[str, Any] = section if isinstance(section, Mapping) else {}
    quickstart = (data.run / "data" / "lume").is_dir()
    places = {"--data": "RUN/data/lume" if quickstart else "DATA"}
    for option, key in (("--mia", "mia"), ("--mmlu", "mmlu")):
        if given.get(key):
            places[option] = f"RUN/data/{key}" if quickstart else key.upper()
    words = " ".join(f"{option} {place}" for option, place in places.items())
    return f"unlearn audit --model RUN/merged --base {'RUN/target' if own else 'TARGET'} {words} --out RUN/audit.json"
