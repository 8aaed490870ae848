"""The model card of a run's delivered model: ``README.md`` beside its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.audit_stage import audit_state
from launcher.console import setting
from launcher.report_audit import MEANINGS, audit_command, audit_of, is_of_other_weights
from launcher.report_data import RunData, base_name, flatten, is_number, pair_names, read_run
from launcher.report_headline import verdict_sentence
from launcher.report_provenance import commands_again, configuration
from launcher.report_text import number, template, without_paths
from trainers.files import write_text

FILE = "README.md"
_METRICS = (
    ("final_score", "final ↑"),
    ("task_aggregate", "task aggregate ↑"),
    ("mia_auc", "membership AUC → 0.5"),
    ("mia_score", "MIA score ↑"),
    ("mmlu_average", "MMLU ↑"),
    ("forgetting", "forgetting ↑"),
    ("retention", "retention ↑"),
)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_LICENCES = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m afl-3.0 artistic-2.0
    bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0
    cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
    cc-by-nc-sa-4.0 ecl-2.0 epl-1.0 epl-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc llama2 llama3
    llama3.1 llama3.2 llama3.3 gemma lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl
    wtfpl unknown other
"""
"""Words of the hub's field ``license`` (https://huggingface.co/docs/hub/repositories-licenses); anything else is ``other`` with a name."""
_LOAD_MODEL = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or the name of its repository
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
inputs = tokenizer("Once upon a time", return_tensors="pt")
outputs = model.generate(**inputs, max_new_tokens=20)
print(tokenizer.decode(outputs[0], skip_special_tokens=True))"""
_LOAD_ADAPTER = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

target = "TARGET"  # folder of the target model that the adapter belongs to
folder = "."  # this folder, or the name of its repository
tokenizer = AutoTokenizer.from_pretrained(target)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(target, dtype="auto"), folder)
inputs = tokenizer("Once upon a time", return_tensors="pt")
outputs = model.generate(**inputs, max_new_tokens=20)
print(tokenizer.decode(outputs[0], skip_special_tokens=True))"""


def write_model_card(run: Path, merged: Path) -> Path:
    """Write ``README.md`` (YAML front matter and Markdown) into the merged model's folder, atomically.

    Args:
        run: the run folder that the numbers come from.
        merged: the folder of the merged model or adapter.

    Returns:
        The card's path.

    Raises:
        InputError: if ``run`` is not a run folder.
    """
    card = Path(merged) / FILE
    write_text(card, render_card(read_run(Path(run)), merged=Path(merged)))
    return card


def refresh_model_card(run: Path) -> Path | None:
    """Write the card of a run's delivered model again, from what the run holds now; None where no model was delivered.

    Raises:
        InputError: if ``run`` is not a run folder.
    """
    merged = Path(run) / "merged"
    return write_model_card(run, merged) if (merged / "merge.json").exists() else None


def render_card(data: RunData, *, merged: Path | None = None) -> str:
    """The card as text.

    Args:
        data: the run.
        merged: the folder of the model, which may hold an adapter; default: the run's own.
    """
    folder = merged or data.run / "merged"
    is_adapter = (folder / "adapter_config.json").exists()
    model = data.delivered or data.model("merged")
    memorised = data.target.get("memorised")
    facts = flatten(memorised) if isinstance(memorised, Mapping) else {}
    licences = {part: _stated(data, part, "license") for part in ("model", "data")}
    versions = data.provenance.get("versions")
    return template("model_card.md.j2", autoescape=False).render(
        front_matter=_front_matter(data, model=model, is_adapter=is_adapter),
        title=_line(f"{data.name}: {'adapter of an unlearned model' if is_adapter else 'unlearned model'}"),
        is_adapter=is_adapter,
        sentence=_line(verdict_sentence(data)),
        sets=_sets(data, model=model),
        memorised=", ".join(f"{key.replace('.', ' ').replace('_', ' ')} {number(value)}" for key, value in facts.items()),
        fold=data.fold,
        titles=[title for _, title in _METRICS],
        rows=[_row(one, bold=one is model) for one in data.models if one["scores"]],
        audit=[_line(line) for line in _audit(data)],
        recipe=_recipe(data),
        pair=_pair(data),
        snippet=_LOAD_ADAPTER if is_adapter else _LOAD_MODEL,
        own_tokenizer=has_own_tokenizer(data),
        merge_wins=(data.results.get("verdict") or {}).get("merge_beats_parents") is not False,
        model_licence=_licence_line(licences["model"]),
        data_licence=_licence_line(licences["data"]),
        unstated=None in licences.values(),
        again=commands_again(data),
        versions=", ".join(f"{name} {value}" for name, value in versions.items() if value) if isinstance(versions, Mapping) else "",
        remarks=[_line(without_paths(text)) for text in (model["deviations"] + model["notes"] if model else [])],
        experiment=configuration(data).rstrip().replace("```", "'''"),
    )


def has_own_tokenizer(data: RunData) -> bool:
    """Whether the run made its target's tokenizer out of the documents: then words of theirs stand in it."""
    target = data.experiment.get("target")
    return isinstance(target, Mapping) and not target.get("base") and _stated(data, "model", "model_name_or_path") is None


# ---- front matter: https://huggingface.co/docs/hub/model-cards


def _front_matter(data: RunData, *, model: Mapping[str, Any] | None, is_adapter: bool) -> str:
    import yaml

    matter: dict[str, Any] = {"library_name": "peft" if is_adapter else "transformers", "pipeline_tag": "text-generation"}
    base = _base_model(data)
    if base:
        matter["base_model"] = base
        matter |= {"base_model_relation": "adapter"} if is_adapter else {}
    matter |= _licence_fields(_stated(data, "model", "license"))
    method = str(_merge_config(data).get("method") or "")
    made_of = data.merge.get("trials") or []
    matter["tags"] = ["unlearning", "machine-unlearning", *(["merge", method] if len(made_of) > 1 and method else [])]
    metrics = _metrics(model)
    if metrics:
        dataset = {"type": "lume-layout", "name": f"the run's own documents, {data.fold} fold", "split": data.fold}
        result = {"task": {"type": "text-generation", "name": "Unlearning"}, "dataset": dataset, "metrics": metrics}
        matter["model-index"] = [{"name": data.name, "results": [result]}]
    return yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)


def _metrics(model: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    scores = model["scores"] if model else {}
    return [
        {"type": key, "name": title.rstrip(" ↑→0.5"), "value": round(scores[key], 4)}
        for key, title in _METRICS
        if is_number(scores.get(key))
    ]


def _base_model(data: RunData) -> str | None:
    """The name on the hub of what was unlearned: as stated, or the given model's where that can be no folder of this machine."""
    stated = _stated(data, "model", "base_model")
    if stated:
        return stated
    given = _stated(data, "model", "model_name_or_path")
    return given if given and _HUB_NAME.fullmatch(given) and not Path(given).parent.exists() else None


def _licence_fields(licence: str | None) -> dict[str, str]:
    if licence is None:
        return {}
    known = licence.strip().lower()
    return {"license": known} if known in _HUB_LICENCES.split() else {"license": "other", "license_name": " ".join(licence.split())}


def _stated(data: RunData, section: str, key: str) -> str | None:
    values = data.experiment.get(section)
    value = values.get(key) if isinstance(values, Mapping) else None
    return str(value) if value else None


def _licence_line(licence: str | None) -> str:
    return f"{_line(licence)} (as stated in the configuration)." if licence else "not stated."


# ---- what was forgotten, and what was found


def _sets(data: RunData, *, model: Mapping[str, Any] | None) -> list[str]:
    counts = data.results.get("data")
    words = {"forget": "To be forgotten", "retain": "To be kept"}
    lines = []
    for name, word in words.items():
        found = counts.get(name) if isinstance(counts, Mapping) else None
        if isinstance(found, Mapping):
            tasks = ", ".join(f"{task} {rows}" for task, rows in (found.get("rows_by_task") or {}).items())
            lines.append(f"{word}, the {name} set: {found['documents']} documents, {found['rows']} rows" + (f" ({tasks})" if tasks else ""))
        else:
            scored = (model or {}).get("counts") or {}
            rows = f" ({scored[name]} rows scored)" if is_number(scored.get(name)) else ""
            lines.append(f"{word}: every document of the {name} set{rows}")
    return [_line(line) for line in lines]


def _row(model: Mapping[str, Any], *, bold: bool) -> dict[str, Any]:
    name = _cell(_model_name(model))
    return {"name": f"**{name}**" if bold else name, "cells": [_score(model, key) for key, _ in _METRICS]}


def _model_name(model: Mapping[str, Any]) -> str:
    label, name = str(model.get("label") or model["name"]), str(model["name"])
    verdict = f", {model['verdict']}" if model.get("verdict") else ""
    return f"{label}{f' ({name}{verdict})' if name != label else verdict}"


def _score(model: Mapping[str, Any], key: str) -> str:
    value, limits = model["scores"].get(key), (model["intervals"] or {}).get(key)
    if not is_number(value):
        return "–"
    return f"{number(value)} [{number(limits[0])}, {number(limits[1])}]" if limits else number(value)


def _audit(data: RunData) -> list[str]:
    audit = audit_of(data)
    state = audit_state(audit=data.audit, events=data.events)
    command = f"`{audit_command(data)}` makes one; `unlearn report RUN` then writes this card again. RUN is the run folder."
    unknown = "whether relearning, rounding of the weights or other prompts bring the documents back is not known"
    if is_of_other_weights(data):
        return [f"The run's audit is of other weights than these: {unknown}.", command]
    if audit is None:
        failed = f"An audit was begun and failed ({without_paths(state['error'])})" if state["error"] else "No audit was made"
        return [f"{failed}: {unknown}.", command]
    control = "a model that never saw the forget set" if state["never_seen"] else None
    documents = len((audit["data"].get("documents") or {}).get("forget") or [])
    attacks = (audit["settings"] or {}).get("attacks") or list(audit["attacks"])
    return [
        f"Verdict: **{audit['verdict']}**. {MEANINGS.get(str(audit['verdict']), '')}".rstrip(),
        f"Attacks: {', '.join(map(str, attacks))}; on {documents} documents of the forget set.",
        "Compared with the target under the same attacks"
        + (f" and with {control}." if control else ". No model that never saw the forget set was there to compare with."),
        *(f"- {without_paths(reason)}" for reason in audit["reasons"]),
        *(f"- Weaker: {without_paths(text)}" for text in audit["weaker"]),
    ]


# ---- how it was made


def _merge_config(data: RunData) -> dict[str, Any]:
    """The merge's method and parameters: of the manifest beside the weights, else of results.json."""
    config = data.merge.get("config")
    pair = data.results.get("pair") or {}
    values = config if isinstance(config, Mapping) else {key: pair.get(key) for key in ("method", "density", "scale")}
    return {str(key): value for key, value in values.items() if value is not None and key != "weights"}


def _recipe(data: RunData) -> list[str]:
    lines = [_ingredient(data, trial) for trial in data.merge.get("trials") or [] if isinstance(trial, Mapping)]
    config = _merge_config(data)
    if config:
        lines.append(_line("Merge: " + ", ".join(f"{key} {setting(value)}" for key, value in config.items())))
    weights = data.merge.get("weights")
    if weights and len(weights) > 1:
        lines.append("Weights: " + " : ".join(setting(weight) for weight in weights))
    if data.merge.get("formula"):
        lines.append(_line(f"Formula: `{data.merge['formula']}`"))
    if data.merge.get("arithmetic"):
        lines.append(_line(f"Arithmetic: {data.merge['arithmetic']}"))
    if is_number(data.merge.get("lost_energy")):
        lines.append(f"The adapter leaves out {data.merge['lost_energy']:.2%} of the merged update's squared norm.")
    lines.append("Trials, their checkpoints, weights, density and scale were chosen by measuring on the validation fold.")
    return lines


def _ingredient(data: RunData, trial: Mapping[str, Any]) -> str:
    """One trial that the model is made of: its checkpoint, its part in the pair and its settings."""
    name = str(trial.get("trial"))
    step = re.fullmatch(r"step-(\d+)", Path(str(trial.get("path") or "")).name)
    parts = {
        side
        for side, checkpoint in pair_names(data).items()
        if base_name(checkpoint) in ((name, None), (name, int(step[1]) if step else None))
    }
    word = f" ({parts.pop()}-forgetting parent)" if len(parts) == 1 else ""
    at = f", checkpoint of step {int(step[1])}" if step else ""
    return _line(f"Made of: {name}{word}{at}{_settings(data, name)}")


def _pair(data: RunData) -> list[str]:
    lines = []
    for side, name in pair_names(data).items():
        trial, step = base_name(name)
        lines.append(
            _line(f"{side}-forgetting: {trial}" + (f", checkpoint of step {step}" if step is not None else "") + _settings(data, trial))
        )
    return lines


def _settings(data: RunData, trial: str) -> str:
    overrides = next((one["overrides"] for one in data.trials if one["name"] == trial), None) or {}
    return " with " + ", ".join(f"{key} = {setting(value)}" for key, value in overrides.items()) if overrides else ""


def _line(text: str) -> str:
    """One line of Markdown text that cannot open raw HTML."""
    return " ".join(str(text).split()).replace("<", "&lt;")


def _cell(text: str) -> str:
    return _line(text).replace("|", "\\|")
