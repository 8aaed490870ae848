"""The model card of a merged model: ``README.md`` beside its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.console import setting
from launcher.report import command_text, number, redact, template, verdict_sentence
from launcher.report_data import RunData, flatten, is_number, read_run
from trainers.files import write_text

_COLUMNS = (
    ("final_score", "final ↑"),
    ("task_aggregate", "task aggregate ↑"),
    ("mia_auc", "membership AUC → 0.5"),
    ("mia_score", "MIA score ↑"),
    ("mmlu_average", "MMLU ↑"),
    ("forgetting", "forgetting ↑"),
    ("retention", "retention ↑"),
)
_EXPERIMENT_LINES = 60
_UNKNOWN_LICENCE = (
    "Not stated. This model derives from its base model and from the data it was trained on; their licences apply, and they are unknown "
    "to this card. Check them before you share or use the weights."
)


def write_model_card(run: Path, merged: Path) -> Path:
    """Write ``README.md`` (YAML front matter and Markdown) into the merged model's folder, atomically.

    Args:
        run: the run folder that the numbers come from.
        merged: the folder of the merged model.

    Returns:
        The card's path.

    Raises:
        InputError: if ``run`` is not a run folder.
    """
    card = Path(merged) / "README.md"
    write_text(card, render_card(read_run(Path(run))))
    return card


def render_card(data: RunData) -> str:
    """The card as text."""
    fold = str(data.results.get("fold") or "test")
    scored = [model for model in data.models if model["scores"]]
    merged = data.model("merged")
    counts = merged["counts"] if merged else {}
    licence = data.provenance.get("license") or data.experiment.get("license")
    memorised = data.target.get("memorised")
    facts = flatten(memorised) if isinstance(memorised, Mapping) else {}
    return template("model_card.md.j2", autoescape=False).render(
        front_matter=_front_matter(data, licence=licence),
        title=_line(f"{data.name}: unlearned and merged model"),
        sentence=_line(verdict_sentence(data)),
        forget_rows=f"{counts['forget']} rows scored" if is_number(counts.get("forget")) else "",
        memorised=", ".join(f"{key.replace('.', ' ')} {number(value)}" for key, value in facts.items()),
        fold=fold,
        titles=[title for _, title in _COLUMNS],
        rows=[{"name": _cell(_model_name(model)), "cells": [_score(model, key) for key, _ in _COLUMNS]} for model in scored],
        recipe=_recipe(data),
        audit=_audit(data),
        merge_wins=(data.results.get("verdict") or {}).get("merge_beats_parents") is not False,
        remarks=[_line(text) for text in (merged["deviations"] + merged["notes"] if merged else [])],
        licence=_line(str(licence)) + " (as stated in the configuration)." if licence else _UNKNOWN_LICENCE,
        command=command_text(data),
        experiment=_experiment(data),
    )


def _front_matter(data: RunData, *, licence: Any) -> str:
    import yaml

    matter: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    base = _base_model(data)
    if base:
        matter["base_model"] = base
    if licence:
        matter["license"] = str(licence)
    matter["tags"] = ["unlearning", "machine-unlearning", "merge", *([str(_merge_config(data)["method"])] if _merge_config(data) else [])]
    return yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)


def _base_model(data: RunData) -> str | None:
    """The model that was unlearned, where it has a name; a tiny target built by the run has none."""
    for source in (data.experiment.get("model"), data.target):
        for key in ("model_name_or_path", "name", "base_model"):
            if isinstance(source, Mapping) and isinstance(source.get(key), str) and source[key]:
                return source[key]
    return None


def _merge_config(data: RunData) -> dict[str, Any]:
    """Method, density, scale and weights, from the manifest beside the weights or from results.json."""
    config = data.merge.get("config")
    values = {**(data.results.get("pair") or {}), **(config if isinstance(config, Mapping) else {})}
    return {key: values[key] for key in ("method", "density", "scale") if values.get(key) is not None} if values.get("method") else {}


def _recipe(data: RunData) -> list[str]:
    lines = []
    pair = data.results.get("pair") or {}
    trials = {trial["name"]: trial for trial in data.trials}
    for key, word in (("over", "over-forgetting"), ("under", "under-forgetting")):
        if pair.get(key):
            overrides = trials.get(str(pair[key]), {}).get("overrides") or {}
            with_settings = ", ".join(f"{name} = {setting(value)}" for name, value in overrides.items())
            lines.append(_line(f"Parent: {pair[key]} ({word})" + (f": {with_settings}" if with_settings else "")))
    config = _merge_config(data)
    if config:
        lines.append("Merge: " + ", ".join(f"{key} {setting(value)}" for key, value in config.items()))
    weights = data.merge.get("weights") or pair.get("weights")
    if weights:
        lines.append("Weights of the parents: " + " : ".join(setting(weight) for weight in weights))
    if data.merge.get("formula"):
        lines.append(_line(f"Formula: `{data.merge['formula']}`"))
    lines.append("The two parents were chosen, and density and scale set, by measuring merges on the validation fold.")
    return lines


def _audit(data: RunData) -> str:
    if (data.run / "audit.json").exists():
        return "An audit (attacks such as relearning and quantisation) was run; see `audit.json` in the run folder."
    return "No audit has been run: whether relearning, quantisation or stronger extraction bring the documents back is not known."


def _model_name(model: Mapping[str, Any]) -> str:
    label, name = str(model.get("label") or model["name"]), str(model["name"])
    verdict = f", {model['verdict']}" if model.get("verdict") else ""
    return f"{label}{f' ({name}{verdict})' if name != label else verdict}"


def _score(model: Mapping[str, Any], key: str) -> str:
    value, interval = model["scores"].get(key), (model["intervals"] or {}).get(key)
    if not is_number(value):
        return "–"
    return f"{number(value)} [{number(interval[0])}, {number(interval[1])}]" if interval else number(value)


def _experiment(data: RunData) -> str:
    import yaml

    if not data.experiment:
        return ""
    lines = yaml.safe_dump(redact(data.experiment), sort_keys=False, allow_unicode=True).rstrip().split("\n")
    rest = [f"# … {len(lines) - _EXPERIMENT_LINES} more lines in experiment.yaml"] if len(lines) > _EXPERIMENT_LINES else []
    return "\n".join([*lines[:_EXPERIMENT_LINES], *rest])


def _line(text: str) -> str:
    """One line of Markdown text that cannot open raw HTML."""
    return " ".join(str(text).split()).replace("<", "&lt;")


def _cell(text: str) -> str:
    return _line(text).replace("|", "\\|")
