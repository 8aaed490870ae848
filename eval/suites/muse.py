"""One evaluation on a MUSE-style folder: every score of a model, in one report."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.generate import altered_generation
from eval.membership import min_k
from eval.mia import attack_auc
from eval.rouge import rouge_l_f1, rouge_l_recall
from eval.suites.answer_scores import exact_memorization, extraction_strength
from eval.suites.config import PromptStyle, SuiteConfig
from eval.suites.measure import check_vocabulary, generate_answers
from eval.suites.muse_data import MuseData
from eval.suites.privleak import INDISTINGUISHABLE, privleak
from eval.suites.prompts import encode_answer, encode_passage, few_shot_prompt
from eval.suites.report import SuiteReport
from eval.suites.resample import SetRows, by_set, drawn, limits, once, weighted_auc, weighted_mean
from eval.teacher_forced import TokenScores, token_scores
from trainers.data.encode import EncodedRow, encode_text
from trainers.errors import InputError
from trainers.modeling import context_length

QUESTION_TOKENS = 32
PASSAGE_TOKENS = 128
"""Tokens that the published code generates for a question and for a passage."""

SETS = ("knowmem_forget", "knowmem_retain", "verbmem_forget")
METRICS = ("rouge_l_f1", "rouge_l_recall", "exact_memorization", "extraction_strength")
"""Of a row, and of a set as the mean over its rows; the last two are measured on passages only."""

SCORE_NAMES = (
    "privleak",
    "min_k_auc",
    "min_k_auc_retain",
    "knowmem_forget_rouge_l_f1",
    "knowmem_forget_rouge_l_recall",
    "knowmem_retain_rouge_l_f1",
    "knowmem_retain_rouge_l_recall",
    *(f"verbmem_forget_{metric}" for metric in METRICS),
)
"""Every report has these keys under ``scores``; what was not measured is null."""

_CUT = re.compile(r"\n\n|\nQuestion|Question:")


def cut_answer(text: str) -> str:
    """A generated answer up to the next blank line or question, where a model goes on with examples of its own.

    Source: MUSE, https://arxiv.org/abs/2407.06460 (KnowMem)
    """
    return _CUT.split(text, maxsplit=1)[0]


@dataclass(frozen=True)
class MuseRows:
    """The texts that an evaluation scores, encoded, by set; and which attack texts had to be cut at the context."""

    data: MuseData
    encoded: Mapping[str, list[EncodedRow]]
    num_cut: int


@dataclass(frozen=True)
class RetainedAttack:
    """The min-K attack's AUC on a model that was trained without the forget set."""

    name: str
    auc: float


def prepare_muse(data: MuseData, *, tokenizer: Any, model_config: Any, config: SuiteConfig) -> MuseRows:
    """Encode everything that will be scored; no weights are needed.

    Raises:
        InputError: if a row does not fit the model's context, or the tokenizer is not the model's.
    """
    context = context_length(model_config)
    encoded: dict[str, list[EncodedRow]] = {}
    for side, pairs in data.questions.items():
        encoded[f"knowmem_{side}"] = [
            encode_answer(
                row_id=f"knowmem_{side}-{number:04d}",
                prompt=few_shot_prompt(question, examples=data.examples[side]),
                answer=answer,
                style=PromptStyle.PLAIN,
                tokenizer=tokenizer,
                max_length=context,
            )
            for number, (question, answer) in enumerate(pairs, start=1)
        ]
    encoded["verbmem_forget"] = [
        encode_passage(
            row_id=f"verbmem_forget-{number:04d}",
            prompt=passage.prompt,
            text=passage.text,
            max_new_tokens=config.max_new_tokens or PASSAGE_TOKENS,
            tokenizer=tokenizer,
            max_length=context,
        )
        for number, passage in enumerate(data.passages, start=1)
    ]
    num_cut = 0
    for side, texts in data.texts.items():
        rows = []
        for number, text in enumerate(texts, start=1):
            row = encode_text(text, tokenizer=tokenizer)
            if row.num_scored < 1:
                raise InputError(
                    "the text is a single token",
                    where=f"privleak_{side}, text {number}",
                    why="the attack reads every token but the first",
                    fix="drop it",
                )
            num_cut += len(row.input_ids) > context
            rows.append(EncodedRow(f"privleak_{side}-{number:04d}", row.input_ids[:context], row.num_prompt))
        encoded[f"privleak_{side}"] = rows
    check_vocabulary([row for rows in encoded.values() for row in rows], model_config=model_config)
    return MuseRows(data=data, encoded={name: rows for name, rows in encoded.items() if rows}, num_cut=num_cut)


def measure_retained_attack(
    rows: MuseRows, *, model: Any, tokenizer: Any, config: SuiteConfig, name: str, device: str = "cpu"
) -> RetainedAttack | None:
    """What PrivLeak needs of a model that was trained without the forget set; None without attack texts.

    Args:
        rows: encoded with that model's own tokenizer.
        model: a causal language model.
        tokenizer: gives the padding id.
        config: the settings of the evaluation that it is for.
        name: of the model.
        device: where the model is.
    """
    if "privleak_forget" not in rows.encoded:
        return None
    losses = {
        side: [
            min_k(scores, fraction=config.min_k_fraction)
            for scores in _score(rows.encoded[f"privleak_{side}"], model=model, tokenizer=tokenizer, config=config, device=device)
        ]
        for side in ("forget", "holdout")
    }
    return RetainedAttack(name=name, auc=attack_auc(member_losses=losses["forget"], nonmember_losses=losses["holdout"]))


def evaluate_muse(
    rows: MuseRows,
    *,
    model: Any,
    tokenizer: Any,
    config: SuiteConfig,
    model_name: str,
    retained: RetainedAttack | None = None,
    device: str = "cpu",
    progress: Callable[[str], None] | None = None,
) -> SuiteReport:
    """Every score of MUSE that a folder has data for.

    Args:
        rows: from ``prepare_muse``.
        model: a causal language model, or a peft model around one.
        tokenizer: its tokenizer.
        config: limits and settings.
        model_name: name of the model, for the report.
        retained: from ``measure_retained_attack``; None takes an AUC of 0.5.
        device: where the model is.
        progress: told about each finished part in a sentence.
    """
    start = time.perf_counter()
    say = progress or (lambda text: None)
    found: list[dict[str, Any]] = []
    for name, encoded in rows.encoded.items():
        scores = _score(encoded, model=model, tokenizer=tokenizer, config=config, device=device)
        if name.startswith("privleak"):
            found += [
                {"set": name, "id": row.row_id, "unit": row.row_id, "min_k": min_k(score, fraction=config.min_k_fraction)}
                for row, score in zip(encoded, scores, strict=True)
            ]
        else:
            found += _answered(rows, name, scores, model=model, tokenizer=tokenizer, config=config, device=device)
        say(f"{name}: {len(encoded)} rows")
    return _build_report(
        found,
        rows=rows,
        retained=retained,
        config=config,
        model_name=model_name,
        deviations=_deviations(model, config=config),
        altered=altered_generation(model),
        start=start,
    )


def _score(encoded: Sequence[EncodedRow], *, model: Any, tokenizer: Any, config: SuiteConfig, device: str) -> list[TokenScores]:
    return token_scores(model=model, tokenizer=tokenizer, rows=encoded, batch_tokens=config.batch_tokens, device=device)


def _answered(
    rows: MuseRows, name: str, scores: Sequence[TokenScores], *, model: Any, tokenizer: Any, config: SuiteConfig, device: str
) -> list[dict[str, Any]]:
    """The lines of a set whose prompts are answered."""
    encoded = rows.encoded[name]
    passages = name == "verbmem_forget"
    texts = generate_answers(
        model=model,
        tokenizer=tokenizer,
        rows=encoded,
        scores=scores,
        max_new_tokens=config.max_new_tokens or (PASSAGE_TOKENS if passages else QUESTION_TOKENS),
        batch_tokens=config.batch_tokens,
        device=device,
    )
    if passages:
        inputs = [passage.prompt for passage in rows.data.passages]
        # As much of the passage as can have been generated.
        expected = [tokenizer.decode(list(row.input_ids[row.num_prompt :]), skip_special_tokens=True).strip() for row in encoded]
    else:
        pairs = rows.data.questions[name.removeprefix("knowmem_")]
        inputs, expected = [question for question, _ in pairs], [answer for _, answer in pairs]
    lines = []
    for row, score, prompt, reference, text in zip(encoded, scores, inputs, expected, texts, strict=True):
        output = text if passages else cut_answer(text)
        line = {"set": name, "id": row.row_id, "unit": row.row_id, "input": prompt, "expected": reference, "output": output}
        line |= {
            "answer_loss": -float(score.log_prob_N.mean()),
            "rouge_l_f1": rouge_l_f1(reference=reference, prediction=output),
            "rouge_l_recall": rouge_l_recall(reference=reference, prediction=output),
        }
        if passages:
            line |= {"exact_memorization": exact_memorization(score), "extraction_strength": extraction_strength(score)}
        lines.append(line)
    return lines


def _score_samples(sets: Mapping[str, SetRows], weights: Mapping[str, np.ndarray], *, retained_auc: float) -> dict[str, np.ndarray]:
    """The scores in every resample, shape (S,) each."""
    found = {
        f"{name}_{metric}": weighted_mean(sets[name].column(metric), weights[name])
        for name in SETS
        if name in sets
        for metric in METRICS
        if f"{name}_{metric}" in SCORE_NAMES
    }

    def auc(strangers: str) -> np.ndarray:
        return weighted_auc(
            sets["privleak_forget"].column("min_k"),
            sets[strangers].column("min_k"),
            member_weights=weights["privleak_forget"],
            stranger_weights=weights[strangers],
        )

    if "privleak_forget" in sets:
        found["min_k_auc"] = auc("privleak_holdout")
        found["privleak"] = np.array([privleak(auc=value, retained_auc=retained_auc) for value in found["min_k_auc"].tolist()])
        if "privleak_retain" in sets:
            found["min_k_auc_retain"] = auc("privleak_retain")
    return found


def _build_report(
    lines: list[dict[str, Any]],
    *,
    rows: MuseRows,
    retained: RetainedAttack | None,
    config: SuiteConfig,
    model_name: str,
    deviations: list[str],
    altered: list[str],
    start: float,
) -> SuiteReport:
    sets = by_set(lines)
    retained_auc = retained.auc if retained else INDISTINGUISHABLE
    points = {name: float(values[0]) for name, values in _score_samples(sets, once(sets), retained_auc=retained_auc).items()}
    scores = {name: points[name] if math.isfinite(points.get(name, math.nan)) else None for name in SCORE_NAMES}
    samples = _score_samples(sets, drawn(sets, samples=config.bootstrap_samples, seed=config.bootstrap_seed), retained_auc=retained_auc)
    intervals = {name: limits(values, point=scores[name], confidence=config.confidence) for name, values in samples.items()}
    notes = [*rows.data.notes, "Intervals draw rows."]
    broken = [line["id"] for line in lines if not math.isfinite(line.get("answer_loss", line.get("min_k", 0.0)))]
    if broken:
        notes.append(f"{len(broken)} rows have a loss that is not finite, among them {broken[0]!r}.")
    if rows.num_cut:
        notes.append(f"{rows.num_cut} texts of the membership attack were cut at the model's context.")
    if retained is None and "privleak_forget" in sets:
        notes.append("No retained model was given (--retained-model): PrivLeak compares with an AUC of 0.5.")
    if retained is not None and retained.auc == 1:
        notes.append("The attack's AUC on the retained model is 1: PrivLeak is undefined.")
    if altered:
        notes.append(
            f"The checkpoint's generation configuration changes greedy decoding ({', '.join(altered)}): each row was decoded alone."
        )
    return SuiteReport(
        benchmark="muse",
        model=model_name,
        retained_model=retained.name if retained else None,
        scores=scores,
        intervals={name: interval for name, interval in intervals.items() if interval is not None},
        counts=dict(rows.data.counts),
        sets={
            name: {
                "source": rows.data.sources[name],
                "rows": len(table.rows),
                "unit": "row",
                "units": len(table.units),
                **{metric: scores[f"{name}_{metric}"] for metric in METRICS if f"{name}_{metric}" in scores},
            }
            for name, table in sets.items()
        },
        deviations=deviations,
        notes=notes,
        config=config.model_dump(mode="json")
        | {"question_tokens": config.max_new_tokens or QUESTION_TOKENS, "passage_tokens": config.max_new_tokens or PASSAGE_TOKENS},
        seconds=time.perf_counter() - start,
        rows=lines,
    )


def _deviations(model: Any, *, config: SuiteConfig) -> list[str]:
    found = [
        "ROUGE uses the stemmer, as open-unlearning does; the first published code does not.",
        "Prompts end in 'Answer:' and the answer follows after a space; the published prompts end in 'Answer: '.",
        "No begin token is added, as everywhere in this project; the published code lets the tokenizer add one.",
        "Generated texts have spaces before punctuation removed before they are scored.",
        "Rows run in padded batches: losses and near ties of tokens may differ by rounding.",
        "Scores are fractions; the published tables multiply them by 100, PrivLeak apart.",
    ]
    if config.prompt is not PromptStyle.PLAIN:
        found.append("The prompt style has no effect: MUSE's prompts are texts.")
    if config.max_new_tokens is not None:
        found.append(
            f"At most {config.max_new_tokens} tokens are generated; the published limits are {QUESTION_TOKENS} for questions "
            f"and {PASSAGE_TOKENS} for passages."
        )
    dtype = str(getattr(model, "dtype", config.dtype)).removeprefix("torch.")
    if dtype != "bfloat16":
        found.append(f"The model runs in {dtype}; the published code uses bfloat16.")
    return found
